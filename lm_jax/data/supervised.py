"""Supervised rows in the layouts that people have (see `layouts.SUPERVISED`), and what of them is learnt."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm_jax.data.columns import Renamed
from lm_jax.data.conversations import without_weights
from lm_jax.data.faults import Faults
from lm_jax.data.layouts import SUPERVISED, counted, one_form, read_as, read_layout, with_response
from lm_jax.data.messages import TEMPLATE_ARGUMENTS, WEIGHT, Message, Text
from lm_jax.data.packing import Segment
from lm_jax.data.rows import read_rows
from lm_jax.data.shares import encode_conversations
from lm_jax.data.text import TextEncoder
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
    read_as: str  # the layout, and what was not read, for a report


@dataclasses.dataclass(frozen=True)
class Supervised:
    """Encoded supervised rows.

    Attributes:
      rows: of each example the row it came from, in their order; a conversation may make several examples.
      segments: the examples, with the values `weights` (the row's) and `synthetic` (1 where its source is, else 0).
      full_lengths: tokens of each example's response before truncation.
      report: lines that say how many rows were read, dropped, truncated, and how long they are.
      faults: the rows that are left out for what is wrong with them.
    """

    rows: list[SupervisedRow]
    segments: list[Segment]
    full_lengths: list[int]
    where: str
    report: list[str]
    faults: Faults

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
    columns: str = "",
    max_dropped_share: float | None = None,
) -> Supervised:
    """Reads and encodes the rows of one file; see `supervised_rows`.

    Args:
      first: of the rows that are not dropped the first so many alone; None: all.
      columns: as `columns.Renamed` has them.
      max_dropped_share: see `Faults`.

    Raises:
      UserError: naming the file, or its faulty rows, and the cure.
    """
    where = os.path.basename(path.rstrip("/"))
    raw = read_rows(path, renamed=columns)
    faults = Faults(where, max_dropped_share)
    data = supervised_rows(raw, where, train_on, response_column, faults, tuple(Renamed(columns).names))
    rows = data.rows[:first]
    prompts, responses, numbers = ([getattr(r, name) for r in rows] for name in ("prompt", "response", "row"))
    names = [f"{where} row {number}" for number in numbers]
    encoded = faults.sound(numbers, encode_conversations(encoder, prompts, responses, names))
    faults.check(len(raw))
    kept = [(row, example) for row, own in zip(rows, encoded, strict=True) for example in own or ()]
    taken = sum(own is not None for own in encoded)
    if not kept:
        dropped = counted(data.dropped | {"faulty": len(faults.rows)})
        raise UserError(f"{path}: no rows left, all dropped ({dropped}); give rows that weigh something")
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
        for row, text in kept
    ]
    lengths = np.array([len(s) for s in segments])
    learnt = sum(len(s.response) if s.loss_mask is None else int(s.loss_mask.sum()) for s in segments)
    whole = len(data.rows) - (len(rows) - taken)
    report = [
        f"{where}: {len(raw)} rows read, {whole} kept"
        + (f", dropped: {counted(data.dropped)}" if data.dropped else "")
        + f"; {sum(r.source == SYNTHETIC for r in data.rows)} of them synthetic"
        + (f"; {taken} of them taken" if taken < whole else "")
        + f"; read as {data.read_as}",
        f"{where}: sequences of {lengths.min()} to {lengths.max()} tokens, median {int(np.median(lengths))}; {learnt} "
        f"of {lengths.sum()} tokens learnt; {sum(t.truncated for _, t in kept)} examples truncated to "
        "config.max_length",
    ]
    if len(kept) > taken:
        report.append(
            f"{where}: {taken} conversations make {len(kept)} examples, since the chat template shows earlier turns "
            "otherwise once later ones follow"
        )
    return Supervised([row for row, _ in kept], segments, [t.full_length for _, t in kept], where, report, faults)


def supervised_rows(
    rows: Sequence[Mapping[str, Any]],
    where: str,
    train_on: str = ALL,
    response_column: str | None = None,
    faults: Faults | None = None,
    named: Sequence[str] = (),
) -> SupervisedData:
    """Reads the rows of one file, in the layout of `layouts.SUPERVISED` that most of them have.

    Each may carry `id` and `weight` (a finite number >= 0; default 1), and `source` (`seed` or `synthetic`; default
    seed), which is a data set's own column, and not read, where any row has another value, unless it is `named`. Rows
    of weight 0 are dropped and counted. Empty responses pass: `TextEncoder` refuses them.

    Args:
      rows: as `read_rows` gives them.
      where: the file, for error messages.
      train_on: of a conversation, `history` included, `all` the assistant's turns are learnt or the `last` alone, but
        none of weight 0. What stands in `prompt` is never learnt, nor is what follows the last turn that is, nor what
        the assistant says before anyone else.
      response_column: learn this column instead: beside `prompt` or `instruction` it is the response, alone a
        conversation. `chosen` makes supervised rows of preference rows.
      faults: gets every row that cannot be read: a missing column, malformed messages, a conversation without an
        assistant's turn, a weight or source that is none, a form that the others have not. None: any is an error.
      named: columns that the user named; see `read_layout`.

    Raises:
      UserError: no layout that is known; without `faults` a row that cannot be read.
    """
    noted = Faults(where) if faults is None else faults
    layouts = SUPERVISED if response_column is None else with_response(response_column.lower())
    layout, read = read_layout(rows, layouts, noted, named)
    sources = {repr(source) for r in read if (source := r.columns.get("source")) is not None}
    own = "source" in named or sources <= set(map(repr, SOURCES))
    kept: list[SupervisedRow] = []
    dropped = {NO_WEIGHT: 0}
    for r in one_form(read, lambda r: f"the prompt is {r.form}", noted):
        at = f"{where} row {r.row}"
        with noted.of(r.row):
            weight, source = _weight(r.columns, at), _source(r.columns, at) if own else SEED
            prompt, response = r.prompt, r.answers[0]
            if not isinstance(prompt, str) and not isinstance(response, str):
                asked = prompt or []
                fixed, turns = (asked, response) if layout.asked[:1] == ("prompt",) else ([], [*asked, *response])
                prompt, response, times = _learnt(fixed, turns, train_on, at)
                weight *= times
            if weight == 0:
                dropped[NO_WEIGHT] += 1
            else:
                kept.append(
                    SupervisedRow(r.row, str(r.columns.get("id", r.row)), prompt or [], response, weight, source)
                )
    if faults is None:
        noted.check(len(rows))
    read_now = read_as(layout, read)
    if not own:
        read_now += (
            f" (source, {', '.join(sorted(sources)[:3])}{', ...' * (len(sources) > 3)}, is not ours: all are seed)"
        )
    return SupervisedData(kept, {reason: count for reason, count in dropped.items() if count}, read_now)


def _learnt(prompt: list[Message], turns: list[Message], train_on: str, at: str) -> tuple[Text, Text, float]:
    """(what is only read, from the first turn that is learnt to the last, the weight of these) of a prompt and the
    turns after it. A turn in between that is not learnt has WEIGHT 0."""
    said = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not said:
        raise UserError(f"{at}: no assistant message, so nothing to learn; drop the row")
    # A turn before which nothing stands is read, as no prompt calls for it; what the template takes is none
    mute = ("assistant", TEMPLATE_ARGUMENTS)
    said = [i for i in said if prompt or any(turn["role"] not in mute for turn in turns[:i])]
    if not said:
        raise UserError(
            f"{at}: begins with an assistant message, before which nothing stands, and has no other; drop the row"
        )
    learnt = [i for i in said if turns[i].get(WEIGHT, 1.0)][-1 if train_on == LAST else 0 :]
    weights = sorted({turns[i].get(WEIGHT, 1.0) for i in learnt} or {0.0})
    if len(weights) > 1:
        raise UserError(
            f"{at}: has turns of the weights {', '.join(f'{w:g}' for w in weights)}, but what is learnt of a row must "
            "have one weight; give the other turns 0, or make rows of them"
        )
    begin, end = (learnt[0], learnt[-1] + 1) if learnt else (0, 0)
    prompt, plain = (without_weights(messages, at, refuse=False) for messages in (prompt, turns))
    response = [{**plain[i], WEIGHT: 0.0} if i in said and i not in learnt else plain[i] for i in range(begin, end)]
    return [*prompt, *plain[:begin]], response, weights[0]


def _weight(row: Mapping[str, Any], at: str) -> float:
    weight = row.get("weight", 1.0)
    with contextlib.suppress(ValueError):  # a table of text has no numbers
        weight = float(weight) if isinstance(weight, str) else weight
    if type(weight) not in (int, float) or not 0 <= weight <= _LARGEST:  # a bool is an int, and no weight
        raise UserError(f"{at}: weight is {weight!r}, no finite number >= 0; mend the row, or drop the column")
    return float(np.float32(weight))


def _source(row: Mapping[str, Any], at: str) -> str:
    source = row.get("source", SEED)
    if source not in SOURCES:
        raise UserError(f"{at}: source is {source!r}; it must be {' or '.join(SOURCES)}: mend or rename the column")
    return source
