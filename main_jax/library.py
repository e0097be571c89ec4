"""MAIN (arXiv 2504.12913) in a few lines of Python: filter pairs, train on them. See docs/library.md."""

from typing import Any

from lm_jax.config import from_settings
from lm_jax.data.rows import read_rows
from lm_jax.library import Model, Rows, settings_of, trained
from main_jax.filter.command import FilterConfig, filter_candidates
from main_jax.training import command as training_command
from main_jax.training.command import MainTrainConfig


def filter_pairs(
    forward: Model, reverse: Model, candidates: Rows, *, output: str, **settings: Any
) -> list[dict[str, Any]]:
    """The pairs that both models find likely: of each response the best candidate, of these the best fraction.

    Not called `filter`: that is the package which it is made of.

    Args:
      forward: p(response | instruction).
      reverse: p(instruction | response); the same model may serve for both.
      candidates: rows with `id`, `response`, `instruction`, or their file.
      output: a file of JSON Lines; every candidate's scores, a report and plots lie beside it.
      settings: as `configs/main_filter.py` has them: `score="forward_gain", fraction=0.5`.

    Raises:
      UserError: anything the user can mend; nothing is left.
    """
    given = settings_of(forward, candidates, output)
    given |= {"forward": given.pop("model"), "reverse": reverse.source.name}
    filter_candidates(from_settings(FilterConfig, **given | settings))
    return list(read_rows(output))


def train(model: Model, rows: Rows, *, output: str, **settings: Any) -> Model:
    """Supervised training on seed and synthetic rows, weighed by alpha; see `launch.main_train`.

    Args:
      rows: supervised rows, `source` seed or synthetic, or their file.
      output: the run directory.
      settings: as `configs/main_train.py` has them.

    Raises:
      UserError: anything the user can mend, naming row or setting.
    """
    training_command.train(from_settings(MainTrainConfig, **settings_of(model, rows, output) | settings))
    return trained(model, output)
