"""Token-aware preference optimisation as an objective for the training step.

Axes: B rows, T tokens, P pairs of a row.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lm_jax.config import ComputeConfig, ModelConfig
from lm_jax.models.forward import packed_logprobs
from lm_jax.training.objective import Batch, Objective, Sums
from musc_jax.training.losses import LossConfig, preference_loss, segment_sums

# (weighted log-ratios, weighted log-probs, response tokens, all [P, 2]: chosen, rejected) -> [P]
PairLoss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def given_weights(params: Any, batch: Batch) -> jax.Array:
    """[B, T]: the weights that every response token brought along."""
    return batch["weights"]


def preference_objective(
    model: ModelConfig,
    compute: ComputeConfig,
    loss: LossConfig,
    weigh: Callable[[Any, Batch], jax.Array] = given_weights,
    pair_loss: PairLoss | None = None,
) -> Objective:
    """r = sum_t w_t (log pi - log ref) of each response under the full instruction; the loss of the pairs' margins.

    Batches are those of `fill_rows` with two segments an example (chosen, rejected), the value `ref_logprobs` and what
    `weigh` makes the weights [B, T] of. Metrics carry TRL's names: rewards are beta times r, `logps/*` plain sums, all
    means over pairs. With `loss.nll_weight` the mean of -log pi over the chosen responses' tokens is added, as TRL's
    `sft` loss beside another one (once `rpo_alpha`): every token counts 1 there, whatever its weight.

    Args:
      pair_loss: another loss of each pair, of the same arguments as `preference_loss` takes behind its config.
    """
    pair_loss = pair_loss or functools.partial(preference_loss, loss)

    def count(batch: Batch) -> Sums:
        return {
            "pairs": (batch["example_ids"] >= 0).sum().astype(jnp.float32),
            "chosen_tokens": (batch["loss_mask"] * (batch["segment_ids"] % 2 == 1)).sum(),
        }

    def contributions(params, batch: Batch, totals: Sums):
        logprobs = packed_logprobs(params, batch, model, compute)
        ids = batch["example_ids"]

        def sums(values):  # [B, T] -> [B * P, 2]
            return segment_sums(values, batch["segment_ids"], ids.shape[1]).reshape(-1, 2)

        mask, weights = batch["loss_mask"], weigh(params, batch)
        plain, weighted = sums(logprobs), sums(weights * logprobs)
        # The difference is formed token by token: a policy equal to its reference then gives 0, not the rounding of
        # two long sums.
        logratios = sums(weights * (logprobs - batch["ref_logprobs"])) if loss.needs_reference else weighted
        present = (ids >= 0).reshape(-1)
        losses = pair_loss(logratios, weighted, sums(mask))
        losses = jnp.where(present, losses, 0.0)
        num_pairs, num_chosen = jnp.maximum(totals["pairs"], 1), jnp.maximum(totals["chosen_tokens"], 1)
        total = jnp.sum(losses) / num_pairs
        rewards = jax.lax.stop_gradient(loss.beta * logratios)
        logps = jax.lax.stop_gradient(plain)

        def mean(values):
            return jnp.sum(jnp.where(present, values, 0.0)) / num_pairs

        metrics = {
            "rewards/chosen": mean(rewards[:, 0]),
            "rewards/rejected": mean(rewards[:, 1]),
            "rewards/margins": mean(rewards[:, 0] - rewards[:, 1]),
            "rewards/accuracies": mean(rewards[:, 0] > rewards[:, 1]),
            "logps/chosen": mean(logps[:, 0]),
            "logps/rejected": mean(logps[:, 1]),
            "pairs": totals["pairs"] * mean(1.0),
        }
        if loss.nll_weight:
            nll = -jnp.sum(jnp.where(present, plain[:, 0], 0.0)) / num_chosen
            total += loss.nll_weight * nll
            metrics["nll_loss"] = nll
        bad = jnp.max(jnp.where(jnp.isfinite(losses), -1, ids.reshape(-1)))
        return total, metrics, bad

    return Objective(count, contributions, ("weights", "ref_logprobs"), dtype=compute.dtype)
