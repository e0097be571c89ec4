"""Attention in blocks with online softmax: memory linear in length, blocks of other segments never visited.

The softmax is normalised on the fly as in FlashAttention (arXiv 2205.14135, algorithm 1), and the gradient recomputes
probabilities from the saved log-normaliser instead of storing them (appendix B). Each query block visits key blocks
from the first one that any of its queries may see up to its own: those bounds come from the segments and the window,
so they are loop bounds at run time, and a row packed with short segments costs what its segments cost.

Axes: B rows, T tokens, H query heads, K key/value heads, G = H/K, E head_dim, Q and S tokens of a query / key block.
"""

import functools

import jax
import jax.numpy as jnp


def _block(length: int) -> int:
    """Tokens of a block. Short rows hold short segments, and small blocks fall outside of those less; in a long one
    large blocks pay. Tiles stay in a CPU core's cache either way."""
    return 64 if length <= 2048 else 128


def blockwise_attention(q, k, v, segment_ids, *, window: int | None):
    """See `lm_jax.models.attention.attention` for shapes. Any T; it is padded to a multiple of the block."""
    length = q.shape[1]
    block = min(_block(length), length)
    pad = -length % block
    if pad:
        q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, pad)))
    return _rows(q, k, v, segment_ids, window, block)[:, :length]


def _rows(q, k, v, segment_ids, window, block):
    """Rows one after another: batching them would make every row visit the blocks of the busiest one."""
    (rows, length, heads, dim), kv_heads = q.shape, k.shape[2]
    # [B, K, G, T, E] so that a block is [K, G*Q, E] against [K, S, E]: one batched matmul for a whole group.
    q = q.reshape(rows, length, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    one = functools.partial(_row, window=window, block=block)
    out = jax.lax.map(lambda a: one(*a), (q, k, v, segment_ids))
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, dim)


def _first_visible(segment_ids: jax.Array, window: int | None) -> jax.Array:
    """[T] int32: the first token that each token may attend to; T for padding, which sees nothing."""
    t = jnp.arange(segment_ids.size, dtype=jnp.int32)
    changed = jnp.concatenate([jnp.ones(1, bool), segment_ids[1:] != segment_ids[:-1]])
    first = jax.lax.cummax(jnp.where(changed, t, 0))
    if window is not None:
        first = jnp.maximum(first, t - window + 1)
    return jnp.where(segment_ids > 0, first, segment_ids.size)


def _scores(q_block, k_block, first, q_start, s_start, block):
    """Masked scores [K, G*Q, S] fp32 and their mask; visible means first <= s <= t."""
    groups = q_block.shape[1]
    q_block = q_block.reshape(q_block.shape[0], groups * block, -1)
    scores = jnp.einsum("kqe,kse->kqs", q_block, k_block, preferred_element_type=jnp.float32)
    s = s_start + jnp.arange(block)
    visible = (first[:, None] <= s) & (s <= q_start + jnp.arange(block)[:, None])
    return scores * q_block.shape[-1] ** -0.5, jnp.tile(visible, (groups, 1))


@functools.partial(jax.custom_vjp, nondiff_argnames=("window", "block"))
def _row(q, k, v, segment_ids, window, block):
    """q [K, G, T, E], k and v [K, T, E], segment_ids [T] -> [K, G, T, E]."""
    return _row_forward(q, k, v, segment_ids, window, block)[0]


def _row_forward(q, k, v, segment_ids, window, block):
    kv_heads, groups, length, dim = q.shape
    first = _first_visible(segment_ids, window)

    def query_block(i):
        q_start = i * block
        q_block = jax.lax.dynamic_slice_in_dim(q, q_start, block, axis=2)
        first_block = jax.lax.dynamic_slice_in_dim(first, q_start, block)

        def key_block(j, carry):
            top, total, acc = carry
            s_start = j * block
            k_block = jax.lax.dynamic_slice_in_dim(k, s_start, block, axis=1)
            v_block = jax.lax.dynamic_slice_in_dim(v, s_start, block, axis=1)
            scores, visible = _scores(q_block, k_block, first_block, q_start, s_start, block)
            new_top = jnp.maximum(top, jnp.max(jnp.where(visible, scores, -jnp.inf), axis=-1))
            finite_top = jnp.where(jnp.isfinite(new_top), new_top, 0.0)
            probs = jnp.where(visible, jnp.exp(scores - finite_top[..., None]), 0.0)
            decay = jnp.exp(top - finite_top)
            acc = acc * decay[..., None] + jnp.einsum(
                "kqs,kse->kqe", probs.astype(v.dtype), v_block, preferred_element_type=jnp.float32
            )
            return new_top, total * decay + jnp.sum(probs, axis=-1), acc

        start = (
            jnp.full((kv_heads, groups * block), -jnp.inf, jnp.float32),
            jnp.zeros((kv_heads, groups * block), jnp.float32),
            jnp.zeros((kv_heads, groups * block, dim), jnp.float32),
        )
        top, total, acc = jax.lax.fori_loop(jnp.min(first_block) // block, i + 1, key_block, start)
        total = jnp.where(total == 0.0, 1.0, total)
        out = (acc / total[..., None]).astype(q.dtype)
        log_norm = jnp.where(jnp.isfinite(top), top, 0.0) + jnp.log(total)
        return out.reshape(kv_heads, groups, block, dim), log_norm.reshape(kv_heads, groups, block)

    out, log_norm = jax.lax.map(query_block, jnp.arange(length // block))
    out = jnp.moveaxis(out, 0, 2).reshape(q.shape)
    log_norm = jnp.moveaxis(log_norm, 0, 2).reshape(q.shape[:3])
    return out, (q, k, v, first, out, log_norm)


def _row_backward(window, block, residuals, d_out):
    q, k, v, first, out, log_norm = residuals
    kv_heads, groups, length, dim = q.shape
    scale = dim**-0.5
    # Rowwise sum of d_out * out equals the softmax gradient's inner product (arXiv 2205.14135, eq. 4).
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def flat(x, q_start):
        return jax.lax.dynamic_slice_in_dim(x, q_start, block, axis=2).reshape(kv_heads, groups * block, *x.shape[3:])

    def query_block(carry, i):
        q_start = i * block
        q_block = jax.lax.dynamic_slice_in_dim(q, q_start, block, axis=2)
        first_block = jax.lax.dynamic_slice_in_dim(first, q_start, block)
        d_out_block, inner_block, norm_block = flat(d_out, q_start), flat(inner, q_start), flat(log_norm, q_start)
        q_flat = flat(q, q_start)

        def key_block(j, carry):
            d_q, d_k, d_v = carry
            s_start = j * block
            k_block = jax.lax.dynamic_slice_in_dim(k, s_start, block, axis=1)
            v_block = jax.lax.dynamic_slice_in_dim(v, s_start, block, axis=1)
            scores, visible = _scores(q_block, k_block, first_block, q_start, s_start, block)
            probs = jnp.where(visible, jnp.exp(scores - norm_block[..., None]), 0.0)
            d_probs = jnp.einsum("kqe,kse->kqs", d_out_block, v_block, preferred_element_type=jnp.float32)
            d_scores = (probs * (d_probs - inner_block[..., None]) * scale).astype(q.dtype)
            d_q += jnp.einsum("kqs,kse->kqe", d_scores, k_block, preferred_element_type=jnp.float32)
            # Kept as [K, E, S]: the other order would have XLA on CPU transpose the [Q, S] operand, at 3-4x the cost.
            d_k_block = jnp.einsum("kqe,kqs->kes", q_flat, d_scores, preferred_element_type=jnp.float32)
            d_v_block = jnp.einsum(
                "kqe,kqs->kes", d_out_block, probs.astype(v.dtype), preferred_element_type=jnp.float32
            )
            return d_q, _add_at(d_k, d_k_block, s_start), _add_at(d_v, d_v_block, s_start)

        d_q = jnp.zeros((kv_heads, groups * block, dim), jnp.float32)
        d_q, *carry = jax.lax.fori_loop(jnp.min(first_block) // block, i + 1, key_block, (d_q, *carry))
        return tuple(carry), d_q.reshape(kv_heads, groups, block, dim)

    zeros = jnp.zeros((kv_heads, dim, length), jnp.float32)
    (d_k, d_v), d_q = jax.lax.scan(query_block, (zeros, zeros), jnp.arange(length // block))
    d_q = jnp.moveaxis(d_q, 0, 2).reshape(q.shape)
    return d_q.astype(q.dtype), d_k.swapaxes(1, 2).astype(k.dtype), d_v.swapaxes(1, 2).astype(v.dtype), None


def _add_at(total, block_value, start):
    old = jax.lax.dynamic_slice_in_dim(total, start, block_value.shape[-1], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(total, old + block_value, start, axis=2)


_row.defvjp(_row_forward, _row_backward)
