"""`weights=online`: in every step the policy itself weighs the tokens that it learns from, without a gradient.

Axes: B rows, T tokens of a row, C contexts, P pairs of a row.
A step's batch carries, under `weigh/`, a second one of C * T tokens a row: the responses of each row's pairs under
every context that the rule reads, in the pairs' order. So a row's j-th response token is the j-th in both.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lm_jax.config import ComputeConfig, ModelConfig
from lm_jax.data.batches import AuxiliaryBatch
from lm_jax.data.packing import Example, example_lengths
from lm_jax.models.lora import without_dropout
from lm_jax.scoring.contexts import packed_contrast
from lm_jax.training.objective import Batch
from lm_jax.training.trainer import Trainer
from musc_jax.training.examples import Pairs
from musc_jax.training.losses import segment_sums
from musc_jax.weights.command import in_contexts
from musc_jax.weights.rules import WEIGHING_RULES, ResponseScores

_NAME = "weigh"


def auxiliary_responses(pairs: Pairs, rule: str, trainer: Trainer) -> tuple[Pairs, AuxiliaryBatch]:
    """The pairs without those that have a fault, and what the batches carry so that `online_weights` can weigh them.

    A fault is a missing perturbed prompt where the rule needs it, or one so long that the contexts fit no row.

    Args:
      pairs: as `load_pairs` gives them while more is looked at.

    Raises:
      UserError: as `PairRows.check`.
    """
    number = len(WEIGHING_RULES[rule].contexts)
    most = number * trainer.config.row_length

    def too_long(two: Sequence[Example]) -> str | None:
        length = int(example_lengths(two).sum())
        if length <= most:
            return None
        return (
            f"both responses under {number} prompts take {length} tokens and {number} rows hold {most}; shorten its "
            "perturbed_prompt or raise config.max_length"
        )

    pairs, _, examples = in_contexts(pairs, (rule,), trainer.encoder, trainer.tokenizer, too_long)
    return pairs, auxiliary_rows(rule, examples)


def auxiliary_rows(rule: str, examples: Sequence[Example] = ()) -> AuxiliaryBatch:
    """The rows that travel with a batch's: both responses of each pair under every context of the rule."""
    return AuxiliaryBatch(_NAME, examples, 2, len(WEIGHING_RULES[rule].contexts))


def online_weights(rule: str, model: ModelConfig, compute: ComputeConfig) -> Callable[[dict, Batch], jax.Array]:
    """(params, a packed batch of pairs) -> weights [B, T] fp32, zero outside responses, a constant to the gradient."""
    weighing = WEIGHING_RULES[rule]

    def weigh(params: dict, batch: Batch) -> jax.Array:
        auxiliary = {k.removeprefix(f"{_NAME}/"): v for k, v in batch.items() if k.startswith(f"{_NAME}/")}
        params = jax.lax.stop_gradient(without_dropout(params))
        scores = packed_contrast(params, auxiliary, model, compute, len(weighing.contexts), weighing.divergences)
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
