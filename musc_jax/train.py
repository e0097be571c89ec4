"""`launch.musc_train`: token-aware preference optimisation of a policy on preference rows, start to finish."""

import dataclasses
import json
import time

import jax
import numpy as np

from lm_jax.config import (
    BatchConfig,
    CheckpointConfig,
    ComputeConfig,
    MeshConfig,
    OptimConfig,
    to_dict,
)
from lm_jax.data.order import BatchIterator, check_batch, plan_batches
from lm_jax.data.packing import example_lengths
from lm_jax.data.text import TextEncoder, end_token_ids, load_tokenizer
from lm_jax.errors import UserError
from lm_jax.models.decoder import check_compute
from lm_jax.sharding import make_mesh, state_shardings
from lm_jax.training.checkpoints import Checkpoints, abstract_like
from lm_jax.training.flops import train_flops
from lm_jax.training.loop import Run, StepCost, fit, resume
from lm_jax.training.metrics import MetricsWriter, say
from lm_jax.training.optim import make_optimizer, make_schedule
from lm_jax.training.runs import begin_run, open_model, param_specs
from lm_jax.training.step import TrainState, make_evaluate, make_train_step
from musc_jax.examples import Pairs, load_pairs
from musc_jax.losses import LossConfig
from musc_jax.objective import preference_objective
from musc_jax.reference import no_scores, reference_scores, weighted_pairs
from musc_jax.token_weights import RULES_ON_SCORES, check_rule

VALUES = ("weights", "ref_logprobs")  # what goes along with every response token


@dataclasses.dataclass(frozen=True)
class MuscTrainConfig:
    """`configs/musc_train.py` says what each key is for and why it has its value."""

    model: str
    reference: str | None
    input: str
    eval_input: str | None
    output: str
    seed: int
    dtype: str
    max_length: int
    epochs: int
    max_steps: int | None
    weights: str
    loss: LossConfig
    batch: BatchConfig
    optim: OptimConfig
    mesh: MeshConfig
    compute: ComputeConfig
    checkpoints: CheckpointConfig
    eval_every: int
    reference_cache: str | None

    def __post_init__(self):
        check_rule(self.weights)
        for name in ("max_length", "epochs", "eval_every", "max_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"config.{name}: must be at least 1, got {getattr(self, name)}")
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
    began = time.monotonic()
    mesh = make_mesh(config.mesh)
    check_batch(config.batch, mesh)
    check_compute(config.compute)
    policy = open_model(config.model)
    reference = open_model(config.reference) if config.reference else policy
    if reference.config.vocab_size != policy.config.vocab_size:
        raise UserError(
            f"{config.reference}: its vocabulary has {reference.config.vocab_size} tokens, that of {config.model} "
            f"{policy.config.vocab_size}; the reference must read the same tokens"
        )
    tokenizer = load_tokenizer(policy.directory, policy.config.vocab_size)
    encoder = TextEncoder(tokenizer, config.max_length, end_token_ids(policy.directory, tokenizer))
    train_pairs = load_pairs(config.input, encoder, config.weights)
    rule = train_pairs.rule
    eval_pairs = load_pairs(config.eval_input, encoder, rule) if config.eval_input else None
    for pairs in filter(None, (train_pairs, eval_pairs)):
        say("\n".join(pairs.report))
    for source in (policy, reference):
        param_specs(source.config, mesh)  # raises where the mesh does not fit the model, before anything is written
    begin_run(config.output, "musc_train", to_dict(config), policy)
    train_examples, eval_examples = _examples(config, rule, mesh, reference, train_pairs, eval_pairs)

    plan = plan_batches(example_lengths(train_examples), config.batch, config.epochs, config.seed)
    num_steps = min(len(plan), config.max_steps or len(plan))
    say(
        f"{len(train_pairs)} pairs, weights {rule}: {num_steps} steps of about "
        f"{len(train_pairs) * config.epochs / len(plan):.1f} pairs on mesh {dict(mesh.shape)}"
    )
    objective = preference_objective(policy.config, config.compute, config.loss)
    schedule = make_schedule(config.optim, num_steps)
    optimizer = make_optimizer(config.optim, schedule)
    batches = BatchIterator(plan, train_examples, mesh, VALUES)
    with jax.set_mesh(mesh), Checkpoints(f"{config.output}/checkpoints", config.checkpoints.keep) as checkpoints:
        state, shardings = _start_state(policy, optimizer, checkpoints, mesh, batches)
        if int(state.step):
            say(f"continuing {config.output} after step {int(state.step)}")
        step = make_train_step(objective, optimizer, schedule)
        with MetricsWriter(config.output, int(state.step)) as metrics:
            fit(
                Run(
                    state=state,
                    train_step=jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)),
                    batches=batches,
                    costs=[_step_cost(plan[i], train_examples, config, policy.config) for i in range(num_steps)],
                    evaluate=_evaluation(config, objective, eval_examples, mesh) if eval_pairs else None,
                    eval_every=config.eval_every,
                    describe=train_pairs.name,
                    checkpoints=checkpoints,
                    checkpoint_config=config.checkpoints,
                    metrics=metrics,
                    shown={"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "acc"},
                )
            )
    _say_summary(config, num_steps, time.monotonic() - began)


def _examples(config, rule: str, mesh, reference, train_pairs: Pairs, eval_pairs: Pairs | None):
    """(chosen, rejected) segments with weights and reference log-probs, of the training and the evaluation pairs."""
    segments = train_pairs.segments + (eval_pairs.segments if eval_pairs else [])
    if config.loss.needs_reference or rule in RULES_ON_SCORES:
        cache = config.reference_cache or f"{config.output}/reference"
        scores = reference_scores(segments, reference, cache, config.compute, config.batch, mesh)
    else:
        scores = no_scores(segments)
    examples = weighted_pairs(segments, scores, rule)
    return examples[: len(train_pairs)], examples[len(train_pairs) :]


def _evaluation(config, objective, examples, mesh):
    """params -> metrics over all evaluation pairs."""
    plan = plan_batches(example_lengths(examples), config.batch, 1, None)
    evaluate = make_evaluate(objective)
    return lambda params: evaluate(params, BatchIterator(plan, examples, mesh, VALUES))


def _start_state(policy, optimizer, checkpoints, mesh, batches) -> tuple[TrainState, TrainState]:
    """The state to go on from, its data iterator positioned, and its shardings."""
    abstract_params = policy.abstract_params(mesh, "float32")
    abstract = jax.eval_shape(lambda p: TrainState.create(p, optimizer), abstract_params)
    shardings = state_shardings(abstract, param_specs(policy.config, mesh), mesh)
    if checkpoints.latest_step() is not None:
        state, position = resume(checkpoints, abstract_like(abstract, shardings))
        batches.set_state(position)
        return state, shardings
    params = policy.load_params(mesh, "float32")
    create = jax.jit(lambda p: TrainState.create(p, optimizer), out_shardings=shardings, donate_argnums=0)
    return create(params), shardings


def _step_cost(rows, examples, config, model) -> StepCost:
    lengths = [len(segment) for row in rows for item in row for segment in examples[item]]
    return StepCost(
        tokens=sum(lengths),
        slots=config.batch.rows * config.batch.row_length,
        flops=train_flops(model, np.array(lengths)),
    )


def _say_summary(config: MuscTrainConfig, num_steps: int, seconds: float) -> None:
    with open(f"{config.output}/metrics.jsonl") as f:
        records = [json.loads(line) for line in f]
    trained = [r for r in records if "loss" in r]
    first, last = trained[0], trained[-1]
    say(
        f"done: {num_steps} steps in {seconds:.0f} s; loss {first['loss']:.4f} -> {last['loss']:.4f}, "
        f"margin {last['rewards/margins']:.4f}, accuracy {last['rewards/accuracies']:.2f}"
    )
    say(f"  metrics      {config.output}/metrics.jsonl  (tensorboard --logdir {config.output}/tensorboard)")
    say(f"  checkpoints  {config.output}/checkpoints")
    say(
        f"  export       python -m launch.export_hf --config=configs/export_hf.py "
        f"--config.model={config.output} --config.output={config.output}-hf"
    )
