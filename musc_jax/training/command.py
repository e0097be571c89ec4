"""`launch.musc_train`: token-aware preference optimisation of a policy on preference rows, start to finish."""

import dataclasses

import jax

from lm_jax.checkpoints.provenance import Method
from lm_jax.checkpoints.runs import ModelSource, open_model, param_specs
from lm_jax.config import FULL, ModelConfig
from lm_jax.console import say
from lm_jax.data.order import Beside
from lm_jax.errors import UserError
from lm_jax.planning.programs import Program, score_program, train_program
from lm_jax.training.job import Job, Task, TrainConfig, begin_job, open_job, run_job
from lm_jax.training.program import StepSpec
from musc_jax.training.examples import Pairs, load_pairs
from musc_jax.training.losses import LossConfig
from musc_jax.training.objective import given_weights, preference_objective
from musc_jax.training.reference import no_scores, reference_scores, weighted_pairs
from musc_jax.weights.online import online_weights, responses_beside, rows_beside
from musc_jax.weights.rules import CHOSEN, REJECTED, RULES_ON_SCORES, check_rule, online_rule


@dataclasses.dataclass(frozen=True)
class MuscTrainConfig(TrainConfig):
    """`configs/musc_train.py` says what each key is for and why it has its value."""

    reference: str | None
    weights: str
    loss: LossConfig
    reference_cache: str | None

    def __post_init__(self):
        check_rule(self.weights)
        super().__post_init__()
        if 2 * self.max_length > self.batch.row_length:
            raise UserError(
                f"config.batch.row_length={self.batch.row_length} must hold a pair, 2 x config.max_length="
                f"{2 * self.max_length} tokens; raise the one or lower the other"
            )


def train(config: MuscTrainConfig) -> None:
    """Runs, or continues, the training that `config` describes; see the module's docstring of `launch.musc_train`.

    Raises:
      UserError: anything the user can mend.
    """
    job = open_job(config)
    reference = open_reference(config, job)
    train_pairs, beside = _load(config.input, config, job, config.weights)
    rule = train_pairs.rule
    eval_pairs, eval_beside = _load(config.eval_input, config, job, rule) if config.eval_input else (None, None)
    spec = step_spec(config, job.policy.config, rule)
    inputs = [pairs.faults for pairs in (train_pairs, eval_pairs) if pairs is not None]
    begin_job(job, "musc_train", _method(config, rule), inputs)
    examples, eval_examples = _examples(config, rule, job, reference, train_pairs, eval_pairs)
    say(f"weights: {rule}")
    task = Task(
        objective=spec.objective,
        unit="pairs",
        examples=examples,
        eval_examples=eval_examples,
        values=spec.values,
        describe=train_pairs.name,
        shown={"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"},
        sides=(CHOSEN, REJECTED),
        beside=beside,
        eval_beside=eval_beside,
    )
    run_job(job, task)


def _load(path: str, config: MuscTrainConfig, job: Job, weights: str) -> tuple[Pairs, Beside | None]:
    """The pairs of a file, and what the batches carry beside them for weights that the policy computes."""
    online, beside = online_rule(weights), None
    limits = config.columns, config.max_dropped_share
    pairs = load_pairs(path, job.encoder, weights, None, *limits, last=not online)
    if online:
        pairs, beside = responses_beside(pairs, online, job)
    say("\n".join(pairs.report))
    return pairs, beside


def _method(config: MuscTrainConfig, rule: str) -> Method:
    plain = rule == "uniform" and config.loss.kind == "sigmoid"
    what = "Direct preference optimisation" if plain else "Token-aware preference optimisation"
    return Method(
        f"{what} as in MuSC ([arXiv 2502.11541](https://arxiv.org/abs/2502.11541)): loss `{config.loss.kind}`, "
        f"beta {config.loss.beta:g}, token weights `{rule}`.",
        ("musc", "dpo", "preference-optimization"),
    )


def step_spec(config: MuscTrainConfig, model: ModelConfig, rule: str) -> StepSpec:
    """What the step consists of.

    Args:
      rule: where the weights are from. Whatever is no `online` rule comes along with the batch, so that before the data
        are read `config.weights` itself will do.
    """
    online, values = online_rule(rule), ("weights", "ref_logprobs")
    if not online:
        return StepSpec(preference_objective(model, config.compute, config.loss, given_weights), values)
    weigh = online_weights(online, model, config.compute)
    objective = preference_objective(model, config.compute, config.loss, weigh)
    return StepSpec(objective, values[1:], rows_beside(online, config.batch))


def musc_programs(config: MuscTrainConfig, model: ModelConfig, mesh: jax.sharding.Mesh) -> list[Program]:
    """What `train` compiles: the step and, for a loss that reads a reference, its pass."""
    programs = [train_program(config, model, step_spec(config, model, config.weights), mesh)]
    if config.loss.needs_reference:
        precision = FULL if config.reference else config.lora.base
        programs.append(score_program(config.batch, config.compute, config.max_length, model, mesh, precision))
    return programs


def open_reference(config: MuscTrainConfig, job: Job) -> ModelSource:
    """The frozen model: `config.reference`, else the policy where it starts, on a base in nf4 if the policy's is.

    Raises:
      UserError: none there, or one that reads other tokens or does not fit the mesh.
    """
    if not config.reference:
        return job.policy
    reference = open_model(config.reference)
    if job.policy.precision != FULL and reference.identity() == job.policy.identity():
        return job.policy  # named or not, it is the base below the adapters
    ours, its = job.policy.config.vocab_size, reference.config.vocab_size
    if its != ours:
        raise UserError(
            f"{config.reference}: its vocabulary has {its} tokens, that of {config.model} {ours}; the reference must "
            "read the same tokens"
        )
    param_specs(reference.config, job.mesh)  # raises where the mesh does not fit it, before anything is written
    return reference


def _examples(config, rule: str, job: Job, reference, train_pairs: Pairs, eval_pairs: Pairs | None):
    """(chosen, rejected) segments with weights and reference log-probs, of the training and the evaluation pairs."""
    segments = train_pairs.segments + (eval_pairs.segments if eval_pairs else [])
    if config.loss.needs_reference or rule in RULES_ON_SCORES:
        cache = config.reference_cache or f"{config.output}/reference"
        scores = reference_scores(segments, reference, cache, config.compute, config.batch, job.mesh)
    else:
        scores = no_scores(segments)
    examples = weighted_pairs(segments, scores, rule)
    return examples[: len(train_pairs)], examples[len(train_pairs) :]
