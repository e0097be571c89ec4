"""Ragged examples -> fixed [rows, row_length] batches with segments.

Axes: B rows, T tokens of a row, I examples of a row.
An example is one or more segments (prompt + response) that must share a row: a scored response is one, a preference
pair two. Position t of a row predicts token t + 1, so what belongs to a response token sits one position before it.
"""

import dataclasses
import hashlib
import heapq
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lm_jax.errors import UserError

_WINDOW = 1024  # examples packed together: enough to fill rows, few enough that rows come in about the data's order


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


def pack(lengths: np.ndarray, row_length: int) -> list[list[int]]:
    """First-fit packing within windows of the data order, the longest first.

    Args:
      lengths: [N] tokens of each example.
      row_length: tokens a row holds.

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
    sizes = lengths.tolist()
    rows: list[list[int]] = []
    for start in range(0, len(lengths), _WINDOW):
        window = start + np.argsort(-lengths[start : start + _WINDOW], kind="stable")
        rows += first_fit(window.tolist(), sizes, row_length)
    return rows


def first_fit(items: Iterable[int], lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Rows of at most `row_length` tokens: each item goes into the first one that has room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for item in items:
        row = next((r for r, left in enumerate(room) if left >= lengths[item]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(row_length)
        rows[row].append(item)
        room[row] -= lengths[item]
    return rows


def balance(items: Iterable[int], lengths: Sequence[int], num_rows: int) -> list[list[int]]:
    """`num_rows` rows alike in length: each item, the longest first, goes where there is least (Graham, 1969)."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    held = [(0, row) for row in range(num_rows)]
    for item in items:
        tokens, row = held[0]
        rows[row].append(item)
        heapq.heapreplace(held, (tokens + lengths[item], row))
    return rows


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
