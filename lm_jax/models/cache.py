"""The key/value cache, and attention of new tokens over it: one code for prefill (T tokens a row) and decode (one).

Axes: N layers, B rows, T new tokens, S places of the cache, C places of a block, H query heads, K key/value heads,
G = H/K, E head_dim.

A row's token at position p lies at place p mod S, so a cache as long as its rows is plain and one as long as a sliding
window is a ring. Which position a place holds follows from the row's length alone; nothing is ever cleared.
Every block of C keys is reduced by itself and blocks are merged in their order (online softmax, arXiv 2205.14135,
algorithm 1). So a row's numbers do not depend on how long its neighbours or the cache are: a block that holds nothing
for a row changes no bit of it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm_jax.config import ModelConfig
from lm_jax.models.attention import kv_head_repeats
from lm_jax.sharding import BATCH_AXES

BLOCK = 128  # C; a multiple of the TPU's lanes
CHUNK = 64  # tokens a row of a prefill step; divides BLOCK

_ROWS = PartitionSpec(BATCH_AXES)
_CACHE = PartitionSpec(None, BATCH_AXES, "tensor")
_HEADS = PartitionSpec(BATCH_AXES, None, "tensor", None)


class KVCache(NamedTuple):
    """The layers that share a window. The keys' last axis is S: a block times a query then reads memory in order."""

    k: jax.Array  # [N, B, K, E, S]
    v: jax.Array  # [N, B, K, S, E]


def make_cache(config: ModelConfig, rows: int, length: int, dtype: str, mesh: Mesh) -> tuple[KVCache, ...]:
    """An empty cache on `mesh`: one member for each of `config.distinct_windows`, in that order.

    Args:
      rows: B, a multiple of the mesh's parts of a batch.
      length: the most tokens a row will hold.
    """
    heads = config.num_kv_heads * kv_head_repeats(config.num_heads, config.num_kv_heads, mesh.shape["tensor"])
    sharding = NamedSharding(mesh, _CACHE)

    @functools.partial(jax.jit, out_shardings=sharding)
    def zeros():
        caches = []
        for window in config.distinct_windows:
            layers, places = config.layer_windows.count(window), cache_places(length, window)
            caches.append(
                KVCache(
                    jnp.zeros((layers, rows, heads, config.head_dim, places), dtype),
                    jnp.zeros((layers, rows, heads, places, config.head_dim), dtype),
                )
            )
        return tuple(caches)

    return zeros()


def cache_places(length: int, window: int | None) -> int:
    """S: `length`, or with a window what keeps it whole for the first token of a chunk; whole blocks."""
    needed = length if window is None else min(length, window + CHUNK)
    return -(-needed // BLOCK) * BLOCK


def key_positions(ends: jax.Array, places: int) -> jax.Array:
    """[B, S] int32: the position that each place holds in rows that have `ends` [B] tokens; negative where none."""
    last = ends[:, None] - 1
    return last - (last - jnp.arange(places)) % places


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KVCache,
    layer: jax.Array,
    positions: jax.Array,
    ends: jax.Array,
    keys_at: jax.Array,
    *,
    window: int | None,
) -> tuple[jax.Array, KVCache]:
    """Writes the new tokens' keys and values, then attends over all that the rows hold.

    Args:
      q: [B, T, H, E]; k, v: [B, T, K, E]; rotary embedding already applied.
      layer: [] int32, which of the cache's N layers.
      positions: [B, T] int32, consecutive in a row. With T > 1 all rows begin at the same multiple of T.
      ends: [B] int32, tokens of each row, the new ones counted; what lies beyond is padding, and a row that is all
        padding is left as it is.
      keys_at: [B, S], `key_positions(ends, S)`.

    Returns:
      ([B, T, H, E] in q's dtype, the cache).
    """
    fn = functools.partial(_write_and_attend, window=window)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return fn(q, k, v, cache, layer, positions, ends, keys_at)
    repeats = kv_head_repeats(q.shape[2], k.shape[2], mesh.shape["tensor"])
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    sharded = jax.shard_map(
        fn,
        in_specs=(_HEADS, _HEADS, _HEADS, KVCache(_CACHE, _CACHE), PartitionSpec(), _ROWS, _ROWS, _ROWS),
        out_specs=(_HEADS, KVCache(_CACHE, _CACHE)),
        check_vma=False,
    )
    return sharded(q, k, v, cache, layer, positions, ends, keys_at)


def _write_and_attend(q, k, v, cache, layer, positions, ends, keys_at, window):
    cache = _write(cache, layer, k.astype(cache.k.dtype), v.astype(cache.v.dtype), positions, ends)
    return _attend(q, cache, layer, positions, keys_at, window), cache


def _write(cache: KVCache, layer, k, v, positions, ends) -> KVCache:
    rows, tokens = positions.shape
    places = positions % cache.k.shape[-1]
    if tokens == 1:
        row, place = jnp.arange(rows), places[:, 0]
        return KVCache(
            cache.k.at[layer, row, :, :, place].set(k[:, 0], unique_indices=True),
            cache.v.at[layer, row, :, place].set(v[:, 0], unique_indices=True),
        )
    # In a ring, the padding of a row that ended chunks ago would lie where its last tokens are
    begun = (ends > positions[:, 0])[None, :, None, None, None]

    def put(old, new, start):
        kept = jax.lax.dynamic_slice(old, start, new.shape)
        return jax.lax.dynamic_update_slice(old, jnp.where(begun, new, kept), start)

    place = places[0, 0]
    return KVCache(
        put(cache.k, k.transpose(0, 2, 3, 1)[None], (layer, 0, 0, 0, place)),
        put(cache.v, v.transpose(0, 2, 1, 3)[None], (layer, 0, 0, place, 0)),
    )


def _attend(q, cache: KVCache, layer, positions, keys_at, window):
    batch, tokens, heads, dim = q.shape
    kv_heads = cache.k.shape[2]
    groups = heads // kv_heads
    # [B, K, G*T, E]: one product for all queries that share keys
    q = q.reshape(batch, tokens, kv_heads, groups, dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, groups * tokens, dim)

    def block(j, carry):
        top, total, acc = carry
        at = jax.lax.dynamic_slice_in_dim(keys_at, j * BLOCK, BLOCK, axis=1)[:, None]  # [B, 1, C]
        k = jax.lax.dynamic_slice(cache.k, (layer, 0, 0, 0, j * BLOCK), (1, batch, kv_heads, dim, BLOCK))[0]
        v = jax.lax.dynamic_slice(cache.v, (layer, 0, 0, j * BLOCK, 0), (1, batch, kv_heads, BLOCK, dim))[0]
        scores = jnp.einsum("bkqe,bkec->bkqc", q, k, preferred_element_type=jnp.float32) * dim**-0.5
        visible = (at >= 0) & (at <= positions[..., None])
        if window is not None:
            visible &= positions[..., None] - at < window
        visible = jnp.tile(visible, (1, groups, 1))[:, None]  # [B, 1, G*T, C]
        new_top = jnp.maximum(top, jnp.max(jnp.where(visible, scores, -jnp.inf), axis=-1))
        finite_top = jnp.where(jnp.isfinite(new_top), new_top, 0.0)
        probs = jnp.where(visible, jnp.exp(scores - finite_top[..., None]), 0.0)
        decay = jnp.exp(top - finite_top)
        out = jnp.einsum("bkqc,bkce->bkqe", probs.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return new_top, total * decay + jnp.sum(probs, axis=-1), acc * decay[..., None] + out

    start = (
        jnp.full(q.shape[:3], -jnp.inf, jnp.float32),
        jnp.zeros(q.shape[:3], jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    blocks = jnp.minimum(jnp.max(positions) // BLOCK + 1, keys_at.shape[1] // BLOCK)
    _, total, acc = jax.lax.fori_loop(0, blocks, block, start)
    out = acc / jnp.where(total == 0.0, 1.0, total)[..., None]
    out = out.reshape(batch, kv_heads, groups, tokens, dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, tokens, heads, dim).astype(q.dtype)
