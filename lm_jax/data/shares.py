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
from lm_jax.data.text import EncodedResponse, T, TextEncoder
from lm_jax.distributed import processes
from lm_jax.errors import UserError

_BLOCK = 1024  # rows of a process between two exchanges: what is on the way at a time stays small

Arrays = tuple[np.ndarray, ...]


def encode_rows(
    encoder: TextEncoder, prompts: Sequence[Text], responses: Sequence[Text], wheres: Sequence[str]
) -> list[EncodedResponse | UserError]:
    """`encoder.encode_many`, which see; every process must give the same rows.

    Raises:
      UserError: the processes' rows differ.
    """
    return _encoded(encoder.encode_many, _arrays, _response, prompts, responses, wheres)


def encode_conversations(
    encoder: TextEncoder, prompts: Sequence[Text], responses: Sequence[Text], wheres: Sequence[str]
) -> list[list[EncodedResponse] | UserError]:
    """`encoder.encode_conversations`, as `encode_rows` is of `encode_many`."""

    def arrays(examples: list[EncodedResponse]) -> Arrays:
        return tuple(array for example in examples for array in _arrays(example))

    def examples(arrays: Arrays) -> list[EncodedResponse]:
        return [_response(arrays[i : i + 4]) for i in range(0, len(arrays), 4)]

    return _encoded(encoder.encode_conversations, arrays, examples, prompts, responses, wheres)


def encode_prompts(
    encoder: TextEncoder, prompts: Sequence[Text], wheres: Sequence[str]
) -> list[np.ndarray | UserError]:
    """`encoder.encode_prompts`, as `encode_rows` is of `encode_many`."""
    return _encoded(encoder.encode_prompts, lambda ids: (ids,), lambda arrays: arrays[0], prompts, wheres)


def _encoded(
    encode: Callable[..., list[T | UserError]],
    arrays: Callable[[T], Arrays],
    row: Callable[[Arrays], T],
    *columns: Sequence[Any],
) -> list[T | UserError]:
    """What `encode` makes of the columns; `arrays` of a row travel between processes, and `row` is made of them."""
    if processes.link is None:
        return encode(*columns)
    _check_alike(*columns)

    def part(own: slice) -> list[Arrays]:
        return [_with_fault(arrays, found) for found in encode(*(column[own] for column in columns))]

    return [_or_fault(row, *found) for found in _divided(len(columns[0]), part)]


def _with_fault(arrays: Callable[[T], Arrays], row: T | UserError) -> Arrays:
    """A row's arrays behind what is wrong with it, as characters; one of the two is empty."""
    if isinstance(row, UserError):
        return (np.array([ord(character) for character in str(row)], np.int32),)
    return np.zeros(0, np.int32), *arrays(row)


def _or_fault(row: Callable[[Arrays], T], fault: np.ndarray, *arrays: np.ndarray) -> T | UserError:
    return UserError("".join(map(chr, fault))) if fault.size else row(arrays)


def _check_alike(*columns: Sequence[Any]) -> None:
    digest = hashlib.blake2b(digest_size=8)
    for row in zip(*columns, strict=True):
        digest.update(repr(row).encode("utf-8", "surrogatepass"))
    processes.check_alike(digest.digest(), "rows", "give every process the same input")


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
    start = 0
    while start < number:
        share = min(_BLOCK, -(-(number - start) // jax.process_count()))
        mine = start + share * jax.process_index()
        with processes.at_work():
            own = encode(slice(mine, mine + share))
        for part in processes.gather(_packed(own), "the rows' tokens"):
            yield from _unpacked(part)
        start += share * jax.process_count()


def _packed(rows: list[Arrays]) -> np.ndarray:
    """[N] int32: how many rows, how many arrays each has, their lengths, their values."""
    arrays = [array for row in rows for array in row]
    head = np.array([len(rows), *map(len, rows), *map(len, arrays)], np.int32)
    return np.concatenate([head, *arrays], dtype=np.int32)


def _unpacked(packed: np.ndarray) -> Iterator[Arrays]:
    counts = packed[1 : packed[0] + 1]
    begin = 1 + len(counts) + int(counts.sum())
    ends = begin + np.cumsum(packed[1 + len(counts) : begin], dtype=np.int64)
    arrays = iter(np.split(packed, [begin, *ends])[1:-1])
    for count in counts:
        yield tuple(itertools.islice(arrays, int(count)))
