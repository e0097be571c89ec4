"""The numbers that a filter's run ends with, as JSON and as a table.

Axes: N candidates.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from main_jax.filter.auroc import midranks

LENGTHS = (0, 50, 100, 200, 400)  # words of a response, where one group ends and the next begins
_QUANTILES = {"p5": 5, "p25": 25, "median": 50, "p75": 75, "p95": 95}


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is known of every candidate at the end of a run.

    Attributes:
      scores: name -> [N], NaN where there is none.
      alone: [N] cross-entropy of the response without an instruction.
      best: [N] bool, the best candidate of its response.
      reason: [N] int8, -1 where kept, else a number in `reasons`.
      reasons: names.
      responses: number of responses.
      words: [N] of the response.
      copied: [N] `instructions.copy_rate`.
    """

    scores: Mapping[str, np.ndarray]
    alone: np.ndarray
    best: np.ndarray
    reason: np.ndarray
    reasons: tuple[str, ...]
    responses: int
    words: np.ndarray
    copied: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        return self.reason < 0

    @property
    def scored(self) -> np.ndarray:
        return ~np.isnan(self.alone)


def report_of(measured: Measured, score: str) -> dict[str, Any]:
    """All numbers of the table and the plots, ready for JSON; what cannot be computed from too few rows is None."""
    kept, scored = measured.kept, measured.scored
    counts = np.bincount(measured.reason[~kept], minlength=len(measured.reasons))
    groups = {"scored": scored, "best": measured.best, "kept": kept}
    return {
        "score": score,
        "candidates": len(kept),
        "responses": measured.responses,
        "scored": int(scored.sum()),
        "best": int(measured.best.sum()),
        "kept": int(kept.sum()),
        "dropped": {name: int(n) for name, n in zip(measured.reasons, counts, strict=True) if n},
        "scores": {
            name: {group: _distribution(values[of]) for group, of in groups.items()}
            for name, values in measured.scores.items()
        },
        "copy_rate": {group: _mean(measured.copied[of]) for group, of in groups.items()},
        "kept_by_length": _by_length(measured),
        "forward_reverse_correlation": {
            group: _correlations(measured.scores["forward"][of], measured.scores["reverse"][of])
            for group, of in groups.items()
        },
    }


def table(report: Mapping[str, Any]) -> str:
    """The report as lines of text."""
    lines: list[tuple[str, ...]] = [("score", "of", "mean", "sd", *_QUANTILES)]
    for name, by_group in report["scores"].items():
        for group, values in by_group.items():
            if values is not None:
                lines.append((name, group, *(f"{values[key]:.3f}" for key in ("mean", "sd", *_QUANTILES))))
                name = ""
    lengths: list[tuple[str, ...]] = [("words", "responses", "kept", "share")]
    for row in report["kept_by_length"]:
        end = f"-{row['below'] - 1}" if row["below"] else "+"
        lengths.append((f"{row['from']}{end}", str(row["best"]), str(row["kept"]), _shown(row["share"])))
    dropped = ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items()) or "none"
    correlation = report["forward_reverse_correlation"]["best"]
    return "\n".join(
        [
            *_aligned(lines, left=2),
            "",
            *_aligned(lengths, left=1),
            "",
            f"copy rate: {', '.join(f'{_shown(v)} of {group}' for group, v in report['copy_rate'].items())}",
            f"forward and reverse, best candidates: Pearson {_shown(correlation['pearson'])}, "
            f"Spearman {_shown(correlation['spearman'])}",
            f"kept {report['kept']} of {report['responses']} responses ({report['candidates']} candidates) by "
            f"{report['score']}; dropped: {dropped}",
        ]
    )


def _distribution(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    found = {"mean": values.mean(), "sd": values.std()}
    found |= dict(zip(_QUANTILES, np.percentile(values, list(_QUANTILES.values())), strict=True))
    return {name: round(float(value), 6) for name, value in found.items()}


def _mean(values: np.ndarray) -> float | None:
    return round(float(values.mean(dtype=np.float64)), 6) if len(values) else None


def _by_length(measured: Measured) -> list[dict[str, Any]]:
    rows = []
    for low, high in zip(LENGTHS, (*LENGTHS[1:], None), strict=True):
        here = measured.best & (measured.words >= low) & (measured.words < (high or np.inf))
        best, kept = int(here.sum()), int((here & measured.kept).sum())
        rows.append({"from": low, "below": high, "best": best, "kept": kept, "share": kept / best if best else None})
    return rows


def _correlations(a: np.ndarray, b: np.ndarray) -> dict[str, float | None]:
    return {"pearson": _pearson(a, b), "spearman": _pearson(*(midranks(x) for x in (a, b)))}


def _pearson(a: np.ndarray, b: np.ndarray) -> float | None:
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return None
    return round(float(np.corrcoef(a, b)[0, 1]), 6)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _aligned(lines: list[tuple[str, ...]], left: int) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
