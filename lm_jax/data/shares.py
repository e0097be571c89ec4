"""Tokenising a file's rows is divided among the processes of a run: each encodes a share, and all get every row's ids.

All of them, since each epoch's batches are drawn from the lengths of all rows, alike for any number of processes.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lm_jax.data.messages import Text
from lm_jax.data.text import EncodedResponse, TextEncoder
from lm_jax.distributed import processes
from lm_jax.errors import UserError

_BLOCK = 1024  # rows of a process between two exchanges: what is on the way at a time stays small

Arrays = tuple[np.ndarray, ...]


def encode_rows(
    encoder: TextEncoder, prompts: Sequence[Text], responses: Sequence[Text], wheres: Sequence[str]
) -> list[EncodedResponse]:
    """`encoder.encode_many`, which see; every process must give the same rows.

    Raises:
      UserError: in the process whose share has the row; it ends all with that line. Or the processes' rows differ.
    """
    found = _examples(lambda *part: [[row] for row in encoder.encode_many(*part)], prompts, responses, wheres)
    return [row for (row,) in found]


def encode_conversations(
    encoder: TextEncoder, prompts: Sequence[Text], responses: Sequence[Text], wheres: Sequence[str]
) -> list[list[EncodedResponse]]:
    """`encoder.encode_conversations`, as `encode_rows` is of `encode_many`."""
    return _examples(encoder.encode_conversations, prompts, responses, wheres)


def _examples(
    encode: Callable[..., list[list[EncodedResponse]]], *columns: Sequence[Any]
) -> list[list[EncodedResponse]]:
    if processes.link is None:
        return encode(*columns)
    _check_alike(*columns)

    def arrays(part: slice) -> list[list[Arrays]]:
        return [[_arrays(e) for e in row] for row in encode(*(column[part] for column in columns))]

    return [[_response(example) for example in row] for row in _divided(len(columns[0]), arrays)]


def encode_prompts(encoder: TextEncoder, prompts: Sequence[Text], wheres: Sequence[str]) -> list[np.ndarray]:
    """`encoder.encode_prompts`, as `encode_rows` is of `encode_many`."""
    if processes.link is None:
        return encoder.encode_prompts(prompts, wheres)
    _check_alike(prompts, wheres)

    def encode(part: slice) -> list[list[Arrays]]:
        return [[(ids,)] for ids in encoder.encode_prompts(prompts[part], wheres[part])]

    return [ids for ((ids,),) in _divided(len(prompts), encode)]


def _check_alike(*columns: Sequence[Any]) -> None:
    digest = hashlib.blake2b(digest_size=8)
    for row in zip(*columns, strict=True):
        digest.update(repr(row).encode("utf-8", "surrogatepass"))
    digests = processes.gather(np.frombuffer(digest.digest(), np.int32), "the rows")
    for process, its in enumerate(digests):
        if not np.array_equal(its, digests[0]):
            raise UserError(f"process {process} reads other rows than process 0; give every process the same input")


def _arrays(row: EncodedResponse) -> Arrays:
    mask = np.zeros(0, np.int32) if row.loss_mask is None else row.loss_mask.astype(np.int32)
    rest = np.array([row.full_length, row.boundary_split, row.loss_mask is not None], np.int32)
    return row.prompt_ids, row.response_ids, mask, rest


def _response(arrays: Arrays) -> EncodedResponse:
    prompt, response, mask, (full_length, boundary_split, masked) = arrays
    return EncodedResponse(
        prompt, response, int(full_length), bool(boundary_split), mask.astype(bool) if masked else None
    )


def _divided(number: int, encode: Callable[[slice], list[list[Arrays]]]) -> Iterator[list[Arrays]]:
    """The arrays of each row's examples, in order, of which this process makes those of its parts."""
    start = 0
    while start < number:
        share = min(_BLOCK, -(-(number - start) // jax.process_count()))
        mine = start + share * jax.process_index()
        with processes.at_work():
            own = encode(slice(mine, mine + share))
        for part in processes.gather(_packed(own), "the rows' tokens"):
            yield from _unpacked(part)
        start += share * jax.process_count()


def _packed(rows: list[list[Arrays]]) -> np.ndarray:
    """[N] int32: how many rows, arrays and arrays an example; examples of each row, each array's length, all values."""
    arrays = [array for row in rows for example in row for array in example]
    per_example = next((len(example) for row in rows for example in row), 1)
    head = [len(rows), len(arrays), per_example, *map(len, rows), *map(len, arrays)]
    return np.concatenate([np.array(head, np.int32), *arrays], dtype=np.int32)


def _unpacked(packed: np.ndarray) -> Iterator[list[Arrays]]:
    num_rows, num_arrays, per_example = map(int, packed[:3])
    begin = 3 + num_rows + num_arrays
    ends = begin + np.cumsum(packed[3 + num_rows : begin], dtype=np.int64)
    arrays = iter(np.split(packed, [begin, *ends])[1:-1])
    for examples in packed[3 : 3 + num_rows]:
        yield [tuple(itertools.islice(arrays, per_example)) for _ in range(examples)]
