"""Supervised rows in the layouts that people have, and what of them is learnt: responses, or the assistant's turns."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm_jax.data.layouts import (
    alpaca_prompt,
    alpaca_text,
    check_one_layout,
    checked_messages,
    columns_of,
    counted,
    message,
    present_columns,
    sharegpt_turns,
    with_tools,
)
from lm_jax.data.messages import Message, Text
from lm_jax.data.packing import Segment
from lm_jax.data.rows import read_rows
from lm_jax.data.shares import encode_conversations
from lm_jax.data.text import TextEncoder, checked
from lm_jax.errors import UserError

SEED, SYNTHETIC = SOURCES = ("seed", "synthetic")
ALL, LAST = TRAIN_ON = ("all", "last")
NO_WEIGHT = "of weight 0"

_LARGEST = 1e30  # of weights: their sums stay finite in fp32


@dataclasses.dataclass(frozen=True)
class SupervisedRow:
    """One row: of `response`, a string or messages, the assistant's words are learnt; `prompt` is only read."""

    row: int  # 0-based position in the file
    id: str  # the row's `id`, else its position
    prompt: Text
    response: Text
    weight: float  # > 0, of each of its tokens in the loss
    source: str  # one of SOURCES


@dataclasses.dataclass(frozen=True)
class SupervisedData:
    rows: list[SupervisedRow]
    dropped: dict[str, int]  # reason -> rows that were left out for it


@dataclasses.dataclass(frozen=True)
class Supervised:
    """Encoded supervised rows.

    Attributes:
      rows: of each example the row it came from, in their order; a conversation may make several examples.
      segments: the examples, with the values `weights` (the row's) and `synthetic` (1 where its source is, else 0).
      full_lengths: tokens of each example's response before truncation.
      report: lines that say how many rows were read, dropped, truncated, and how long they are.
    """

    rows: list[SupervisedRow]
    segments: list[Segment]
    full_lengths: list[int]
    where: str
    report: list[str]

    def name(self, i: int) -> str:
        """How a user finds the row of example i."""
        return f"{self.where} row {self.rows[i].row}"

    def sources(self) -> frozenset[str]:
        """Those that occur."""
        return frozenset(row.source for row in self.rows)


def load_supervised(
    path: str,
    encoder: TextEncoder,
    train_on: str = ALL,
    response_column: str | None = None,
    first: int | None = None,
) -> Supervised:
    """Reads and encodes the rows of one file; see `supervised_rows`.

    Args:
      first: of the rows that are not dropped the first so many alone; None: all.

    Raises:
      UserError: naming the file or row and the cure.
    """
    where = os.path.basename(path.rstrip("/"))
    data = supervised_rows(read_rows(path), where, train_on, response_column)
    rows, kept = data.rows[:first], len(data.rows)
    if not rows:
        raise UserError(f"{path}: no rows left, all dropped ({counted(data.dropped)}); give rows that weigh something")
    prompts, responses, names = zip(*((r.prompt, r.response, f"{where} row {r.row}") for r in rows), strict=True)
    encoded = checked(encode_conversations(encoder, prompts, responses, names))
    examples = [(row, example) for row, own in zip(rows, encoded, strict=True) for example in own]
    segments = [
        Segment(
            text.prompt_ids,
            text.response_ids,
            {
                "weights": np.full(len(text.response_ids), row.weight, np.float32),
                "synthetic": np.full(len(text.response_ids), row.source == SYNTHETIC, np.float32),
            },
            text.loss_mask,
        )
        for row, text in examples
    ]
    lengths = np.array([len(s) for s in segments])
    learnt = sum(len(s.response) if s.loss_mask is None else int(s.loss_mask.sum()) for s in segments)
    report = [
        f"{where}: {kept + sum(data.dropped.values())} rows read, {kept} kept"
        + (f", dropped: {counted(data.dropped)}" if data.dropped else "")
        + f"; {sum(r.source == SYNTHETIC for r in data.rows)} of them synthetic"
        + (f"; {len(rows)} of them taken" if len(rows) < kept else ""),
        f"{where}: sequences of {lengths.min()} to {lengths.max()} tokens, median {int(np.median(lengths))}; {learnt} "
        f"of {lengths.sum()} tokens learnt; {sum(e.truncated for _, e in examples)} examples truncated to "
        "config.max_length",
    ]
    if len(examples) > len(rows):
        report.append(
            f"{where}: {len(rows)} conversations make {len(examples)} examples, since the chat template shows earlier "
            "turns otherwise once later ones follow"
        )
    return Supervised([row for row, _ in examples], segments, [e.full_length for _, e in examples], where, report)


def supervised_rows(
    rows: Sequence[Mapping[str, Any]], where: str, train_on: str = ALL, response_column: str | None = None
) -> SupervisedData:
    """Reads the rows of one file; every row must have the layout of the first.

    Layouts, the first that fits: `messages`, a conversation; ShareGPT's `conversations` of `from` and `value` (or
    `role` and `content`), with an optional `system`; `prompt` with `response` or TRL's `completion`, strings or
    messages (a string response to a prompt of messages is an assistant message); LLaMA-Factory's `instruction`,
    `input`, `output` with optional `system` and `history`. Each may carry `id`, `source` (`seed` or `synthetic`;
    default seed) and `weight` (a finite number >= 0; default 1), and those of messages `tools`, which the chat template
    gets. Rows of weight 0 are dropped and counted. Empty responses pass: `TextEncoder` refuses them.

    Args:
      rows: as `read_rows` gives them.
      where: the file, for error messages.
      train_on: of a conversation, `history` included, `all` the assistant's turns are learnt or the `last` alone. What
        stands in `prompt` is never learnt, nor is what follows the last turn of the assistant read.
      response_column: learn this column instead: beside `prompt` or `instruction` it is the response, alone a
        conversation. `chosen` makes supervised rows of preference rows.

    Raises:
      UserError: a missing column, a mixture of layouts, malformed messages, a conversation without an assistant's turn
        or that begins with one, a weight or source that is none.
    """
    kept: list[SupervisedRow] = []
    dropped = {NO_WEIGHT: 0}
    first = ""
    for number, row in enumerate(rows):
        at = f"{where} row {number}"
        row = present_columns(row)
        layout, column = _layout(row, response_column, at)
        this = f"the columns are {' and '.join(dict.fromkeys((layout, column)))}"
        if layout == "prompt":
            this += f", the prompt {'a string' if isinstance(row[layout], str) else 'messages'}"
        first = first or this
        check_one_layout(this, first, row, at, where)
        weight, source = _weight(row, at), _source(row, at)
        prompt, response = _READERS[layout](row, column, train_on, at)
        if weight == 0:
            dropped[NO_WEIGHT] += 1
            continue
        kept.append(SupervisedRow(number, str(row.get("id", number)), prompt, response, weight, source))
    return SupervisedData(kept, {reason: count for reason, count in dropped.items() if count})


def _layout(row: Mapping[str, Any], response_column: str | None, at: str) -> tuple[str, str]:
    """(the column that names the layout, the column that has the response)."""
    if response_column is not None:
        layout = next((name for name in ("prompt", "instruction") if name in row), "messages")
        column = response_column
    else:
        layout = next((name for name in _RESPONSES if name in row), "")
        if not layout:
            raise UserError(
                f"{at}: none of the columns {', '.join(_RESPONSES)}; a supervised row needs one ({columns_of(row)})"
            )
        column = _RESPONSES[layout]
        if layout == "prompt" and column not in row and "completion" in row:
            column = "completion"
    if column not in row:
        raise UserError(
            f"{at}: column {column!r} is missing; a supervised row needs it, or name another one as "
            f"config.response_column ({columns_of(row)})"
        )
    return layout, column


def _read_messages(row: Mapping[str, Any], column: str, train_on: str, at: str) -> tuple[Text, Text]:
    return _learnt([], with_tools(checked_messages(row[column], column, at), row, at), train_on, at)


def _read_sharegpt(row: Mapping[str, Any], column: str, train_on: str, at: str) -> tuple[Text, Text]:
    system = [message("system", row["system"])] if row.get("system") else []
    conversation = [*system, *sharegpt_turns(row[column], column, at)]
    return _learnt([], with_tools(conversation, row, at), train_on, at)


def _read_prompt(row: Mapping[str, Any], column: str, train_on: str, at: str) -> tuple[Text, Text]:
    prompt, response = row["prompt"], row[column]
    if isinstance(prompt, str) and isinstance(response, str):
        return prompt, response
    if isinstance(prompt, str):
        raise UserError(
            f"{at}: prompt is a string but {column} is {'messages' if isinstance(response, list) else 'neither'}; make "
            f"them alike, or remove the prompt where {column} holds the whole conversation"
        )
    prompt = with_tools(checked_messages(prompt, "prompt", at), row, at)
    if isinstance(response, str):
        return prompt, [message("assistant", response)]
    return _learnt(prompt, checked_messages(response, column, at), train_on, at)


def _read_alpaca(row: Mapping[str, Any], column: str, train_on: str, at: str) -> tuple[Text, Text]:
    answer = message("assistant", alpaca_text(row, column, at))
    return _learnt([], with_tools([*alpaca_prompt(row, at), answer], row, at), train_on, at)


_READERS = {
    "messages": _read_messages,
    "conversations": _read_sharegpt,
    "prompt": _read_prompt,
    "instruction": _read_alpaca,
}
_RESPONSES = {
    "messages": "messages",
    "conversations": "conversations",
    "prompt": "response",
    "instruction": "output",
}


def _learnt(prompt: list[Message], turns: list[Message], train_on: str, at: str) -> tuple[Text, Text]:
    """(what is only read, from the first turn that is learnt to the last) of a prompt and the turns after it."""
    assistant = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not assistant:
        raise UserError(f"{at}: no assistant message, so nothing to learn; drop the row")
    begin, end = assistant[-1 if train_on == LAST else 0], assistant[-1] + 1
    read = [*prompt, *turns[:begin]]
    if not read:
        raise UserError(
            f"{at}: begins with an assistant message, before which nothing stands; drop that message, or learn the "
            "last turn alone (train_on=last)"
        )
    return read, turns[begin:end]


def _weight(row: Mapping[str, Any], at: str) -> float:
    weight = row.get("weight", 1.0)
    if type(weight) not in (int, float) or not 0 <= weight <= _LARGEST:  # a bool is an int, and no weight
        raise UserError(f"{at}: weight is {weight!r}, no finite number >= 0; mend the row, or drop the column")
    return float(np.float32(weight))


def _source(row: Mapping[str, Any], at: str) -> str:
    source = row.get("source", SEED)
    if source not in SOURCES:
        raise UserError(f"{at}: source is {source!r}; it must be {' or '.join(SOURCES)}: mend or rename the column")
    return source
