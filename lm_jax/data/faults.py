"""Faulty rows of one input: all are named at once; a few are dropped and counted, many stop the run."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from lm_jax.console import say
from lm_jax.data.rows import write_jsonl
from lm_jax.errors import UserError

T = TypeVar("T")
_SHOWN, _ROWS = 8, 5  # kinds of fault that a message tells apart, and rows that it names of each
_LENGTH = 60  # characters of a kind in an error, which is one line
_NAME = re.compile(r"^.*? row \d+( \([\w ]+\))?: ", re.DOTALL)
# What two rows of one kind may differ in
_OWN = re.compile(r"\(it has [^)]*\)|'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|-?\d[\d.,]*")


class Faults:
    """What is wrong with the rows of one input.

    Args:
      where: the file, as messages name it.
      max_share: of all rows may be faulty. None: not one, and no key could allow it.

    Attributes:
      rows: row number -> its first fault.
    """

    def __init__(self, where: str, max_share: float | None = None):
        self.where, self._max_share = where, max_share
        self.rows: dict[int, str] = {}
        self._total = 0

    def add(self, row: int, error: UserError | str) -> None:
        """Notes a fault; the first one of a row counts."""
        self.rows.setdefault(row, str(error))

    @contextlib.contextmanager
    def of(self, row: int) -> Iterator[None]:
        """Notes what is raised within as a fault of the row, and goes on behind it."""
        try:
            yield
        except UserError as error:
            self.add(row, error)

    def sound(self, rows: Sequence[int], found: Sequence[T | UserError]) -> list[T | None]:
        """`found`, a result or an error for each of `rows`: the errors are noted, with None in their place."""
        kept: list[T | None] = []
        for row, result in zip(rows, found, strict=True):
            if isinstance(result, UserError):
                self.add(row, result)
            kept.append(None if isinstance(result, UserError) else result)
        return kept

    def check(self, total: int) -> None:
        """Once all of the `total` rows were looked at, and before anything is written.

        Raises:
          UserError: more of them are faulty than may be: how many are of which kind, and the first of each.
        """
        self._total, few = total, len(self.rows)
        if few / max(total, 1) <= (self._max_share or 0):
            return
        cure = "" if self._max_share is None else f", or raise config.max_dropped_share={self._max_share:g}"
        if len(self._kinds()) == 1:  # the first one's cure is that of all
            fault, like = self.rows[min(self.rows)], " like it" * (few > 1)
            raise UserError(fault + (f" ({few} of {total} rows{like}){cure}" if cure or like else ""))
        kinds = "; ".join(
            f"{len(rows)} like row {rows[0]} ({_shortened(self._words(rows[0]))})" for rows in self._kinds()
        )
        if cure:
            say("\n  ".join([f"{self.where}: {few} of {total} rows are faulty", *self._lines()]))
        raise UserError(f"{self.where}: {few} of {total} rows are faulty: {kinds}; mend or drop them{cure}")

    def say(self, output: str | None = None) -> None:
        """Tells how many rows were dropped, if any.

        Args:
          output: where `write` lists all of them.
        """
        if self.rows:
            listed = f"; all of them are in {output}" if output else ""
            head = f"{self.where}: {len(self.rows)} of {self._total} rows are faulty and left out{listed}"
            say("\n  ".join([head, *self._lines()]))

    def _kinds(self) -> list[list[int]]:
        """The rows of each kind of fault, the commonest first; of many the rest together."""
        kinds: dict[str, list[int]] = {}
        for row in sorted(self.rows):
            kinds.setdefault(_OWN.sub("*", self._words(row)), []).append(row)
        found = sorted(kinds.values(), key=len, reverse=True)
        return [*found[:_SHOWN], *([sorted(row for rows in found[_SHOWN:] for row in rows)] if found[_SHOWN:] else [])]

    def _lines(self) -> list[str]:
        """Of each kind: how many rows have it, the first of them, and what is wrong with the very first."""
        told = []
        for rows in self._kinds():
            named = ", ".join(map(str, rows[:_ROWS])) + ", ..." * (len(rows) > _ROWS)
            told.append(f"{len(rows)}: row {named}: {self._words(rows[0])}")
        return told

    def _words(self, row: int) -> str:
        """What is wrong with a row, without its name and the cure."""
        return _NAME.sub("", self.rows[row]).split(";")[0]


def _shortened(words: str) -> str:
    words = words.split(" (it has ")[0]
    return words if len(words) <= _LENGTH else words[:_LENGTH].rsplit(" ", 1)[0] + " ..."


class RowIds:
    """Ids that decide a row's random draws: the rows' own, which must differ, else their numbers."""

    def __init__(self, faults: Faults):
        self._faults = faults
        self._first: dict[str, int] = {}

    def of(self, row: int, given: Any) -> Any:
        """The id of a row that has `given`, or None; a fault is noted."""
        id, at = row if given is None else given, f"{self._faults.where} row {row}"
        if type(id) not in (int, str) or id == "":
            self._faults.add(row, f"{at}: id must be a string or a whole number, got {id!r}; mend it or leave it out")
        elif (before := self._first.setdefault(str(id), row)) != row:
            self._faults.add(
                row,
                f"{at}: has the same id {id!r} as row {before} (a row without one is called by its number); ids decide "
                "the random draws and must differ",
            )
        return id


def fault_rows(inputs: Iterable[Faults]) -> list[dict[str, Any]]:
    """Every faulty row of some inputs as {"file", "row", "error"}."""
    return [
        {"file": faults.where, "row": row, "error": _NAME.sub("", error)}
        for faults in inputs
        for row, error in sorted(faults.rows.items())
    ]


def write_faults(path: str, inputs: Iterable[Faults]) -> None:
    """Lists them as JSON Lines; no file where there are none."""
    if found := fault_rows(inputs):
        write_jsonl(path, found)
