"""Rows of plain data: files, directories and hub data sets in; JSON Lines out."""

import contextlib
import glob
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from lm_jax.checkpoints import buckets as storage
from lm_jax.data.columns import Renamed
from lm_jax.data.formats import KINDS, file_kind, first_line, rows_of_file
from lm_jax.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PART = re.compile(r":([\w.-]+)$")
_SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves


def read_rows(path: str, columns: Sequence[str] = (), renamed: str = "") -> list[dict[str, Any]]:
    """All rows of `path`, in their order; see `stream_rows`."""
    return list(stream_rows(path, columns, renamed))


def stream_rows(path: str, columns: Sequence[str] = (), renamed: str = "") -> Iterator[dict[str, Any]]:
    """The rows of `path`, in their order, one after the other.

    Args:
      path: a file (see `formats`), local, gs:// or s3://; a pattern of several (`data/*.parquet`); a directory of
        files, or one that `datasets` wrote with save_to_disk; or a hub id `org/name`. Where there are several splits or
        subsets: `path:SPLIT`, `path:SUBSET`, `path:SUBSET:SPLIT`.
      columns: columns that every row must have.
      renamed: what columns are called here and there; see `columns.Renamed`.

    Raises:
      UserError: missing, empty or broken file (with line and column), a row that is no object, a missing column, an
        unknown suffix, a split or subset that has to be chosen; a bucket that gives no access.
    """
    renaming = Renamed(renamed)
    with storage.accessing(path):
        number = -1
        for number, row in enumerate(_rows_at(path)):
            if not isinstance(row, dict):
                raise UserError(f"{path} row {number}: expected an object, got {type(row).__name__}; mend the row")
            row = renaming.of(row)
            if lacking := [c for c in columns if c not in row]:
                raise UserError(
                    f"{path} row {number}: column {lacking[0]!r} is missing; it has {', '.join(sorted(row)) or 'none'};"
                    f' add the column, or name yours: --config.columns="{lacking[0]}=..."'
                )
            yield row
        if number < 0:
            raise UserError(f"{path}: no rows in it; give a file with at least one")
        renaming.check(path)


def _rows_at(path: str) -> Iterator[Any]:
    location, parts = path, list[str]()
    while len(parts) < 2 and not epath.Path(location).exists() and (part := _PART.search(location)):
        location, parts = location[: part.start()], [part[1], *parts]
    file, local = epath.Path(location), not storage.is_remote(location)
    if file.is_dir():
        if any((file / name).exists() for name in _SAVED):
            return _saved_rows(location, parts)
        if local:
            return _rows_of_files(location, _files_of_split(location, parts))
        return _rows_of_files(location, sorted(str(f) for f in file.glob("*") if file_kind(f.name)))
    if file.exists() and parts:
        raise UserError(f"{path}: a file has no split {':'.join(parts)!r}; give {location}")
    if glob.has_magic(location) and not file.exists():
        base, pattern = re.split(r"(?=[^/]*[*?\[])", location, maxsplit=1)
        return _rows_of_files(location, sorted(map(str, epath.Path(base or ".").glob(pattern))))
    if file_kind(file.name):
        return rows_of_file(file)
    if file.exists() or not local or not _HUB_ID.fullmatch(location) or file.suffix[1:].isalpha():
        fault = "unknown kind of file" if file.exists() else "no such file or directory"
        raise UserError(
            f"{path}: {fault}; give {', '.join(KINDS)} (.gz, .zst, .bz2 or .lz4 too), a directory of such, "
            "a pattern, a saved dataset's directory, or an org/name"
        )
    return _hub_rows(location, parts)


def _rows_of_files(location: str, files: Sequence[str]) -> Iterator[Any]:
    """One after the other; their rows are counted on."""
    files = [file for file in files if file_kind(file)]
    if not files:
        raise UserError(f"{location}: no files of rows there ({', '.join(KINDS)}); check the path")
    for file in files:
        yield from rows_of_file(epath.Path(file))


def _saved_rows(location: str, parts: list[str]) -> Iterator[Any]:
    import datasets

    try:
        data = datasets.load_from_disk(location)
    except Exception as error:  # the library raises many kinds, none of its own
        raise UserError(f"{location}: damaged, save_to_disk wrote more ({first_line(error)}); write it anew") from error
    if isinstance(data, datasets.DatasetDict):
        return iter(data[_chosen(location, list(data), parts)])
    if parts:
        raise UserError(f"{':'.join([location, *parts])}: the dataset there has no splits; give {location}")
    return iter(data)


def _files_of_split(location: str, parts: list[str]) -> list[str]:
    builder, parts = _builder(location, parts)
    files = {str(split): found for split, found in builder.config.data_files.items()}
    return list(map(str, files[_chosen(location, list(files), parts)]))


def _hub_rows(location: str, parts: list[str]) -> Iterator[Any]:
    import datasets

    builder, parts = _builder(location, parts)
    split = _chosen(location, list(map(str, builder.config.data_files)), parts)
    try:
        return iter(datasets.load_dataset(location, builder.config.name, split=split))
    except Exception as error:
        raise UserError(f"{location}: could not be loaded from the hub ({first_line(error)})") from error


def _builder(location: str, parts: list[str]) -> tuple[Any, list[str]]:
    """What `datasets` finds of files at a directory or hub id, and the parts of the name that chose no subset."""
    import datasets

    first: Exception | None = None
    # One part is a split where there is such a one, else a subset
    for subset, rest in ([(None, parts)] if len(parts) < 2 else []) + ([(parts[0], parts[1:])] if parts else []):
        try:
            builder = datasets.load_dataset_builder(location, subset)
            if subset is not None or not rest or rest[0] in builder.config.data_files:
                return builder, rest
            first = first or UserError(_no_split(location, list(map(str, builder.config.data_files)), rest))
        except Exception as error:  # the library raises many kinds, none of its own
            first = first or error
    if isinstance(first, UserError):
        raise first
    said = " ".join(str(first).split("Example of usage")[0].split())
    if "Config name is missing" in said:
        raise UserError(f"{location}: {said}; give {location}:SUBSET or {location}:SUBSET:SPLIT") from first
    if os.path.isdir(location):
        fault = f"no directory of rows, nor one that datasets' save_to_disk wrote ({said}); give {', '.join(KINDS)}"
        raise UserError(f"{location}: {fault}, or such a directory") from first
    raise UserError(
        f"{':'.join([location, *parts])}: no such file or directory, and no dataset of that name could be loaded from "
        f"the hub ({said}); check the path, or the name and the network"
    ) from first


def _chosen(location: str, splits: list[str], parts: list[str]) -> str:
    """The split that a name's parts choose, or the only one."""
    if not parts and len(splits) > 1:
        raise UserError(f"{location}: has the splits {', '.join(splits)}; give {location}:SPLIT")
    if len(parts) > 1 or (parts and parts[0] not in splits):
        raise UserError(_no_split(location, splits, parts))
    return parts[0] if parts else splits[0]


def _no_split(location: str, splits: list[str], parts: list[str]) -> str:
    return f"{':'.join([location, *parts])}: no split {parts[-1]!r}; it has {', '.join(splits)}"


def write_jsonl(path: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, UTF-8. Atomic: `path` holds the old content or all of the new, never a part.

    NumPy scalars and arrays become numbers and lists.

    Raises:
      UserError: a value is NaN or infinite, which JSON does not have.
    """
    with replacing(path) as out:
        for number, row in enumerate(rows):
            try:
                line = json.dumps(row, ensure_ascii=False, allow_nan=False, default=_plain)
                out.write(line.encode() + b"\n")
            except UnicodeEncodeError as error:
                raise UserError(f"{path} row {number}: half a surrogate pair in the text; remove it") from error
            except ValueError as error:
                raise UserError(f"{path} row {number}: NaN or infinity is no JSON; remove it first") from error


def write_text(path: str, text: str) -> None:
    """Writes `text` in UTF-8; atomic, as `write_jsonl` is."""
    with replacing(path) as out:
        out.write(text.encode())


def check_not_input(output: str, given: str | None, key: str = "config.input") -> None:
    """Raises UserError where `output` is the file `given`, which writing would replace."""
    if given and _place(output) == _place(given):
        raise UserError(f"config.output={output!r}: {key} itself; give another file name")


def _place(path: str) -> str:
    return path if storage.is_remote(path) else os.path.realpath(path)


def check_file_output(output: str) -> None:
    """Raises UserError where `output`, local, gs:// or s3://, cannot be a file that `replacing` makes.

    For callers that do something slow first.
    """
    if storage.is_remote(output):
        storage.check_bucket(output)
    if storage.is_directory(output) if storage.is_remote(output) else os.path.isdir(output):
        raise UserError(f"{output}: is a directory; give config.output a file name")


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path`, when the block ends, and is gone if it raises.

    Of an address, gs:// or s3://, it lies among the local temporary files until then.
    """
    if storage.is_remote(path):
        with tempfile.TemporaryDirectory() as directory:
            directory_path, _, name = path.rpartition("/")
            with open(os.path.join(directory, name), "wb") as out:
                yield out
            storage.upload(directory, [name], directory_path)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")
