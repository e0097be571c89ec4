"""Means over instructions with 95% intervals: what one benchmark's few hundred instructions leave open."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
_RESAMPLES = 2000
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean, its 95% interval, and how many instructions it is of."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(totals: Sequence[float], sizes: Sequence[int] | None = None, maximum: float = 1.0) -> Estimate | None:
    """The mean over all that instructions are made of; instructions are what is drawn anew.

    Wilson's score interval where every instruction's value is 0 or `maximum`, and where all are the same, of which a
    bootstrap would say that nothing is open; else the percentile bootstrap over instructions.

    Args:
      totals: the sum of each instruction's values.
      sizes: values of each; none: one.
      maximum: the largest value; 0 is the least.

    Returns:
      The estimate, or None without instructions.
    """
    sums = np.asarray(totals, float)
    counts = np.ones(len(sums)) if sizes is None else np.asarray(sizes, float)
    if not len(sums):
        return None
    mean, shares = float(sums.sum() / counts.sum()), sums / counts / maximum
    if np.ptp(shares) == 0 or (np.ptp(counts) == 0 and np.isin(shares, (0.0, 1.0)).all()):
        low, high = (maximum * bound for bound in _wilson(mean / maximum, len(sums)))
    else:
        drawn = np.random.default_rng(_SEED).integers(len(sums), size=(_RESAMPLES, len(sums)))
        means = sums[drawn].sum(1) / counts[drawn].sum(1)
        low, high = map(float, np.quantile(means, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)))
    return Estimate(mean, low, high, len(sums))


def _wilson(share: float, n: int) -> tuple[float, float]:
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)
