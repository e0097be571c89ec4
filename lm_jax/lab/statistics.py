"""Means over independent runs with their intervals, and paired tests: Student's t, for as few runs as five.

`lm_jax.lab.answers.estimate` is for hundreds of answers of one model; this is for the models of several seeds, which
differ by more than their answers do.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from lm_jax.lab.answers import Estimate

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
    return Estimate(float(array.mean()), t_quantile(CONFIDENCE, len(array) - 1) * _standard_error(array))


def compare_runs(these: Mapping[int, float], base: Mapping[int, float]) -> Comparison | None:
    """`these` less `base`, run by run; None of fewer than two runs that both have.

    Args:
      these, base: seed -> value.
    """
    differences = np.array([these[seed] - base[seed] for seed in sorted(these.keys() & base.keys())], float)
    mean = mean_of_runs(differences)
    if mean is None:
        return None
    error = _standard_error(differences)
    if error == 0:
        return Comparison(mean, 1.0 if mean.mean == 0 else 0.0, len(differences))
    within = t_probability(abs(mean.mean) / error, len(differences) - 1)
    return Comparison(mean, max(0.0, 1 - within), len(differences))


def t_probability(t: float, degrees: int) -> float:
    """P(|T| <= t) of Student's distribution with a whole number of degrees of freedom, t >= 0.

    The finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(degrees))
    sine, squared = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2 == 1
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(3 if odd else 2, degrees + 1, 2):
        total += term
        term *= squared * (k - 1) / k
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_quantile(probability: float, degrees: int) -> float:
    """The t with P(|T| <= t) = `probability`, by bisection."""
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, degrees) < probability else (low, middle)
    return high


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values))
