"""Means over independent runs with their intervals, and paired tests: Student's t, for as few runs as five.

`lab.worlds.answers.estimate` is for hundreds of answers of one model; this is for the models of several seeds, which
differ by more than their answers do.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from lab.worlds.answers import Estimate

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A paired difference of runs that share all but one thing.

    Attributes:
      difference: its mean, with the half width of the 95% interval.
      p: of the paired t test, two-sided, for a difference of 0.
      pairs: runs that both have.
    """

    difference: Estimate
    p: float
    pairs: int


def mean_of_runs(values: Sequence[float]) -> Estimate | None:
    """The mean of independent runs and the half width of its 95% interval; None of fewer than two."""
    if len(values) < 2:
        return None
    array = np.asarray(values, float)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(array) - 1))
    return Estimate(float(array.mean()), quantile * _standard_error(array))


def compare_runs(these: Mapping[int, float], base: Mapping[int, float]) -> Comparison | None:
    """`these` less `base`, run by run; None of fewer than two runs that both have.

    Args:
      these, base: seed -> value.
    """
    differences = np.array([these[seed] - base[seed] for seed in sorted(these.keys() & base.keys())], float)
    mean = mean_of_runs(differences.tolist())
    if mean is None:
        return None
    error = _standard_error(differences)
    if error == 0:
        return Comparison(mean, 1.0 if mean.mean == 0 else 0.0, len(differences))
    p = 2 * float(stats.t.sf(abs(mean.mean) / error, len(differences) - 1))
    return Comparison(mean, p, len(differences))


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values))
