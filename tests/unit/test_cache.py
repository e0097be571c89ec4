"""The cache against attention without one: any chunking, ragged rows, rings, and what must not be touched."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.config import MeshConfig, ModelConfig, RopeConfig
from lm_jax.models import cache as cache_module
from lm_jax.models.attention import reference_attention
from lm_jax.models.cache import (
    CHUNK,
    LayerOrder,
    cache_shapes,
    cached_attention,
    layer_order,
    make_cache,
    write_cache,
)
from lm_jax.sharding import make_mesh

HEADS, KV_HEADS, DIM, ROWS = 4, 2, 8, 4
# window, lengths of the rows' prompts, tokens decoded after them (less in all than the longest row has room for)
CASES = {
    "plain": (None, (1, 31, 33, 150), 70),
    "chunk-multiples": (None, (32, 64, 96, 128), 40),
    "window": (40, (1, 32, 60, 150), 90),  # a ring of 128: all but the first two begin beyond it or cross its end
    "window-beyond-rows": (1000, (5, 20, 64, 90), 40),
    "window-of-one": (1, (1, 30, 63, 130), 70),
    "window-of-a-block": (64, (64, 65, 127, 200), 70),
    "window-fills-ring": (96, (95, 96, 97, 128), 140),  # 96 + a chunk is a whole number of blocks: no place is spare
}


def config(windows, **fields):
    return ModelConfig(
        "qwen2", 64, len(windows), 32, 48, HEADS, KV_HEADS, DIM, RopeConfig(1e4), 1e-5, 64, layer_windows=windows,
        **fields,
    )  # fmt: skip


@functools.cache
def mesh():
    return make_mesh(MeshConfig(1, 1, 1))


def empty_cache(windows, rows, length, fill=0.0, stacked=False):
    caches = make_cache(config(windows), rows, length, "float32", mesh())
    if stacked:  # as where layers of one window share a cache
        caches = (jax.tree.map(lambda *x: jnp.concatenate(x), *caches),)
    return jax.tree.map(lambda x: jnp.full_like(x, fill), caches)


ORDER = LayerOrder((0, 0), (0, 1))


@functools.partial(jax.jit, static_argnames="window")
def step(cache, q, k, v, positions, ends, window):
    """As the decoder does it, for a cache of two layers: (out of the second layer, cache). k, v [N, B, T, K, E]."""
    held = jnp.minimum(ends, positions[:, 0])
    out = cached_attention(q, k[1], v[1], cache[0], jnp.int32(1), positions, held, window=window)
    return out, write_cache(cache, (k, v), ORDER, positions, ends > positions[:, 0])


def make_qkv(rows, length, seed):
    rng = np.random.default_rng(seed)
    shapes = ((rows, length, HEADS, DIM), (2, rows, length, KV_HEADS, DIM), (2, rows, length, KV_HEADS, DIM))
    return [1.5 * rng.standard_normal(s).astype(np.float32) for s in shapes]


def fed(name, fill, seed):
    """Attention of every token of every row through the cache: prompts in chunks, then tokens, rows stopping early."""
    window, lengths, decoded = CASES[name]
    rng = np.random.default_rng(seed)
    lengths = np.array(lengths)
    stops = lengths + rng.integers(1, decoded + 1, ROWS)  # a row is padding from then on
    stops[int(rng.integers(ROWS))] = lengths.max() + decoded if window else stops.max()
    total = int(stops.max())
    q, k, v = make_qkv(ROWS, total + CHUNK, seed)
    cache = empty_cache((window, window), ROWS, total, fill, stacked=True)
    out = np.full((ROWS, total, HEADS, DIM), np.nan, np.float32)
    for start in range(0, int(lengths.max()), CHUNK):
        at = slice(start, start + CHUNK)
        positions = jnp.broadcast_to(jnp.arange(start, start + CHUNK), (ROWS, CHUNK))
        ends = jnp.minimum(lengths, start + CHUNK)
        got, cache = step(cache, q[:, at], k[:, :, at], v[:, :, at], positions, ends, window)
        for r in range(ROWS):
            size = max(min(CHUNK, lengths[r] - start), 0)
            out[r, start : start + size] = got[r, :size]
    ends = lengths.copy()
    while (ends < stops).any():
        active = ends < stops
        rows, at = np.arange(ROWS), np.minimum(ends, total - 1)
        positions = np.where(active, ends, 0)[:, None].astype(np.int32)
        one = q[rows, at][:, None], k[:, rows, at][:, :, None], v[:, rows, at][:, :, None]
        got, cache = step(cache, *one, positions, np.where(active, ends + 1, 0), window)
        for r in np.flatnonzero(active):
            out[r, ends[r]] = got[r, 0]
        ends = ends + active
    return window, stops, q, k, v, out


@pytest.mark.parametrize("fill", [0.0, 50.0], ids=["new", "used"])
@pytest.mark.parametrize("name", CASES)
def test_equals_reference_attention(name, fill):
    """Whatever the slot held before. The oracle sees all tokens of a row at once."""
    window, stops, q, k, v, out = fed(name, fill, seed=len(name))
    segment_ids = (np.arange(out.shape[1]) < stops[:, None]).astype(np.int32)
    whole = [x[:, : out.shape[1]] for x in (q, k[1], v[1])]
    expected = jax.jit(reference_attention, static_argnames="window")(*whole, segment_ids, window=window)
    for r, length in enumerate(stops):
        np.testing.assert_allclose(out[r, :length], expected[r, :length], rtol=1e-4, atol=2e-5, err_msg=f"row {r}")


def test_a_row_has_the_same_bits_beside_longer_ones():
    """Blocks read for a neighbour, and a cache with more of them, change nothing."""
    q, k, v = make_qkv(2, 256, 0)

    def last(length, stop):
        cache = empty_cache((None, None), 2, length, stacked=True)
        for start in range(0, stop, CHUNK):
            at = slice(start, start + CHUNK)
            positions = jnp.broadcast_to(jnp.arange(start, start + CHUNK), (2, CHUNK))
            ends = jnp.minimum(jnp.array([40, stop]), start + CHUNK)
            _, cache = step(cache, q[:, at], k[:, :, at], v[:, :, at], positions, ends, None)
        one = q[:, 40:41], k[:, :, 40:41], v[:, :, 40:41]
        return np.asarray(step(cache, *one, jnp.array([[40], [stop]]), jnp.array([41, stop + 1]), None)[0])

    np.testing.assert_array_equal(last(64, 41)[0], last(256, 200)[0])
    assert (last(64, 41)[1] != last(256, 200)[1]).any()


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("tokens", [1, CHUNK])
def test_padding_rows_are_left_as_they_are(tokens, window):
    cache = empty_cache((window, window), ROWS, 200, stacked=True)
    filled = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.ndim), x.shape), cache)
    before = jax.tree.map(np.asarray, filled)
    _, k, v = make_qkv(ROWS, tokens, 1)
    starts = np.full(ROWS, 64) if tokens > 1 else np.array([0, 63, 64, 150])
    valid = np.array([True, False, True, False])
    positions = starts[:, None] + np.arange(tokens)
    after = write_cache(filled, (jnp.asarray(k), jnp.asarray(v)), ORDER, jnp.asarray(positions), jnp.asarray(valid))
    places = cache[0].places
    whole = [np.concatenate([b for b in x[0].k], axis=4) for x in (before, after)]  # [N, B, K, E, S]
    values = [np.concatenate([b for b in x[0].v], axis=3) for x in (before, after)]  # [N, B, K, S, E]
    expected_k, expected_v = whole[0].copy(), values[0].copy()
    for r in np.flatnonzero(valid):
        for t in range(tokens):
            expected_k[:, r, :, :, positions[r, t] % places] = k[:, r, t]
            expected_v[:, r, :, positions[r, t] % places] = v[:, r, t]
    np.testing.assert_array_equal(whole[1], expected_k)
    np.testing.assert_array_equal(values[1], expected_v)


def test_layers_go_to_their_members():
    """Layer i of the model writes into the member, and the layer of it, that `layer_order` names."""
    windows = (7, None, 7)
    k = jnp.broadcast_to(jnp.arange(1.0, 4)[:, None, None, None, None], (3, 1, 1, KV_HEADS, DIM))
    for members in (2, 3):
        c = config(windows)
        order = layer_order(c, members)
        cache = empty_cache(windows, 1, 64)
        if members == 2:
            of = [[i for i, w in enumerate(windows) if w == window] for window in c.distinct_windows]
            cache = tuple(jax.tree.map(lambda *x: jnp.concatenate(x), *(cache[i] for i in layers)) for layers in of)
        out = write_cache(cache, (k, -k), order, jnp.array([[3]]), jnp.array([True]))
        for i in range(3):
            assert (out[order.member[i]].k[0][order.layer[i], 0, :, :, 3] == i + 1).all()
            assert (out[order.member[i]].v[0][order.layer[i], 0, :, 3] == -i - 1).all()
            assert windows[i] == windows[order.member.index(order.member[i])]


@pytest.mark.parametrize("window", [None, 1, 33, 4096, 10**9])
def test_blocks_cover_every_length(window):
    """Enough places, whole chunks in every block, and a shorter cache's blocks are the first of a longer one's."""
    longest = cache_module._blocks(40_000, None)
    for length in [*range(1, 300), *range(300, 40_001, 37), 40_000]:
        blocks = cache_module._blocks(length, window)
        places = sum(blocks)
        needed = length if window is None else min(length, window + CHUNK)
        assert needed <= places < max(needed * 1.25 + 64, needed + 64)
        assert all(b % CHUNK == 0 and 0 < b <= 1024 for b in blocks)
        assert blocks == longest[: len(blocks)]
    assert len(longest) < 64, "each block is compiled"


def test_shapes_are_those_of_the_cache():
    shapes, made = (f(config((None, 7)), 2, 100, "bfloat16", mesh()) for f in (cache_shapes, make_cache))
    assert jax.tree.structure(shapes) == jax.tree.structure(made)
    for shape, array in zip(jax.tree.leaves(shapes), jax.tree.leaves(made), strict=True):
        assert (shape.shape, shape.dtype, shape.sharding) == (array.shape, array.dtype, array.sharding)
        assert not array.any()
