"""Columns by the names that a user's data have: `config.columns`, as "prompt=question,chosen=best"."""

import dataclasses
from typing import Any

from lm_jax.config import split_names
from lm_jax.errors import UserError


class Renamed:
    """Rows with our names for the user's.

    Args:
      text: `ours=theirs`, commas between; `ours=` alone leaves a column of that name out.

    Raises:
      UserError: no such list.
    """

    def __init__(self, text: str):
        self.names: dict[str, str] = {}
        for pair in split_names(text):
            ours, equals, theirs = (part.strip() for part in pair.partition("="))
            if not ours or not equals or ours in self.names:
                raise UserError(f'config.columns={text!r}: give OURS=THEIRS,..., as "prompt=question,chosen=best"')
            self.names[ours] = theirs
        self._seen: set[str] = set()
        self._columns: set[str] = set()

    def of(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row, its columns renamed."""
        if not self.names:
            return row
        self._seen |= self.names.keys() & {ours for ours, theirs in self.names.items() if theirs in row}
        if not self._columns:
            self._columns |= row.keys()
        theirs = set(self.names.values())
        kept = {name: value for name, value in row.items() if name not in theirs and name not in self.names}
        return kept | {ours: row[name] for ours, name in self.names.items() if name in row}

    def check(self, where: str) -> None:
        """Raises UserError where no row had a column that was named."""
        for ours, theirs in self.names.items():
            if theirs and ours not in self._seen:
                raise UserError(
                    f"{where}: config.columns has {ours}={theirs}, but no row has a column {theirs!r}; row 0 has "
                    f"{', '.join(sorted(self._columns)) or 'none'}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowKeys:
    """The keys of every command that reads rows of the user's."""

    columns: str = ""  # see `Renamed`
    max_dropped_share: float = 0.01  # of a file's rows may be faulty; more is no accident, and nothing is written

    def __post_init__(self):
        Renamed(self.columns)
        if not 0 <= self.max_dropped_share <= 1:
            raise UserError(f"config.max_dropped_share={self.max_dropped_share}: must lie between 0 and 1")
