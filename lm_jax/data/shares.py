"""Tokenising is divided among the processes of a run: each encodes a share of the rows, and all get every row's ids.

All of them, since each epoch's batches are drawn from the lengths of all rows, alike for any number of processes.
"""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from lm_jax.data.text import EncodedResponse, Text, TextEncoder
from lm_jax.distributed.processes import at_work, gather

_BLOCK = 1024  # rows of a process between two exchanges: what is on the way at a time stays small

Arrays = tuple[np.ndarray, ...]


def encode_rows(
    encoder: TextEncoder,
    prompts: Sequence[Text],
    responses: Sequence[Text],
    wheres: Sequence[str],
    assistant_only: bool = False,
) -> list[EncodedResponse]:
    """`encoder.encode_many`, which see; the same rows in every process.

    Raises:
      UserError: in the process whose share has the row; it ends all with that line.
    """
    if jax.process_count() == 1:
        return encoder.encode_many(prompts, responses, wheres, assistant_only)

    def encode(part: slice) -> list[Arrays]:
        encoded = encoder.encode_many(prompts[part], responses[part], wheres[part], assistant_only)
        return [_arrays(row) for row in encoded]

    return [_response(arrays) for arrays in _divided(len(prompts), encode)]


def encode_prompts(encoder: TextEncoder, prompts: Sequence[Text], wheres: Sequence[str]) -> list[np.ndarray]:
    """`encoder.encode_prompts`, as `encode_rows` is of `encode_many`."""
    if jax.process_count() == 1:
        return encoder.encode_prompts(prompts, wheres)

    def encode(part: slice) -> list[Arrays]:
        return [(ids,) for ids in encoder.encode_prompts(prompts[part], wheres[part])]

    return [ids for (ids,) in _divided(len(prompts), encode)]


def _arrays(row: EncodedResponse) -> Arrays:
    mask = np.zeros(0, np.int32) if row.loss_mask is None else row.loss_mask.astype(np.int32)
    rest = np.array([row.full_length, row.boundary_split, row.loss_mask is not None], np.int32)
    return row.prompt_ids, row.response_ids, mask, rest


def _response(arrays: Arrays) -> EncodedResponse:
    prompt, response, mask, (full_length, boundary_split, masked) = arrays
    return EncodedResponse(
        prompt, response, int(full_length), bool(boundary_split), mask.astype(bool) if masked else None
    )


def _divided(number: int, encode: Callable[[slice], list[Arrays]]) -> Iterator[Arrays]:
    """Each row's arrays, in order, of which this process makes those of its parts."""
    processes = jax.process_count()
    share = max(1, min(_BLOCK, -(-number // processes)))
    for start in range(0, number, share * processes):
        mine = start + share * jax.process_index()
        with at_work():
            own = encode(slice(mine, mine + share))
        for part in gather(_packed(own), "the rows' tokens"):
            yield from _unpacked(part)


def _packed(rows: list[Arrays]) -> np.ndarray:
    """Rows of int32 arrays as one: how many arrays, their lengths, their values."""
    arrays = [array for row in rows for array in row]
    head = np.array([len(arrays), *map(len, arrays), len(rows[0]) if rows else 1], np.int32)
    return np.concatenate([head, *arrays]).astype(np.int32)


def _unpacked(packed: np.ndarray) -> Iterator[Arrays]:
    number = int(packed[0])
    per_row = int(packed[number + 1])
    ends = number + 2 + np.cumsum(packed[1 : number + 1])
    arrays = np.split(packed, [number + 2, *ends])[1:-1]
    for first in range(0, number, per_row):
        yield tuple(arrays[first : first + per_row])
