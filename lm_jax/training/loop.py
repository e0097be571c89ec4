"""The training loop: batches in, steps, metrics one step late, evaluation, checkpoints, exact resume."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.checkpoints.orbax import Checkpoints
from lm_jax.config import CheckpointConfig
from lm_jax.console import Progress, say
from lm_jax.data.order import BatchIterator
from lm_jax.distributed.processes import stops_before
from lm_jax.distributed.stopping import Stopped
from lm_jax.errors import UserError
from lm_jax.training.flops import peak_flops
from lm_jax.training.metrics import MetricsWriter
from lm_jax.training.profile import Tracer
from lm_jax.training.skipping import Skips
from lm_jax.training.step import TrainState
from lm_jax.training.watches import Watch


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
      watches: what looks at every step's metrics; they have seen those before `state.step`.
    """

    state: TrainState
    train_step: Any
    frozen: Any
    batches: BatchIterator
    costs: list[StepCost]
    evaluate: Callable[[Any], dict[str, float]] | None
    eval_every: int
    skips: Skips
    watches: Sequence[Watch]
    checkpoints: Checkpoints
    checkpoint_config: CheckpointConfig
    metrics: MetricsWriter
    tracer: Tracer
    shown: Mapping[str, str]  # metric name -> short name in the progress line


def fit(run: Run) -> TrainState:
    """Trains to the end of the plan, saving every `checkpoint_config.every` steps and after the last.

    Metrics are fetched while the next step runs. A step whose loss or gradient is not finite is skipped, and the data
    go on. A checkpoint that is due after such a step waits for the next one that is not skipped: where the parameters
    are at fault rather than the batch, the sound checkpoints before are not pushed out by unsound ones. A
    run that is asked to stop is saved as it is.

    Raises:
      UserError: more steps skipped than may be (names the step and its rows), or all of them, parameters that are not
        finite, or a failed checkpoint.
      Stopped: the run was asked to stop, and is saved as far as it came.
    """
    state = run.state
    first, last = int(state.step), len(run.costs)
    saved, due = first, False
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
                _save(run, step, state)
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
        due = due or done % run.checkpoint_config.every == 0 or done == last
        evaluate = run.evaluate if done % run.eval_every == 0 or done == last else None
        if due or evaluate is not None or run.tracer.ends(done):
            clock = _finish(run, pending, clock, progress)
            pending = None
            run.tracer.end(done)
            if done == run.skips.number == last:
                raise UserError(
                    f"all {last} steps were skipped, since their loss or gradient was not finite; nothing was trained "
                    "and nothing is saved: check the model and the rows, or train in float32"
                )
            if evaluate is not None:
                values = evaluate(state.params)
                run.metrics.write(done, {f"eval_{k}": v for k, v in values.items()})
            if due and (run.skips.last != done or done == last):
                _save(run, done, state)
                saved, due = done, False
            clock = time.perf_counter()  # neither belongs to a training step
    progress.close()
    run.checkpoints.wait()
    if run.skips.last == last:
        say(f"warning: step {last}, the last, was skipped: no loss was seen of the final parameters; evaluate them")
    return state


def _save(run: Run, step: int, state: TrainState) -> None:
    """Begins to save.

    Raises:
      UserError: not finite, though the loss and the gradient that led there were; or as `Checkpoints.save`.
    """
    if not _all_finite((state.params, state.opt_state)):
        raise UserError(
            f"step {step}: its update made parameters that are not finite; nothing is saved of it and the last "
            "checkpoint is intact: lower config.optim.learning_rate"
        )
    progress = {"data": run.batches.get_state(), "skipped_steps": int(state.skipped)}
    run.checkpoints.save(step, checkpoint_items(state, progress))


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


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
    optimizer, progress = items["optimizer"], items["progress"]
    state = TrainState(
        step=optimizer["step"],
        params=items["params"],
        opt_state=optimizer["opt_state"],
        carried=items.get("objective", abstract.carried),
        # Runs from before steps were skipped do not have it
        skipped=jax.device_put(np.int32(progress.get("skipped_steps", 0)), abstract.skipped.sharding),
    )
    return state, progress["data"]


@dataclasses.dataclass(frozen=True)
class _Pending:
    step: int
    values: dict[str, jax.Array]
    waited: float
    num_tokens: int
    num_flops: float


def _finish(run: Run, pending: _Pending, clock: float, progress: Progress) -> float:
    """Waits for a step's metrics, looks at them and writes them; returns the time at which the step was done."""
    values = {k: np.asarray(v).item() for k, v in jax.device_get(pending.values).items()}
    now = time.perf_counter()
    seconds = now - clock
    if said := run.skips.look(pending.step, values):
        progress.say(said)
    del values["bad_example"]
    finite = {k: v for k, v in values.items() if math.isfinite(v)}
    for warning in filter(None, (watch.look(pending.step, finite) for watch in run.watches)):
        progress.say(warning)
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
    shown = {short: f"{values.get(name, math.nan):.4g}" for name, short in run.shown.items()}
    progress.update(pending.step, {**shown, "tokens/s": f"{cost.tokens / seconds:.0f}"})
    return now
