"""What MAIN (arXiv 2504.12913) is compared with: the same final training on other pairs, or with another alpha.

An arm is a name and the pairs that it learns beside the seeds. Rows in, rows out: no model, no file. Draws are hashes
of (seed, purpose, name or place in the file). Every arm that selects keeps as many pairs as the filter did.

Axes: N candidates, in groups of one response each.
"""

import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from lm_jax.errors import UserError
from lm_jax.generation.answer_text import unfenced, visible
from lm_jax.generation.verdicts import read_score
from main_jax.filter.auroc import auroc
from main_jax.filter.scores import SCORES, best_of_each
from main_jax.training.weighting import RULES

Row = dict[str, Any]
SEED_ONLY, NO_FILTER, RANDOM, JUDGED, SHUFFLED = "seed_only", "no_filter", "random", "score", "shuffled"
UNFILTERED = (NO_FILTER, RANDOM, JUDGED)  # arms whose pairs the filter's models do not choose
ALPHA, DEPTH = "alpha_", "rounds_"
MOST_ROUNDS = 3
ARMS = {
    SEED_ONLY: "the seeds alone",
    NO_FILTER: "one drawn candidate of every response",
    RANDOM: "of those as many as the filter keeps, drawn",
    JUDGED: "as many, by the score from 1 to 5 that the model gave a pair",
    **{name: f"as many, by the filter's score {name}" for name in SCORES},
    SHUFFLED: "what the filter keeps, each instruction with another one's response",
    **{f"{ALPHA}{rule}": f"what the filter keeps, alpha by {rule}" for rule in RULES},
    **{f"{DEPTH}{n}": f"what the filter keeps after {n} rounds" for n in range(MOST_ROUNDS + 1)},
}
REAL, WRONG = KINDS = ("real", "shuffled")


def check_arms(arms: Sequence[str]) -> None:
    """Raises UserError for an arm that there is none of or that stands there twice, and where seed_only lacks."""
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise UserError(f"config.arms: unknown arm {unknown[0]!r}; choose from {', '.join(ARMS)}")
    if twice := [arm for arm, count in Counter(arms).items() if count > 1]:
        raise UserError(f"config.arms: {twice[0]} stands there twice; leave one out")
    if SEED_ONLY not in arms:
        raise UserError(f"config.arms: {SEED_ONLY} lacks, with which the others are compared; add it")


def check_held_out(share: float) -> None:
    """Raises UserError for a share outside (0, 1)."""
    if not 0 < share < 1:
        raise UserError(f"config.held_out={share}: must lie between 0 and 1, a share of the seed pairs")


def depth_of(arm: str, depth: int) -> int:
    """The rounds that an arm's candidates and filter come from; `depth` is that of arms which name none."""
    return int(arm.removeprefix(DEPTH)) if arm.startswith(DEPTH) else depth


def alpha_of(arm: str, rule: str) -> str:
    """The rule of alpha that an arm is trained with; `rule` is that of arms which name none."""
    return arm.removeprefix(ALPHA) if arm.startswith(ALPHA) else rule


def trained_as(arm: str, score: str, rule: str, depth: int) -> str:
    """The arm itself, or the filter's own where both train alike.

    Args:
      score: of the filter.
      rule: of alpha, where an arm names none.
      depth: rounds, likewise.

    >>> trained_as("rounds_2", "mutual_gain", "loss_ratio", 2), trained_as("rounds_1", "mutual_gain", "loss_ratio", 2)
    ('mutual_gain', 'rounds_1')
    """
    return score if arm in (f"{ALPHA}{rule}", f"{DEPTH}{depth}") else arm


def held_out(numbers: Sequence[int], share: float, seed: int) -> frozenset[int]:
    """Which of the seed pairs are kept for evaluation: the share of them, rounded to the nearest, drawn.

    Raises:
      UserError: less than 2 would be kept, of which no interval can be computed, or less than 2 would be left.
    """
    check_held_out(share)
    count = round(share * len(numbers))
    if not 2 <= count <= len(numbers) - 2:
        raise UserError(
            f"config.held_out={share}: of {len(numbers)} seed pairs {count} would be held out and "
            f"{len(numbers) - count} left; at least 2 of each are needed: give more pairs, or another share"
        )
    return frozenset(sorted(numbers, key=lambda number: _draw(seed, "held_out", number))[:count])


def arm_pairs(
    arm: str,
    candidates: Sequence[Row],
    score: str,
    seed: int,
    cluster: str | None = None,
    verdicts: Sequence[int | None] = (),
) -> list[Row]:
    """The candidates that an arm learns, in their order; of `shuffled` with other responses.

    Candidates that the filter could not score are no arm's: all choose from the same.

    Args:
      candidates: N rows of `launch.main_filter`'s .candidates.jsonl: `id`, `response`, `instruction`, `scores`, `kept`.
      score: the filter's; its own arm and what varies alpha or rounds take what is `kept`.
      cluster: the filter's; of every cluster as many are selected as it kept there.
      verdicts: [N] of `read_verdict`, for the arm `score`; None: there is none, and the candidate is not chosen.

    Raises:
      ValueError: an unknown arm.
    """
    kept = [row for row in candidates if row["kept"]]
    if arm == SEED_ONLY:
        return []
    if arm == score or arm.startswith((ALPHA, DEPTH)):
        return kept
    if arm == SHUFFLED:
        return shuffled(kept, seed)
    response_of = _numbered([row["id"] for row in candidates])
    of_candidate = np.array([_draw(seed, "candidate", row["id"], n) for n, row in enumerate(candidates)])
    of_response = np.array([_draw(seed, "response", row["id"]) for row in candidates])
    if arm in (NO_FILTER, RANDOM):
        within, across = of_candidate, of_response
    elif arm == JUDGED:
        # Whole numbers, so less than 1 decides between equals alone
        judged = np.array([np.nan if verdict is None else -verdict for verdict in verdicts])
        within, across = judged + of_candidate, judged + of_response
    elif arm in SCORES:
        within = across = np.array([np.nan if row["scores"] is None else row["scores"][arm] for row in candidates])
    else:
        raise ValueError(f"unknown arm {arm!r}")
    unscored = np.array([row["scores"] is None for row in candidates])
    best = best_of_each(np.where(unscored, np.nan, within), response_of)
    if arm != NO_FILTER:
        room = Counter(_cluster(row, cluster) for row in kept)
        best = np.sort(_lowest(best, across, [_cluster(row, cluster) for row in candidates], room))
    return [candidates[number] for number in best]


def _lowest(chosen: np.ndarray, values: np.ndarray, clusters: Sequence[Hashable], room: Mapping) -> np.ndarray:
    """Of the `chosen` candidates those of the lowest values, as many of each cluster as it has room for."""
    left, lowest = Counter(room), []
    for number in chosen[np.argsort(values[chosen], kind="stable")]:
        if left[clusters[number]] > 0:
            left[clusters[number]] -= 1
            lowest.append(number)
    return np.array(lowest, np.int64)


def _cluster(row: Row, cluster: str | None) -> Hashable:
    return None if cluster is None else row[cluster]


def shuffled(pairs: Sequence[Row], seed: int) -> list[Row]:
    """Every instruction with the response of another pair, and every response once; none of a single pair."""
    if len(pairs) < 2:
        return []
    order = sorted(range(len(pairs)), key=lambda number: _draw(seed, "shuffled", number))
    after = dict(zip(order, [*order[1:], *order[:1]], strict=True))  # one circle, so that none is left where it was
    return [{**pair, "response": pairs[after[number]]["response"]} for number, pair in enumerate(pairs)]


def read_verdict(answer: str | None) -> int | None:
    """The score from 1 to 5 in the first line of an answer that says something; None: there is none to be read."""
    text = None if answer is None else visible(answer)
    lines = [line for line in unfenced(text or "").split("\n") if line.strip()]
    return read_score(lines[0]) if lines else None


def told_apart(real: np.ndarray, wrong: np.ndarray) -> dict[str, Any] | None:
    """How well a score rejects shuffled pairs when they are mixed with as many real ones and half are kept.

    Args:
      real, wrong: [K] scores of pairs of each kind, lower is better; where one of the two is NaN both are left out.

    Returns:
      `pairs` of each kind; `kept_shuffled`, the share of the shuffled ones in the better half (of equals their part),
      0.5 for a score that does not look; `auroc`, `low`, `high`. None where less than 2 pairs are left.
    """
    both = ~(np.isnan(real) | np.isnan(wrong))
    real, wrong = real[both], wrong[both]
    if len(real) < 2:
        return None
    mixed = np.concatenate([real, wrong])
    last = np.sort(mixed)[len(real) - 1]
    room = (len(real) - (mixed < last).sum()) / (mixed == last).sum()
    found = auroc(real, wrong)
    return {
        "pairs": len(real),
        "kept_shuffled": float(((wrong < last).sum() + room * (wrong == last).sum()) / len(wrong)),
        "auroc": found.value,
        "low": found.low,
        "high": found.high,
    }


def _numbered(names: Sequence[Hashable]) -> np.ndarray:
    """[N] int64, the number of each name in the order of their first places."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)


def _draw(seed: int, *purpose: Any) -> float:
    """In [0, 1)."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6]) / 2**48
