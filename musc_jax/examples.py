"""Preference rows -> packed-ready pairs of segments, with a report of what was dropped and truncated."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from lm_jax.data.packing import Segment
from lm_jax.data.preference import PreferenceRow, check_weight_lengths, preference_rows
from lm_jax.data.rows import read_rows
from lm_jax.data.text import TextEncoder
from lm_jax.errors import UserError
from musc_jax.token_weights import AUTO, FROM_COLUMNS

CHOSEN, REJECTED = "chosen", "rejected"


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Encoded preference pairs.

    Attributes:
      rows: the rows they came from, in their order.
      segments: 2 a pair, chosen then rejected.
      name: how a user finds pair i.
      report: lines that say how many rows were read, dropped, truncated, and how long they are.
    """

    rows: list[PreferenceRow]
    segments: list[Segment]
    where: str
    report: list[str]

    def name(self, i: int) -> str:
        return f"{self.where} row {self.rows[i].row}"

    def __len__(self) -> int:
        return len(self.rows)


def load_pairs(path: str, encoder: TextEncoder, weights: str) -> Pairs:
    """Reads and encodes preference rows.

    Args:
      weights: a rule's name, `columns` or `auto`. Where the rows' own token scores are to be used they must fit the
        tokens; they become the segments' `weights`.

    Raises:
      UserError: naming the file or row and the cure.
    """
    where = os.path.basename(path.rstrip("/"))
    data = preference_rows(read_rows(path), where)
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
    segments = []
    use_scores = rule_for(weights, rows) == FROM_COLUMNS
    for row, chosen, rejected in zip(rows, encoded[::2], encoded[1::2], strict=True):
        if use_scores:
            if row.chosen_scores is None:
                raise UserError(
                    f"{where} row {row.row}: no token scores, which config.weights=columns needs; choose a rule"
                )
            check_weight_lengths(row, chosen, rejected, where)
        for text, scores in ((chosen, row.chosen_scores), (rejected, row.rejected_scores)):
            values = {"weights": scores[: len(text.response_ids)]} if use_scores else {}
            segments.append(Segment(text.prompt_ids, text.response_ids, values))
    truncated = sum(e.truncated for e in encoded)
    lengths = np.array([len(s) for s in segments])
    report = [
        f"{where}: {len(rows) + sum(data.dropped.values())} rows read, {len(rows)} pairs kept"
        + (f", dropped: {_counts(data.dropped)}" if any(data.dropped.values()) else ""),
        f"{where}: sequences of {lengths.min()} to {lengths.max()} tokens, median {int(np.median(lengths))}; "
        f"{truncated} of {len(segments)} responses truncated to config.max_length",
    ]
    return Pairs(rows, segments, where, report)


def rule_for(weights: str, rows: Sequence[PreferenceRow]) -> str:
    """What `auto` stands for: the rows' own token scores where they bring them, else uniform weights."""
    if weights != AUTO:
        return weights
    return FROM_COLUMNS if rows and rows[0].chosen_scores is not None else "uniform"


def _counts(dropped: dict[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in dropped.items() if n)
