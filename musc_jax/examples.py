"""Preference rows -> packed-ready pairs of segments, with a report of what was dropped and truncated."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm_jax.data.packing import Segment
from lm_jax.data.preference import PreferenceRow, check_weight_lengths, preference_rows
from lm_jax.data.rows import read_rows
from lm_jax.data.text import TextEncoder
from lm_jax.errors import UserError
from musc_jax.stored_weights import COLUMN, pair_fingerprint, stored_weights
from musc_jax.token_weights import AUTO, CHOSEN, FROM_COLUMNS, FROM_STORE, REJECTED


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Encoded preference pairs.

    Attributes:
      rows: the rows they came from, in their order.
      columns: the same rows as they were read, every column.
      segments: 2 a pair, chosen then rejected.
      rule: what the weights are, `auto` resolved.
      name: how a user finds pair i.
      report: lines that say how many rows were read, dropped, truncated, and how long they are.
    """

    rows: list[PreferenceRow]
    columns: list[Mapping[str, Any]]
    segments: list[Segment]
    rule: str
    where: str
    report: list[str]

    def name(self, i: int) -> str:
        return f"{self.where} row {self.rows[i].row}"

    def __len__(self) -> int:
        return len(self.rows)


def load_pairs(path: str, encoder: TextEncoder, weights: str) -> Pairs:
    """Reads and encodes preference rows.

    Args:
      weights: a rule's name, `columns`, `store`, `store:RULE` or `auto`. Where the rows' own token scores, or those
        of a store that they point at, are to be used they must fit the tokens; they become the segments' `weights`.

    Raises:
      UserError: naming the file or row and the cure.
    """
    where = os.path.basename(path.rstrip("/"))
    read = read_rows(path)
    data = preference_rows(read, where)
    rows = data.rows
    if not rows:
        raise UserError(f"{path}: no pairs left, all dropped ({_counts(data.dropped)}); give pairs that differ")
    prompts, responses, wheres = [], [], []
    for row in rows:
        for side, response in ((CHOSEN, row.chosen), (REJECTED, row.rejected)):
            prompts.append(row.prompt)
            responses.append(response)
            wheres.append(f"{where} row {row.row} ({side})")
    encoded = encoder.encode_many(prompts, responses, wheres)
    columns = [read[row.row] for row in rows]
    rule = rule_for(weights, rows, columns)
    sides = list(zip(encoded[::2], encoded[1::2], strict=True))
    stored = None
    if rule.startswith(FROM_STORE):
        stored = stored_weights(
            columns,
            [pair_fingerprint(r.prompt, c.response_ids, j.response_ids) for r, (c, j) in zip(rows, sides, strict=True)],
            [(len(c.response_ids), len(j.response_ids)) for c, j in sides],
            [f"{where} row {row.row}" for row in rows],
            path,
            rule,
        )
    segments = []
    for i, (row, (chosen, rejected)) in enumerate(zip(rows, sides, strict=True)):
        if rule == FROM_COLUMNS:
            if row.chosen_scores is None:
                raise UserError(
                    f"{where} row {row.row}: no token scores, which config.weights=columns needs; choose a rule"
                )
            check_weight_lengths(row, chosen, rejected, where)
        own = (row.chosen_scores, row.rejected_scores) if rule == FROM_COLUMNS else (None, None)
        for text, scores in zip((chosen, rejected), stored[i] if stored else own, strict=True):
            values = {} if scores is None else {"weights": scores[: len(text.response_ids)]}
            segments.append(Segment(text.prompt_ids, text.response_ids, values))
    truncated = sum(e.truncated for e in encoded)
    lengths = np.array([len(s) for s in segments])
    report = [
        f"{where}: {len(rows) + sum(data.dropped.values())} rows read, {len(rows)} pairs kept"
        + (f", dropped: {_counts(data.dropped)}" if any(data.dropped.values()) else ""),
        f"{where}: sequences of {lengths.min()} to {lengths.max()} tokens, median {int(np.median(lengths))}; "
        f"{truncated} of {len(segments)} responses truncated to config.max_length",
    ]
    return Pairs(rows, columns, segments, rule, where, report)


def rule_for(weights: str, rows: Sequence[PreferenceRow], columns: Sequence[Mapping[str, Any]]) -> str:
    """What `auto` stands for: the store that the rows point at, else their own token scores, else uniform weights."""
    if weights != AUTO:
        return weights
    if columns and columns[0].get(COLUMN) is not None:
        return FROM_STORE
    return FROM_COLUMNS if rows and rows[0].chosen_scores is not None else "uniform"


def _counts(dropped: dict[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in dropped.items() if n)
