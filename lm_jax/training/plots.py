"""Pictures of a run, drawn when it ends, as PNG files: its metrics, the lengths and the weights of its data.

Curves are read from metrics.jsonl alone, so that a run that was interrupted shows as one. Figures are drawn without
pyplot, so no display is looked for.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lm_jax.data.packing import Example
from lm_jax.data.rows import replacing

_SMOOTHED = 60  # steps beyond which noise hides the trend
_COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red")
_BINS = 40


@dataclasses.dataclass(frozen=True)
class _Curves:
    """One picture of metrics over steps.

    Attributes:
      names: of the metrics, with their `eval_` fellows; none of them in a run: no picture.
      log: a logarithmic axis.
    """

    label: str
    names: tuple[str, ...]
    log: bool = False


_PICTURES = {
    "loss": _Curves("loss", ("loss", "loss/seed", "loss/synthetic", "nll_loss")),
    "margins": _Curves(
        "reward: beta x log-ratio to the reference", ("rewards/chosen", "rewards/rejected", "rewards/margins")
    ),
    "logps": _Curves("log-prob of a response, nats", ("logps/chosen", "logps/rejected")),
    "accuracy": _Curves("accuracy", ("rewards/accuracies", "mean_token_accuracy")),
    "alpha": _Curves("alpha, the weight of the synthetic loss", ("alpha",)),
    "grad_norm": _Curves("gradient norm before clipping", ("grad_norm",), log=True),
}


def plot_run(
    directory: str, records: Sequence[Mapping[str, Any]], examples: Sequence[Example], sides: Sequence[str]
) -> None:
    """Writes `directory`/NAME.png, whatever there is to show: see _PICTURES; `lengths`; `token_weights`.

    Args:
      records: the run's metrics, see `training_records`.
      examples: what was trained on; weights of response tokens are their segments' values `weights`.
      sides: what the segments of an example are.
    """
    for name, curves in _PICTURES.items():
        series = _series(records, curves.names)
        if any(label in curves.names for label in series):
            _save(_curves(curves, series), f"{directory}/{name}.png")
    lengths = {side: np.array([len(e[i].response) for e in examples]) for i, side in enumerate(sides)}
    lengths["prompt and response"] = np.array([len(segment) for example in examples for segment in example])
    _save(_histogram(lengths, "tokens", "sequences"), f"{directory}/lengths.png")
    weights = {side: _weights(examples, i) for i, side in enumerate(sides)}
    if any(len(np.unique(values)) > 1 for values in weights.values()):
        _save(
            _histogram(weights, "weight", "share of the response tokens", share=True), f"{directory}/token_weights.png"
        )


def _weights(examples: Sequence[Example], i: int) -> np.ndarray:
    found = [example[i].values["weights"] for example in examples if "weights" in example[i].values]
    return np.concatenate(found) if found else np.array([])


def _series(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Metric -> [2, N] steps and values, finite ones alone; evaluations under their own name."""
    series = {}
    for name in (prefix + name for name in names for prefix in ("", "eval_")):
        points = [(r["step"], r[name]) for r in records if name in r and np.isfinite(r[name])]
        if points:
            series[name] = np.array(points, float).T
    return series


def _curves(curves: _Curves, series: Mapping[str, np.ndarray]) -> Figure:
    figure, axis = _figure()
    for name, (steps, values) in series.items():
        evaluated = name.startswith("eval_")
        color = _COLORS[curves.names.index(name.removeprefix("eval_"))]
        if evaluated:
            axis.plot(steps, values, "o--", color=color, markersize=4, linewidth=1, label=f"{name[5:]}, held-out")
        elif len(steps) <= _SMOOTHED:
            axis.plot(steps, values, ".-", color=color, markersize=4, linewidth=1.2, label=name)
        else:
            width = len(steps) // 20
            axis.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
            axis.plot(
                steps, _smoothed(values, width), color=color, linewidth=1.6, label=f"{name}, mean of {width} steps"
            )
    if curves.log:
        axis.set_yscale("log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("step")
    axis.set_ylabel(curves.label)
    figure.legend(loc="outside upper left", ncols=2, fontsize="small", frameon=False)
    return figure


def _smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of each value and those around it, of fewer towards the ends."""
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _histogram(groups: Mapping[str, np.ndarray], x: str, y: str, share: bool = False) -> Figure:
    figure, axis = _figure()
    shown = {name: values for name, values in groups.items() if len(values)}
    bins = np.histogram_bin_edges(np.concatenate([*shown.values()]), _BINS)
    for (name, values), color in zip(shown.items(), _COLORS, strict=False):
        each = np.full(len(values), 1 / len(values)) if share else None
        label = f"{name} ({len(values)}, median {np.median(values):.4g})"
        axis.hist(values, bins, weights=each, histtype="step", linewidth=1.6, color=color, label=label)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    figure.legend(loc="outside upper left", ncols=2, fontsize="small", frameon=False)
    return figure


def _figure() -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    return figure, axis


def _save(figure: Figure, path: str) -> None:
    with replacing(path) as out:
        figure.savefig(out, format="png", dpi=120)
