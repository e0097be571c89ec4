"""`--preview=N` of a command that trains: the first rows on a terminal, token by token, as the model sees them.

What is printed is read back from the packed batch that training is fed with, not from what it was made of.
"""

import os
import shutil
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import numpy as np

from lm_jax.data.messages import TOOLS, Text, split_arguments
from lm_jax.data.packing import Example, Segment, example_lengths, fill_rows
from lm_jax.data.pieces import token_pieces
from lm_jax.strict_json import dumps

PROMPT, RESPONSE, END = "prompt", "response", "end"
_TOKEN_WIDTH = 18  # columns of a token's text; longer ones are cut
_MOST_WIDTH = 160  # of a line, however wide the terminal
_DIM, _LOW, _HIGH, _BOLD, _RESET = "\033[2m", "\033[38;5;33m", "\033[38;5;208m", "\033[1m", "\033[0m"


def as_trained(example: Example, values: Sequence[str] = ()) -> list[dict[str, np.ndarray]]:
    """Each segment of an example as it lies in a batch: tokens, positions, mask and `values`, all [segment's length].

    `mask` and the values belong to the token in their place. In the batch they lie one place earlier, where that token
    is predicted.
    """
    batch = fill_rows([[0]], [example], int(example_lengths([example])[0]), 1, values)
    segments = []
    for number in range(1, len(example) + 1):
        at = np.flatnonzero(batch["segment_ids"][0] == number)
        found = {name: batch[name][0, at] for name in ("tokens", "positions")}
        for name in ("loss_mask", *values):
            found[name] = np.concatenate([[0.0], batch[name][0, at[:-1]]])
        found["mask"] = found.pop("loss_mask")
        segments.append(found)
    return segments


def segment_lines(
    name: str,
    segment: Mapping[str, np.ndarray],
    full_length: int,
    tokenizer: Any,
    values: Sequence[str],
    width: int,
    colour: bool,
) -> list[str]:
    """A segment as lines of at most `width` columns.

    Args:
      name: what it is, as "chosen".
      segment: of `as_trained`.
      full_length: tokens of the response before truncation.
      values: which to show of each response token; `weights` are coloured by their distance from 1.
    """
    mask = segment["mask"] > 0
    first, length = int(np.argmax(mask)) if mask.any() else len(mask), int(mask.sum())
    cut = full_length - (len(mask) - first)
    kinds = np.where(mask, RESPONSE, PROMPT)
    if not cut:
        kinds[-1] = END
    texts = _token_texts(tokenizer, segment["tokens"])
    places, ids = len(str(len(mask) - 1)), max(len(str(i)) for i in segment["tokens"])
    others = len(mask) - first - length  # others' turns between those that are learnt
    counts = f"{first} tokens of prompt, {length} of response" + (f", {others} of others' turns" if others else "")
    lines = [_coloured(f"{name}: {counts}", _BOLD, colour)]
    for kind, note in ((PROMPT, "mask 0"), (RESPONSE, "mask 1"), (END, "mask 1")):
        at = np.flatnonzero(kinds == kind)
        if not len(at):
            continue
        shown = [] if kind == PROMPT else list(values)
        head = f"position id {' '.join(shown)}{' ' * bool(shown)}token"
        title = f"{kind} and others' turns" if kind == PROMPT and others else kind
        lines.append(_coloured(f"  {title} ({note}): {head}", _DIM, colour))
        cells = []
        for t in at:
            numbers = "".join(f" {segment[value][t]:7.3f}" for value in shown)
            cell = f"{segment['positions'][t]:>{places}} {segment['tokens'][t]:>{ids}}{numbers} "
            style = _style(kind, segment["weights"][t] if "weights" in shown else 1.0)
            cells.append((cell + _padded(texts[t], _TOKEN_WIDTH), style))
        across = max(1, (width - 4) // (_columns(cells[0][0]) + 2))
        for start in range(0, len(cells), across):
            line = "  ".join(_coloured(cell, style, colour) for cell, style in cells[start : start + across])
            lines.append("    " + line.rstrip())
    if cut:
        lines.append(f"  truncated: {cut} of {full_length} response tokens lie beyond max_length, the end with them")
    return lines


def print_examples(
    named: Sequence[tuple[str, Example, Sequence[tuple[str, int]]]],
    tokenizer: Any,
    values: Sequence[str] = (),
    out: TextIO | None = None,
) -> None:
    """Prints examples; colours only on a terminal, and none where NO_COLOR is set.

    Args:
      named: (how a user finds the row, its segments, of each segment (its name, tokens of its response before
        truncation)).
      values: of `Segment.values`, which to show.
      out: default: stdout.
    """
    out = out or sys.stdout
    colour = out.isatty() and not os.environ.get("NO_COLOR")
    width = min(shutil.get_terminal_size((120, 24)).columns, _MOST_WIDTH)
    for name, example, sides in named:
        print(_coloured(name, _BOLD, colour), file=out)
        for segment, (side, full_length) in zip(as_trained(example, values), sides, strict=True):
            print("\n".join(segment_lines(side, segment, full_length, tokenizer, values, width, colour)), file=out)
        print(file=out)
    out.flush()


def template_note(tokenizer: Any, prompt: Text) -> str:
    """What a row's chat template got besides, for its heading; nothing where it got nothing, or there is no template.

    Args:
      tokenizer: from `load_tokenizer`, with what the settings give to all rows.
    """
    if isinstance(prompt, str):
        return ""
    own, _ = split_arguments(prompt)
    given = {**tokenizer.chat_template_kwargs, **own} | ({TOOLS: len(own[TOOLS])} if TOOLS in own else {})
    return f"; the template got {dumps(given, ensure_ascii=False)}" if given else ""


def with_values(segment: Segment, names: Sequence[str]) -> Segment:
    """The segment with these of its values alone."""
    values = {name: segment.values[name] for name in names}
    return Segment(segment.prompt, segment.response, values, segment.loss_mask)


def _token_texts(tokenizer: Any, tokens: np.ndarray) -> list[str]:
    """One text a token; tokens that share a character have it with their number: `é 1/2`."""
    texts = []
    for text, count in token_pieces(tokenizer, tokens):
        shown = _visible(text)
        texts += [shown] if count == 1 else [f"{shown} {part + 1}/{count}" for part in range(count)]
    return texts


def _visible(text: str) -> str:
    """Spaces as ␣; what has no glyph, or would steer the terminal, by its escape."""

    def sign(s: str) -> str:
        if s == " ":
            return "␣"
        return s if unicodedata.category(s)[0] not in "CZ" else s.encode("unicode_escape").decode()

    return "".join(map(sign, text))


def _columns(text: str) -> int:
    """Columns of a terminal: wide characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(s) else 2 if unicodedata.east_asian_width(s) in "WF" else 1 for s in text)


def _padded(text: str, columns: int) -> str:
    if _columns(text) > columns:
        while _columns(text) > columns - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (columns - _columns(text))


def _style(kind: str, weight: float) -> str:
    if kind == PROMPT:
        return _DIM
    return _HIGH if weight > 1.05 else _LOW if weight < 0.95 else ""


def _coloured(text: str, style: str, colour: bool) -> str:
    return f"{style}{text}{_RESET}" if colour and style else text
