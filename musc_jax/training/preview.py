"""`launch.musc_train --preview=N`: the first pairs as training sees them, and nothing trained or written."""

import jax
import numpy as np

from lm_jax.config import BatchConfig
from lm_jax.console import say
from lm_jax.scoring.cached_scores import FIELDS
from lm_jax.scoring.scoring import score
from lm_jax.training.preview import print_examples, template_note, with_values
from lm_jax.training.trainer import Trainer
from musc_jax.training.command import MuscTrainConfig, open_reference
from musc_jax.training.examples import load_pairs
from musc_jax.training.reference import no_scores, weighted_pairs
from musc_jax.weights.rules import CHOSEN, REJECTED, RULES_ON_SCORES, online_rule


def preview(config: MuscTrainConfig, number: int) -> None:
    """Prints the first `number` pairs: every token with its id, mask, weight and position.

    Where the weights come from the reference's scores, those few rows are scored, which loads the reference.

    Raises:
      UserError: as `train`, as far as it concerns settings and these rows.
    """
    trainer = Trainer(config)
    reference = open_reference(config, trainer)
    options = lambda n: range(min(number, n)), config.columns, 1.0  # noqa: E731
    pairs = load_pairs(config.input, trainer.encoder, config.weights, *options)
    say("\n".join(pairs.report))
    pairs.faults.say()
    if online_rule(pairs.rule):
        say(f"weights: {pairs.rule}; the policy computes them in every step, so they are not shown")
        values: tuple[str, ...] = ()
    else:
        scored = pairs.rule in RULES_ON_SCORES
        say(f"weights: {pairs.rule}" + (", of the reference's scores of these rows" if scored else ""))
        values = ("weights", "ref_logprobs") if scored else ("weights",)
    scores = _scores(pairs.segments, reference, trainer) if pairs.rule in RULES_ON_SCORES else no_scores(pairs.segments)
    examples = weighted_pairs(pairs.segments, scores, pairs.rule)
    if jax.process_index() == 0:
        print_examples(
            [
                (
                    f"{pairs.name(i)} ({pairs.rows[i].id})" + template_note(trainer.tokenizer, pairs.rows[i].prompt),
                    [with_values(segment, values) for segment in example],
                    list(zip((CHOSEN, REJECTED), pairs.full_lengths[2 * i : 2 * i + 2], strict=True)),
                )
                for i, example in enumerate(examples)
            ],
            trainer.tokenizer,
            values,
        )


def _scores(segments, reference, trainer) -> dict[str, list[np.ndarray]]:
    """As `reference_scores`, of a few rows and without a cache: in batches as small as the mesh allows."""
    config, mesh = trainer.config, trainer.mesh
    batch = BatchConfig(rows=1, row_length=config.row_length)  # of each device
    found: dict[str, list[np.ndarray]] = {name: [np.empty(0, np.float32)] * len(segments) for name in FIELDS}
    params = reference.load_params(mesh, "float32")
    for scores in score(params, segments, reference.config, config.compute, batch, mesh):
        for one in scores:
            found["logprobs"][one.row] = one.logprobs
            if one.entropies is not None:
                found["entropies"][one.row] = one.entropies
    return found
