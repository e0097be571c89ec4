"""The training loop: batches in, steps, metrics one step late, evaluation, checkpoints, exact resume."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lm_jax.config import CheckpointConfig
from lm_jax.data.order import BatchIterator
from lm_jax.distributed.processes import stops_before
from lm_jax.distributed.stopping import Stopped
from lm_jax.errors import UserError
from lm_jax.training.checkpoints import Checkpoints
from lm_jax.training.flops import peak_flops
from lm_jax.training.metrics import MetricsWriter, Progress
from lm_jax.training.profile import Tracer
from lm_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What a step works on, known from the plan before it runs."""

    tokens: int  # real tokens, padding excluded
    slots: int  # tokens including padding
    flops: float  # of the model, forward and backward


@dataclasses.dataclass
class Run:
    """Everything that `fit` drives.

    Attributes:
      state: at the step where training begins or resumes.
      train_step: compiled (state, batch, frozen) -> (state, metrics); the state is donated.
      frozen: what the step reads beside the state and does not change.
      batches: positioned at `state.step`.
      costs: of every step.
      evaluate: params -> metrics, or None.
      describe: example id -> how a user finds that row, for the error that names it.
    """

    state: TrainState
    train_step: Any
    frozen: Any
    batches: BatchIterator
    costs: list[StepCost]
    evaluate: Callable[[Any], dict[str, float]] | None
    eval_every: int
    describe: Callable[[int], str]
    checkpoints: Checkpoints
    checkpoint_config: CheckpointConfig
    metrics: MetricsWriter
    tracer: Tracer
    shown: Mapping[str, str]  # metric name -> short name in the progress line


def fit(run: Run) -> TrainState:
    """Trains to the end of the plan, saving every `checkpoint_config.every` steps and after the last.

    Metrics are fetched while the next step runs. A checkpoint is written only after its own step's metrics are known
    to be finite.

    Raises:
      UserError: non-finite loss or gradient (names the step and the row), or a failed checkpoint.
      Stopped: the run was asked to stop, and is saved as far as it came.
    """
    state = run.state
    first, last = int(state.step), len(run.costs)
    saved = first
    progress = Progress(last, first, "step")
    pending: _Pending | None = None
    num_tokens, num_flops = (np.cumsum([getattr(c, n) for c in run.costs]) for n in ("tokens", "flops"))
    clock = time.perf_counter()
    for step in range(first, last):
        run.checkpoints.check()
        if stops_before(f"step {step + 1}"):
            if pending is not None:
                _finish(run, pending, clock, progress)
            if step > saved:
                run.checkpoints.save(step, checkpoint_items(state, {"data": run.batches.get_state()}))
            progress.close()
            run.checkpoints.wait()
            raise Stopped(f"stopped after step {step} of {last}, as asked; all is saved: the same command goes on")
        done = step + 1
        if run.tracer.begins(done) and pending is not None:
            clock, pending = _finish(run, pending, clock, progress), None
        run.tracer.begin(done)
        begin = time.perf_counter()
        batch = next(run.batches)
        waited = time.perf_counter() - begin
        state, values = run.train_step(state, batch, run.frozen)
        if pending is not None:
            clock = _finish(run, pending, clock, progress)
        pending = _Pending(done, values, waited, int(num_tokens[step]), float(num_flops[step]))
        saving = done % run.checkpoint_config.every == 0 or done == last
        evaluate = run.evaluate if done % run.eval_every == 0 or done == last else None
        if saving or evaluate is not None or run.tracer.ends(done):
            clock = _finish(run, pending, clock, progress)
            pending = None
            run.tracer.end(done)
            if evaluate is not None:
                values = evaluate(state.params)
                run.metrics.write(done, {f"eval_{k}": v for k, v in values.items()})
            if saving:
                run.checkpoints.save(done, checkpoint_items(state, {"data": run.batches.get_state()}))
                saved = done
            clock = time.perf_counter()  # neither belongs to a training step
    progress.close()
    run.checkpoints.wait()
    return state


def checkpoint_items(state: TrainState, progress: Any) -> dict[str, Any]:
    """What a checkpoint holds, by item; parameters apart, since exporting and scoring need nothing else.

    What the objective carries is an item where it carries something.
    """
    items = {
        "params": state.params,
        "optimizer": {"step": state.step, "opt_state": state.opt_state},
        "progress": progress,
    }
    return items | ({"objective": state.carried} if jax.tree.leaves(state.carried) else {})


def resume(checkpoints: Checkpoints, abstract: TrainState, step: int | None = None) -> tuple[TrainState, dict]:
    """A checkpoint, the newest by default, as (state, data position)."""
    items = checkpoints.restore(checkpoint_items(abstract, None), step)
    optimizer = items["optimizer"]
    state = TrainState(
        optimizer["step"], items["params"], optimizer["opt_state"], items.get("objective", abstract.carried)
    )
    return state, items["progress"]["data"]


@dataclasses.dataclass(frozen=True)
class _Pending:
    step: int
    values: dict[str, jax.Array]
    waited: float
    num_tokens: int
    num_flops: float


def _finish(run: Run, pending: _Pending, clock: float, progress: Progress) -> float:
    """Waits for a step's metrics, checks and writes them; returns the time at which the step was done."""
    values = {k: np.asarray(v).item() for k, v in jax.device_get(pending.values).items()}
    now = time.perf_counter()
    seconds = now - clock
    bad = values.pop("bad_example")
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values[name]):
            row = f" (first seen in {run.describe(bad)})" if bad >= 0 else ""
            raise UserError(
                f"step {pending.step}: {name} is {values[name]}{row}; the last checkpoint is intact: lower "
                f"config.optim.learning_rate, check that row's text and weights, or train in float32"
            )
    cost = run.costs[pending.step - 1]
    peak = peak_flops()
    run.metrics.write(
        pending.step,
        {
            **values,
            "num_tokens": pending.num_tokens,
            "num_flops": pending.num_flops,
            "padding_fraction": 1 - cost.tokens / cost.slots,
            "num_compiles": run.train_step._cache_size(),
            "tokens_per_second": cost.tokens / seconds,
            "model_flops_utilization": None if peak is None else cost.flops / seconds / peak,
            "data_wait_fraction": min(pending.waited / seconds, 1.0),
        },
    )
    shown = {short: f"{values[name]:.4g}" for name, short in run.shown.items()}
    progress.update(pending.step, {**shown, "tokens/s": f"{cost.tokens / seconds:.0f}"})
    return now
