"""One decoder for every family: pre-norm, rotary, grouped-query, gated feed-forward; layers scanned and rematerialised.

Axes: B rows, T tokens, D model, H query heads, K key/value heads, E head_dim, F feed-forward, V vocabulary.
Parameter paths are those of `lm_jax.models.weights`; layers are stacked on a leading axis.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm_jax.config import ComputeConfig, ModelConfig
from lm_jax.errors import UserError
from lm_jax.models.attention import IMPLEMENTATIONS, attention
from lm_jax.models.cache import KVCache, cached_attention, layer_order, write_cache
from lm_jax.models.linear import Linear
from lm_jax.models.rope import apply_rope, rope_cos_sin
from lm_jax.sharding import constrain

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
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
    def __call__(self, x, cos, sin, where, which):
        """x [B, T, D]; cos, sin [B, T, E/2]; `where`: segment ids [B, T], or (positions [B, T], held [B], cache).

        `which`: the number of the layer's variant below, and of the layer in the cache's member.

        Returns ([B, T, D], this layer's new keys and values where there is a cache).
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
        variant, index = which
        # A window is static in every kernel; layers of one scan that differ choose between the compiled variants.
        if isinstance(where, jax.Array):
            new: Any = None
            operands: tuple[Any, ...] = q, k, v, where
            variants = [
                functools.partial(attention, window=w, implementation=self.compute.attention)
                for w in c.distinct_windows
            ]
        else:
            positions, held, cache = where
            new, operands = (k, v), (q, k, v, index, positions, held)
            windows = [c.layer_windows[layer_order(c, len(cache)).member.index(m)] for m in range(len(cache))]
            variants = [
                functools.partial(_over_cache, cache=kv, window=w) for kv, w in zip(cache, windows, strict=True)
            ]
        out = variants[0](*operands) if len(variants) == 1 else jax.lax.switch(variant, variants, *operands)
        out = constrain(out, "batch", "length", "heads", "head_dim")
        return Linear((c.d_model,), c.o_bias, num_axes=2, name="o")(out), new


def _over_cache(q, k, v, index, positions, held, *, cache, window):
    return cached_attention(q, k, v, cache, index, positions, held, window=window)


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
    def __call__(self, x, which, cos, sin, where):
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        attn = Attention(c, self.compute, name="attn")
        out, new = attn(RMSNorm(c.norm_eps, dtype, name="attn_norm")(x), cos, sin, where, which)
        x = x + out
        x = x + FeedForward(c, name="mlp")(RMSNorm(c.norm_eps, dtype, name="mlp_norm")(x))
        return constrain(x, "batch", "length", "embed"), new


class Embedding(nn.Module):
    """A row [D] for each word; on a mesh that does not divide them with rows of padding, see `sharding.padded_shape`.

    The output embedding is only declared by it: `output_embedding` reads it, `token_statistics` multiplies by it.
    """

    config: ModelConfig
    leaf: str
    initializer: Callable[..., jax.Array]

    @nn.compact
    def __call__(self) -> jax.Array:
        if self.has_variable("params", self.leaf):
            return cast(jax.Array, self.get_variable("params", self.leaf))
        return self.param(self.leaf, self.initializer, (self.config.vocab_size, self.config.d_model), jnp.float32)


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
          ends: [B] int32, tokens that each row has when these are written, and what lies beyond is padding; with a
            cache. Rows that end before these tokens begin are all padding and are left as they are.

        Returns:
          hidden [B, T, D] after the final norm, in compute.dtype; with a cache (hidden, the cache).
        """
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        embedding = Embedding(
            c, "embedding", nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0), name="embed"
        )()
        # The table is gathered over fsdp; left to itself, XLA gathers the activations of all rows instead.
        table = constrain(embedding, "vocab", "embed")
        # Cast after the lookup, so that a token's gradients add up in fp32.
        x = constrain(jnp.take(table, tokens, axis=0).astype(dtype), "batch", "length", "embed")
        cos, sin = rope_cos_sin(c.rope, c.head_dim, c.max_position, positions, segment_ids)
        if cache is None or ends is None:
            where: Any = segment_ids
            order = layer_order(c, len(c.distinct_windows))
        else:
            where = positions, jnp.minimum(ends, positions[:, 0]), cache
            order = layer_order(c, len(cache))
        scanned = nn.scan(
            _remat(Block, self.compute.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_layers,
            unroll=min(self.compute.scan_unroll, c.num_layers),
        )
        which = tuple(jnp.array(x, jnp.int32) for x in order)
        x, new = scanned(c, self.compute, name="layers")(x, which, cos, sin, where)
        if not c.tie_embeddings:
            Embedding(c, "kernel", nn.initializers.normal(0.02), name="lm_head")()
        x = RMSNorm(c.norm_eps, dtype, name="final_norm")(x)
        if cache is None or ends is None:
            return x
        return x, write_cache(cache, new, order, positions, ends > positions[:, 0])


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
