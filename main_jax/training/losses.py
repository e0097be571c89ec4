"""Seed and synthetic cross-entropy in one loss: arrays in, a coefficient for every token out. No model, no mean.

Axes: B rows, T tokens. `seed` and `synthetic` [B, T] are the weights of the learnt tokens of each source, `totals`
their sums over the whole step; the sum over all tokens of coefficient times -log p is the loss, however a step is cut.
"""

import jax
import jax.numpy as jnp

from lm_jax.data.supervised import SEED, SYNTHETIC
from lm_jax.training.objective import Sums
from lm_jax.training.supervised import mean_over_tokens, share


def mixed_coefficients(seed: jax.Array, synthetic: jax.Array, totals: Sums) -> dict[str, jax.Array]:
    """`loss` = alpha * CE_synthetic + (1 - alpha) * CE_seed (MAIN, arXiv 2504.12913), each the mean over its tokens.

    The means are by weight. A source that the step lacks adds 0: alpha then weighs a source alike in steps that hold
    both and in steps that do not.

    Args:
      totals: `seed`, `synthetic`, and `alpha`, the weight of the synthetic side.
    """
    alpha = totals["alpha"]
    loss = alpha * share(synthetic, totals[SYNTHETIC]) + (1 - alpha) * share(seed, totals[SEED])
    return {"loss": loss, **_by_source(seed, synthetic, totals)}


def plain_coefficients(seed: jax.Array, synthetic: jax.Array, totals: Sums) -> dict[str, jax.Array]:
    """`loss`, the mean over all tokens whatever their source, which evaluations of different alphas have in common."""
    return {**mean_over_tokens(seed, synthetic, totals), **_by_source(seed, synthetic, totals)}


def _by_source(seed: jax.Array, synthetic: jax.Array, totals: Sums) -> dict[str, jax.Array]:
    """Each source's own loss; NaN, not defined, where the step lacks it."""
    return {
        f"loss/{source}": jnp.where(totals[source] > 0, share(weights, totals[source]), jnp.nan)
        for source, weights in ((SEED, seed), (SYNTHETIC, synthetic))
    }
