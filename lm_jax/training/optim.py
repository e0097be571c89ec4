"""Learning-rate schedule and optimiser chain, from an OptimConfig."""

import math

import jax
import jax.numpy as jnp
import optax

from lm_jax.config import AUTO, OptimConfig
from lm_jax.models.linear import LORA_A, LORA_B

_MATRICES = ("kernel", "embedding", LORA_A, LORA_B)


def make_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then the named decay to `final_ratio` of the peak at the last step.

    Steps count from 0 and the warm-up takes ceil(warmup_ratio * num_steps) of them, as in transformers, so that the
    curves of a run here and one there can be laid over each other.
    """
    peak, final = config.learning_rate, config.final_ratio
    warmup = math.ceil(config.warmup_ratio * num_steps)

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / max(num_steps - warmup, 1), 0.0, 1.0)
        decay = {
            "cosine": final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress)),
            "linear": final + (1 - final) * (1 - progress),
            "constant": jnp.ones(()),
        }[config.schedule]
        return peak * jnp.where(step < warmup, step / max(warmup, 1), decay)

    return schedule


def make_optimizer(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW with decay on matrices only, adapters' among them (not on norms or biases).

    Moments have the parameters' dtype, fp32 for fp32 master weights; the first ones have `mu_dtype` if it is given.
    Second moments stay: with beta2 near 1 a bfloat16 could not follow their small changes.
    """
    adamw = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_is_matrix,
        mu_dtype=None if config.mu_dtype == AUTO else config.mu_dtype,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw


def _is_matrix(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in _MATRICES, params)
