"""The built-in generator: many prompts through a fixed number of slots, each refilled as soon as it is free.

Prompts are prefilled in batches ahead of the slots, R rows in chunks of T tokens; slots decode side by side and are
looked at between chunks of steps (continuous batching, as in Orca, OSDI 2022). A row's text depends on its id, the
seed and the model alone: its random stream is keyed by them, chunks and blocks lie at the same multiples of the row's
own positions whatever surrounds it, and every shape is the same for the first and the last row.
"""

import dataclasses
import hashlib
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lm_jax.config import ComputeConfig, DecodeConfig, ModelConfig
from lm_jax.data.text import TextEncoder
from lm_jax.data.tokenizers import token_ids
from lm_jax.errors import UserError
from lm_jax.generation.decoding import Placement, Prompts, decode, make_slots, place, prefill
from lm_jax.generation.requests import Completion, Request, Sample, SamplingConfig
from lm_jax.generation.stopping import Stops, resolve_stops, response_text
from lm_jax.generation.token_choice import filters_of
from lm_jax.models.cache import CHUNK, make_cache
from lm_jax.sharding import batch_divisor, to_host

_PREFILL_ROWS = 16  # R: with T this many tokens a step keep the matmuls busy
_PLACED = 8  # prompts that move into slots together: about as many as finish in a chunk


@dataclasses.dataclass(eq=False)
class _Row:
    """A request that is on its way."""

    request: Request
    prompt: np.ndarray
    budget: int
    samples: list[Sample | None]


@dataclasses.dataclass(eq=False)
class _Sequence:
    """One sample of a row, in a slot or before it."""

    row: _Row
    index: int
    stops: Stops
    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)


def decoding_compute(compute: ComputeConfig) -> ComputeConfig:
    """How decoding computes, from a command's settings: there is no gradient to save for."""
    return dataclasses.replace(compute, remat="none", scan_unroll=1)


def decode_rows(decode: DecodeConfig, mesh: Mesh) -> tuple[int, int]:
    """(slots, rows of a prefill), as many as the mesh can cut."""
    parts = batch_divisor(mesh)
    return -(-decode.slots // parts) * parts, -(-_PREFILL_ROWS // parts) * parts


class LocalGenerator:
    """Generates with the model in this process (or these processes, which all make the same calls).

    Args:
      params: parameters on `mesh`.
      tokenizer, end_ids: from `load_tokenizer` and `end_token_ids`.
      mesh: rows are cut over its data and fsdp axes, heads over tensor.
    """

    collective = True

    def __init__(
        self,
        params: dict,
        config: ModelConfig,
        tokenizer: Any,
        end_ids: tuple[int, ...],
        compute: ComputeConfig,
        decode: DecodeConfig,
        mesh: Mesh,
    ):
        self._params, self._config, self._tokenizer, self._end_ids = params, config, tokenizer, end_ids
        self._compute = decoding_compute(compute)
        self._mesh, self._chunk = mesh, decode.chunk
        self._parts = batch_divisor(mesh)
        self._num_slots, self._prefill_rows = decode_rows(decode, mesh)
        self._max_length, self._context = decode.max_length, min(decode.max_length, config.max_position)
        known = np.isin(np.arange(config.vocab_size), token_ids(tokenizer))
        self._known = None if known.all() else known  # a padded vocabulary has rows without a token
        self._encoder = TextEncoder(tokenizer, sys.maxsize, end_ids)  # prompts that are too long are told so here

    def generate(self, requests: Sequence[Request], sampling: SamplingConfig) -> Iterator[list[Completion]]:
        """See `requests.Generator`. Rows that share the beginning of their prompt finish near one another.

        Raises:
          UserError: an unknown stop token.
        """
        end_ids, stop_texts = resolve_stops(sampling.stop, self._tokenizer, self._end_ids)
        rows, failed = self._encode(requests, sampling)
        if failed:
            yield failed
        if rows:
            run = _Run(self, _in_order(rows, self._prefill_rows), sampling, end_ids, stop_texts)
            while True:
                with jax.set_mesh(self._mesh):  # not while the caller has the turn: it is a state of the whole thread
                    done = run.next()
                if not done:
                    return
                yield done

    def _encode(self, requests, sampling) -> tuple[list[_Row], list[Completion]]:
        texts = [r for r in requests if r.token_ids is None]
        encoded = iter(self._encoder.encode_prompts([r.prompt for r in texts], [f"row {r.id}" for r in texts]))
        prompts = [next(encoded) if r.token_ids is None else np.asarray(r.token_ids, np.int32) for r in requests]
        rows, failed = [], []
        for request, prompt in zip(requests, prompts, strict=True):
            try:
                if isinstance(request.prompt, str) and not request.prompt.strip() and request.token_ids is None:
                    raise UserError(f"row {request.id}: the prompt is empty; give a text, or drop the row")
                if isinstance(prompt, UserError):
                    raise prompt
                if len(prompt) >= self._context:
                    raise UserError(self._too_long(request, len(prompt)))
                own = request.max_new_tokens or sampling.max_new_tokens
                budget = min(own, sampling.max_new_tokens, self._context - len(prompt))
                rows.append(_Row(request, prompt, budget, [None] * sampling.num_samples))
            except UserError as error:
                failed.append(Completion(request.id, (), str(error)))
        return rows, failed

    def _too_long(self, request: Request, length: int) -> str:
        limit, cure = "config.decode.max_length", "shorten it, or raise that"
        if self._max_length >= self._config.max_position:
            limit, cure = "the model's context", "shorten it"
        return f"row {request.id}: the prompt has {length} tokens and {limit} is {self._context}; {cure}"


class _Run:
    """One call of `generate`: the queue, the prompts that are ready, the slots and who is in them."""

    def __init__(self, generator: LocalGenerator, rows: list[_Row], sampling: SamplingConfig, end_ids, stop_texts):
        g = self._generator = generator
        self._queue = deque(rows)
        self._ready: deque[Any] = deque()
        self._end_ids, self._stop_texts, self._seed = end_ids, stop_texts, sampling.seed
        self._filters, self._strengths = filters_of(sampling)
        longest = max(len(row.prompt) for row in rows)
        longest += -longest % CHUNK
        length = max(longest, max(len(row.prompt) + row.budget for row in rows))
        self._tokens = np.zeros((g._prefill_rows, longest), np.int32)
        self._lengths = np.zeros(g._prefill_rows, np.int32)
        cache = make_cache(g._config, g._prefill_rows, longest, g._compute.dtype, g._mesh)
        self._places = min(member.places for member in cache)
        self._prompts = Prompts._make((cache, None))  # before the first prefill
        with_seen = self._filters.repetition_penalty
        self._slots = make_slots(g._config, g._compute, g._num_slots, length, with_seen, g._mesh)
        self._in_slot: list[_Sequence | None] = [None] * g._num_slots
        self._keep = np.ones(g._num_slots, bool)

    def next(self) -> list[Completion]:
        """The rows that finish next; none are left when it is empty."""
        while True:
            self._fill()
            if not any(self._in_slot):
                return []
            if done := self._step():
                return done

    def _fill(self) -> None:
        """Puts sequences into free slots, prefilling more prompts as they run out."""
        free = [slot for slot, sequence in enumerate(self._in_slot) if sequence is None]
        while free and (self._ready or self._queue):
            if not self._ready:
                self._prefill()
            pairs = [self._pair(free) for _ in range(min(len(free), len(self._ready)))]
            pairs.sort(key=self._crosses)
            for at in range(0, len(pairs), _PLACED):
                self._place(pairs[at : at + _PLACED])

    def _pair(self, free: list[int]) -> tuple[tuple[int, _Sequence], int]:
        """The next sequence and a free slot, in the prompt's own part of the mesh where there is one."""
        ready = self._ready.popleft()
        slot = next((slot for slot in free if not self._crosses((ready, slot))), free[0])
        free.remove(slot)
        return ready, slot

    def _crosses(self, pair: tuple[tuple[int, _Sequence], int]) -> bool:
        (r, _), slot = pair
        g = self._generator
        return r * g._parts // g._prefill_rows != slot * g._parts // g._num_slots

    def _prefill(self) -> None:
        g = self._generator
        rows = [self._queue.popleft() for _ in range(min(g._prefill_rows, len(self._queue)))]
        first = min(self._reusable(r, row.prompt) for r, row in enumerate(rows))
        for r, row in enumerate(rows):
            self._tokens[r, : len(row.prompt)] = row.prompt
            self._lengths[r] = len(row.prompt)
        self._lengths[len(rows) :] = 1
        self._prompts = prefill(g._params, self._prompts.cache, *self._given(), np.int32(first), g._config, g._compute)
        for r, row in enumerate(rows):
            self._ready.extend((r, _Sequence(row, i, self._stops(row))) for i in range(len(row.samples)))

    def _stops(self, row: _Row) -> Stops:
        return Stops(self._generator._tokenizer, row.prompt, self._stop_texts, row.request.think_end)

    def _reusable(self, r: int, prompt: np.ndarray) -> int:
        """Chunks of `prompt` that row r's cache holds from the prompt before: few-shot examples are prefilled once.

        A ring that has gone round holds the beginning no longer. The last token's chunk always runs, for its hidden
        state.
        """
        before = int(self._lengths[r])
        if before > self._places:
            return 0
        common = min(before, len(prompt))
        differs = self._tokens[r, :common] != prompt[:common]
        same = int(np.argmax(differs)) if differs.any() else common
        return min(same, len(prompt) - 1) // CHUNK

    def _place(self, pairs: list[tuple[tuple[int, _Sequence], int]]) -> None:
        to = Placement(
            np.zeros(_PLACED, np.int32),
            np.full(_PLACED, len(self._in_slot), np.int32),
            np.zeros(_PLACED, np.int32),
            np.zeros((_PLACED, 2), np.uint32),
        )
        for j, ((r, sequence), slot) in enumerate(pairs):
            to.row[j], to.slot[j], to.budget[j] = r, slot, sequence.row.budget
            to.keys[j] = _stream(self._seed, sequence.row.request.id, sequence.index)
            self._in_slot[slot] = sequence
            self._keep[slot] = True
        exchange = any(map(self._crosses, pairs))
        self._slots = place(self._slots, self._prompts, *self._given(), to, exchange)

    def _given(self) -> tuple[np.ndarray, np.ndarray]:
        """Copies: a computation may still be reading what the next prefill overwrites."""
        return self._tokens.copy(), self._lengths.copy()

    def _step(self) -> list[Completion]:
        """Decodes a chunk and takes out what has finished."""
        g = self._generator
        before = [len(sequence.ids) if sequence else 0 for sequence in self._in_slot]
        self._slots, *out = decode(
            g._params, self._slots, self._keep.copy(), np.asarray(self._end_ids, np.int32), g._known,
            self._strengths, g._chunk, g._config, g._compute, self._filters,
        )  # fmt: skip
        tokens, logprobs, produced, active = to_host((*out, self._slots.produced, self._slots.active))
        done = []
        for slot, sequence in enumerate(self._in_slot):
            if sequence is None:
                continue
            new = int(produced[slot]) - before[slot]
            sequence.ids += tokens[:new, slot].tolist()
            sequence.logprobs += logprobs[:new, slot].tolist()
            if sample := self._finished(sequence, new, bool(active[slot])):
                self._in_slot[slot], self._keep[slot] = None, False
                row = sequence.row
                row.samples[sequence.index] = sample
                finished = tuple(sample for sample in row.samples if sample is not None)
                if len(finished) == len(row.samples):
                    done.append(Completion(row.request.id, finished))
                    row.samples.clear()  # the caller has them now
        return done

    def _finished(self, sequence: _Sequence, new: int, active: bool) -> Sample | None:
        tokenizer, prompt, ids = self._generator._tokenizer, sequence.row.prompt, sequence.ids
        if found := sequence.stops.find(ids, new):
            count, text = found
            return Sample(text, "stop", count, tuple(ids[:count]), tuple(sequence.logprobs[:count]))
        if active:
            return None
        ended = ids[-1] in self._end_ids
        text = response_text(tokenizer, prompt, ids[:-1] if ended else ids)
        return Sample(text, "stop" if ended else "length", len(ids), tuple(ids), tuple(sequence.logprobs))


def _in_order(rows: list[_Row], batch: int) -> list[_Row]:
    """Groups of rows that share their first chunk one after the other, then the rest; longest prompts first in each.

    Rows of one prefill then begin and end together, and rows of one time have caches of one length.
    """
    groups: dict[bytes, list[_Row]] = {}
    for row in rows:
        shared = row.prompt[:CHUNK].tobytes() if len(row.prompt) > CHUNK else b""
        groups.setdefault(shared, []).append(row)
    large = [group for start, group in groups.items() if start and len(group) >= batch]
    rest = [row for start, group in groups.items() if not start or len(group) < batch for row in group]
    return [row for group in (*large, rest) for row in sorted(group, key=lambda r: -len(r.prompt))]


def _stream(seed: int, request_id: str, index: int) -> np.ndarray:
    """[2] uint32: the key of a sample's random stream."""
    return np.frombuffer(hashlib.sha256(f"{seed} {index} {request_id}".encode()).digest()[:8], np.uint32)
