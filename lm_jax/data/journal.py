"""Rows of a long run, kept as they finish: killed at any moment and started again, it ends as if it never had been.

Beside `output`, a JSON Lines file on a local path:

    <output>.run.json   what the rows depend on; written before any row, whole or not at all, and kept with the output
    <output>.partial    a line for every row that is done, in order of completion; locked by the process that appends
    <output>            all rows, in any order the caller likes; appears whole, then .partial goes

A line is {"crc32":"89abcdef","row":17,"value":{...}}; the checksum is of all bytes behind it. A line that a kill cut
short is dropped, one that was damaged is counted, and either row is simply not done. What a row becomes is decided by
the settings and its number, so doing it again gives the same bytes.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lm_jax.data.rows import write_jsonl
from lm_jax.errors import UserError

_FORMAT = 1
_CLOSED = -1  # for a file descriptor
_HEAD = len(b'{"crc32":"89abcdef",')
_SHOWN = 60  # characters of a setting in an error


class Journal:
    """The rows of one run that are done. A context manager; one process at a time.

    Memory: 16 bytes a row. The values stay on disk.

    Args:
      output: where the whole file will appear.
      identity: name -> JSON-able value of everything that the rows depend on, compared in this order.
      num_rows: rows of the whole run.
      redo: says of a kept value that its row shall be done again, as one that failed.

    Attributes:
      output: as given.
      finished: the output is there already, made with the same identity; nothing more to do.
      damaged: lines of .partial whose checksum does not fit; their rows are missing.

    Raises:
      UserError: `output` cannot be written (see `check_output`); the files are of a run with another identity; another
        process writes them.
    """

    def __init__(
        self,
        output: str,
        identity: Mapping[str, Any],
        num_rows: int,
        redo: Callable[[dict[str, Any]], bool] = lambda value: False,
    ):
        check_output(output)
        self.output = output
        self.damaged = 0
        self._identity = json.loads(json.dumps(identity, allow_nan=False))
        self._run, self._partial = _paths(output)
        self._spans = np.full((num_rows, 2), -1, np.int64)  # [row] -> offset and length of its line
        self._end = 0
        self._file = _CLOSED
        self.finished = self._is_finished()
        if self.finished:
            return
        Path(output).absolute().parent.mkdir(parents=True, exist_ok=True)
        self._file = _open_locked(self._partial)
        try:
            self.finished = self._is_finished()  # another process may have come to its end before the lock
            if not self.finished:
                self._begin(redo)
        except BaseException:
            self._release()
            raise
        if self.finished:
            self._release()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def missing(self) -> np.ndarray:
        """int64 [n], ascending: the rows that are still to do."""
        return np.empty(0, np.int64) if self.finished else np.flatnonzero(self._spans[:, 0] < 0)

    def append(self, rows: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Keeps (row number, value) of rows that are missing. Durable on return.

        Raises:
          UserError: the disk is full, or a value is no JSON; then none of `rows` is kept, and all before them are.
        """
        block, spans = bytearray(), {}
        for number, value in rows:
            if self._spans[number, 0] >= 0 or number in spans:
                raise ValueError(f"row {number} is done already")
            line = _line(number, value, f"{self.output} row {number}")
            spans[number] = (self._end + len(block), len(line))
            block += line
        try:
            _write_all(self._file, block)
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):  # where even this fails, the next start drops what is left of the block
                os.ftruncate(self._file, self._end)
            raise _no_room(self._partial, error) from error
        self._end += len(block)
        for number, span in spans.items():
            self._spans[number] = span

    def value(self, row: int) -> dict[str, Any]:
        """What was kept of a row that is done, read from disk.

        Raises:
          UserError: it was damaged there since.
        """
        offset, length = (int(x) for x in self._spans[row])
        if offset < 0:
            raise ValueError(f"row {row} is not done")
        entry = _read_line(os.pread(self._file, length, offset))
        if entry is None:
            raise UserError(f"{self._partial}: row {row} is damaged on disk; run the same command again to do it anew")
        return entry["value"]

    def finish(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes `rows`, which may be made with `value`, as the output, and removes .partial.

        Raises:
          UserError: the disk is full; everything that is done stays.
        """
        if self.missing().size:
            raise ValueError(f"{self.missing().size} rows are not done")
        try:
            write_jsonl(self.output, rows)
        except OSError as error:
            raise _no_room(self.output, error) from error
        _sync_directory(self.output)  # else, after a loss of power, .partial may be gone and the output not there
        self._partial.unlink(missing_ok=True)
        self._release()
        self.finished = True

    def close(self) -> None:
        """Lets others write. A run that did no row leaves nothing behind."""
        if self._file != _CLOSED and self._end == 0:
            self._run.unlink(missing_ok=True)
            self._partial.unlink(missing_ok=True)
        self._release()

    def _release(self) -> None:
        if self._file != _CLOSED:
            os.close(self._file)  # and with it the lock
            self._file = _CLOSED

    def _is_finished(self) -> bool:
        if not Path(self.output).exists():
            return False
        if differing := _differing(_read_run(self._run), self._identity):
            raise UserError(
                f"{self.output}: made with {_told(differing)}; give another output, or delete it and {self._run.name}"
            )
        if self._partial.exists():  # killed between the output's appearance and its removal
            self._partial.unlink(missing_ok=True)
        return True

    def _begin(self, redo: Callable[[dict[str, Any]], bool]) -> None:
        """Takes over what a run before left, or starts anew."""
        if os.fstat(self._file).st_size and not self._run.exists():
            raise UserError(
                f"{self._partial}: there, but {self._run.name}, which says what made it, is not; delete or move it"
            )
        self._scan(redo)
        differing = _differing(_read_run(self._run), self._identity) if self._run.exists() else None
        if differing and (self.damaged or self.missing().size < len(self._spans)):
            raise UserError(
                f"{self._run}: this run was begun with {_told(differing)}; go on with the same settings, give another "
                f"output, or delete {self._run.name} and {self._partial.name} to start anew"
            )
        if differing:  # nothing is done that could be lost
            os.ftruncate(self._file, 0)
            self._end = 0
        os.fsync(self._file)
        temporary = re.compile(re.escape(f".{Path(self.output).name}.") + r"(\d+|run\.json)\.tmp")
        for left in os.listdir(self._run.absolute().parent):  # of a kill while the output or the settings were written
            if temporary.fullmatch(left):
                self._run.with_name(left).unlink(missing_ok=True)
        if differing or not self._run.exists():
            _write_whole(self._run, {"format": _FORMAT, "identity": self._identity})

    def _scan(self, redo: Callable[[dict[str, Any]], bool]) -> None:
        size = 0
        with open(self._file, "rb", closefd=False) as lines:
            lines.seek(0)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                entry = _read_line(line)
                if entry is None or not 0 <= entry["row"] < len(self._spans):
                    self.damaged += 1
                elif not redo(entry["value"]):
                    self._spans[entry["row"]] = (size, len(line))
                size += len(line)
        os.ftruncate(self._file, size)  # appended to a line cut short, the next one would be lost with it
        self._end = size


def check_output(output: str) -> None:
    """Raises UserError where a journal's output cannot lie, for callers that do something slow first."""
    if not output:
        raise UserError("output: empty; give it a file name that ends in .jsonl")
    if "://" in output:
        raise UserError(f"{output}: rows are appended as they finish, which a bucket cannot; give a local path")
    if Path(output).is_dir():
        raise UserError(f"{output}: is a directory; give output a file name")
    if not output.endswith(".jsonl"):
        raise UserError(f"{output}: what is written is JSON Lines; give output a name that ends in .jsonl")
    run, partial = _paths(output)
    if Path(output).exists() and not run.exists():
        raise UserError(
            f"{output}: there already, and no {run.name} beside it says what made it; move it or give another output"
        )
    for path in (run, partial):
        if path.is_dir():
            raise UserError(f"{path}: is a directory where a file must be; remove it or give another output")


def rows_fingerprint(rows: Iterable[Mapping[str, Any]], where: str) -> str:
    """sha256 (hex) over the rows as JSON, their order and their columns' included.

    Args:
      where: names the file in errors.

    Raises:
      UserError: a value that JSON does not have (a date, bytes, NaN), which a run would stumble over at its very end.
    """
    digest = hashlib.sha256()
    for number, row in enumerate(rows):
        digest.update(_encode(row, f"{where} row {number}") + b"\n")
    return digest.hexdigest()


def _paths(output: str) -> tuple[Path, Path]:
    return Path(f"{output}.run.json"), Path(f"{output}.partial")


def _encode(value: Mapping[str, Any], where: str) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: half a surrogate pair in the text; remove it") from error
    except TypeError as error:
        raise UserError(f"{where}: {error}; turn it into text or a number, or drop the column") from error
    except ValueError as error:
        raise UserError(f"{where}: NaN or infinity is no JSON; write null, or drop the row") from error


def _line(number: int, value: Mapping[str, Any], where: str) -> bytes:
    rest = _encode({"row": int(number), "value": value}, where)[1:]
    return b'{"crc32":"%08x",%b\n' % (zlib.crc32(rest), rest)


def _read_line(line: bytes) -> dict[str, Any] | None:
    """The entry of a line with its newline, or None where it is not whole."""
    rest = line[_HEAD:-1]
    if line[:_HEAD] != b'{"crc32":"%08x",' % zlib.crc32(rest) or line[-1:] != b"\n":
        return None
    try:
        return json.loads(b"{" + rest)
    except ValueError:
        return None


def _open_locked(path: Path) -> int:
    """A descriptor of the file at `path`, made if there is none, that no other process has locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had the lock may have removed the file: the lock would then be on nothing
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise UserError(
                f"{path}: another process is writing it; wait for its end, or give another output"
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise UserError(f"{path}: cannot be locked ({error.strerror}); give an output on a local disk") from error
        os.close(descriptor)


def _write_all(descriptor: int, block: bytes | bytearray) -> None:
    view = memoryview(block)
    while view:
        view = view[os.write(descriptor, view) :]


def _write_whole(path: Path, value: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as out:
        out.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)
    _sync_directory(path)


def _sync_directory(path: Path | str) -> None:
    descriptor = os.open(Path(path).absolute().parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_run(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] == _FORMAT and isinstance(found["identity"], dict):
            return found["identity"]
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path}: not the settings of a run of this version; move it or give another output")


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    names = dict.fromkeys([*now, *before])
    return next(((k, before.get(k), now.get(k)) for k in names if before.get(k) != now.get(k)), None)


def _told(differing: tuple[str, Any, Any]) -> str:
    name, before, now = differing
    return f"{name}={_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _no_room(path: Path | str, error: OSError) -> UserError:
    return UserError(
        f"{path}: {error.strerror or error}; make room or mend the access, then run the same command again: it goes on "
        "from the rows that are done"
    )
