"""`launch.main_train`: supervised tuning on seed and synthetic pairs, or on plain supervised rows, start to finish."""

import dataclasses

import jax

from lm_jax.checkpoints.provenance import Method
from lm_jax.config import ModelConfig
from lm_jax.console import say
from lm_jax.data.supervised import SOURCES, TRAIN_ON, load_supervised
from lm_jax.errors import UserError
from lm_jax.planning.programs import Program, train_program
from lm_jax.training.job import Task, TrainConfig, begin_job, open_job, run_job
from lm_jax.training.program import StepSpec
from lm_jax.training.supervised import VALUES, supervised_objective
from main_jax.training.losses import mixed_coefficients, plain_coefficients
from main_jax.training.weighting import AlphaConfig, alpha_carry


@dataclasses.dataclass(frozen=True)
class MainTrainConfig(TrainConfig):
    """`configs/main_train.py` says what each key is for and why it has its value."""

    train_on: str
    response_column: str | None
    alpha: AlphaConfig

    def __post_init__(self):
        super().__post_init__()
        if self.train_on not in TRAIN_ON:
            raise UserError(f"config.train_on: unknown {self.train_on!r}; choose from {', '.join(TRAIN_ON)}")
        if self.max_length > self.batch.row_length:
            raise UserError(
                f"config.batch.row_length={self.batch.row_length} must hold config.max_length={self.max_length} "
                "tokens; raise the one or lower the other"
            )


def train(config: MainTrainConfig) -> None:
    """Runs, or continues, the training that `config` describes, into the run directory `config.output`.

    Rows of both sources are weighed by alpha (arXiv 2504.12913); with one source alone the loss is the plain
    cross-entropy, whatever alpha. Evaluation is always plain.

    Raises:
      UserError: anything the user can mend.
    """
    job = open_job(config)
    options = config.train_on, config.response_column, None, config.columns, config.max_dropped_share
    rows = load_supervised(config.input, job.encoder, *options)
    held_out = load_supervised(config.eval_input, job.encoder, *options) if config.eval_input else None
    for read in filter(None, (rows, held_out)):
        say("\n".join(read.report))
    mixed = rows.sources() == frozenset(SOURCES)
    shown = {"loss": "loss", "mean_token_accuracy": "accuracy"}
    spec, eval_objective = step_spec(config, job.policy.config, mixed), None
    if mixed:
        say(f"alpha: {config.alpha.rule}")
        eval_objective = supervised_objective(job.policy.config, config.compute, plain_coefficients)
    else:
        say(f"all rows are {next(iter(rows.sources()))}: plain cross-entropy, without alpha")
    begin_job(job, "main_train", _method(config, mixed), [read.faults for read in (rows, held_out) if read])
    task = Task(
        objective=spec.objective,
        unit="rows",
        examples=[(segment,) for segment in rows.segments],
        eval_examples=[(segment,) for segment in held_out.segments] if held_out else [],
        values=spec.values,
        describe=rows.name,
        shown=shown | ({"alpha": "alpha"} if mixed else {}),
        eval_objective=eval_objective,
    )
    run_job(job, task)


def _method(config: MainTrainConfig, mixed: bool) -> Method:
    if not mixed:
        return Method("Supervised fine-tuning: cross-entropy of the responses.", ("sft",))
    return Method(
        "Supervised fine-tuning on seed and synthetic pairs as in MAIN "
        f"([arXiv 2504.12913](https://arxiv.org/abs/2504.12913)): the two losses are weighed by `{config.alpha.rule}`.",
        ("main", "sft"),
    )


def step_spec(config: MainTrainConfig, model: ModelConfig, mixed: bool) -> StepSpec:
    """What the step consists of.

    Args:
      mixed: the rows are of both sources.
    """
    if mixed:
        carry = alpha_carry(config.alpha)
        return StepSpec(supervised_objective(model, config.compute, mixed_coefficients, carry), VALUES)
    return StepSpec(supervised_objective(model, config.compute), VALUES)


def main_programs(config: MainTrainConfig, model: ModelConfig, mesh: jax.sharding.Mesh) -> list[Program]:
    """What `train` compiles for rows of both sources."""
    return [train_program(config, model, step_spec(config, model, mixed=True), mesh)]
