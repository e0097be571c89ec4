"""Preference rows in the layouts that people have: TRL's (strings or messages), LLaMA-Factory's alpaca and ShareGPT."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm_jax.data.layouts import (
    alpaca_prompt,
    alpaca_text,
    check_one_layout,
    checked_messages,
    columns_of,
    message,
    present_columns,
    sharegpt_turns,
    with_tools,
)
from lm_jax.data.messages import Text
from lm_jax.data.text import EncodedResponse
from lm_jax.errors import UserError

IDENTICAL = "chosen and rejected are identical"

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


def preference_rows(rows: Sequence[Mapping[str, Any]], where: str) -> PreferenceData:
    """Reads the rows of one file; every row must have the layout of the first.

    Layouts: `prompt, chosen, rejected` as strings; the same as messages (a string response to a prompt of messages
    is an assistant message); `chosen, rejected` as whole conversations, whose shared leading messages are the prompt;
    `instruction, input, chosen, rejected` with optional `system` and `history`, which become messages; ShareGPT's
    `conversations`, the prompt, with one turn as `chosen` and one as `rejected`. Each may carry `chosen_token_scores`
    and `rejected_token_scores`, lists of finite numbers >= 0, and those of messages `tools`, which the chat template
    gets.

    Identical pairs are dropped and counted. Empty responses pass: `TextEncoder` refuses them.

    Args:
      rows: as `read_rows` gives them.
      where: the file, for error messages.

    Raises:
      UserError: a missing column, a mixture of layouts, malformed messages or history, scores that are no weights.
    """
    kept: list[PreferenceRow] = []
    dropped = {IDENTICAL: 0}
    first = ""
    for number, row in enumerate(rows):
        at = f"{where} row {number}"
        row = present_columns(row)
        layout = _layout(row, at)
        chosen_scores, rejected_scores = (_scores(row, name, at) for name in _SCORES)
        if (chosen_scores is None) != (rejected_scores is None):
            raise UserError(f"{at}: has only one of {' and '.join(_SCORES)}; give both or neither ({columns_of(row)})")
        this = f"{_DESCRIBED[layout]}, {'with' if chosen_scores is not None else 'without'} token scores"
        first = first or this
        check_one_layout(this, first, row, at, where)
        prompt, chosen, rejected = _READERS[layout](row, at)
        if chosen == rejected:
            dropped[IDENTICAL] += 1
            continue
        name = str(row.get("id", number))
        kept.append(PreferenceRow(number, name, prompt, chosen, rejected, chosen_scores, rejected_scores))
    return PreferenceData(kept, {reason: count for reason, count in dropped.items() if count})


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


def _layout(row: Mapping[str, Any], at: str) -> str:
    for name in ("chosen", "rejected"):
        if name not in row:
            raise UserError(f"{at}: column {name!r} is missing; a preference row needs it ({columns_of(row)})")
        if not isinstance(row[name], (str, list)) and not (isinstance(row[name], dict) and _is_sharegpt(row)):
            raise UserError(f"{at}: {name} must be a string or messages, got {type(row[name]).__name__}; mend the row")
    strings = [isinstance(row[name], str) for name in ("chosen", "rejected")]
    if strings[0] != strings[1]:
        raise UserError(f"{at}: one of chosen and rejected is a string, the other messages; make them alike")
    if _is_sharegpt(row):
        return "sharegpt"
    if "prompt" in row:
        if isinstance(row["prompt"], str) and not strings[0]:
            raise UserError(
                f"{at}: prompt is a string but chosen and rejected are messages; make the prompt messages too, or "
                "remove it where chosen and rejected hold the whole conversation"
            )
        return "strings" if isinstance(row["prompt"], str) else "messages"
    if "instruction" in row:
        return "alpaca"
    if strings[0]:
        raise UserError(
            f"{at}: column 'prompt' (or 'instruction') is missing; add it, or give whole conversations as messages in "
            f"chosen and rejected ({columns_of(row)})"
        )
    return "conversations"


def _is_sharegpt(row: Mapping[str, Any]) -> bool:
    return "conversations" in row and "prompt" not in row and "instruction" not in row


def _read_strings(row: Mapping[str, Any], at: str) -> tuple[Text, Text, Text]:
    return row["prompt"], row["chosen"], row["rejected"]


def _read_messages(row: Mapping[str, Any], at: str) -> tuple[Text, Text, Text]:
    prompt = checked_messages(row["prompt"], "prompt", at)
    chosen, rejected = (
        [message("assistant", row[name])] if isinstance(row[name], str) else checked_messages(row[name], name, at)
        for name in ("chosen", "rejected")
    )
    return with_tools(prompt, row, at), chosen, rejected


def _read_conversations(row: Mapping[str, Any], at: str) -> tuple[Text, Text, Text]:
    chosen, rejected = (checked_messages(row[name], name, at) for name in ("chosen", "rejected"))
    if chosen == rejected:
        return [], chosen, rejected  # nothing tells where the prompt ends; the caller drops the pair
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
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
    return with_tools(chosen[:shared], row, at), chosen[shared:], rejected[shared:]


def _read_alpaca(row: Mapping[str, Any], at: str) -> tuple[Text, Text, Text]:
    chosen, rejected = ([message("assistant", alpaca_text(row, name, at))] for name in ("chosen", "rejected"))
    return with_tools(alpaca_prompt(row, at), row, at), chosen, rejected


def _read_sharegpt(row: Mapping[str, Any], at: str) -> tuple[Text, Text, Text]:
    system = [message("system", row["system"])] if row.get("system") else []
    prompt = [*system, *sharegpt_turns(row["conversations"], "conversations", at)]
    chosen, rejected = (
        [message("assistant", row[name])]
        if isinstance(row[name], str)
        else sharegpt_turns(row[name] if isinstance(row[name], list) else [row[name]], name, at)
        for name in ("chosen", "rejected")
    )
    return with_tools(prompt, row, at), chosen, rejected


_READERS = {
    "strings": _read_strings,
    "messages": _read_messages,
    "conversations": _read_conversations,
    "alpaca": _read_alpaca,
    "sharegpt": _read_sharegpt,
}
_DESCRIBED = {
    "strings": "prompt, chosen and rejected are strings",
    "messages": "prompt is messages",
    "conversations": "chosen and rejected are whole conversations without a prompt column",
    "alpaca": "the columns are instruction, chosen and rejected",
    "sharegpt": "the columns are conversations, chosen and rejected",
}


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
