"""Preference rows in the layouts that people have (see `layouts.PREFERENCE`), as prompt, chosen and rejected."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm_jax.data.conversations import message, without_weights
from lm_jax.data.faults import Faults
from lm_jax.data.layouts import PREFERENCE, Layout, Read, one_form, read_as, read_layout
from lm_jax.data.messages import Message, Text
from lm_jax.data.text import EncodedResponse
from lm_jax.errors import UserError

IDENTICAL = "chosen and rejected are identical"
TIED = "neither response is preferred"

_SCORES = ("chosen_token_scores", "rejected_token_scores")


@dataclasses.dataclass(frozen=True, eq=False)
class PreferenceRow:
    """One pair. `prompt`, `chosen` and `rejected` are all strings (raw text) or all messages (chat template)."""

    row: int  # 0-based position in the file
    id: str  # the row's `id`, else its position
    prompt: Text
    chosen: Text
    rejected: Text
    chosen_scores: np.ndarray | None  # float32, a weight for each token of chosen, end token included
    rejected_scores: np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False)
class PreferenceData:
    rows: list[PreferenceRow]
    dropped: dict[str, int]  # reason -> rows that were left out for it
    read_as: str  # the layout, for a report


def preference_rows(
    rows: Sequence[Mapping[str, Any]], where: str, faults: Faults | None = None, named: Sequence[str] = ()
) -> PreferenceData:
    """Reads the rows of one file, in the layout of `layouts.PREFERENCE` that most of them have.

    `chosen` and `rejected` without a prompt are whole conversations, whose shared leading messages it is. Each row may
    carry `id`, and `chosen_token_scores` with `rejected_token_scores`, lists of finite numbers >= 0.

    Identical pairs and ties are dropped and counted. Empty responses pass: `TextEncoder` refuses them.

    Args:
      rows: as `read_rows` gives them.
      where: the file, for error messages.
      faults: gets every row that cannot be read: a missing column, malformed messages or history, scores that are no
        weights, a form that the others have not. None: any is an error.
      named: columns that the user named; see `read_layout`.

    Raises:
      UserError: no layout that is known; without `faults` a row that cannot be read.
    """
    noted = Faults(where) if faults is None else faults
    layout, read = read_layout(rows, PREFERENCE, noted, named)
    kept: list[PreferenceRow] = []
    dropped = {IDENTICAL: 0, TIED: 0}
    for r in one_form(read, _form, noted):
        at = f"{where} row {r.row}"
        with noted.of(r.row):
            scores = [_scores(r.columns, name, at) for name in _SCORES]
            if (scores[0] is None) != (scores[1] is None):
                raise UserError(f"{at}: has only one of {' and '.join(_SCORES)}; give both or neither")
            order = _order(r, layout, at)
            if order is None or r.answers[0] == r.answers[1]:
                dropped[TIED if order is None else IDENTICAL] += 1
                continue
            prompt, chosen, rejected = _pair(r, [r.answers[i] for i in order], at)
            kept.append(PreferenceRow(r.row, str(r.columns.get("id", r.row)), prompt, chosen, rejected, *scores))
    if faults is None:
        noted.check(len(rows))
    return PreferenceData(kept, {reason: count for reason, count in dropped.items() if count}, read_as(layout, read))


def check_weight_lengths(row: PreferenceRow, chosen: EncodedResponse, rejected: EncodedResponse, where: str) -> None:
    """Checks that a row's scores are for these tokens. A truncated response uses the first len(response_ids) of them.

    Raises:
      UserError: the number of scores is not the number of the response's tokens before truncation.
    """
    for name, scores, encoded in zip(
        _SCORES, (row.chosen_scores, row.rejected_scores), (chosen, rejected), strict=True
    ):
        if scores is not None and len(scores) != encoded.full_length:
            raise UserError(
                f"{where} row {row.row}: {name} has {len(scores)} values but the response has {encoded.full_length} "
                "tokens with this tokenizer; weights computed with another tokenizer cannot be used: compute them anew "
                "(weights=...)"
            )


def _form(r: Read) -> str:
    return f"the prompt is {r.form}, {'with' if _SCORES[0] in r.columns else 'without'} token scores"


def _order(r: Read, layout: Layout, at: str) -> tuple[int, int] | None:
    """Which answer is chosen and which is rejected; None: neither is preferred."""
    if layout.better is None:
        return 0, 1
    value, known = r.columns[layout.better], f"{layout.first} or {layout.second}"
    if not layout.first:
        known = "a number, below 0 for the first"
        number = value if type(value) in (int, float) else math.nan
        sign = -1 if number < 0 else 1 if number > 0 else 0 if number == 0 else None
    else:
        sign = {layout.first: -1, layout.second: 1}.get(str(value), 0 if str(value).startswith("tie") else None)
    if sign is None:
        raise UserError(f"{at}: {layout.better} is {value!r}, which must be {known}; mend the row")
    return {-1: (0, 1), 1: (1, 0)}.get(sign)


def _pair(r: Read, answers: list[Text], at: str) -> tuple[Text, Text, Text]:
    if isinstance(r.prompt, str):
        return r.prompt, answers[0], answers[1]
    chosen, rejected = map(_messages, answers)
    prompt, chosen, rejected = (r.prompt, chosen, rejected) if r.prompt else _shared(chosen, rejected, at)
    return (
        without_weights(prompt, at, refuse=False),
        without_weights(chosen, at, refuse=True),
        without_weights(rejected, at, refuse=True),
    )


def _messages(text: Text) -> list[Message]:
    """`text`, where nothing of the row is raw."""
    return [message("assistant", text)] if isinstance(text, str) else text


def _shared(
    chosen: list[Message], rejected: list[Message], at: str
) -> tuple[list[Message], list[Message], list[Message]]:
    """Two conversations as their shared leading messages, the prompt, and what follows in each."""
    pairs = zip(map(_said, chosen), map(_said, rejected), strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    if shared == 0:
        raise UserError(f"{at}: chosen and rejected share no leading message to be the prompt; add a prompt column")
    for name, conversation in (("chosen", chosen), ("rejected", rejected)):
        if shared == len(conversation):
            raise UserError(f"{at}: {name} has no message after the shared prompt, an empty response; drop the row")
        if (role := conversation[shared]["role"]) in ("user", "system"):
            raise UserError(
                f"{at}: {name} differs first in a {role} message, so its response would begin with one; the prompts "
                "must be the same: mend the row, or add a prompt column"
            )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _said(turn: Message) -> tuple[Any, ...]:
    """What a model sees of a message: data sets add a score, a model's name."""
    return turn["role"], turn["content"], turn.get("tool_calls")


def _scores(row: Mapping[str, Any], name: str, at: str) -> np.ndarray | None:
    if name not in row:
        return None
    try:
        scores = np.asarray(row[name])
    except ValueError:  # ragged
        scores = np.asarray(None)
    # A bool among numbers would turn into one without a word
    if scores.ndim != 1 or (scores.size and scores.dtype.kind not in "fiu") or any(type(s) is bool for s in row[name]):
        raise UserError(f"{at}: {name} must be a list of numbers, one a token; compute the weights anew")
    bad = ~(np.isfinite(scores) & (scores >= 0))
    if bad.any():
        position = int(np.argmax(bad))
        raise UserError(
            f"{at}: {name}[{position}] is {scores[position]}, no finite number >= 0; compute the weights anew"
        )
    return scores.astype(np.float32)
