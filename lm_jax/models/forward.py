"""The forward pass over packed rows, down to what it says of every token.

Axes: B rows, T tokens of a row.
"""

import functools
from typing import Any

import jax

from lm_jax.config import ComputeConfig, ModelConfig
from lm_jax.models.decoder import Decoder, output_embedding
from lm_jax.models.linear import in_compute_dtype
from lm_jax.models.logprobs import token_statistics


@functools.partial(jax.jit, static_argnames=("config", "compute", "names"))
@in_compute_dtype
def packed_statistics(
    params: dict, batch: dict[str, jax.Array], config: ModelConfig, compute: ComputeConfig, names: tuple[str, ...]
) -> dict[str, jax.Array]:
    """A packed batch [B, T] -> {name: [B, T]} of what `token_statistics` knows, zero where `loss_mask` is."""
    decoder = Decoder(config, compute)
    hidden: Any = decoder.apply({"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"])
    return token_statistics(
        hidden,
        output_embedding(params, config),
        batch["targets"],
        batch["loss_mask"],
        compute.logprob_chunk,
        names,
        config.vocab_size,
    )


def packed_logprobs(
    params: dict, batch: dict[str, jax.Array], config: ModelConfig, compute: ComputeConfig
) -> jax.Array:
    """A packed batch [B, T] -> log-probs of the targets [B, T] fp32 in nats, zero where `loss_mask` is."""
    return packed_statistics(params, batch, config, compute, ("logprobs",))["logprobs"]
