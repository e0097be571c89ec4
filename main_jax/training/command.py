"""`launch.main_train`: supervised tuning on seed and synthetic pairs, or on plain supervised rows, start to finish."""

import dataclasses

import jax

from lm_jax.checkpoints.provenance import Method
from lm_jax.config import ExampleBatch, ModelConfig
from lm_jax.console import say
from lm_jax.data.supervised import SOURCES, TRAIN_ON, load_supervised
from lm_jax.errors import UserError
from lm_jax.planning.programs import Program, train_program
from lm_jax.training.objective import Objective
from lm_jax.training.supervised import supervised_objective
from lm_jax.training.trainer import Data, TrainConfig, Trainer
from main_jax.training.losses import mixed_coefficients, plain_coefficients
from main_jax.training.weighting import AlphaConfig, alpha_state


@dataclasses.dataclass(frozen=True)
class MainTrainConfig(TrainConfig):
    """`configs/main_train.py` says what each key is for and why it has its value."""

    batch: ExampleBatch = ExampleBatch()
    train_on: str = "all"
    response_column: str | None = None
    alpha: AlphaConfig = AlphaConfig()

    def __post_init__(self):
        super().__post_init__()
        if self.train_on not in TRAIN_ON:
            raise UserError(f"config.train_on: unknown {self.train_on!r}; choose from {', '.join(TRAIN_ON)}")


def train(config: MainTrainConfig) -> None:
    """Runs, or continues, the training that `config` describes, into the run directory `config.output`.

    Rows of both sources are weighed by alpha (arXiv 2504.12913); with one source alone the loss is the plain
    cross-entropy, whatever alpha. Evaluation is always plain.

    Raises:
      UserError: anything the user can mend.
    """
    trainer = Trainer(config)
    model, compute = trainer.policy.config, config.compute
    options = config.train_on, config.response_column, None, config.columns, config.max_dropped_share
    paths = [config.input, *([config.eval_input] if config.eval_input else [])]
    read = [load_supervised(path, trainer.encoder, *options) for path in paths]
    for rows in read:
        say("\n".join(rows.report))
    mixed = read[0].sources() == frozenset(SOURCES)
    if mixed:
        say(f"alpha: {config.alpha.rule}")
    else:
        say(f"all rows are {next(iter(read[0].sources()))}: plain cross-entropy, without alpha")
    data = [Data([(segment,) for segment in rows.segments], rows.name) for rows in read]
    faults = [rows.faults for rows in read]
    trainer.begin("main_train", _method(config, mixed), faults, [own.examples for own in data])
    trainer.fit(
        objective_of(config, model, mixed),
        data[0],
        data[1] if config.eval_input else None,
        shown={"loss": "loss", "mean_token_accuracy": "accuracy"} | ({"alpha": "alpha"} if mixed else {}),
        eval_objective=supervised_objective(model, compute, plain_coefficients) if mixed else None,
    )


def _method(config: MainTrainConfig, mixed: bool) -> Method:
    if not mixed:
        return Method("Supervised fine-tuning: cross-entropy of the responses.", ("sft",))
    return Method(
        "Supervised fine-tuning on seed and synthetic pairs as in MAIN "
        f"([arXiv 2504.12913](https://arxiv.org/abs/2504.12913)): the two losses are weighed by `{config.alpha.rule}`.",
        ("main", "sft"),
    )


def objective_of(config: MainTrainConfig, model: ModelConfig, mixed: bool) -> Objective:
    """What is minimised.

    Args:
      mixed: the rows are of both sources.
    """
    if mixed:
        return supervised_objective(model, config.compute, mixed_coefficients, alpha_state(config.alpha))
    return supervised_objective(model, config.compute)


def main_programs(config: MainTrainConfig, model: ModelConfig, mesh: jax.sharding.Mesh) -> list[Program]:
    """What `train` compiles for rows of both sources."""
    return [train_program(config, model, objective_of(config, model, mixed=True), mesh)]
