"""One decoder for every family: pre-norm, rotary, grouped-query, gated feed-forward; layers scanned and rematerialised.

Axes: B rows, T tokens, D model, H query heads, K key/value heads, E head_dim, F feed-forward, V vocabulary.
Parameter paths are those of `lm_jax.models.weights`; layers are stacked on a leading axis.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm_jax.config import ComputeConfig, ModelConfig
from lm_jax.errors import UserError
from lm_jax.models.attention import IMPLEMENTATIONS, attention
from lm_jax.models.cache import KVCache, cached_attention, key_positions
from lm_jax.models.linear import Linear
from lm_jax.models.rope import apply_rope, rope_cos_sin
from lm_jax.sharding import constrain

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}

# What the backward pass finds saved; everything else of a layer is computed again.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "save_matmuls": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in fp32, returned in `dtype`."""

    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * scale).astype(self.dtype)


class Attention(nn.Module):
    config: ModelConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x, cos, sin, where, which, cache):
        """x [B, T, D]; cos, sin [B, T, E/2]; `where` [B, T] segment ids, or with a cache what `_over_cache` needs.

        `which`: the layer's window among the distinct ones, and its number among the layers that share it.
        """
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        q = Linear((c.num_heads, c.head_dim), c.qkv_bias, name="q")(x)
        k = Linear((c.num_kv_heads, c.head_dim), c.qkv_bias, name="k")(x)
        v = Linear((c.num_kv_heads, c.head_dim), c.qkv_bias, name="v")(x)
        if c.qk_norm:
            q = RMSNorm(c.norm_eps, dtype, name="q_norm")(q)
            k = RMSNorm(c.norm_eps, dtype, name="k_norm")(k)
        q = constrain(apply_rope(q, cos, sin), "batch", "length", "heads", "head_dim")
        k = constrain(apply_rope(k, cos, sin), "batch", "length", "kv_heads", "head_dim")
        v = constrain(v, "batch", "length", "kv_heads", "head_dim")
        window_index, layer = which
        # A window is static in every kernel; layers of one scan that differ choose between the compiled variants.
        if cache is None:
            variants = [functools.partial(_over_tokens, window=w, compute=self.compute) for w in c.distinct_windows]
        else:
            variants = [functools.partial(_over_cache, window=w, member=i) for i, w in enumerate(c.distinct_windows)]
        operands = (q, k, v, where, layer, cache)
        out, cache = variants[0](*operands) if len(variants) == 1 else jax.lax.switch(window_index, variants, *operands)
        out = constrain(out, "batch", "length", "heads", "head_dim")
        return Linear((c.d_model,), c.o_bias, num_axes=2, name="o")(out), cache


def _over_tokens(q, k, v, segment_ids, layer, cache, *, window, compute):
    return attention(q, k, v, segment_ids, window=window, implementation=compute.attention), cache


def _over_cache(q, k, v, where, layer, cache, *, window, member):
    positions, ends, keys_at = where
    out, new = cached_attention(q, k, v, cache[member], layer, positions, ends, keys_at[member], window=window)
    return out, (*cache[:member], new, *cache[member + 1 :])


class FeedForward(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        gate = Linear((c.d_ff,), c.mlp_bias, name="gate")(x)
        up = Linear((c.d_ff,), c.mlp_bias, name="up")(x)
        inner = constrain(ACTIVATIONS[c.activation](gate) * up, "batch", "length", "mlp")
        return Linear((c.d_model,), c.mlp_bias, name="down")(inner)


class Block(nn.Module):
    config: ModelConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, carry, which, cos, sin, where):
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        x, cache = carry
        attn = Attention(c, self.compute, name="attn")
        out, cache = attn(RMSNorm(c.norm_eps, dtype, name="attn_norm")(x), cos, sin, where, which, cache)
        x = x + out
        x = x + FeedForward(c, name="mlp")(RMSNorm(c.norm_eps, dtype, name="mlp_norm")(x))
        return (constrain(x, "batch", "length", "embed"), cache), None


class OutputEmbedding(nn.Module):
    """Declares the untied output embedding; `output_embedding` reads it, `token_logprobs` multiplies by it."""

    config: ModelConfig

    @nn.compact
    def __call__(self):
        c = self.config
        self.param("kernel", nn.initializers.normal(0.02), (c.vocab_size, c.d_model), jnp.float32)


class Decoder(nn.Module):
    """Tokens to final hidden states. Used purely: `Decoder(config, compute).apply({"params": params}, ...)`."""

    config: ModelConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        cache: tuple[KVCache, ...] | None = None,
        ends: jax.Array | None = None,
    ):
        """Packed sequences, or with a cache the next tokens of rows whose earlier ones it holds.

        Args:
          tokens, positions: [B, T] int32.
          segment_ids: [B, T] int32; None with a cache, where a row is one sequence.
          cache: see `lm_jax.models.cache`, also for what `positions` may be.
          ends: [B] int32, tokens that each row has when these are written; with a cache.

        Returns:
          hidden [B, T, D] after the final norm, in compute.dtype; with a cache (hidden, the cache).
        """
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        embed = nn.Embed(c.vocab_size, c.d_model, name="embed")
        # The table is gathered over fsdp; left to itself, XLA gathers the activations of all rows instead.
        table = constrain(embed.embedding, "vocab", "embed")
        # Cast after the lookup, so that a token's gradients add up in fp32.
        x = constrain(jnp.take(table, tokens, axis=0).astype(dtype), "batch", "length", "embed")
        cos, sin = rope_cos_sin(c.rope, c.head_dim, c.max_position, positions, segment_ids)
        where = segment_ids
        if cache is not None:
            where = positions, ends, tuple(key_positions(ends, member.k.shape[-1]) for member in cache)
        scanned = nn.scan(
            _remat(Block, self.compute.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_layers,
            unroll=min(self.compute.scan_unroll, c.num_layers),
        )
        windows = c.layer_windows
        which = (
            jnp.array([c.distinct_windows.index(w) for w in windows], jnp.int32),
            jnp.array([windows[:i].count(w) for i, w in enumerate(windows)], jnp.int32),
        )
        (x, cache), _ = scanned(c, self.compute, name="layers")((x, cache), which, cos, sin, where)
        if not c.tie_embeddings:
            OutputEmbedding(c, name="lm_head")()
        x = RMSNorm(c.norm_eps, dtype, name="final_norm")(x)
        return x if cache is None else (x, cache)


def check_compute(compute: ComputeConfig) -> None:
    """Raises UserError for a name that no remat policy or attention implementation has, before anything is compiled."""
    for key, known in (("remat", ("none", *REMAT_POLICIES)), ("attention", ("auto", *IMPLEMENTATIONS))):
        if (name := getattr(compute, key)) not in known:
            raise UserError(f"config.compute.{key}: unknown {name!r}; choose from {', '.join(known)}")


def _remat(block, policy: str):
    return block if policy == "none" else nn.remat(block, policy=REMAT_POLICIES[policy], prevent_cse=False)


def output_embedding(params: dict, config: ModelConfig) -> jax.Array:
    """[V, D]: the matrix whose product with a hidden state gives logits; the input embedding where they are tied."""
    return params["embed"]["embedding"] if config.tie_embeddings else params["lm_head"]["kernel"]
