"""Supervised training as an objective: cross-entropy of the tokens that are learnt, each with its row's weight.

Axes: B rows, T tokens, I examples of a row.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lm_jax.config import ComputeConfig, ModelConfig
from lm_jax.data.supervised import SEED, SYNTHETIC
from lm_jax.models.forward import packed_statistics
from lm_jax.training.objective import Batch, Objective, ObjectiveState, Sums

VALUES = ("weights", "synthetic")  # of `load_supervised`, which batches carry for every response token

# (weights of the learnt tokens that are seed, [B, T]; the same of the synthetic ones; totals) -> name -> [B, T]
Coefficients = Callable[[jax.Array, jax.Array, Sums], dict[str, jax.Array]]


def mean_over_tokens(seed: jax.Array, synthetic: jax.Array, totals: Sums) -> dict[str, jax.Array]:
    """`loss`: the mean over a step's learnt tokens, by weight; with all weights 1 that of TRL and transformers."""
    return {"loss": share(seed + synthetic, totals[SEED] + totals[SYNTHETIC])}


def share(weights: jax.Array, total: jax.Array) -> jax.Array:
    """weights / total, and 0 where a step has nothing of the kind."""
    return weights * jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)


def supervised_objective(
    model: ModelConfig,
    compute: ComputeConfig,
    coefficients: Coefficients = mean_over_tokens,
    state: ObjectiveState = ObjectiveState(),  # noqa: B008
) -> Objective:
    """Sums over learnt tokens of c_t * -log p(token t | those before it in its sequence).

    Batches are those of `fill_rows` with one segment an example and VALUES. Totals are `tokens`, the learnt tokens'
    number, and the sum of their weights by source, `seed` and `synthetic`.

    Args:
      coefficients: c_t by name, of the whole step's totals: `loss` is minimised, the others are metrics. NaN stands for
        a part `loss/NAME` that the step does not define.
    """

    def token_weights(batch: Batch) -> tuple[jax.Array, jax.Array]:
        weights = batch["loss_mask"] * batch["weights"]
        return weights * (1 - batch["synthetic"]), weights * batch["synthetic"]

    def count(batch: Batch) -> Sums:
        seed, synthetic = token_weights(batch)
        return {"tokens": batch["loss_mask"].sum(), SEED: seed.sum(), SYNTHETIC: synthetic.sum()}

    def contributions(params, batch: Batch, totals: Sums):
        found = packed_statistics(params, batch, model, compute, ("logprobs", "top1"))
        named = coefficients(*token_weights(batch), totals)
        metrics = {name: jnp.sum(c * -found["logprobs"]) for name, c in named.items()}
        metrics["mean_token_accuracy"] = jnp.sum(found["top1"]) / jnp.maximum(totals["tokens"], 1)
        example = jnp.take_along_axis(batch["example_ids"], jnp.maximum(batch["segment_ids"] - 1, 0), axis=1)
        bad = jnp.max(jnp.where(jnp.isfinite(found["logprobs"]), -1, example))
        return metrics.pop("loss"), metrics, bad

    return Objective(count, contributions, VALUES, state=state, dtype=compute.dtype)
