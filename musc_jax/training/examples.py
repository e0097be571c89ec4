"""Preference rows -> packed-ready pairs of segments, with a report of what was dropped and truncated."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lm_jax.data.messages import Text, messages_fault, split_arguments, with_arguments
from lm_jax.data.packing import Segment
from lm_jax.data.preference import PreferenceRow, check_weight_lengths, preference_rows
from lm_jax.data.rows import read_rows
from lm_jax.data.shares import encode_rows
from lm_jax.data.text import EncodedResponse, TextEncoder, checked
from lm_jax.errors import UserError
from musc_jax.weights.rules import AUTO, CHOSEN, FROM_COLUMNS, FROM_STORE, REJECTED
from musc_jax.weights.stored import COLUMN, pair_fingerprint, stored_fields


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Encoded preference pairs.

    Attributes:
      rows: the rows they came from, in their order.
      columns: the same rows as they were read, every column.
      segments: 2 a pair, chosen then rejected.
      full_lengths: tokens of each segment's response before truncation.
      rule: what the weights are, `auto` resolved.
      path: the file that they are from; `where` is its name.
      name: how a user finds pair i.
      report: lines that say how many rows were read, dropped, truncated, and how long they are.
    """

    rows: list[PreferenceRow]
    columns: list[Mapping[str, Any]]
    segments: list[Segment]
    full_lengths: list[int]
    rule: str
    path: str
    report: list[str]

    @property
    def where(self) -> str:
        return _name(self.path)

    def name(self, i: int) -> str:
        return f"{self.where} row {self.rows[i].row}"

    def __len__(self) -> int:
        return len(self.rows)

    def stored(self) -> list[dict[str, tuple[np.ndarray, np.ndarray]]]:
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


Choose = Callable[[int], Sequence[int]]  # number of pairs -> which of them, ascending


def read_pairs(path: str, choose: Choose | None = None) -> tuple[list[PreferenceRow], list[Mapping[str, Any]], str]:
    """The pairs of a file, all columns of each one's row, and a line that says how many rows were dropped.

    Args:
      choose: of the pairs that are not dropped those to take; None: all.

    Raises:
      UserError: no readable preference rows, or none left.
    """
    read = read_rows(path)
    data = preference_rows(read, _name(path))
    if not data.rows:
        raise UserError(f"{path}: no pairs left, all dropped ({_counts(data.dropped)}); give pairs that differ")
    rows = data.rows if choose is None else [data.rows[i] for i in choose(len(data.rows))]
    said = f"{_name(path)}: {len(read)} rows read, {len(data.rows)} pairs kept"
    if data.dropped:
        said += f", dropped: {_counts(data.dropped)}"
    if len(rows) < len(data.rows):
        said += f"; {len(rows)} of the pairs taken"
    return rows, [read[row.row] for row in rows], said


def load_pairs(path: str, encoder: TextEncoder, weights: str, choose: Choose | None = None) -> Pairs:
    """Reads and encodes preference rows.

    Args:
      weights: a rule's name, `columns`, `store`, `store:RULE` or `auto`. Where the rows' own token scores, or those
        of a store that they point at, are to be used they must fit the tokens; they become the segments' `weights`.
      choose: see `read_pairs`; the rows that are not taken are not encoded either.

    Raises:
      UserError: naming the file or row and the cure.
    """
    rows, columns, said = read_pairs(path, choose)
    where = _name(path)
    prompts, responses, wheres = [], [], []
    for row in rows:
        for side, response in ((CHOSEN, row.chosen), (REJECTED, row.rejected)):
            prompts.append(row.prompt)
            responses.append(response)
            wheres.append(f"{where} row {row.row} ({side})")
    encoded = checked(encode_rows(encoder, prompts, responses, wheres))
    segments = [Segment(e.prompt_ids, e.response_ids) for e in encoded]
    lengths = np.array([len(s) for s in segments])
    report = [
        said,
        f"{where}: sequences of {lengths.min()} to {lengths.max()} tokens, median {int(np.median(lengths))}; "
        f"{sum(e.truncated for e in encoded)} of {len(segments)} responses truncated to config.max_length",
    ]
    rule = rule_for(weights, rows, columns)
    pairs = Pairs(rows, columns, segments, [e.full_length for e in encoded], rule, path, report)
    if rule.startswith(FROM_STORE):
        found = [next(iter(fields.values())) for fields in pairs.stored()]
    elif rule == FROM_COLUMNS:
        found = [_own_scores(*row, where) for row in zip(rows, encoded[::2], encoded[1::2], strict=True)]
    else:
        return pairs
    weighed = [
        Segment(s.prompt, s.response, {"weights": values[: len(s.response)]})
        for s, values in zip(segments, (values for sides in found for values in sides), strict=True)
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


def _counts(dropped: dict[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in dropped.items() if n)
