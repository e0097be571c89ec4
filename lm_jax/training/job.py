"""A training command from start to finish, for any objective: model and data in, a run directory out."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lm_jax.checkpoints.mirror import Mirror
from lm_jax.checkpoints.orbax import Checkpoints
from lm_jax.checkpoints.provenance import Method
from lm_jax.checkpoints.runs import ModelSource, begin_run, open_model, param_specs, training_records
from lm_jax.config import BatchConfig, CheckpointConfig, ComputeConfig, LoraConfig, MeshConfig, OptimConfig, to_dict
from lm_jax.console import say
from lm_jax.data.order import BatchIterator, Beside, batch_shapes, check_batch, plan_batches
from lm_jax.data.packing import Example, example_lengths
from lm_jax.data.text import TextEncoder
from lm_jax.data.tokenizers import end_token_ids, load_tokenizer
from lm_jax.distributed.processes import stops_before
from lm_jax.distributed.stopping import Stopped, deferred
from lm_jax.errors import UserError
from lm_jax.models.attention import chosen
from lm_jax.models.decoder import check_compute
from lm_jax.models.lora import adapter_specs, init_adapters
from lm_jax.models.quantized import check_quantizer
from lm_jax.sharding import make_mesh
from lm_jax.training.flops import forward_flops, train_flops
from lm_jax.training.loggers import check_loggers, open_loggers
from lm_jax.training.loop import Run, StepCost, fit, resume
from lm_jax.training.metrics import MetricsWriter
from lm_jax.training.profile import Tracer, steps_to_trace
from lm_jax.training.program import StepProgram, assemble, compile_ahead, step_program
from lm_jax.training.skipping import Skips
from lm_jax.training.step import Objective, TrainState, make_evaluate
from lm_jax.training.watches import open_watches


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The keys of every command that trains."""

    model: str
    input: str
    eval_input: str | None
    output: str
    chat_template_kwargs: str
    seed: int
    dtype: str
    max_length: int
    epochs: int
    max_steps: int | None
    eval_every: int
    batch: BatchConfig
    optim: OptimConfig
    lora: LoraConfig
    mesh: MeshConfig
    compute: ComputeConfig
    checkpoints: CheckpointConfig
    loggers: str
    profile: str | None

    def __post_init__(self):
        check_loggers(self.loggers)
        steps_to_trace(self.profile)
        for name in ("max_length", "epochs", "eval_every", "max_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"config.{name}: must be at least 1, got {value}")


@dataclasses.dataclass(frozen=True)
class Job:
    """What of a run is known before its data are read.

    Attributes:
      policy: the model where training starts.
      encoder: makes the policy's token ids, with `tokenizer`.
      began: on the clock of `time.monotonic`.
    """

    config: TrainConfig
    mesh: jax.sharding.Mesh
    policy: ModelSource
    tokenizer: Any
    encoder: TextEncoder
    began: float


@dataclasses.dataclass(frozen=True)
class Task:
    """What a method gives to training.

    Attributes:
      eval_objective: None: the same; what it carries does not enter an evaluation.
      unit: what an example is, in the plural.
      values: what goes along with every response token, as `Segment.values` has it.
      eval_examples: empty for no evaluation.
      beside: what goes along with the examples, and `eval_beside` with those of the evaluation.
      describe: example number -> how a user finds that row.
      shown: metric name -> short name, of what the progress line and the summary show.
      sides: what the segments of an example are.
    """

    objective: Objective
    unit: str
    examples: Sequence[Example]
    eval_examples: Sequence[Example]
    values: tuple[str, ...]
    describe: Callable[[int], str]
    shown: Mapping[str, str]
    sides: tuple[str, ...] = ("response",)
    eval_objective: Objective | None = None
    beside: Beside | None = None
    eval_beside: Beside | None = None


def open_job(config: TrainConfig) -> Job:
    """Checks what can be checked without the data; reads no weights and writes nothing.

    Raises:
      UserError: a mesh, batch or model that do not fit each other.
    """
    began = time.monotonic()
    mesh = make_mesh(config.mesh)
    check_batch(config.batch, mesh)
    check_compute(config.compute)
    check_quantizer(config.lora.base)
    policy = dataclasses.replace(open_model(config.model), precision=config.lora.base)
    param_specs(policy.config, mesh, policy.precision)
    if config.lora.rank:
        adapter_specs(policy.config, config.lora, mesh)
    tokenizer = load_tokenizer(policy.directory, policy.config.vocab_size, config.chat_template_kwargs)
    encoder = TextEncoder(tokenizer, config.max_length, end_token_ids(policy.directory, tokenizer))
    return Job(config, mesh, policy, tokenizer, encoder, began)


def begin_job(job: Job, command: str, method: Method) -> None:
    """Makes the run directory, or finds the same run in it to continue; see `begin_run`."""
    begin_run(job.config.output, command, to_dict(job.config), job.policy, method, bool(job.config.lora.rank))


def run_job(job: Job, task: Task) -> None:
    """Trains to the end of the plan, from the start or from the newest checkpoint, and says where everything lies.

    Raises:
      UserError: too many steps with a loss or gradient that is not finite, a failed or damaged checkpoint.
      Stopped: asked to stop before the end.
    """
    config, mesh = job.config, job.mesh
    lengths = _lengths(task.examples, task.beside, config.batch)
    plan = plan_batches(lengths, config.batch, config.epochs, config.seed)
    num_steps = min(len(plan), config.max_steps or len(plan))
    per_step = len(task.examples) * config.epochs / len(plan)
    model, dtype = job.policy.config, config.compute.dtype
    attention = config.compute.attention
    attention = chosen(mesh, model.head_dim) if attention == "auto" else attention
    say(
        f"{len(task.examples)} {task.unit}: {num_steps} steps of about {per_step:.1f} on mesh {dict(mesh.shape)}, "
        f"attention {attention}"
    )
    program = step_program(model, task.objective, config.optim, config.lora, dtype, mesh, num_steps, config.seed)
    batches = BatchIterator(plan, task.examples, mesh, task.values, task.beside)
    copy = _mirror(config)
    keep = config.checkpoints.keep
    checkpointing = Checkpoints(f"{config.output}/checkpoints", keep, None if copy is None else copy.push)
    with deferred(), jax.set_mesh(mesh), checkpointing as checkpoints:
        shapes = batch_shapes(config.batch, mesh, task.values, task.beside)
        compiling = compile_ahead(program, mesh, shapes)
        frozen = job.policy.load_params(mesh, dtype) if config.lora.rank else None
        state = _start_state(job, program, checkpoints, batches)
        compiling.join()
        if done := int(state.step):
            if copy is not None:
                copy.push_missing(done)
            say(f"continuing {config.output} after step {done}")
        tracer = Tracer(steps_to_trace(config.profile), done, num_steps, f"{config.output}/profile")
        with (
            open_loggers(config.loggers, config.output) as loggers,
            MetricsWriter(config.output, done, loggers) as metrics,
        ):
            fit(
                Run(
                    state=state,
                    train_step=program.step,
                    frozen=frozen,
                    batches=batches,
                    costs=[_step_cost(plan[i], task, job) for i in range(num_steps)],
                    evaluate=_evaluation(job, task, frozen) if task.eval_examples else None,
                    eval_every=config.eval_every,
                    skips=Skips(config.output, config.optim.skip_limit, batches, task.describe),
                    watches=open_watches(config.output, done),
                    checkpoints=checkpoints,
                    checkpoint_config=config.checkpoints,
                    metrics=metrics,
                    tracer=tracer,
                    shown=task.shown,
                )
            )
        stops = stops_before("the end of training")  # what follows may be hours of another stage
    if jax.process_index() == 0:
        from lm_jax.training.plots import plot_run  # matplotlib takes a second, and a preview or an error needs none

        records = training_records(config.output)
        plot_run(f"{config.output}/plots", records, task.examples, task.sides)
        _say_summary(config.output, records, task.shown, num_steps, time.monotonic() - job.began)
    if stops:
        raise Stopped(f"{config.output}: all {num_steps} steps are done; stopped, as asked")


def _mirror(config: TrainConfig) -> Mirror | None:
    if (remote := config.checkpoints.remote) is None:
        return None
    return Mirror(remote, config.output, config.checkpoints.keep, jax.process_index(), jax.process_count())


def _lengths(examples: Sequence[Example], beside: Beside | None, batch: BatchConfig) -> np.ndarray:
    """[N] tokens of a row that each example takes, of the examples' row or of that beside it."""
    lengths = example_lengths(examples)
    return lengths if beside is None else np.maximum(lengths, beside.lengths(batch.row_length))


def _evaluation(job: Job, task: Task, frozen):
    """What is trained -> metrics over all evaluation examples."""
    batch = job.config.batch
    plan = plan_batches(_lengths(task.eval_examples, task.eval_beside, batch), batch, 1, None)
    evaluate = make_evaluate(task.eval_objective or task.objective)
    return lambda trained: evaluate(
        assemble(trained, frozen, job.config.lora),
        BatchIterator(plan, task.eval_examples, job.mesh, task.values, task.eval_beside),
    )


def _start_state(job: Job, program: StepProgram, checkpoints: Checkpoints, batches: BatchIterator) -> TrainState:
    """The state to go on from, its data iterator positioned."""
    if (step := checkpoints.whole_step()) is not None:
        state, position = resume(checkpoints, program.state, step)
        batches.set_state(position)
        return state
    policy, mesh, lora = job.policy, job.mesh, job.config.lora
    if lora.rank:
        return program.begin(init_adapters(policy.config, lora, mesh, job.config.seed))
    return program.begin(policy.load_params(mesh, "float32"))


def _step_cost(rows, task: Task, job: Job) -> StepCost:
    def segment_lengths(examples, items):
        return np.array([len(segment) for item in items for segment in examples[item]], np.int64)

    model, items = job.policy.config, [item for row in rows for item in row]
    lengths = segment_lengths(task.examples, items)
    flops = train_flops(model, lengths, frozen=bool(job.config.lora.rank))
    if task.beside is not None:
        n = task.beside.per_example
        beside = segment_lengths(task.beside.examples, [item * n + i for item in items for i in range(n)])
        flops += forward_flops(model, beside)
    slots = job.config.batch.rows * job.config.batch.row_length
    return StepCost(tokens=int(lengths.sum()), slots=slots, flops=flops)


def _say_summary(output: str, records, shown: Mapping[str, str], num_steps: int, seconds: float) -> None:
    trained = [record for record in records if "loss" in record]
    first, last = trained[0], trained[-1]
    values = ", ".join(f"{short} {last[name]:.4f}" for name, short in shown.items() if name != "loss")
    say(
        f"done: {num_steps} steps in {seconds:.0f} s; loss {first['loss']:.4f} -> {last['loss']:.4f}"
        + (f", {values}" if values else "")
    )
    say(f"  metrics      {output}/metrics.jsonl  (tensorboard --logdir {output}/tensorboard)")
    say(f"  plots        {output}/plots")
    say(f"  checkpoints  {output}/checkpoints")
    say(
        f"  export       python -m launch.export_hf --config=configs/export_hf.py "
        f"--config.model={output} --config.output={output}-hf"
    )
