"""A training run from start to finish, for any objective: model and data in, a run directory out."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lm_jax.checkpoints.mirror import Mirror
from lm_jax.checkpoints.orbax import Checkpoints
from lm_jax.checkpoints.provenance import Method
from lm_jax.checkpoints.runs import ModelSource, begin_run, open_model, param_specs
from lm_jax.checkpoints.settings import Contents, rows_content, training_records
from lm_jax.config import (
    BatchConfig,
    CheckpointConfig,
    ComputeConfig,
    LoraConfig,
    MeshConfig,
    OptimConfig,
    StepBatch,
    to_dict,
)
from lm_jax.console import say
from lm_jax.data.batches import AuxiliaryBatch, BatchIterator, batch_shapes
from lm_jax.data.columns import RowKeys
from lm_jax.data.faults import Faults, write_faults
from lm_jax.data.packing import Example, example_lengths, examples_fingerprint
from lm_jax.data.plans import BatchPlan, plan_passes, plan_steps
from lm_jax.data.text import TextEncoder
from lm_jax.data.tokenizers import end_token_ids, load_tokenizer, tokenizer_fingerprint
from lm_jax.distributed.processes import moving, stops_before
from lm_jax.distributed.stopping import Stopped, deferred
from lm_jax.errors import UserError
from lm_jax.models.attention import chosen
from lm_jax.models.decoder import check_compute
from lm_jax.models.lora import adapter_specs, init_adapters
from lm_jax.models.quantized import check_quantizer
from lm_jax.sharding import batch_divisor, make_mesh
from lm_jax.training.callbacks import Callback, Evaluation, ProgressBar, StepCost, Throughput
from lm_jax.training.checkpointing import Checkpointing, resume
from lm_jax.training.flops import forward_flops, train_flops
from lm_jax.training.loggers import check_loggers, open_loggers
from lm_jax.training.loop import fit
from lm_jax.training.metrics import MetricsWriter
from lm_jax.training.objective import Objective
from lm_jax.training.profile import Tracer, steps_to_trace
from lm_jax.training.program import StepProgram, assemble, compile_beside, step_program
from lm_jax.training.skipping import Skips
from lm_jax.training.step import TrainState, host_totals, make_evaluate
from lm_jax.training.watches import Warnings


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(RowKeys):
    """The keys of every command that trains."""

    model: str
    input: str
    eval_input: str | None = None
    output: str
    chat_template_kwargs: str = ""
    seed: int = 0
    dtype: str = "bfloat16"
    max_length: int = 2048
    epochs: int = 3
    max_steps: int | None = None
    eval_every: int = 100
    batch: StepBatch
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig = LoraConfig()
    mesh: MeshConfig = MeshConfig()
    compute: ComputeConfig = ComputeConfig(dtype="bfloat16", remat="full")
    checkpoints: CheckpointConfig = CheckpointConfig()
    loggers: str = ""
    profile: str | None = None

    def __post_init__(self):
        super().__post_init__()
        check_loggers(self.loggers)
        steps_to_trace(self.profile)
        for name in ("max_length", "epochs", "eval_every", "max_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"config.{name}: must be at least 1, got {value}")

    @property
    def row_length(self) -> int:
        """Tokens that a row may hold: two of the longest sequences, so that a pair always fits."""
        return 2 * self.max_length

    def forward_batch(self, mesh: jax.sharding.Mesh) -> BatchConfig:
        """The shape of a pass without a gradient, of as many rows at one time as a step's microbatch."""
        return BatchConfig(self.batch.rows_per_device * batch_divisor(mesh), self.row_length)


@dataclasses.dataclass(frozen=True)
class Data:
    """Examples of one set, as the objective's batches hold them.

    Attributes:
      auxiliary: what travels with the examples.
      describe: example number -> how a user finds that row.
      sides: what the segments of an example are.
    """

    examples: Sequence[Example]
    describe: Callable[[int], str] = str
    auxiliary: AuxiliaryBatch | None = None
    sides: tuple[str, ...] = ("response",)

    @property
    def lengths(self) -> np.ndarray:
        """[N] tokens of a row that each example takes, its auxiliary ones too."""
        lengths = example_lengths(self.examples)
        return lengths if self.auxiliary is None else np.maximum(lengths, self.auxiliary.lengths())

    def segment_lengths(self, items: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of each segment of these examples, and of the auxiliary ones that travel with them."""

        def of(examples, numbers):
            return np.array([len(segment) for item in numbers for segment in examples[item]], np.int64)

        if self.auxiliary is None:
            return of(self.examples, items), np.zeros(0, np.int64)
        n = self.auxiliary.per_example
        return of(self.examples, items), of(self.auxiliary.examples, [i * n + j for i in items for j in range(n)])


class Trainer:
    """One run: the model where it starts, the mesh, and from `fit` on the data and the objective.

    Making one checks what can be checked without the data; it reads no weights and writes nothing.

    Attributes:
      policy: the model where training starts.
      encoder: makes the policy's token ids, with `tokenizer`.

    Raises:
      UserError: a mesh and a model that do not fit each other.
    """

    def __init__(self, config: TrainConfig):
        self._began = time.monotonic()
        self.config, self.mesh = config, make_mesh(config.mesh)
        check_compute(config.compute)
        check_quantizer(config.lora.base)
        self.policy = dataclasses.replace(open_model(config.model), precision=config.lora.base)
        param_specs(self.policy.config, self.mesh, self.policy.precision)
        if config.lora.rank:
            adapter_specs(self.policy.config, config.lora, self.mesh)
        self.tokenizer: Any = load_tokenizer(
            self.policy.directory, self.policy.config.vocab_size, config.chat_template_kwargs
        )
        end_ids = end_token_ids(self.policy.directory, self.tokenizer)
        self.encoder = TextEncoder(self.tokenizer, config.max_length, end_ids)

    def begin(
        self,
        command: str,
        method: Method,
        faults: Sequence[Faults],
        read: Sequence[Sequence[Example]],
        reference: ModelSource | None = None,
    ) -> None:
        """Makes the run directory, or finds the same run in it to continue; see `begin_run`.

        Args:
          faults: the faulty rows of what was read, which `dropped.jsonl` lists.
          read: all that training, and evaluation, reads of its rows, as far as it is known before a model scores them.
          reference: what else than the policy has scored them.
        """
        config = self.config

        def made_from() -> Contents:
            tokenizer = tokenizer_fingerprint(self.tokenizer)
            models = {"model": self.policy, "reference": reference}
            return {
                key: rows_content(len(own), examples_fingerprint(own), tokenizer)
                for key, own in zip(("input", "eval_input"), read, strict=False)
            } | {key: model.content() for key, model in models.items() if model is not None}

        dropped = f"{config.output}/dropped.jsonl"
        for own in faults:
            own.say(dropped)
        begin_run(config.output, command, to_dict(config), self.policy, method, made_from, bool(config.lora.rank))
        if jax.process_index() == 0:
            write_faults(dropped, faults)

    def fit(
        self,
        objective: Objective,
        data: Data,
        eval_data: Data | None,
        shown: Mapping[str, str],
        eval_objective: Objective | None = None,
    ) -> None:
        """Trains to the end, from the start or from the newest checkpoint, and says where everything lies.

        Args:
          shown: metric name -> short name, of what the progress line and the summary show.
          eval_objective: None: the same; its state does not enter an evaluation.

        Raises:
          UserError: too many steps with a loss or gradient that is not finite, a failed or damaged checkpoint.
          Stopped: asked to stop before the end.
        """
        config, mesh, output = self.config, self.mesh, self.config.output
        plan = self._plan(data)
        num_steps = min(len(plan), config.max_steps or len(plan))
        program = step_program(
            self.policy.config,
            objective,
            config.optim,
            config.lora,
            config.compute.dtype,
            mesh,
            num_steps,
            config.seed,
        )
        batches = BatchIterator(plan, data.examples, mesh, objective.values, data.auxiliary)
        copy = _mirror(config)
        copies = None if copy is None else copy.push
        checkpointing = Checkpoints(f"{output}/checkpoints", config.checkpoints.keep, copies)
        with deferred(), jax.set_mesh(mesh), checkpointing as checkpoints:
            shapes = (plan.rows, plan.max_examples, mesh, objective.values, data.auxiliary)

            def load() -> tuple[Any, TrainState]:
                frozen = self.policy.load_params(mesh, config.compute.dtype) if config.lora.rank else None
                return frozen, self._start_state(program, checkpoints, batches)

            given = [batch_shapes(stacks, *shapes) for stacks in plan.shapes]
            frozen, state = compile_beside(program, mesh, given, load)
            if done := int(state.step):
                if copy is not None:
                    with moving(copy.remote):
                        copy.push_missing(done)
                say(f"continuing {output} after step {done}")
            with (
                open_loggers(config.loggers, output) as loggers,
                MetricsWriter(output, done, loggers) as writer,
            ):
                costs = [self._cost(plan, step, data) for step in range(num_steps)]
                skips = Skips(output, config.optim.skip_limit, num_steps, batches, data.describe)
                callbacks: list[Callback] = [
                    skips,
                    Warnings(output, done),
                    Throughput(costs, program.step._cache_size),
                    writer,
                    ProgressBar(num_steps, done, shown),
                    Tracer(steps_to_trace(config.profile), done, num_steps, f"{output}/profile"),
                ]
                if eval_data is not None:
                    evaluate = self._evaluation(eval_objective or objective, eval_data, frozen)
                    callbacks.append(Evaluation(evaluate, config.eval_every, num_steps, writer.write))
                callbacks.append(Checkpointing(checkpoints, config.checkpoints.every, done, num_steps, batches, skips))
                fit(state, program.step, frozen, batches, num_steps, callbacks)
            stops = stops_before("the end of training")  # what follows may be hours of another stage
        if jax.process_index() == 0:
            from lm_jax.training.plots import plot_run  # matplotlib takes a second; a preview or an error needs none

            records = training_records(output)
            plot_run(f"{output}/plots", records, data.examples, data.sides)
            _say_summary(output, records, shown, num_steps, time.monotonic() - self._began)
        if stops:
            raise Stopped(f"{output}: all {num_steps} steps are done; stopped, as asked")

    def _plan(self, data: Data) -> BatchPlan:
        config, size = self.config, self.config.batch.size
        rows = config.forward_batch(self.mesh).rows
        plan = plan_steps(
            data.lengths, size, config.epochs, config.seed, rows, config.row_length, config.batch.row_lengths
        )
        num_steps = min(len(plan), config.max_steps or len(plan))
        attention = config.compute.attention
        attention = chosen(self.mesh, self.policy.config.head_dim) if attention == "auto" else attention
        say(
            f"{len(data.examples)} {config.batch.unit}: {num_steps} steps of {size}, {_row_shapes(plan)}, on mesh "
            f"{dict(self.mesh.shape)}, attention {attention}"
        )
        return plan

    def _evaluation(self, objective: Objective, data: Data, frozen: Any) -> Callable[[Any], dict[str, float]]:
        """What is trained -> metrics over all evaluation examples."""
        plan = plan_passes(data.lengths, self.config.forward_batch(self.mesh), batch_divisor(self.mesh))
        evaluate = make_evaluate(objective)

        def batches() -> BatchIterator:
            return BatchIterator(plan, data.examples, self.mesh, objective.values, data.auxiliary)

        whole = batches().whole
        totals = host_totals(objective, (stack for step in range(len(plan)) for stack in whole(step)))
        lora = self.config.lora
        return lambda trained: evaluate(assemble(trained, frozen, lora), (stack for (stack,) in batches()), totals)

    def _start_state(self, program: StepProgram, checkpoints: Checkpoints, batches: BatchIterator) -> TrainState:
        """The state to go on from, its data iterator positioned."""
        if (step := checkpoints.whole_step()) is not None:
            state, position = resume(checkpoints, program.state, step)
            batches.set_state(position)
            return state
        lora = self.config.lora
        if lora.rank:
            return program.begin(init_adapters(self.policy.config, lora, self.mesh, self.config.seed))
        return program.begin(self.policy.load_params(self.mesh, "float32"))

    def _cost(self, plan: BatchPlan, step: int, data: Data) -> StepCost:
        own, auxiliary = data.segment_lengths(plan.examples(step))
        model = self.policy.config
        flops = train_flops(model, own, frozen=bool(self.config.lora.rank)) + forward_flops(model, auxiliary)
        return StepCost(tokens=int(own.sum()), padded_tokens=plan.tokens(step), flops=flops)


def _mirror(config: TrainConfig) -> Mirror | None:
    if (remote := config.checkpoints.remote) is None:
        return None
    return Mirror(remote, config.output, config.checkpoints.keep, jax.process_index(), jax.process_count())


def _row_shapes(plan: BatchPlan) -> str:
    """Such as `microbatches of 2 x 3072 or 2 x 4096 tokens`."""
    lengths = sorted({stack.row_length for shape in plan.shapes for stack in shape})
    return f"microbatches of {' or '.join(f'{plan.rows} x {length}' for length in lengths)} tokens"


def _say_summary(output: str, records, shown: Mapping[str, str], num_steps: int, seconds: float) -> None:
    trained = [record for record in records if "loss" in record]
    first, last = trained[0], trained[-1]
    values = ", ".join(f"{short} {last[name]:.4f}" for name, short in shown.items() if name in last.keys() - {"loss"})
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
