"""`launch.main_train --preview=N`: the first rows as training sees them, and nothing trained or written."""

import jax

from lm_jax.console import say
from lm_jax.data.supervised import load_supervised
from lm_jax.training.preview import print_examples, template_note, with_values
from lm_jax.training.trainer import Trainer
from main_jax.training.command import MainTrainConfig

_VALUES = ("weights",)


def preview(config: MainTrainConfig, number: int) -> None:
    """Prints the first `number` rows: every token with its id, mask, weight and position.

    Raises:
      UserError: as `train`, as far as it concerns settings and these rows.
    """
    trainer = Trainer(config)
    options = config.train_on, config.response_column, number, config.columns
    rows = load_supervised(config.input, trainer.encoder, *options, max_dropped_share=1.0)
    say("\n".join(rows.report))
    rows.faults.say()
    if jax.process_index() == 0:
        print_examples(
            [
                (
                    f"{rows.name(i)} ({rows.rows[i].id}, {rows.rows[i].source})"
                    + template_note(trainer.tokenizer, rows.rows[i].prompt),
                    [with_values(segment, _VALUES)],
                    [(rows.rows[i].source, full_length)],
                )
                for i, (segment, full_length) in enumerate(zip(rows.segments, rows.full_lengths, strict=True))
            ],
            trainer.tokenizer,
            _VALUES,
        )
