"""What looks at a run's metrics step by step and warns, in a line each, of what a person would see in the curves."""

import collections
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax

from lm_jax.checkpoints.settings import training_records
from lm_jax.console import say
from lm_jax.training.callbacks import Callback, Metrics, Timing

_GUIDE = "docs/troubleshooting.md"
_WORSE = 3.0  # times what was warned of: then again


class Watch(Protocol):
    def look(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """A warning, or None; steps come in their order, and a metric that a step does not have is not looked at."""


class SpikeWatch:
    """Warns of a loss that is far above those of the steps before.

    Far is _DEVIATIONS standard deviations above the mean, as in OLMo's and Levanter's detection of outliers. A loss
    that is further off counts among the steps before only as far as that, so that a spike does not hide the next one.
    """

    _DEVIATIONS = 6.0
    _WINDOW = 100  # steps
    _QUIET = 30  # steps until enough of them are known
    _SMALLEST = 0.02  # of the mean, the least that counts as deviation: a loss that hardly moves is no reason to warn

    def __init__(self):
        self._before: collections.deque[float] = collections.deque(maxlen=self._WINDOW)
        self._warned = 0.0

    def look(self, step: int, metrics: Mapping[str, float]) -> str | None:
        if (loss := metrics.get("loss")) is None:
            return None
        if len(self._before) < self._QUIET:
            self._before.append(loss)
            return None
        mean, deviation = statistics.fmean(self._before), statistics.stdev(self._before)
        far = self._DEVIATIONS * max(deviation, self._SMALLEST * abs(mean))
        above, number = loss - mean, len(self._before)
        self._before.append(min(loss, mean + far))
        if above <= max(far, _WORSE * self._warned):
            return None
        self._warned = above
        return (
            f"warning: step {step}: loss {loss:.4g} is far above that of the {number} steps before, {mean:.4g} +- "
            f"{deviation:.2g}; see 'The loss jumps' in {_GUIDE}"
        )


class CollapseWatch:
    """Warns of chosen responses that become less likely while the margins grow (arXiv 2402.13228, 2410.05255).

    The mean of the last _WINDOW steps is compared with that of the first ones. Both changes must be beyond the steps'
    noise, and the chosen reward must have lost more than the margin gained: most of what was learnt then is to write
    neither. That it loses something is usual.
    """

    _WINDOW = 20  # steps
    _NOISE = 4.0  # standard errors of the difference of two means
    _LEAST = 0.1  # gain of the margin, in rewards, below which nothing has been learnt

    _NAMES = ("rewards/chosen", "rewards/margins", "logps/chosen")

    def __init__(self):
        self._first: list[list[float]] = []
        self._last: collections.deque[list[float]] = collections.deque(maxlen=self._WINDOW)
        self._warned = 0.0

    def look(self, step: int, metrics: Mapping[str, float]) -> str | None:
        if any(name not in metrics for name in self._NAMES):
            return None
        values = [metrics[name] for name in self._NAMES]
        if len(self._first) < self._WINDOW:
            self._first.append(values)
            return None
        self._last.append(values)
        if len(self._last) < self._WINDOW:
            return None
        (chosen, margin, _), (chosen_now, margin_now, _) = before, now = (_means(self._first), _means(self._last))
        chosen_error, margin_error, _ = map(self._error, zip(*self._first, strict=True), zip(*self._last, strict=True))
        lost, gained = chosen - chosen_now, margin_now - margin
        if lost <= max(self._NOISE * chosen_error, gained, _WORSE * self._warned) or gained <= max(
            self._NOISE * margin_error, self._LEAST
        ):
            return None
        self._warned = lost
        changes = (f"{name} {a:.3g} -> {b:.3g}" for name, a, b in zip(self._NAMES, before, now, strict=True))
        return (
            f"warning: step {step}: the chosen responses become less likely while the margins grow: "
            f"{', '.join(changes)} (means of the first and the last {self._WINDOW} steps); see '`logps/chosen` falls "
            f"while margins grow' in {_GUIDE}"
        )

    def _error(self, first: Sequence[float], last: Sequence[float]) -> float:
        return ((statistics.variance(first) + statistics.variance(last)) / self._WINDOW) ** 0.5


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]


class Warnings(Callback):
    """Says what the watches warn of, in process 0.

    Args:
      output: the run directory, whose metrics end at step `done`, as `MetricsWriter` sees to: what was told of these
        is not told again.
    """

    def __init__(self, output: str, done: int):
        self._watches: list[Watch] = [] if jax.process_index() else [SpikeWatch(), CollapseWatch()]
        for record in training_records(output) if done and self._watches else ():
            for watch in self._watches:
                watch.look(record["step"], record)

    def on_metrics(self, step: int, metrics: Metrics, timing: Timing) -> None:
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for watch in self._watches:
            if warning := watch.look(step, finite):
                say(warning)
