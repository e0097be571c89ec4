"""Files of rows, decoded one row after the other: JSON Lines, JSON lists, CSV and Parquet, plain or compressed.

Our own readers rather than the `datasets` library's, which would lose: line and column of what is broken; NaN, doubled
keys and half-read files as errors; values as they are (Arrow gives a column one type, and turns what looks like a date
into one); a bound on memory; and no second copy of the data in a cache.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from etils import epath

from lm_jax.checkpoints import buckets as storage
from lm_jax.errors import UserError
from lm_jax.strict_json import no_doubled_keys

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
_ROWS = 64  # of a Parquet file that are held at once
_LINE = 64 << 20  # bytes of a line: a hundred times the longest context
_BUFFER = 1 << 20  # bytes read at a time of a file in a bucket
_UNPACKED, _RATIO = 4 << 30, 100  # bytes that a file may unpack to, or times its own size, whichever is more


def file_kind(name: str) -> str | None:
    """Which of KINDS a file name ends in, before the suffix of a compression; None: in none of them."""
    suffixes = epath.Path(name).suffixes
    if suffixes and suffixes[-1] in _CODECS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else None


def rows_of_file(file: epath.Path) -> Iterator[Any]:
    """The rows of a file of one of KINDS, in their order. Only of a JSON list is the whole file read at once.

    Raises:
      UserError: a file that is missing, empty, broken (with line and column) or cut short.
    """
    import pyarrow as pa

    if not file.exists():
        raise UserError(f"{file}: no such file; check the path")
    kind, codec = file_kind(file.name), _CODECS.get(file.suffix)
    read = _parquet_rows if kind == ".parquet" else _csv_rows if kind in (".csv", ".tsv") else _json_rows
    try:
        with file.open("rb") as source:
            if codec is not None:
                source = _Counted(pa.CompressedInputStream(pa.PythonFile(source, mode="r"), codec), file)
            if codec is not None or storage.is_remote(str(file)):  # which know no bound of a line
                source = io.BufferedReader(source, _BUFFER)
            yield from read(source, file)
    except (pa.ArrowException, OSError) as error:
        if codec is None and kind != ".parquet":
            raise
        what = "Parquet file" if kind == ".parquet" else f"{codec} file"
        raise UserError(f"{file}: no readable {what} ({first_line(error)}); write it anew") from error


class _Counted(io.RawIOBase):
    """What a decompressor gives, as long as that is no more than real rows would be."""

    def __init__(self, source: Any, file: epath.Path):
        self._source, self._file, self._unpacked = source, file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._source.readinto(buffer)
        self._unpacked += count
        _check_unpacked(self._file, self._unpacked)
        return count


def _check_unpacked(file: epath.Path, unpacked: int) -> None:
    if unpacked > max(_UNPACKED, _RATIO * file.stat().length):
        raise UserError(
            f"{file}: unpacks to {unpacked / 1e9:.1f} GB and more, over {_RATIO} times its size, as no real rows do; "
            "write it as .jsonl if that is no accident"
        )


def _parquet_rows(source: BinaryIO, file: epath.Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    parquet = pq.ParquetFile(source)
    for i in range(parquet.metadata.num_row_groups):
        _check_unpacked(file, parquet.metadata.row_group(i).total_byte_size)
    unpacked = 0  # a value that stands once there may stand in every row
    for batch in parquet.iter_batches(batch_size=_ROWS):
        unpacked += batch.nbytes
        _check_unpacked(file, unpacked)
        yield from batch.to_pylist()


def _csv_rows(source: BinaryIO, file: epath.Path) -> Iterator[Any]:
    """Every cell is text, as "007" and "null" are; an empty one is null."""
    csv.field_size_limit(_LINE)
    lines = csv.reader(
        _lines(source, file, _LINE), delimiter="\t" if file_kind(file.name) == ".tsv" else ",", strict=True
    )
    try:
        names = next(lines, [])
        _check_not_empty(file, not names)
        if doubled := {name for name in names if names.count(name) > 1}:
            raise UserError(f"{file}: the column {min(doubled)!r} stands twice; rename one")
        for cells in lines:
            if cells and len(cells) != len(names):
                raise UserError(
                    f"{file}:{lines.line_num}: {len(cells)} cells where the first line names {len(names)} columns; "
                    "put quotes around what has the separator or a line break in it"
                )
            if cells:
                yield {name: cell or None for name, cell in zip(names, cells, strict=True)}
    except csv.Error as error:
        raise UserError(f"{file}:{lines.line_num}: broken CSV ({first_line(error)}); mend the line") from error


def _json_rows(source: Any, file: epath.Path) -> Iterator[Any]:
    """One list of rows, or a row a line: .json and .jsonl are used for both."""
    if source.peek(_BUFFER).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _parse("".join(_lines(source, file)), file, 1)
        return
    empty = True
    for number, line in enumerate(_lines(source, file, _LINE), 1):
        if line.strip():
            empty = False
            yield _parse(line.rstrip("\n"), file, number)
    _check_not_empty(file, empty)


def _lines(source: BinaryIO, file: epath.Path, longest: int = -2) -> Iterator[str]:
    """Cut at newlines alone: U+2028 and its like may stand unescaped inside a JSON string.

    Args:
      longest: bytes of a line that are still taken; -2: any number.
    """
    offset = 0
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


def _parse(text: str, file: epath.Path, first_line_number: int) -> Any:
    try:
        return _DECODER.decode(text)
    except _NotJson as error:
        # The decoder does not say where: for a list of rows the line of the first such constant outside a string
        line = first_line_number + text[: _constant_position(text, str(error))].count("\n")
        raise UserError(f"{file}:{line}: {error} is no JSON number; write null, or drop the row") from error
    except json.JSONDecodeError as error:
        line = first_line_number + error.lineno - 1
        cure = "a file is one list of rows, or has one object a line" if text.strip() == "{" else "mend the line"
        raise UserError(f"{file}:{line}: broken JSON at column {error.colno}: {error.msg}; {cure}") from error
    except RecursionError as error:
        raise UserError(f"{file}:{first_line_number}: JSON nested too deeply; flatten the row") from error
    except ValueError as error:  # a key that stands twice, a whole number of thousands of digits
        raise UserError(f"{file}:{first_line_number}: {first_line(error).split(';')[0]}; mend the row") from error


def _constant_position(text: str, name: str) -> int:
    for match in re.finditer(r'"(?:[^"\\]|\\.)*"|' + re.escape(name), text):
        if match.group() == name:
            return match.start()
    return 0


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
