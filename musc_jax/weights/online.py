"""`weights=online`: in every step the policy itself weighs the tokens that it learns from, without a gradient.

Axes: B rows, T tokens of a row, C contexts, P pairs of a row.
A step's batch carries, under `weigh/`, a second one of C * T tokens a row: the responses of each row's pairs under
every context that the rule reads, in the pairs' order. So a row's j-th response token is the j-th in both.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lm_jax.config import BatchConfig, ComputeConfig, ModelConfig
from lm_jax.data.order import Beside
from lm_jax.data.packing import Example, example_lengths
from lm_jax.models.lora import without_dropout
from lm_jax.scoring.contexts import packed_contrast
from lm_jax.training.job import Job
from lm_jax.training.step import Batch
from musc_jax.training.examples import Pairs
from musc_jax.training.losses import segment_sums
from musc_jax.weights.command import in_contexts
from musc_jax.weights.rules import WEIGHING_RULES, ResponseScores

_NAME = "weigh"


def responses_beside(pairs: Pairs, rule: str, job: Job) -> tuple[Pairs, Beside]:
    """The pairs without those that have a fault, and what the batches carry so that `online_weights` can weigh them.

    A fault is a missing perturbed prompt where the rule needs it, or one so long that the contexts fit no row.

    Args:
      pairs: as `load_pairs` gives them while more is looked at.

    Raises:
      UserError: as `PairRows.check`.
    """
    number, row_length = len(WEIGHING_RULES[rule].contexts), rows_beside(rule, job.config.batch).row_length

    def too_long(two: Sequence[Example]) -> str | None:
        length = int(example_lengths(two).sum())
        if length <= row_length:
            return None
        return (
            f"both responses under {number} prompts take {length} tokens and {number} rows hold {row_length}; raise "
            "config.batch.row_length or lower config.max_length"
        )

    pairs, _, examples = in_contexts(pairs, (rule,), job.encoder, job.tokenizer, too_long)
    return pairs, rows_beside(rule, job.config.batch, examples)


def rows_beside(rule: str, batch: BatchConfig, examples: Sequence[Example] = ()) -> Beside:
    """The rows that go along with those of `batch`: of both responses of a pair under every context of the rule."""
    return Beside(_NAME, examples, 2, len(WEIGHING_RULES[rule].contexts) * batch.row_length)


def online_weights(rule: str, model: ModelConfig, compute: ComputeConfig) -> Callable[[dict, Batch], jax.Array]:
    """(params, a packed batch of pairs) -> weights [B, T] fp32, zero outside responses, a constant to the gradient."""
    weighing = WEIGHING_RULES[rule]

    def weigh(params: dict, batch: Batch) -> jax.Array:
        beside = {k.removeprefix(f"{_NAME}/"): v for k, v in batch.items() if k.startswith(f"{_NAME}/")}
        params = jax.lax.stop_gradient(without_dropout(params))
        scores = packed_contrast(params, beside, model, compute, len(weighing.contexts), weighing.divergences)
        mask, segment_ids = batch["loss_mask"] > 0, batch["segment_ids"]
        at = jnp.cumsum(mask, axis=1) - 1

        def in_place(values, i):  # [B, T, C] -> [B, T]
            return jnp.take_along_axis(values[..., i], at, axis=1)

        def sums(values):  # [B, T] -> [B, T], of each token's response
            by_pair = segment_sums(jnp.where(mask, values, 0.0), segment_ids, batch["example_ids"].shape[1])
            return jnp.take_along_axis(by_pair.reshape(len(mask), -1), jnp.maximum(segment_ids - 1, 0), axis=1)

        logprobs, entropies, divergences = scores
        own = ResponseScores(
            {context: in_place(logprobs, c) for c, context in enumerate(weighing.contexts)},
            {context: in_place(entropies, c) for c, context in enumerate(weighing.contexts)},
            None if divergences is None else in_place(divergences, 0),
            None if divergences is None else in_place(divergences, 1),
            is_chosen=segment_ids % 2 == 1,
            mean=lambda values: sums(values) / jnp.maximum(sums(jnp.ones_like(values)), 1),
        )
        return jax.lax.stop_gradient(jnp.where(mask, weighing.weigh(own), 0.0))

    return weigh
