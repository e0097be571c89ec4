"""Rows of plain data: JSON Lines, JSON, Parquet and `datasets` directories in; JSON Lines out."""

import contextlib
import io
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
from lm_jax.errors import UserError
from lm_jax.strict_json import no_doubled_keys

_SUFFIXES = (".jsonl", ".json", ".parquet")
_ROWS = 64  # of a Parquet file that are held at once
_LINE = 64 << 20  # bytes of a .jsonl row: a hundred times the longest context
_BUFFER = 1 << 20  # bytes read at a time of a file in a bucket
_UNPACKED, _RATIO = 4 << 30, 100  # bytes that a Parquet file may unpack to, or times its own size, whichever is more
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def read_rows(path: str, columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """All rows of `path`, in their order; see `stream_rows`."""
    return list(stream_rows(path, columns))


def stream_rows(path: str, columns: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """The rows of `path`, in their order, one after the other. Only of .json is the whole file read at once.

    Args:
      path: a .jsonl, .json (one list of objects) or .parquet file, local, gs:// or s3://; a directory that `datasets`
        saved with save_to_disk; or a hub id `org/name`. Where a dataset has several splits: `path:split`.
      columns: columns that every row must have.

    Raises:
      UserError: missing, empty or broken file (with line and column), a row that is no object, a missing column, an
        unknown suffix, a split that has to be chosen; a bucket that gives no access.
    """
    with storage.accessing(path):
        yield from _stream_rows(path, columns)


def _stream_rows(path: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    file = epath.Path(path)
    location, split = path, None
    if not file.exists() and re.search(r":\w+$", path):
        location, _, split = path.rpartition(":")
        file = epath.Path(location)
    if file.is_dir():
        rows = _from_datasets(location, split, hub=False)
    elif split is not None and file.exists():
        raise UserError(f"{path}: a file has no split {split!r}; give {location}")
    elif file.suffix in _SUFFIXES:
        rows = _from_file(file)
    elif file.exists() or not _HUB_ID.fullmatch(location) or file.suffix[1:].isalpha():
        fault = "unknown kind of file" if file.exists() else "no such file or directory"
        raise UserError(f"{path}: {fault}; give {', '.join(_SUFFIXES)}, a saved dataset's directory, or an org/name")
    else:
        rows = _from_datasets(location, split, hub=True)
    number = -1
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path} row {number}: expected an object, got {type(row).__name__}; mend the row")
        if lacking := [c for c in columns if c not in row]:
            raise UserError(
                f"{path} row {number}: column {lacking[0]!r} is missing; it has {', '.join(sorted(row)) or 'none'}; "
                "rename or add the column"
            )
        yield row
    if number < 0:
        raise UserError(f"{path}: no rows in it; give a file with at least one")


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


def _from_file(file: epath.Path) -> Iterator[Any]:
    if not file.exists():
        raise UserError(f"{file}: no such file; check the path")
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with file.open("rb") as source:
                parquet = pq.ParquetFile(source)
                for i in range(parquet.metadata.num_row_groups):
                    _check_unpacked(file, parquet.metadata.row_group(i).total_byte_size)
                unpacked = 0  # a value that stands once there may stand in every row
                for batch in parquet.iter_batches(batch_size=_ROWS):
                    unpacked += batch.nbytes
                    _check_unpacked(file, unpacked)
                    yield from batch.to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file}: no readable Parquet file ({_first_line(error)}); write it anew") from error
        return
    if file.suffix == ".json":
        text = "".join(_lines(file))
        _check_not_empty(file, not text.strip())
        rows = _parse(text, file, 1)
        if not isinstance(rows, list):
            raise UserError(f"{file}: expected a list of rows, got {type(rows).__name__}; one object a line is .jsonl")
        yield from rows
        return
    empty = True
    for number, line in enumerate(_lines(file, _LINE), 1):
        if line.strip():
            empty = False
            yield _parse(line.rstrip("\n"), file, number)
    _check_not_empty(file, empty)


def _check_unpacked(file: epath.Path, unpacked: int) -> None:
    if unpacked > max(_UNPACKED, _RATIO * file.stat().length):
        raise UserError(
            f"{file}: unpacks to {unpacked / 1e9:.1f} GB and more, over {_RATIO} times its size, as no real rows do; "
            "write it as .jsonl if that is no accident"
        )


def _lines(file: epath.Path, longest: int = -2) -> Iterator[str]:
    """Cut at newlines alone: U+2028 and its like may stand unescaped inside a JSON string.

    Args:
      longest: bytes of a line that are still taken; -2: any number.
    """
    offset = 0
    # A bucket's files know no bound of a line; a BufferedReader does
    with io.BufferedReader(file.open("rb"), _BUFFER) if storage.is_remote(file) else file.open("rb") as source:
        for number, line in enumerate(iter(lambda: source.readline(longest + 1), b""), 1):
            if 0 < longest < len(line):
                raise UserError(
                    f"{file}:{number}: a line of more than {longest >> 20} MiB; cut the row, or the file into lines"
                )
            try:
                # utf-8-sig: a byte order mark, which some editors write, is no part of the first row
                yield line.decode("utf-8" if offset else "utf-8-sig")
            except UnicodeDecodeError as error:
                at = offset + error.start
                raise UserError(f"{file}:{number}: not UTF-8 (byte {at}); convert the file to UTF-8") from error
            offset += len(line)


def _check_not_empty(file: epath.Path, empty: bool) -> None:
    if empty:
        raise UserError(f"{file}: the file is empty; give a file with at least one row")


class _NotJson(ValueError):
    pass


def _refuse_constant(name: str) -> None:
    raise _NotJson(name)


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=no_doubled_keys)


def _parse(text: str, file: epath.Path, first_line: int) -> Any:
    try:
        return _DECODER.decode(text)
    except _NotJson as error:
        # The decoder does not say where: for a list of rows the line of the first such constant outside a string
        line = first_line + text[: _constant_position(text, str(error))].count("\n")
        raise UserError(f"{file}:{line}: {error} is no JSON number; write null, or drop the row") from error
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{file}:{line}: broken JSON at column {error.colno}: {error.msg}; mend the line") from error
    except RecursionError as error:
        raise UserError(f"{file}:{first_line}: JSON nested too deeply; flatten the row") from error
    except ValueError as error:  # a key that stands twice, a whole number of thousands of digits
        raise UserError(f"{file}:{first_line}: {_first_line(error).split(';')[0]}; mend the row") from error


def _constant_position(text: str, name: str) -> int:
    for match in re.finditer(r'"(?:[^"\\]|\\.)*"|' + re.escape(name), text):
        if match.group() == name:
            return match.start()
    return 0


def _from_datasets(location: str, split: str | None, hub: bool) -> Iterator[dict[str, Any]]:
    import datasets

    where = f"{location}:{split}" if split else location
    try:
        data = datasets.load_dataset(location) if hub else datasets.load_from_disk(location)
    except Exception as error:  # the library raises many kinds, none of its own
        if hub:
            raise UserError(
                f"{where}: no such file or directory, and no dataset of that name could be loaded from the hub "
                f"({_first_line(error)}); check the path, or the name and the network"
            ) from error
        raise UserError(
            f"{where}: no directory that datasets' save_to_disk wrote ({_first_line(error)}); "
            f"give a file ({', '.join(_SUFFIXES)}) or such a directory"
        ) from error
    if isinstance(data, datasets.DatasetDict):
        splits = ", ".join(data)
        if split is None and len(data) > 1:
            raise UserError(f"{where}: has the splits {splits}; give {location}:SPLIT")
        if split is not None and split not in data:
            raise UserError(f"{where}: no split {split!r}; it has {splits}")
        data = data[split or next(iter(data))]
    elif split is not None:
        raise UserError(f"{where}: the dataset there has no splits; give {location}")
    return iter(data)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
