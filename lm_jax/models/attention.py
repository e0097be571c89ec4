"""Causal, segment-aware, grouped-query, sliding-window attention behind one interface.

Axes: B rows, T tokens, H query heads, K key/value heads, G = H/K, E head_dim.
Rows are packed: a token attends to earlier tokens of its own segment, no further back than the window. Segment 0 is
padding: its queries give zeros. Implementations register themselves in IMPLEMENTATIONS and share one test.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm_jax.models import blockwise_attention, splash_attention, triton_attention
from lm_jax.sharding import BATCH_AXES


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    window: int | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Scaled dot-product attention with fp32 softmax.

    Args:
      q: [B, T, H, E]; k, v: [B, T, K, E] with H a multiple of K; rotary embedding already applied.
      segment_ids: [B, T] int32, equal ids contiguous within a row, 0 for padding.
      window: tokens that a query sees, itself included; None for all earlier ones.
      implementation: a key of IMPLEMENTATIONS, or "auto" for the platform's.

    Returns:
      [B, T, H, E] in q's dtype; zeros at padding.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if implementation == "auto":
        implementation = chosen(mesh, q.shape[-1])
    fn = functools.partial(IMPLEMENTATIONS[implementation], window=window)
    if implementation in KERNELS:
        fn = functools.partial(fn, interpret=_platform(mesh) != KERNELS[implementation])
    if mesh.empty or mesh.size == 1:
        return fn(q, k, v, segment_ids)
    # Rows and heads are independent, so each device attends over what it holds, with no collective inside.
    repeats = kv_head_repeats(q.shape[2], k.shape[2], mesh.shape["tensor"])
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    heads = PartitionSpec(BATCH_AXES, None, "tensor", None)
    sharded = jax.shard_map(
        fn, in_specs=(heads, heads, heads, PartitionSpec(BATCH_AXES, None)), out_specs=heads, check_vma=False
    )
    return sharded(q, k, v, segment_ids)


def chosen(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, head_dim: int) -> str:
    """The implementation that "auto" stands for on the devices of a mesh; on those of this machine if it is empty.

    On a GPU it is the CPU's, until "triton" has run on one. What cuDNN offers through `jax.nn.dot_product_attention`
    ignores segments.
    """
    return "splash" if _platform(mesh) == "tpu" and splash_attention.fits(head_dim) else "blockwise"


def _platform(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> str:
    # Not the default backend: a plan compiles for devices that are not here
    abstract: Any = getattr(mesh, "abstract_mesh", mesh)
    device = abstract.abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def kv_head_repeats(num_heads: int, num_kv_heads: int, parts: int) -> int:
    """How often each key/value head is repeated, as little as lets `parts` devices hold whole groups."""
    groups = num_heads // num_kv_heads
    return next(r for r in range(1, groups + 1) if groups % r == 0 and num_kv_heads * r % parts == 0)


def reference_attention(q, k, v, segment_ids, *, window):
    """The definition, with every score materialised: what the others are tested against."""
    num_groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, num_groups, axis=2) for x in (k, v))
    scores = jnp.einsum("bthe,bshe->bhts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    t = jnp.arange(q.shape[1])
    allowed = t[:, None] >= t[None, :]
    if window is not None:
        allowed &= t[:, None] - t[None, :] < window
    same = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids > 0)[:, :, None]
    mask = (allowed & same)[:, None]
    scores = jnp.where(mask, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    probs = jnp.where(mask, jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0)), 0.0)
    total = jnp.sum(probs, axis=-1, keepdims=True)
    probs = probs / jnp.where(total == 0.0, 1.0, total)
    return jnp.einsum("bhts,bshe->bthe", probs.astype(v.dtype), v)


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "blockwise": blockwise_attention.blockwise_attention,
    "splash": splash_attention.splash_attention,
    "triton": triton_attention.triton_attention,
    "reference": reference_attention,
}
KERNELS = {"splash": "tpu", "triton": "gpu"}  # written for one platform, and interpreted on others
