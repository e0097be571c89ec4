"""The training loop: next batch, step, callbacks."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lm_jax.distributed.processes import stops_before
from lm_jax.distributed.stopping import Stopped
from lm_jax.training.callbacks import Callback, Timing
from lm_jax.training.step import TrainState


class _Pending(NamedTuple):
    """A step whose metrics are not fetched yet."""

    step: int
    metrics: dict[str, jax.Array]
    waited: float


def fit(
    state: TrainState,
    train_step: Any,
    frozen: Any,
    batches: Iterator[Any],
    num_steps: int,
    callbacks: Sequence[Callback],
) -> TrainState:
    """Trains until step `num_steps`. Metrics are fetched while the next step runs.

    Args:
      state: where training begins or resumes.
      train_step: compiled (state, batch, frozen) -> (state, metrics); the state is donated.
      frozen: what the step reads beside the state and does not change.
      batches: positioned at `state.step`.

    Raises:
      UserError: as the callbacks do.
      Stopped: the run was asked to stop; the callbacks have saved it as far as it came.
    """
    pending: _Pending | None = None
    clock = time.perf_counter()
    first = int(state.step)
    for step in range(first + 1, num_steps + 1):
        if stops_before(f"step {step}"):
            if pending is not None:
                _report(pending, clock, callbacks)
            for callback in callbacks:
                callback.stop(step - 1, state)
            raise Stopped(
                f"stopped after step {step - 1} of {num_steps}, as asked; all is saved: the same command goes on"
            )
        for callback in callbacks:
            callback.before_step(step, state)
        begin = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - begin
        state, metrics = train_step(state, batch, frozen)
        if pending is not None:
            clock = _report(pending, clock, callbacks)
        pending = _Pending(step, metrics, waited)
        if any([callback.wants_state(step) for callback in callbacks]):
            _report(pending, clock, callbacks)
            pending = None
            for callback in callbacks:
                callback.on_state(step, state)
            clock = time.perf_counter()  # what they did belongs to no step
    if pending is not None:
        _report(pending, clock, callbacks)
    for callback in callbacks:
        callback.end(num_steps, state)
    return state


def _report(pending: _Pending, clock: float, callbacks: Sequence[Callback]) -> float:
    """Waits for a step's metrics and hands them on; returns the time at which the step was done."""
    metrics = {name: np.asarray(value).item() for name, value in jax.device_get(pending.metrics).items()}
    now = time.perf_counter()
    for callback in callbacks:
        callback.on_metrics(pending.step, metrics, Timing(now - clock, pending.waited))
    return now
