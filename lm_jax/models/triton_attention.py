"""Attention on GPUs: JAX's Pallas-Triton kernel, which honours segments and never visits keys after a block's queries.

Blocks of other segments it visits and masks. It knows no sliding window: rows longer than it go through the loops. It
knows no groups of queries either: keys and values are repeated, and kept so for the backward pass.

Axes: B rows, T tokens, H query heads, K key/value heads, E head_dim.
"""

import jax.numpy as jnp

from lm_jax.models.blockwise_attention import blockwise_attention

_BLOCK = 128  # of queries and keys: rows are padded to whole ones


def triton_attention(q, k, v, segment_ids, *, window: int | None, interpret: bool = False):
    """See `lm_jax.models.attention.attention` for shapes. Any T; it is padded to a multiple of 128.

    `interpret`: as plain operations, for platforms that are no GPU; slow, for tests.
    """
    from jax.experimental.pallas.ops.gpu.attention import mha  # its lowering is for those who ask for it

    length, (heads, dim) = q.shape[1], q.shape[2:]
    if window is not None and window < length:
        return blockwise_attention(q, k, v, segment_ids, window=window)
    pad = -length % _BLOCK
    k, v = (jnp.repeat(x, heads // k.shape[2], axis=2) for x in (k, v))
    padded = [jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v)]
    ids = jnp.pad(segment_ids, ((0, 0), (0, pad)))
    out = mha(*padded, ids, sm_scale=dim**-0.5, causal=True, interpret=interpret)
    # Padding attends to padding in there; cut off here, nothing comes back from it either.
    return jnp.where((segment_ids > 0)[..., None, None], out[:, :length], 0)
