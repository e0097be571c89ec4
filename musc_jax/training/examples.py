"""Preference rows -> packed-ready pairs of segments, with a report of what was dropped and truncated."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lm_jax.data.columns import Renamed
from lm_jax.data.faults import Faults
from lm_jax.data.layouts import counted
from lm_jax.data.messages import Text, messages_fault, split_arguments, with_arguments
from lm_jax.data.packing import Segment
from lm_jax.data.preference import PreferenceRow, check_weight_lengths, preference_rows
from lm_jax.data.rows import read_rows
from lm_jax.data.shares import encode_rows
from lm_jax.data.text import EncodedResponse, TextEncoder, attempt
from lm_jax.errors import UserError
from musc_jax.weights.rules import AUTO, CHOSEN, FROM_COLUMNS, FROM_STORE, REJECTED
from musc_jax.weights.stored import COLUMN, pair_fingerprint, stored_fields

Choose = Callable[[int], Sequence[int]]  # number of pairs -> which of them, ascending


@dataclasses.dataclass(frozen=True)
class PairRows:
    """Preference pairs of a file before they are encoded.

    Attributes:
      rows: those that are taken.
      columns: the same rows as they were read, every column.
      path: the file that they are from; `where` is its name.
      faults: what is wrong with rows of the file.
      total: rows of the file.
      report: lines that say how many rows were read, dropped, truncated, and how long they are.
    """

    rows: list[PreferenceRow]
    columns: list[Mapping[str, Any]]
    path: str
    faults: Faults
    total: int
    report: list[str]

    @property
    def where(self) -> str:
        return _name(self.path)

    def name(self, i: int) -> str:
        """How a user finds pair i."""
        return f"{self.where} row {self.rows[i].row}"

    def __len__(self) -> int:
        return len(self.rows)

    def check(self) -> None:
        """Once all was looked at that may be wrong with a row.

        Raises:
          UserError: too many rows are faulty, or no pair is left.
        """
        self.faults.check(self.total)
        if not self.rows and self.faults.rows:
            raise UserError(self.faults.rows[min(self.faults.rows)])
        if not self.rows:
            raise UserError(f"{self.path}: no pairs left ({self.report[0]}); give pairs that differ")


@dataclasses.dataclass(frozen=True)
class Pairs(PairRows):
    """Encoded preference pairs.

    Attributes:
      segments: 2 a pair, chosen then rejected.
      full_lengths: tokens of each segment's response before truncation.
      rule: what the weights are, `auto` resolved.
    """

    segments: list[Segment]
    full_lengths: list[int]
    rule: str

    def sound(self, *columns: Sequence[Any]) -> "tuple[Pairs, list[list[Any]]]":
        """The pairs that have no fault so far, and of each of `columns`, with an item for each pair, theirs."""
        kept = [i for i, row in enumerate(self.rows) if row.row not in self.faults.rows]
        both = [k for i in kept for k in (2 * i, 2 * i + 1)]
        pairs = dataclasses.replace(
            self,
            rows=[self.rows[i] for i in kept],
            columns=[self.columns[i] for i in kept],
            segments=[self.segments[k] for k in both],
            full_lengths=[self.full_lengths[k] for k in both],
        )
        return pairs, [[column[i] for i in kept] for column in columns]

    def stored(self) -> list[dict[str, tuple[np.ndarray, np.ndarray]] | UserError]:
        """All that the rows' store has of each pair; see `stored_fields`. For pairs whose weights are from a store."""
        sides = list(zip(self.segments[::2], self.segments[1::2], strict=True))
        return stored_fields(
            self.columns,
            [pair_fingerprint(c.prompt, c.response, j.response) for c, j in sides],
            [(len(c.response), len(j.response)) for c, j in sides],
            [self.name(i) for i in range(len(self))],
            self.path,
            self.rule,
        )


def read_pairs(
    path: str, choose: Choose | None = None, columns: str = "", max_dropped_share: float | None = None
) -> PairRows:
    """The pairs of a file, those with a fault left out; the caller has to `check` how many they are.

    Args:
      choose: of the pairs that are not dropped those to take; None: all.
      columns: as `columns.Renamed` has them.
      max_dropped_share: see `Faults`.

    Raises:
      UserError: no readable preference rows.
    """
    read = read_rows(path, renamed=columns)
    faults = Faults(_name(path), max_dropped_share)
    data = preference_rows(read, _name(path), faults, tuple(Renamed(columns).names))
    rows = data.rows if choose is None else [data.rows[i] for i in choose(len(data.rows))]
    said = f"{_name(path)}: {len(read)} rows read, {len(data.rows)} pairs kept"
    if data.dropped:
        said += f", dropped: {counted(data.dropped)}"
    if len(rows) < len(data.rows):
        said += f"; {len(rows)} of the pairs taken"
    said += f"; read as {data.read_as}"
    return PairRows(rows, [read[row.row] for row in rows], path, faults, len(read), [said])


def load_pairs(
    path: str,
    encoder: TextEncoder,
    weights: str,
    choose: Choose | None = None,
    columns: str = "",
    max_dropped_share: float | None = None,
    last: bool = True,
) -> Pairs:
    """Reads and encodes preference rows; those with a fault are left out.

    Args:
      weights: a rule's name, `columns`, `store`, `store:RULE` or `auto`. Where the rows' own token scores, or those
        of a store that they point at, are to be used they must fit the tokens; they become the segments' `weights`.
      choose, columns, max_dropped_share: see `read_pairs`; the rows that are not taken are not encoded either.
      last: nothing more is looked at, so that the pairs are checked here.

    Raises:
      UserError: naming the file, or its faulty rows, and the cure.
    """
    found = read_pairs(path, choose, columns, max_dropped_share)
    rows, faults, where = found.rows, found.faults, found.where
    numbers = [row.row for row in rows]
    encoded: list[list[EncodedResponse | None]] = []
    for side in (CHOSEN, REJECTED):
        names = [f"{where} row {number} ({side})" for number in numbers]
        texts = encode_rows(encoder, [row.prompt for row in rows], [getattr(row, side) for row in rows], names)
        encoded.append(faults.sound(numbers, texts))
    kept = [(i, *both) for i, both in enumerate(zip(*encoded, strict=True)) if None not in both]
    whole = [text for _, *both in kept for text in both if text is not None]
    rows, given = [rows[i] for i, *_ in kept], [found.columns[i] for i, *_ in kept]
    lengths = np.array([len(t.prompt_ids) + len(t.response_ids) for t in whole] or [0])
    report = [
        *found.report,
        f"{where}: sequences of {lengths.min()} to {lengths.max()} tokens, median {int(np.median(lengths))}; "
        f"{sum(t.truncated for t in whole)} of {len(whole)} responses truncated to config.max_length",
    ]
    segments = [Segment(t.prompt_ids, t.response_ids) for t in whole]
    rule = rule_for(weights, rows, given)
    pairs = Pairs(rows, given, path, faults, found.total, report, segments, [t.full_length for t in whole], rule)
    if rule.startswith(FROM_STORE):
        pairs = _weighed(pairs, [v if isinstance(v, UserError) else next(iter(v.values())) for v in pairs.stored()])
    elif rule == FROM_COLUMNS:
        sides = zip(rows, whole[::2], whole[1::2], strict=True)
        pairs = _weighed(pairs, [attempt(_own_scores, *row, where) for row in sides])
    if last:
        pairs.check()
    return pairs


def _weighed(pairs: Pairs, found: Sequence[tuple[np.ndarray, np.ndarray] | UserError]) -> Pairs:
    """The pairs whose weights, of (chosen, rejected), were found, with these."""
    pairs, (sides,) = pairs.sound(pairs.faults.sound([row.row for row in pairs.rows], found))
    weighed = [
        Segment(s.prompt, s.response, {"weights": values[: len(s.response)]})
        for s, values in zip(pairs.segments, itertools.chain.from_iterable(sides), strict=True)
    ]
    return dataclasses.replace(pairs, segments=weighed)


def _own_scores(
    row: PreferenceRow, chosen: EncodedResponse, rejected: EncodedResponse, where: str
) -> tuple[np.ndarray, np.ndarray]:
    if row.chosen_scores is None or row.rejected_scores is None:
        raise UserError(f"{where} row {row.row}: no token scores, which config.weights=columns needs; choose a rule")
    check_weight_lengths(row, chosen, rejected, where)
    return row.chosen_scores, row.rejected_scores


def perturbed_prompt(prompt: Text, value: Any, name: str) -> Text:
    """A row's `perturbed_prompt` in the form of its prompt: beside messages a string is the last user message.

    Raises:
      UserError: of another form, naming the row.
    """
    if isinstance(prompt, str) and isinstance(value, str):
        return value
    if isinstance(prompt, str) or isinstance(value, str):
        messages = [] if isinstance(prompt, str) else prompt
        users = [m for m in messages if m["role"] == "user"]
        if not users:
            raise UserError(
                f"{name}: prompt and perturbed_prompt must both be strings or both be messages; make them alike"
            )
        return [{**m, "content": value} if m is users[-1] else m for m in messages]
    if fault := messages_fault(value):
        raise UserError(f"{name}: perturbed_prompt {fault}; give a string or a list of messages")
    return with_arguments(split_arguments(value)[1], split_arguments(prompt)[0])


def rule_for(weights: str, rows: Sequence[PreferenceRow], columns: Sequence[Mapping[str, Any]]) -> str:
    """What `auto` stands for: the store that the rows point at, else their own token scores, else uniform weights."""
    if weights != AUTO:
        return weights
    if columns and columns[0].get(COLUMN) is not None:
        return FROM_STORE
    return FROM_COLUMNS if rows and rows[0].chosen_scores is not None else "uniform"


def _name(path: str) -> str:
    return os.path.basename(path.rstrip("/"))
