"""The key/value cache, and attention of new tokens over it: one code for prefill (T tokens a row) and decode (one).

Axes: N layers, B rows, T new tokens, S places of a row, C places of a block, H query heads, K key/value heads, G = H/K,
E head_dim.

A row's token at position p lies at place p mod S, so a cache as long as its rows is plain and one as long as a sliding
window is a ring. Which position a place holds follows from the row's length alone; nothing is ever cleared. Layers only
read the cache: their new keys and values come back together and are written once.

The places are cut into blocks at fixed bounds. Each is reduced by itself and merged in order (online softmax, arXiv
2205.14135, algorithm 1), the new tokens among themselves last. A block that holds nothing for a row changes no bit of
it, so a row's numbers do not depend on how long its neighbours are, and blocks beyond the longest row are not read.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm_jax.config import ModelConfig
from lm_jax.models.attention import kv_head_repeats
from lm_jax.sharding import BATCH_AXES

CHUNK = 32  # tokens a row of a prefill step; divides every block
_SMALLEST, _LARGEST = 64, 1024  # C, growing by a quarter: little is read in vain, and long rows are few blocks
_HIDDEN = -1e30  # added to the score of what a token may not see; finite, so that no difference is NaN

_ROWS = PartitionSpec(BATCH_AXES)
_CACHE = PartitionSpec(None, BATCH_AXES, "tensor")
_HEADS = PartitionSpec(BATCH_AXES, None, "tensor", None)


class KVCache(NamedTuple):
    """N layers of one window. The keys' last axis is the place: a query times a block then reads memory in order."""

    k: tuple[jax.Array, ...]  # a block each: [N, B, K, E, C]
    v: tuple[jax.Array, ...]  # [N, B, K, C, E]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First place and end of every block."""
        ends = list(itertools.accumulate(block.shape[-1] for block in self.k))
        return list(zip([0, *ends], ends, strict=False))

    @property
    def places(self) -> int:
        """S."""
        return self.spans[-1][1]


class LayerOrder(NamedTuple):
    """For every layer of the model: the cache's member that holds it, and which of the member's layers it is."""

    member: tuple[int, ...]
    layer: tuple[int, ...]


def layer_order(config: ModelConfig, members: int) -> LayerOrder:
    """Members hold the layers of one window each, or one layer each."""
    windows, number = config.layer_windows, config.num_layers
    if members == number:
        return LayerOrder(tuple(range(number)), (0,) * number)
    return LayerOrder(
        tuple(config.distinct_windows.index(w) for w in windows),
        tuple(windows[:i].count(w) for i, w in enumerate(windows)),
    )


def make_cache(config: ModelConfig, rows: int, length: int, dtype: str, mesh: Mesh) -> tuple[KVCache, ...]:
    """An empty cache on `mesh`; see `cache_shapes`."""
    return make_zeros(cache_shapes(config, rows, length, dtype, mesh))


def make_zeros(shapes):
    """A pytree of ShapeDtypeStructs with shardings -> the same of arrays."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding), shapes)


def cache_shapes(config: ModelConfig, rows: int, length: int, dtype: str, mesh: Mesh) -> tuple[KVCache, ...]:
    """The cache on `mesh`, as ShapeDtypeStructs.

    Args:
      rows: B, a multiple of the mesh's parts of a batch.
      length: the most tokens a row will hold.
    """
    heads = config.num_kv_heads * kv_head_repeats(config.num_heads, config.num_kv_heads, mesh.shape["tensor"])
    # XLA on CPU copies a slice of a stacked array before it multiplies by it, which costs more than the product
    apart = mesh.devices.flat[0].platform == "cpu"
    members = [(w, 1) for w in config.layer_windows] if apart else [
        (w, config.layer_windows.count(w)) for w in config.distinct_windows
    ]  # fmt: skip

    def block(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, _CACHE))

    return tuple(
        KVCache(
            tuple(block(layers, rows, heads, config.head_dim, c) for c in _blocks(length, window)),
            tuple(block(layers, rows, heads, c, config.head_dim) for c in _blocks(length, window)),
        )
        for window, layers in members
    )


def _blocks(length: int, window: int | None) -> list[int]:
    """Sizes of the blocks for rows of `length` tokens. A ring has room for a chunk beyond what its first token sees."""
    if window is not None:
        length = min(length, window + CHUNK)
    blocks = [_SMALLEST]
    while sum(blocks) < length:
        blocks.append(min(max(sum(blocks) // 4 // _SMALLEST, 1) * _SMALLEST, _LARGEST))
    return blocks


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KVCache,
    layer: jax.Array,
    positions: jax.Array,
    held: jax.Array,
    *,
    window: int | None,
) -> jax.Array:
    """Attention of new tokens over what their rows hold and over themselves, with fp32 softmax.

    Args:
      q: [B, T, H, E]; k, v: [B, T, K, E]; rotary embedding already applied.
      layer: [] int32, which of the cache's N layers.
      positions: [B, T] int32, consecutive in a row.
      held: [B] int32, tokens of each row that are in the cache; where it is less than the row's first position, the row
        is padding and so is its result.

    Returns:
      [B, T, H, E] in q's dtype.
    """
    fn = functools.partial(_attend, window=window)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return fn(q, k, v, cache, layer, positions, held)
    repeats = kv_head_repeats(q.shape[2], k.shape[2], mesh.shape["tensor"])
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    sharded = jax.shard_map(
        fn,
        in_specs=(_HEADS, _HEADS, _HEADS, _CACHE, PartitionSpec(), _ROWS, _ROWS),
        out_specs=_HEADS,
        check_vma=False,
    )
    return sharded(q, k, v, cache, layer, positions, held)


def _attend(q, k, v, cache: KVCache, layer, positions, held, window):
    batch, tokens, heads, dim = q.shape
    kv_heads = k.shape[2]
    groups = heads // kv_heads
    # [B, K, G*T, E]: one product for all queries that share keys
    q = q.reshape(batch, tokens, kv_heads, groups, dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, groups * tokens, dim)

    def merge(carry, keys, values, at):
        """keys [B, K, E, C], values [B, K, C, E], at [B, C]: their positions, negative where there is none."""
        top, total, acc = carry
        at = at[:, None]
        visible = (at >= 0) & (at <= positions[..., None])  # [B, T, C]
        if window is not None:
            visible &= positions[..., None] - at < window
        hidden = jnp.tile(jnp.where(visible, 0.0, _HIDDEN), (1, groups, 1))[:, None]  # [B, 1, G*T, C]
        scores = jnp.einsum("bkqe,bkec->bkqc", q, keys, preferred_element_type=jnp.float32) * dim**-0.5 + hidden
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        probs = jnp.exp(scores - new_top[..., None])
        decay = jnp.exp(top - new_top)
        out = jnp.einsum("bkqc,bkce->bkqe", probs.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return new_top, total * decay + jnp.sum(probs, axis=-1), acc * decay[..., None] + out

    # Where nothing was visible yet, sums are of no meaning; the decay to the first score that counts is exactly zero.
    # The last merge always has one: a token sees itself.
    carry = (
        jnp.full(q.shape[:3], _HIDDEN, jnp.float32),
        jnp.zeros(q.shape[:3], jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    longest, last = jnp.max(held), held[:, None] - 1
    for (start, stop), block_k, block_v in zip(cache.spans, cache.k, cache.v, strict=True):
        at = _positions(last, jnp.arange(start, stop), cache.places, window)

        def read(carry, block_k=block_k, block_v=block_v, at=at):
            return merge(carry, _layer(block_k, layer), _layer(block_v, layer), at)

        carry = jax.lax.cond(longest > start, read, lambda carry: carry, carry)
    _, total, acc = merge(carry, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), positions)
    out = acc / total[..., None]
    out = out.reshape(batch, kv_heads, groups, tokens, dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, tokens, heads, dim).astype(q.dtype)


def _positions(last, place, places, window):
    """[B, C]: the position that each place [C] of `places` holds, of rows whose last one is [B, 1]; negative: none."""
    if window is None:  # as long as its rows, so nothing goes round, and division is slow on a CPU
        return jnp.where(place <= last, place, -1)
    return last - (last - place) % places


def _layer(block, layer):
    return block[0] if block.shape[0] == 1 else jax.lax.dynamic_index_in_dim(block, layer, keepdims=False)


def write_cache(
    cache: tuple[KVCache, ...],
    new: tuple[jax.Array, jax.Array],
    order: LayerOrder,
    positions: jax.Array,
    valid: jax.Array,
) -> tuple[KVCache, ...]:
    """Puts new keys and values, each [N, B, T, K, E] for all layers of the model, at their positions [B, T].

    With T > 1 all rows begin at the same multiple of T. Rows [B] that are not `valid` are left as they are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    fn = functools.partial(_write, order=order)
    if mesh.empty or mesh.size == 1:
        return fn(cache, new, positions, valid)
    k, v = (jnp.repeat(x, cache[0].k[0].shape[2] // x.shape[3], axis=3) for x in new)
    news = PartitionSpec(None, BATCH_AXES, None, "tensor")
    return jax.shard_map(
        fn, in_specs=(_CACHE, news, _ROWS, _ROWS), out_specs=_CACHE, check_vma=False
    )(cache, (k, v), positions, valid)  # fmt: skip


def _write(cache, new, positions, valid, order: LayerOrder):
    put: Callable[..., KVCache] = _write_token if positions.shape[1] == 1 else _write_chunk
    return tuple(
        put(kv, *(x[jnp.array([i for i, m in enumerate(order.member) if m == member])] for x in new), positions, valid)
        for member, kv in enumerate(cache)
    )


def _write_token(cache: KVCache, k, v, positions, valid):
    """k, v [N, B, 1, K, E]."""
    rows = jnp.arange(positions.shape[0])
    place = jnp.where(valid, positions[:, 0] % cache.places, cache.places)
    # What lies in another block is dropped, and must not count as negative from this one's end
    at = [jnp.where((place >= start) & (place < stop), place - start, stop) for start, stop in cache.spans]
    k, v = jnp.moveaxis(k[:, :, 0], 0, 1), jnp.moveaxis(v[:, :, 0], 0, 1)  # [B, N, K, E]
    options: dict[str, Any] = {"mode": "drop", "unique_indices": True}
    return KVCache(
        tuple(block.at[:, rows, :, :, i].set(k, **options) for block, i in zip(cache.k, at, strict=True)),
        tuple(block.at[:, rows, :, i].set(v, **options) for block, i in zip(cache.v, at, strict=True)),
    )


def _write_chunk(cache: KVCache, k, v, positions, valid):
    """k, v [N, B, T, K, E]; the whole chunk lies in one block."""
    tokens, place = positions.shape[1], positions[0, 0] % cache.places
    rows = valid[None, :, None, None, None]

    def put(block, start, stop, new, axis):
        def write(block):
            where = [0] * 5
            where[axis] = place - start
            kept = jax.lax.dynamic_slice(block, where, new.shape)
            return jax.lax.dynamic_update_slice(block, jnp.where(rows, new, kept), where)

        return jax.lax.cond((place >= start) & (place + tokens <= stop), write, lambda block: block, block)

    k, v = k.transpose(0, 1, 3, 4, 2).astype(cache.k[0].dtype), v.transpose(0, 1, 3, 2, 4).astype(cache.v[0].dtype)
    return KVCache(
        tuple(put(block, *span, k, 4) for block, span in zip(cache.k, cache.spans, strict=True)),
        tuple(put(block, *span, v, 3) for block, span in zip(cache.v, cache.spans, strict=True)),
    )
