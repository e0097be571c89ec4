"""Plots of a filter's run and of the controls, as PNG files.

Figures are drawn without pyplot, so no display is looked for.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from main_jax.filter.report import LENGTHS, Measured

_POINTS = 5000  # of a scatter plot; more only blur


def plot_filter(measured: Measured, directory: str, score: str) -> None:
    """Writes scores.png, kept_by_length.png, copy_rate.png and forward_reverse.png."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, draw in (
        ("scores", _scores),
        ("kept_by_length", _kept_by_length),
        ("copy_rate", _copy_rate),
        ("forward_reverse", _forward_reverse),
    ):
        figure = Figure(figsize=(12, 7) if name == "scores" else (6, 4), layout="constrained")
        draw(figure, measured, score)
        figure.savefig(Path(directory) / f"{name}.png", dpi=120)


def plot_controls(arms: Sequence[Mapping[str, Any]], path: str) -> None:
    """Writes one picture: each arm's difference to the seeds alone, with its interval.

    Args:
      arms: of `control_report.report_of`.
    """
    shown = [arm for arm in arms if arm["loss"] is not None and arm["difference"] is not None]
    figure = Figure(figsize=(7, 1.2 + 0.3 * len(shown)), layout="constrained")
    axis = figure.subplots()
    value, low, high = (np.array([arm["difference"][name] for arm in shown]) for name in ("value", "low", "high"))
    axis.errorbar(value, np.arange(len(shown)), xerr=(value - low, high - value), fmt="o", color="tab:blue", capsize=3)
    axis.axvline(0, color="0.6")
    axis.set_yticks(np.arange(len(shown)), [f"{arm['arm']} ({arm['pairs']})" for arm in shown])
    axis.invert_yaxis()
    axis.set_xlabel("loss on held-out seeds less that of the seeds alone, nats a token")
    figure.savefig(path, dpi=120)


def _scores(figure: Figure, measured: Measured, score: str) -> None:
    axes = figure.subplots(2, 3).flat
    for axis, (name, values) in zip(axes, measured.scores.items(), strict=False):
        _histogram(axis, values, measured)
        axis.set_title(f"{name} (chosen by)" if name == score else name)
        axis.set_xlabel("nats a token")
    axes[-1].axis("off")


def _copy_rate(figure: Figure, measured: Measured, score: str) -> None:
    axis = figure.subplots()
    _histogram(axis, measured.copied, measured)
    axis.set_xlabel("share of the instruction's 5-grams found in the response")


def _histogram(axis, values: np.ndarray, measured: Measured) -> None:
    shown = values[measured.best]
    bins = np.histogram_bin_edges(shown, bins=40)
    axis.hist(shown, bins, color="0.75", label="best of each response")
    axis.hist(values[measured.kept], bins, color="tab:blue", label="kept")
    axis.set_ylabel("candidates")
    axis.legend(fontsize="small")


def _kept_by_length(figure: Figure, measured: Measured, score: str) -> None:
    axis = figure.subplots()
    group = np.digitize(measured.words[measured.best], LENGTHS) - 1
    best = np.bincount(group, minlength=len(LENGTHS))
    kept = np.bincount(group[measured.kept[measured.best]], minlength=len(LENGTHS))
    labels = [f"{low}+" for low in LENGTHS]
    axis.bar(labels, kept / np.maximum(best, 1), color="tab:blue")
    for i, n in enumerate(best):
        axis.text(i, 0.01, f"of {n}", ha="center", fontsize="small")
    axis.set_ylim(0, 1)
    axis.set_xlabel("words of the response")
    axis.set_ylabel("share kept")


def _forward_reverse(figure: Figure, measured: Measured, score: str) -> None:
    axis = figure.subplots()
    best = np.flatnonzero(measured.best)
    best = best[:: -(-len(best) // _POINTS)]
    for of, color, label in (
        (best[~measured.kept[best]], "0.6", "not kept"),
        (best[measured.kept[best]], "tab:blue", "kept"),
    ):
        axis.scatter(measured.scores["forward"][of], measured.scores["reverse"][of], s=8, color=color, label=label)
    axis.set_xlabel("forward: CE(response | instruction)")
    axis.set_ylabel("reverse: CE(instruction | response)")
    axis.legend(fontsize="small")
