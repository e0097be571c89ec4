"""Scores of candidate instructions, and which of them are kept (MAIN, arXiv 2504.12913: mutual filter).

Every score is a cross-entropy per token, in nats, or a difference or sum of such: lower is better. The published rule
could not be read, so all of them are here to be compared.

Axes: N candidates, M responses. A response r has one or more candidate instructions i.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from lm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class CrossEntropies:
    """What the two models say, teacher-forced; NaN where a candidate was dropped before.

    Attributes:
      response: [N] CE_f(r | i), of the forward model, a token of the response.
      instruction: [N] CE_r(i | r), of the reverse model, a token of the instruction.
      alone: [N] CE_f(r) without an instruction, the same for all candidates of a response.
    """

    response: np.ndarray
    instruction: np.ndarray
    alone: np.ndarray


def forward(ce: CrossEntropies) -> np.ndarray:
    """CE_f(r | i): how surprising the response is, given the instruction."""
    return ce.response


def reverse(ce: CrossEntropies) -> np.ndarray:
    """CE_r(i | r): how surprising the instruction is, given the response."""
    return ce.instruction


def mutual(ce: CrossEntropies) -> np.ndarray:
    """CE_f(r | i) + CE_r(i | r)."""
    return ce.response + ce.instruction


def forward_gain(ce: CrossEntropies) -> np.ndarray:
    """CE_f(r | i) - CE_f(r): minus what the instruction tells of the response; below 0 where it helps."""
    return ce.response - ce.alone


def mutual_gain(ce: CrossEntropies) -> np.ndarray:
    """CE_f(r | i) - CE_f(r) + CE_r(i | r)."""
    return forward_gain(ce) + ce.instruction


DEFAULT_SCORE = "mutual_gain"
SCORES: dict[str, Callable[[CrossEntropies], np.ndarray]] = {
    "forward": forward,
    "reverse": reverse,
    "mutual": mutual,
    "forward_gain": forward_gain,
    DEFAULT_SCORE: mutual_gain,
}


def check_selection(score: str, fraction: float) -> None:
    """Raises UserError for a score that there is none of, or a fraction outside (0, 1]."""
    if score not in SCORES:
        raise UserError(f"config.score: unknown score {score!r}; choose from {', '.join(SCORES)}")
    if not 0 < fraction <= 1:
        raise UserError(f"config.fraction={fraction}: must lie in (0, 1]; 1 keeps the best candidate of every response")


def best_of_each(scores: np.ndarray, response_of: np.ndarray) -> np.ndarray:
    """The candidate with the lowest score of each response, the earlier one of equals: [<= M] int64, ascending.

    Args:
      scores: [N], NaN for candidates that are out of the question.
      response_of: [N] number of each candidate's response.
    """
    order = np.lexsort((np.arange(len(scores)), scores, response_of))  # NaN is sorted last
    order = order[~np.isnan(scores[order])]
    first = np.ones(len(order), bool)
    first[1:] = response_of[order][1:] != response_of[order][:-1]
    return np.sort(order[first])


def best_fraction(scores: np.ndarray, fraction: float, clusters: np.ndarray) -> np.ndarray:
    """Which of K candidates are among the lowest `fraction` of their cluster: [K] bool.

    Of each cluster at least one, and otherwise fraction x size, rounded to the nearest; the earlier one of equals.

    Args:
      scores: [K], no NaN.
      fraction: in (0, 1].
      clusters: [K] int; all the same for one quota over all.
    """
    order = np.lexsort((np.arange(len(scores)), scores, clusters))
    kept = np.zeros(len(scores), bool)
    bounds = np.flatnonzero(np.diff(clusters[order])) + 1
    for members in np.split(order, bounds):
        kept[members[: max(1, math.floor(fraction * len(members) + 0.5))]] = True
    return kept
