"""MuSC (arXiv 2502.11541) in a few lines of Python: pairs, token weights, training. See docs/library.md.

What is written and how a call goes on after an interruption is that of the commands, which these functions run.
"""

from collections.abc import Callable, Mapping
from typing import Any

from lm_jax.config import from_settings
from lm_jax.data.rows import read_rows
from lm_jax.library import Model, Rows, settings_of, trained
from musc_jax.pairs import command as pairs_command
from musc_jax.pairs.config import PairsConfig
from musc_jax.training import command as training_command
from musc_jax.training.command import MuscTrainConfig
from musc_jax.weights.command import WeighConfig, weigh_rows


def make_pairs(model: Model, instructions: Rows, *, output: str, **settings: Any) -> list[dict[str, Any]]:
    """Preference pairs that the model makes of instructions by itself, which differ in constraints.

    Args:
      instructions: rows with `prompt` or `instruction` (and `input`), or their file.
      output: a file of JSON Lines; the model's answers are kept beside it.
      settings: as `configs/musc_pairs.py` has them, nested ones as dicts: `respond={"max_new_tokens": 256}`.

    Raises:
      UserError: anything the user can mend; no pair is left.
    """
    pairs_command.make_pairs(from_settings(PairsConfig, **settings_of(model, instructions, output) | settings))
    return list(read_rows(output))


def weigh(model: Model, pairs: Rows, *, output: str, **settings: Any) -> list[dict[str, Any]]:
    """The pairs with a weight for every response token, in a store that `train` finds through their rows.

    Args:
      pairs: preference rows with `perturbed_prompt`, as `make_pairs` gives them, or their file.
      settings: as `configs/musc_token_weights.py` has them: `rules="calibrated_entropy"`.

    Raises:
      UserError: anything the user can mend, naming the row.
    """
    weigh_rows(from_settings(WeighConfig, **settings_of(model, pairs, output) | settings))
    return list(read_rows(output))


def train(
    model: Model,
    pairs: Rows,
    *,
    output: str,
    loss: Callable[..., Any] | Mapping[str, Any] | None = None,
    learning_rate: float | None = None,
    **settings: Any,
) -> Model:
    """Token-aware preference optimisation of the model on preference rows; the model is its own reference.

    Args:
      pairs: preference rows in any layout of docs/data.md, or their file.
      output: the run directory.
      loss: settings, as `{"kind": "ipo"}`, or a function of each pair's (weighted log-ratios to the reference, weighted
        log-probs, response tokens), all [P, 2] of chosen and rejected, to the losses [P].
      settings: as `configs/musc_train.py` has them: `epochs=1, batch={"pairs": 8}`.

    Returns:
      The trained model, the run's newest checkpoint.

    Raises:
      UserError: anything the user can mend, naming row or setting.
    """
    given = {**settings_of(model, pairs, output), **settings}
    if learning_rate is not None:
        given["optim"] = {"learning_rate": learning_rate, **given.get("optim", {})}
    if isinstance(loss, Mapping):
        given["loss"] = dict(loss)
    training_command.train(from_settings(MuscTrainConfig, **given), loss if callable(loss) else None)
    return trained(model, output)
