"""Attention on TPUs: Pallas' splash kernel, which honours segments and never visits blocks that causality masks.

Blocks of other segments it visits and masks: its grid is fixed when it is compiled.

Axes: B rows, T tokens, H query heads, K key/value heads, E head_dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

_LANES = 128  # of a TPU's vector registers: blocks are multiples of it
_BLOCKS = (512, 256, _LANES)


def fits(head_dim: int) -> bool:
    """Whether the kernel compiles for heads of this size."""
    return head_dim % 64 == 0


def splash_attention(q, k, v, segment_ids, *, window: int | None, interpret: bool = False):
    """See `lm_jax.models.attention.attention` for shapes. Any T; it is padded to a multiple of 128.

    `interpret`: as plain operations, for platforms that are no TPU; slow, for tests.
    """
    length, (heads, dim) = q.shape[1], q.shape[2:]
    pad = -length % _LANES
    q = q * jnp.asarray(dim**-0.5, q.dtype)  # the kernel does not scale
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q, k, v))
    ids = jnp.pad(segment_ids, ((0, 0), (0, pad)))
    kernel = _kernel(heads, length + pad, window, interpret)
    out = jax.vmap(kernel)(q, k, v, splash_attention_kernel.SegmentIds(q=ids, kv=ids))
    # Padding attends to padding in there; cut off here, nothing comes back from it either.
    return jnp.where((segment_ids > 0)[..., None, None], out.swapaxes(1, 2)[:, :length], 0)


def _kernel(heads: int, length: int, window: int | None, interpret: bool):
    shape = (length, length)
    if window is None or window >= length:
        mask: splash_attention_mask.Mask = splash_attention_mask.CausalMask(shape)
    else:
        mask = splash_attention_mask.LocalMask(shape, (window - 1, 0), offset=0)
    block = next(b for b in _BLOCKS if length % b == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": block for name in names}
    sizes = splash_attention_kernel.BlockSizes(**blocks)
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,  # a device's own heads are all there are
        q_seq_shards=1,
        interpret=interpret,
    )
