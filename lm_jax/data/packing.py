"""Ragged examples -> fixed [rows, row_length] batches with segments.

Axes: B rows, T tokens of a row, I examples of a row.
An example is one or more segments (prompt + response) that must share a row: a scored response is one, a preference
pair two. Position t of a row predicts token t + 1, so what belongs to a response token sits one position before it.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lm_jax.errors import UserError

_WINDOW = 1024  # examples packed together: enough to fill rows, few enough that shuffling stays a shuffle
_SHORT = 4  # shuffled examples below a fourth of a row fill it in any order; costs 0.3 to 0.8% of the places


@dataclasses.dataclass(frozen=True)
class Segment:
    """A prompt and its response.

    Attributes:
      prompt: [P] int32, P >= 1.
      response: [R] int32.
      values: name -> [R] float32, what goes along with each response token (weights, reference log-probs).
      loss_mask: [R] bool, the response tokens that are learnt or scored, where others' turns are among them; None: all.
    """

    prompt: np.ndarray
    response: np.ndarray
    values: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    loss_mask: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


Example = Sequence[Segment]


def example_lengths(examples: Sequence[Example]) -> np.ndarray:
    """[N] int64: tokens that each example takes in a row."""
    return np.array([sum(map(len, example)) for example in examples], np.int64)


def examples_fingerprint(examples: Iterable[Example]) -> str:
    """sha256 (hex) over all that is read of examples, in their order: token ids, masks and values."""
    digest = hashlib.sha256()
    for example in examples:
        for segment in example:
            arrays = {"prompt": segment.prompt.astype("<i4"), "response": segment.response.astype("<i4")}
            arrays |= {name: value.astype("<f4") for name, value in sorted(segment.values.items())}
            if segment.loss_mask is not None:
                arrays["mask"] = segment.loss_mask.astype(np.int8)
            digest.update(repr({name: len(array) for name, array in arrays.items()}).encode())
            digest.update(b"".join(array.tobytes() for array in arrays.values()))
        digest.update(b"\n")
    return digest.hexdigest()


def pack(
    lengths: np.ndarray, row_length: int, max_examples: int, rng: np.random.Generator | None = None
) -> list[np.ndarray]:
    """First-fit packing within windows of the data order, the longest first.

    Shuffled, only what takes a good part of a row goes first: in order of length whole rows, and with few rows whole
    steps, would be of short examples or of long ones alone.

    Args:
      lengths: [N] tokens of each example.
      row_length: tokens a row holds.
      max_examples: examples a row holds.
      rng: shuffles the examples before and the rows after; None keeps the order (scoring).

    Returns:
      Rows, each the numbers of its examples. Every example is in exactly one row.

    Raises:
      UserError: an example is longer than a row.
    """
    if len(lengths) and lengths.max() > row_length:
        worst = int(lengths.argmax())
        raise UserError(
            f"example {worst} takes {lengths[worst]} tokens and a row holds {row_length}; raise "
            f"config.batch.row_length or lower config.max_length"
        )
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    sized = lengths if rng is None else np.maximum(lengths, row_length // _SHORT)
    rows: list[np.ndarray] = []
    for start in range(0, len(order), _WINDOW):
        window = order[start : start + _WINDOW]
        rows += _first_fit(window[np.argsort(-sized[window], kind="stable")], lengths, row_length, max_examples)
    return rows if rng is None else [rows[i] for i in rng.permutation(len(rows))]


def _first_fit(items, lengths, row_length, max_examples):
    room = np.full(len(items), row_length, np.int64)  # of each row that could be opened
    count = np.zeros(len(items), np.int64)
    rows: list[list[int]] = []
    for item in items:
        row = int(np.argmax((room >= lengths[item]) & (count < max_examples)))
        if row == len(rows):
            rows.append([])
        rows[row].append(int(item))
        room[row] -= lengths[item]
        count[row] += 1
    return [np.array(row) for row in rows]


def fill_rows(
    rows: Sequence[Sequence[int] | np.ndarray],
    examples: Sequence[Example],
    row_length: int,
    max_examples: int,
    values: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Lays packed examples out as arrays; rows without examples are padding.

    Returns:
      tokens, positions, segment_ids, targets [B, T] int32; loss_mask and each name of `values` [B, T] float32;
      example_ids [B, I] int32, -1 where a row has fewer. The segments of a row are numbered from 1 in the order of
      its examples, so with two segments an example, example i of the row has segments 2i + 1 and 2i + 2.
      `loss_mask` is 1 where the target is a response token that the segment's own mask does not leave out.
    """
    shape = (len(rows), row_length)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segment_ids", "targets")}
    batch |= {name: np.zeros(shape, np.float32) for name in ("loss_mask", *values)}
    batch["example_ids"] = np.full((len(rows), max_examples), -1, np.int32)
    for b, row in enumerate(rows):
        start = segment_id = 0
        for i, item in enumerate(row):
            batch["example_ids"][b, i] = item
            for segment in examples[item]:
                segment_id += 1
                stop = start + len(segment)
                tokens = np.concatenate([segment.prompt, segment.response])
                batch["tokens"][b, start:stop] = tokens
                batch["positions"][b, start:stop] = np.arange(len(tokens))
                batch["segment_ids"][b, start:stop] = segment_id
                batch["targets"][b, start : stop - 1] = tokens[1:]
                scored = response_slice(segment, start)
                batch["loss_mask"][b, scored] = 1.0 if segment.loss_mask is None else segment.loss_mask
                for name in values:
                    batch[name][b, scored] = segment.values[name]
                start = stop
    return batch


def response_slice(segment: Segment, start: int) -> slice:
    """The positions of a row that predict a segment's response, the segment beginning at `start`."""
    first = start + len(segment.prompt) - 1
    return slice(first, first + len(segment.response))
