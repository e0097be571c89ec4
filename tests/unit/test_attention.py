"""Every attention implementation against torch, its gradient, and who may see whom, proved by gradient."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lm_jax.models import blockwise_attention
from lm_jax.models.attention import IMPLEMENTATIONS, KERNELS, attention, chosen

BLOCK = 16  # instead of 64, so that short rows have several blocks
REAL_BLOCK = blockwise_attention._block
HEAD_DIM = 8

# Lengths of the segments of each row; what is left of the row is padding.
RAGGED = ([13, 20, 4], [40], [], [1, 1, 7, 16])
# name: tokens a row, segments, query heads, key/value heads, window
CASES = {
    "ragged": (40, RAGGED, 4, 2, None),
    "block-multiple": (48, ([16, 16, 16], [15, 33], [48]), 2, 2, None),
    "one-block": (11, ([5, 6], [3]), 4, 1, None),
    "one-kv-head": (37, ([20, 17],), 4, 1, None),
    "window": (40, RAGGED, 4, 2, 5),
    "window-of-one": (40, RAGGED, 2, 1, 1),
    "window-over-a-block": (40, RAGGED, 2, 2, 21),
    "window-over-the-row": (20, ([20],), 2, 2, 4096),
}
# Interpreted, a kernel takes seconds a case, and has a test of its own below
LIVELY = [name for name in IMPLEMENTATIONS if name not in KERNELS]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise_attention, "_block", lambda length: BLOCK)


def make_segments(length, rows):
    ids = np.zeros((len(rows), length), np.int32)
    for b, lengths in enumerate(rows):
        filled = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        ids[b, : len(filled)] = filled
    return ids


def make_qkv(rows, length, heads, kv_heads, seed=0, dtype=np.float32, head_dim=HEAD_DIM):
    rng = np.random.default_rng(seed)
    shapes = [(rows, length, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    return [jnp.asarray(2 * rng.standard_normal(s), dtype) for s in shapes]


def visible(segment_ids, window):
    """[B, T, S] bool, by the definition."""
    t = np.arange(segment_ids.shape[1])
    seen = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids > 0)[:, :, None]
    return seen & (t[:, None] >= t) & (t[:, None] - t < (window or len(t)))


def torch_attention(q, k, v, segment_ids, window, d_out):
    """(out, d_q, d_k, d_v) of torch's fp32 attention; padding sees itself there and is zeroed afterwards."""
    q, k, v = (torch.tensor(np.asarray(x, np.float32)).transpose(1, 2).requires_grad_() for x in (q, k, v))
    mask = torch.tensor(visible(segment_ids, window) | np.eye(segment_ids.shape[1], dtype=bool))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None], enable_gqa=True)
    out = out.transpose(1, 2) * torch.tensor(segment_ids > 0)[..., None, None]
    out.backward(torch.tensor(np.asarray(d_out, np.float32)))
    return [out.detach().numpy(), *(x.grad.transpose(1, 2).numpy() for x in (q, k, v))]


@functools.partial(jax.jit, static_argnames=("window", "implementation"))
def with_gradients(q, k, v, segment_ids, d_out, window, implementation):
    def fn(q, k, v):
        return attention(q, k, v, segment_ids, window=window, implementation=implementation)

    out, pull_back = jax.vjp(fn, q, k, v)
    return [out, *pull_back(d_out)]


@pytest.mark.parametrize(
    ("name", "implementation"),
    [*itertools.product(CASES, LIVELY), *itertools.product(("ragged", "window-of-one"), KERNELS)],
)
def test_equals_torch(name, implementation):
    length, rows, heads, kv_heads, window = CASES[name]
    segment_ids = make_segments(length, rows)
    q, k, v = make_qkv(len(rows), length, heads, kv_heads)
    d_out = make_qkv(len(rows), length, heads, 1, seed=1)[0]  # not zero at padding: nothing may come back from there
    ours = with_gradients(q, k, v, segment_ids, d_out, window, implementation)
    theirs = torch_attention(q, k, v, segment_ids, window, d_out)
    for what, a, b in zip(("out", "d_q", "d_k", "d_v"), ours, theirs, strict=True):
        assert np.isfinite(a).all(), what
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5, err_msg=what)
        assert not np.asarray(a)[segment_ids == 0].any(), f"{what} is not zero at padding"


def test_unpatched_block(monkeypatch):
    """With the block that runs use, over a row that is no multiple of it."""
    monkeypatch.setattr(blockwise_attention, "_block", REAL_BLOCK)
    length = 300
    segment_ids = make_segments(length, ([130, 150], [290]))
    q, k, v = make_qkv(2, length, 2, 1)
    d_out = make_qkv(2, length, 2, 1, seed=1)[0]
    ours = with_gradients(q, k, v, segment_ids, d_out, None, "blockwise")
    for a, b in zip(ours, torch_attention(q, k, v, segment_ids, None, d_out), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window", [None, 150])
def test_kernels_equal_blockwise(window, head_dim, implementation, monkeypatch):
    """Over several of the kernel's blocks, two query heads a key/value head, padding within a block and beyond."""
    monkeypatch.setattr(blockwise_attention, "_block", REAL_BLOCK)
    length, rows = 300, ([40, 170, 60],)
    segment_ids = make_segments(length, rows)
    q, k, v = make_qkv(1, length, 2, 1, head_dim=head_dim)
    d_out = make_qkv(1, length, 2, 1, seed=1, head_dim=head_dim)[0]
    kernel, loops = (with_gradients(q, k, v, segment_ids, d_out, window, i) for i in (implementation, "blockwise"))
    for what, a, b in zip(("out", "d_q", "d_k", "d_v"), kernel, loops, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max(), err_msg=what)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_gpu_kernel_is_lowered_for_cuda(dtype, head_dim):
    """As far as one comes without a GPU: forward and backward as Triton's code, no loops of ours in their place."""
    q, k, v = (jax.ShapeDtypeStruct((2, 300, n, head_dim), dtype) for n in (4, 2, 2))
    segment_ids = jax.ShapeDtypeStruct((2, 300), jnp.int32)

    def loss(q, k, v, segment_ids):
        out = IMPLEMENTATIONS["triton"](q, k, v, segment_ids, window=None)
        return jnp.sum(out.astype(jnp.float32))

    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v, segment_ids).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "mha_forward" in text and "mha_backward" in text and "stablehlo.while" not in text


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation):
    """Inputs and outputs in bf16, softmax in fp32: near torch's fp32 result on the same inputs."""
    segment_ids = make_segments(40, RAGGED)
    q, k, v = make_qkv(len(RAGGED), 40, 4, 2, dtype=jnp.bfloat16)
    d_out = make_qkv(len(RAGGED), 40, 4, 1, seed=1, dtype=jnp.bfloat16)[0]
    ours = with_gradients(q, k, v, segment_ids, d_out, None, implementation)
    theirs = torch_attention(q, k, v, segment_ids, None, d_out)
    for what, a, b in zip(("out", "d_q", "d_k", "d_v"), ours, theirs, strict=True):
        assert a.dtype == jnp.bfloat16, what
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2e-2, atol=1.5e-2 * np.abs(b).max(), err_msg=what)


@pytest.mark.parametrize("implementation", LIVELY)
@pytest.mark.parametrize("window", [None, 6])
def test_sees_only_earlier_tokens_of_its_segment(implementation, window):
    """d out[t] / d v[s] is nonzero exactly where t may see s; d out[t] / d k[s] and d q[s] are exactly 0 elsewhere."""
    length, rows = 37, ([9, 17, 5], [37])
    segment_ids = make_segments(length, rows)
    q, k, v = make_qkv(len(rows), length, 2, 1)

    @jax.jit
    def rows_of_jacobian(q, k, v):
        fn = functools.partial(attention, segment_ids=segment_ids, window=window, implementation=implementation)
        _, pull_back = jax.vjp(fn, q, k, v)
        one_token = jnp.eye(length)[:, None, :, None, None] * jnp.ones((1, *q.shape))
        return jax.vmap(pull_back)(one_token)  # each [t, B, s, heads, E]

    may_see = visible(segment_ids, window)
    d_q, d_k, d_v = (np.moveaxis(np.abs(x).max((-1, -2)), 0, 1) for x in rows_of_jacobian(q, k, v))  # [B, t, s]
    np.testing.assert_array_equal(d_v != 0, may_see)
    assert not d_k[~may_see].any()
    assert not d_q[:, ~np.eye(length, dtype=bool)].any()
    sees_more = may_see.sum(-1, keepdims=True) > 1  # with one visible token the softmax is 1 whatever its key
    assert d_k[may_see & sees_more].all()
    assert d_q[np.eye(length, dtype=bool) & sees_more].all()


def test_blocks_of_other_segments_are_not_visited():
    """What blockwise attention saves: a poisoned block of another segment never enters the sums."""
    segment_ids = make_segments(3 * BLOCK, ([BLOCK, BLOCK, BLOCK],))
    q, k, v = make_qkv(1, 3 * BLOCK, 2, 1)
    k, v = (x.at[:, BLOCK : 2 * BLOCK].set(jnp.nan) for x in (k, v))
    out = np.isnan(attention(q, k, v, segment_ids, implementation="blockwise"))
    assert out[:, BLOCK : 2 * BLOCK].all()
    assert not out[:, :BLOCK].any() and not out[:, 2 * BLOCK :].any()


@pytest.mark.parametrize(
    ("platform", "head_dim", "expected"),
    [("tpu", 128, "splash"), ("tpu", 64, "splash"), ("tpu", 80, "blockwise"), ("cuda", 128, "blockwise")],
)
def test_what_auto_stands_for(platform, head_dim, expected):
    device = types.SimpleNamespace(platform=platform)
    assert chosen(types.SimpleNamespace(abstract_device=device), head_dim) == expected


def test_auto_is_the_cpus():
    segment_ids = make_segments(40, RAGGED)
    q, k, v = make_qkv(len(RAGGED), 40, 2, 1)
    auto, blockwise = (attention(q, k, v, segment_ids, implementation=i) for i in ("auto", "blockwise"))
    np.testing.assert_array_equal(auto, blockwise)
