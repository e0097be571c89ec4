"""Area under the ROC curve with its interval: how well a score tells two kinds apart, real from shuffled pairs say."""

import math
from typing import NamedTuple

import numpy as np

NORMAL_95 = 1.959963984540054


class Auroc(NamedTuple):
    """An estimate and the ends of its 95% interval, within [0, 1]."""

    value: float
    low: float
    high: float


def auroc(lower: np.ndarray, higher: np.ndarray) -> Auroc:
    """How often a score of `lower` is below one of `higher`, ties counting half: 1 tells them apart, 0.5 is chance.

    The variance is DeLong's (DeLong, DeLong and Clarke-Pearson 1988) in its O(n log n) form (Sun and Xu 2014), the
    interval that of the normal distribution, cut at 0 and 1. Where every pair is in order the variance is 0 and the
    interval a point: say the sizes with it. Scores of one source (several candidates of a response) are not
    independent, and the interval is then too narrow: take one of each.

    Args:
      lower: [n] scores of the kind that should be lower (of a loss: the true ones), n >= 2.
      higher: [m] scores of the other kind, m >= 2.

    Raises:
      ValueError: fewer than 2 of a kind, or NaN.
    """
    lower, higher = np.asarray(lower, np.float64), np.asarray(higher, np.float64)
    if min(len(lower), len(higher)) < 2:
        raise ValueError(f"at least 2 scores of each kind are needed, got {len(lower)} and {len(higher)}")
    if np.isnan(lower).any() or np.isnan(higher).any():
        raise ValueError("NaN among the scores")
    ranks = midranks(np.concatenate([lower, higher]))
    # Of each score the share of the other kind that it is in order with
    of_lower = 1 - (ranks[: len(lower)] - midranks(lower)) / len(higher)
    of_higher = (ranks[len(lower) :] - midranks(higher)) / len(lower)
    value = float(of_lower.mean())
    half = NORMAL_95 * math.sqrt(of_lower.var(ddof=1) / len(lower) + of_higher.var(ddof=1) / len(higher))
    return Auroc(value, max(value - half, 0.0), min(value + half, 1.0))


def midranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]
