"""What a run does beside its steps: one interface, and the callbacks that have no file of their own."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lm_jax.console import Progress
from lm_jax.training.flops import peak_flops
from lm_jax.training.step import TrainState

Metrics = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Of one step.

    Attributes:
      seconds: from the end of the step before, or of what came after it, to its own.
      waited: of these, for its batch.
    """

    seconds: float
    waited: float


class Callback:
    """Called by `lm_jax.training.loop.fit`, every method in the order of the callbacks; steps count from 1."""

    def before_step(self, step: int, state: TrainState) -> None:
        """Before the step is started; `state` may still be computed."""

    def wants_state(self, step: int) -> bool:
        """Whether `on_state` is to be called after the step; the run waits for the step then."""
        return False

    def on_metrics(self, step: int, metrics: Metrics, timing: Timing) -> None:
        """Once the step is done, which may be while the next one runs. What is changed, later callbacks see."""

    def on_state(self, step: int, state: TrainState) -> None:
        """After every step that any callback `wants_state` of."""

    def stop(self, step: int, state: TrainState) -> None:
        """The run was asked to stop, and does so after this step."""

    def end(self, step: int, state: TrainState) -> None:
        """After the last step."""


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What a step works on, known from the plan before it runs."""

    tokens: int  # real tokens, padding excluded
    padded_tokens: int  # tokens including padding
    flops: float  # of the model, forward and backward


class Throughput(Callback):
    """Adds how fast a step was, and what the run has worked on so far.

    Args:
      costs: of every step of the run.
      num_compiles: how often the step was compiled so far.
    """

    def __init__(self, costs: Sequence[StepCost], num_compiles: Callable[[], int]):
        self._costs, self._num_compiles, self._peak = costs, num_compiles, peak_flops()
        self._tokens, self._flops = (np.cumsum([getattr(c, name) for c in costs]) for name in ("tokens", "flops"))

    def on_metrics(self, step: int, metrics: Metrics, timing: Timing) -> None:
        cost, peak = self._costs[step - 1], self._peak
        metrics |= {
            "num_tokens": int(self._tokens[step - 1]),
            "num_flops": float(self._flops[step - 1]),
            "padding_fraction": 1 - cost.tokens / cost.padded_tokens,
            "num_compiles": self._num_compiles(),
            "tokens_per_second": cost.tokens / timing.seconds,
            "data_wait_fraction": min(timing.waited / timing.seconds, 1.0),
        } | ({} if peak is None else {"model_flops_utilization": cost.flops / timing.seconds / peak})


class Evaluation(Callback):
    """Writes `eval_*` metrics every `every` steps and after the last.

    Args:
      evaluate: what is trained -> metrics.
      write: what takes (step, metrics).
    """

    def __init__(
        self,
        evaluate: Callable[[Any], Mapping[str, float]],
        every: int,
        last: int,
        write: Callable[[int, Metrics], None],
    ):
        self._evaluate, self._every, self._last, self._write = evaluate, every, last, write

    def wants_state(self, step: int) -> bool:
        return step % self._every == 0 or step == self._last

    def on_state(self, step: int, state: TrainState) -> None:
        if self.wants_state(step):
            self._write(step, {f"eval_{k}": v for k, v in self._evaluate(state.params).items()})


class ProgressBar(Callback):
    """Shows some metrics under short names, and the speed.

    Args:
      shown: metric name -> short name.
    """

    def __init__(self, total: int, done: int, shown: Mapping[str, str]):
        self._progress, self._shown = Progress(total, done, "step"), shown

    def on_metrics(self, step: int, metrics: Metrics, timing: Timing) -> None:
        shown = {short: f"{metrics.get(name, math.nan):.4g}" for name, short in self._shown.items()}
        self._progress.update(step, {**shown, "tokens/s": f"{metrics['tokens_per_second']:.0f}"})

    def stop(self, step: int, state: TrainState) -> None:
        self._progress.close()

    def end(self, step: int, state: TrainState) -> None:
        self._progress.close()
