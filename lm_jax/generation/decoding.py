"""The compiled half of the sampler: prefill, moving prompts into slots, and decoding in chunks of steps.

Axes: R rows of a prefill, B slots, P tokens of the longest prompt, T tokens of a chunk, D model, V vocabulary,
Z end tokens, M tokens between two looks.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm_jax.config import ComputeConfig, ModelConfig
from lm_jax.generation.token_choice import Filters, Strengths, choose_tokens
from lm_jax.models.cache import CHUNK, KVCache, cache_shapes, make_zeros
from lm_jax.models.decoder import Decoder, output_embedding
from lm_jax.models.linear import contract_rows, in_compute_dtype
from lm_jax.models.logprobs import without_padding
from lm_jax.sharding import BATCH_AXES, constrain, padded_shape


class Slots(NamedTuple):
    """B sequences in the middle of their generation."""

    cache: tuple[KVCache, ...]
    hidden: jax.Array  # [B, D] final hidden state of the last token in the cache
    ends: jax.Array  # [B] int32, tokens in the cache
    produced: jax.Array  # [B] int32, tokens of the response so far
    budget: jax.Array  # [B] int32, tokens that the response may have
    active: jax.Array  # [B] bool
    keys: jax.Array  # [B, 2] uint32, the random stream of each sequence
    seen: jax.Array | None  # [B, V] bool, tokens in prompt or response; with a repetition penalty only


class Prompts(NamedTuple):
    """R prompts whose keys and values are ready."""

    cache: tuple[KVCache, ...]
    hidden: jax.Array  # [R, D] of each prompt's last token


class Placement(NamedTuple):
    """Which prompt goes to which slot: J pairs, those with a slot of B or more go nowhere."""

    row: np.ndarray  # [J] int32 of the prompts
    slot: np.ndarray  # [J] int32
    budget: np.ndarray  # [J] int32
    keys: np.ndarray  # [J, 2] uint32


_ROWS, _CACHE, _WHOLE = PartitionSpec(BATCH_AXES), PartitionSpec(None, BATCH_AXES, "tensor"), PartitionSpec()
# What a step returns lies as what it was given: left to the compiler, each step's result would be a new layout to the
# next, which compiles anew for it
_SLOTS = Slots._make(_CACHE if name == "cache" else _ROWS for name in Slots._fields)
_PROMPTS = Prompts._make((_CACHE, _ROWS))


def make_slots(
    config: ModelConfig, compute: ComputeConfig, rows: int, length: int, with_seen: bool, mesh: Mesh
) -> Slots:
    """`rows` empty slots for sequences of at most `length` tokens."""
    return make_zeros(slot_shapes(config, compute, rows, length, with_seen, mesh))


def slot_shapes(
    config: ModelConfig, compute: ComputeConfig, rows: int, length: int, with_seen: bool, mesh: Mesh
) -> Slots:
    """The slots that `make_slots` makes, as ShapeDtypeStructs."""

    def each(dtype, *shape):
        return jax.ShapeDtypeStruct((rows, *shape), jnp.dtype(dtype), sharding=NamedSharding(mesh, _ROWS))

    return Slots(
        cache=cache_shapes(config, rows, length, compute.dtype, mesh),
        hidden=each(compute.dtype, config.d_model),
        ends=each(jnp.int32),
        produced=each(jnp.int32),
        budget=each(jnp.int32),
        active=each(bool),
        keys=each(jnp.uint32, 2),
        seen=each(bool, *padded_shape(("vocab",), (config.vocab_size,), mesh)) if with_seen else None,
    )


@functools.partial(jax.jit, static_argnames=("config", "compute"), donate_argnames=("cache",), out_shardings=_PROMPTS)
@in_compute_dtype
def prefill(
    params: dict,
    cache: tuple[KVCache, ...],
    tokens: jax.Array,
    lengths: jax.Array,
    first: jax.Array,
    config: ModelConfig,
    compute: ComputeConfig,
) -> Prompts:
    """Runs prompts through the model, a chunk of T tokens of every row at a time: one shape whatever their lengths.

    Args:
      cache: of R rows; chunks before `first` are in it already.
      tokens: [R, P] int32, P a multiple of T.
      lengths: [R] int32, at least 1.
      first: [] int32, the chunk to begin with; no row ends before it.
    """
    decoder = Decoder(config, compute)
    offsets = jnp.arange(CHUNK)

    def chunk(i, carry):
        hidden, cache = carry
        start = i * CHUNK
        # What pads a row's end stays within the context: a dynamic rope looks at the largest position
        positions = jnp.minimum(start + offsets, config.max_position - 1)
        out, cache = decoder.apply(
            {"params": params},
            jax.lax.dynamic_slice_in_dim(tokens, start, CHUNK, axis=1),
            jnp.broadcast_to(positions, (tokens.shape[0], CHUNK)),
            None,
            cache,
            jnp.minimum(lengths, start + CHUNK),
        )
        last = lengths - 1 - start
        here = (last >= 0) & (last < CHUNK)
        of_last = jnp.take_along_axis(out, jnp.clip(last, 0, CHUNK - 1)[:, None, None], axis=1)[:, 0]
        return jnp.where(here[:, None], of_last, hidden), cache

    hidden = jnp.zeros((tokens.shape[0], config.d_model), jnp.dtype(compute.dtype))
    hidden, cache = jax.lax.fori_loop(first, (jnp.max(lengths) - 1) // CHUNK + 1, chunk, (hidden, cache))
    return Prompts(cache, hidden)


@functools.partial(jax.jit, static_argnames=("exchange",), donate_argnames=("slots",), out_shardings=_SLOTS)
def place(
    slots: Slots, prompts: Prompts, tokens: jax.Array, lengths: jax.Array, to: Placement, exchange: bool
) -> Slots:
    """Copies prompts into slots, whatever those held.

    Args:
      tokens, lengths: [R, P] and [R] int32, the prompts'.
      exchange: False where every prompt goes to a slot in its own part of the mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Not left to the partitioner, which masks and moves whole caches: the few prompts go everywhere, slots stay
    return jax.shard_map(
        functools.partial(_place, parts=[mesh.shape[axis] for axis in BATCH_AXES], exchange=exchange),
        in_specs=(_SLOTS, _PROMPTS, _WHOLE, _WHOLE, _WHOLE),
        out_specs=_SLOTS,
        check_vma=False,
    )(slots, prompts, tokens, lengths, to)


def _place(slots: Slots, prompts: Prompts, tokens, lengths, to: Placement, parts, exchange) -> Slots:
    part = jax.lax.axis_index(BATCH_AXES[0]) * parts[1] + jax.lax.axis_index(BATCH_AXES[1])
    here = to.row // prompts.hidden.shape[0] == part  # the prompts that this part of the mesh has
    slot = to.slot - part * slots.ends.size
    slot = jnp.where((slot >= 0) & (slot < slots.ends.size), slot, slots.ends.size)  # others are dropped

    def take(x, axis):
        taken = jnp.take(x, to.row % prompts.hidden.shape[0], axis=axis)
        return jnp.where(here.reshape(-1, *(1,) * (x.ndim - axis - 1)), taken, jnp.zeros((), x.dtype))

    taken = jax.tree.map(functools.partial(take, axis=1), prompts.cache), take(prompts.hidden, 0)
    if exchange:
        flat, unravel = jax.flatten_util.ravel_pytree(taken)  # one exchange instead of one an array
        taken = unravel(jax.lax.psum(flat, BATCH_AXES))
    cache, hidden = taken

    def put(old, new):
        return old.at[slot].set(new, mode="drop")

    def put_blocks(old, new):
        return tuple(o.at[:, slot].set(n, mode="drop") for o, n in zip(old, new, strict=False)) + old[len(new) :]

    seen = slots.seen
    if seen is not None:
        given = jnp.arange(tokens.shape[1]) < lengths[:, None]
        rows = jnp.arange(tokens.shape[0])[:, None]
        in_prompt = jnp.zeros((tokens.shape[0], seen.shape[1]), bool).at[rows, tokens].max(given)
        seen = put(seen, in_prompt[to.row])
    return Slots(
        # Prompts' caches have the first blocks of the slots'; a ring that goes round has them all
        cache=tuple(
            KVCache(put_blocks(old.k, new.k), put_blocks(old.v, new.v))
            for old, new in zip(slots.cache, cache, strict=True)
        ),
        hidden=put(slots.hidden, hidden),
        ends=put(slots.ends, lengths[to.row]),
        produced=put(slots.produced, jnp.zeros_like(to.budget)),
        budget=put(slots.budget, to.budget),
        active=put(slots.active, True),
        keys=put(slots.keys, to.keys),
        seen=seen,
    )


@functools.partial(
    jax.jit,
    static_argnames=("steps", "config", "compute", "filters"),
    donate_argnames=("slots",),
    out_shardings=(_SLOTS, PartitionSpec(None, BATCH_AXES), PartitionSpec(None, BATCH_AXES)),
)
@in_compute_dtype
def decode(
    params: dict,
    slots: Slots,
    keep: jax.Array,
    end_ids: jax.Array,
    known: jax.Array | None,
    strengths: Strengths,
    steps: int,
    config: ModelConfig,
    compute: ComputeConfig,
    filters: Filters,
) -> tuple[Slots, jax.Array, jax.Array]:
    """Up to `steps` tokens for every active slot; ends early where none is left.

    Args:
      keep: [B] bool, False for sequences to give up.
      end_ids: [Z] int32, tokens after which a sequence is done.
      known: [V] bool, tokens that may be chosen; None: all.

    Returns:
      (slots, tokens [M, B] int32, log-probs [M, B] fp32), M = steps. A slot's tokens are the first ones of its column,
      as many as `produced` grew by.
    """
    decoder = Decoder(config, compute)
    embedding = constrain(output_embedding(params, config), "vocab", "embed")
    rows = jnp.arange(keep.shape[0])
    if known is not None:  # rows that pad the vocabulary on this mesh are no tokens either
        known = jnp.pad(known, (0, embedding.shape[0] - known.size))

    def unfinished(carry):
        step, slots, *_ = carry
        return (step < steps) & jnp.any(slots.active)

    def one(carry):
        step, slots, tokens, logprobs = carry
        logits = without_padding(contract_rows(slots.hidden, embedding, jnp.float32), config.vocab_size)
        logits = constrain(logits, "batch", "vocab")
        uniform = _uniform(slots.keys, slots.produced)
        token, logprob = choose_tokens(logits, slots.seen, known, uniform, filters, strengths)
        produced = slots.produced + slots.active
        ended = jnp.any(token[:, None] == end_ids, axis=1) | (produced >= slots.budget)
        active = slots.active & ~ended
        # A finished slot computes on, as a row of padding that nobody reads and for which no block is read or written
        ends = jnp.where(active, slots.ends + 1, 0)
        positions = jnp.maximum(ends - 1, 0)[:, None]
        made: Any = decoder.apply({"params": params}, token[:, None], positions, None, slots.cache, ends)
        hidden, cache = made
        seen = slots.seen if slots.seen is None else slots.seen.at[rows, token].set(True)
        slots = Slots(cache, hidden[:, 0], ends, produced, slots.budget, active, slots.keys, seen)
        return step + 1, slots, tokens.at[step].set(token), logprobs.at[step].set(logprob)

    tokens = jnp.zeros((steps, keep.shape[0]), jnp.int32)
    carry = (jnp.int32(0), slots._replace(active=slots.active & keep), tokens, tokens.astype(jnp.float32))
    _, slots, tokens, logprobs = jax.lax.while_loop(unfinished, one, carry)
    return slots, tokens, logprobs


def _uniform(keys, produced):
    """[B] in [0, 1): a function of the row's key and the position in its response alone."""

    def one(key, position):
        return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position))

    return jax.vmap(one)(keys, produced)
