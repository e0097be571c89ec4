"""What the controls found, as JSON and as Markdown."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lab.controls.arms import ARMS, JUDGED, SEED_ONLY, UNFILTERED, depth_of
from lab.controls.costs import total
from main_jax.filter.auroc import NORMAL_95
from main_jax.rounds.config import INSTRUCTIONS, SAMPLED
from main_jax.rounds.rows import DIRECTIONS

Row = dict[str, Any]


class Interval(NamedTuple):
    """An estimate and the ends of its 95% interval."""

    value: float
    low: float
    high: float


def nats_a_token(nll: np.ndarray, tokens: np.ndarray) -> float:
    """Of R rows: the sum of their negative log-likelihoods [R] over the sum of their tokens [R]."""
    return float(nll.sum() / tokens.sum())


def paired_difference(nll: np.ndarray, than: np.ndarray, tokens: np.ndarray) -> Interval:
    """How much more nats a token one model takes than another over the same R rows; below 0 it is better.

    The interval is that of a ratio of sums over rows that were drawn (Cochran, Sampling Techniques, 1977, section 2.11;
    first order, normal): it holds the models fixed, and says nothing of other trainings.

    Args:
      nll, than: [R] negative log-likelihood of each row by the two models, R >= 2.
      tokens: [R] that both are sums over.
    """
    difference = np.asarray(nll, np.float64) - than
    value = float(difference.sum() / tokens.sum())
    rest = difference - value * tokens
    half = NORMAL_95 * math.sqrt(len(rest) / (len(rest) - 1) * float(np.sum(rest**2))) / float(tokens.sum())
    return Interval(value, value - half, value + half)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a trained model was found to be: `nll`, `tokens` [R] of the held-out rows, its `steps`."""

    nll: np.ndarray
    tokens: np.ndarray
    steps: int


def report_of(
    pairs: Mapping[str, int],
    trained_as: Mapping[str, str],
    depth: int,
    measured: Mapping[str, Measured],
    stages: Mapping[str, Row],
) -> dict[str, Any]:
    """The arms' numbers, ready for JSON.

    Args:
      pairs: arm -> number of its pairs, in the table's order.
      trained_as: arm -> the one that was trained for it.
      depth: rounds that arms come from which name none.
      measured: trained arm -> what was found; those without pairs lack.
      stages: name -> cost.
    """
    base = measured[SEED_ONLY]
    arms = []
    for arm, number in pairs.items():
        trained = trained_as[arm]
        row: Row = {"arm": arm, "trained_as": trained, "pairs": number, "loss": None}
        if found := measured.get(trained):
            difference = None if arm == SEED_ONLY else paired_difference(found.nll, base.nll, base.tokens)
            row |= {
                "loss": nats_a_token(found.nll, found.tokens),
                "difference": None if difference is None else difference._asdict(),
                "steps": found.steps,
                "training": stages[f"train_{trained}"],
                "needs": total(stages[name] for name in stages_of(arm, depth_of(arm, depth)) + [f"train_{trained}"]),
            }
        arms.append(row)
    return {
        "held_out": {"rows": len(base.tokens), "tokens": int(base.tokens.sum())},
        "arms": arms,
        "stages": dict(stages),
        "total": total(stages.values()),
    }


def stages_of(arm: str, depth: int) -> list[str]:
    """What an arm needs before its own training: the rounds up to its own as far as they matter to it, and its filter.

    Args:
      depth: the arm's rounds.
    """
    if arm == SEED_ONLY:
        return []
    before = [f"round_{n}/{part}" for n in range(depth) for part in ((*SAMPLED, *DIRECTIONS) if n else DIRECTIONS)]
    if arm in UNFILTERED:
        return [*before, f"round_{depth}/{INSTRUCTIONS}", *(["judge"] if arm == JUDGED else [])]
    last = [f"round_{depth}/{part}" for part in ((*SAMPLED, *DIRECTIONS) if depth else DIRECTIONS)]
    return [*before, *last, *([] if depth else [f"round_1/{INSTRUCTIONS}"]), f"filter_{depth}"]


def markdown(report: Mapping[str, Any]) -> str:
    """The report as tables."""
    held_out, judged = report["held_out"], report["judge"]
    parts = [
        "# Controls",
        f"Loss on {held_out['rows']} held-out seed pairs ({held_out['tokens']} response tokens), nats a token, lower "
        f"is better; the difference to `{SEED_ONLY}` with the 95% interval over rows, the models held fixed. Steps, "
        "tokens, seconds and FLOPs of the final training alone; in the last three columns those of all that an arm "
        "needs, evaluation apart.",
        _table(_ARM_HEAD, [_arm_line(arm) for arm in report["arms"]]),
        "\n".join(f"- `{arm['arm']}`: {ARMS[arm['arm']]}{_remark(arm)}" for arm in report["arms"]),
    ]
    if judged:
        scores = ", ".join(f"{count} of {score}" for score, count in judged["scores"].items()) or "none"
        parts.append(
            f"Scores that the model wrote: {judged['read']} of {judged['candidates']} candidates have one ({scores}); "
            f"{judged['unreadable']} answers could not be read, {judged['not_asked']} were not asked for."
        )
    if report["shuffled"]:
        parts += [
            "## Real and shuffled pairs, mixed",
            "The share of the shuffled pairs that a score lets into the better half (0.5: it does not look), and AUROC "
            "with its 95% interval.",
            _table(
                ("pairs", "score", "of each kind", "shuffled kept", "AUROC", "95%"),
                [
                    (name, score, *_told_apart(found))
                    for name, by_score in report["shuffled"].items()
                    for score, found in by_score.items()
                ],
            ),
        ]
    parts += [
        "## Cost",
        "Tokens and FLOPs by count, without padding; seconds by the clock, start and compilation included. `+`: the "
        "stage was interrupted, and its last attempt alone is timed.",
        _table(
            ("stage", "tokens", "seconds", "FLOPs"),
            [(name, *_cost(cost)) for name, cost in [*report["stages"].items(), ("all", report["total"])]],
        ),
    ]
    return "\n\n".join(parts) + "\n"


_ARM_HEAD = (
    *("arm", "pairs", "loss", "difference", "95%", "steps", "tokens", "seconds", "FLOPs"),
    *("all tokens", "all seconds", "all FLOPs"),
)


def _arm_line(arm: Row) -> tuple[str, ...]:
    if arm["loss"] is None:
        return (arm["arm"], str(arm["pairs"]), *["-"] * (len(_ARM_HEAD) - 2))
    found = arm["difference"]
    return (
        arm["arm"],
        str(arm["pairs"]),
        f"{arm['loss']:.4f}",
        *(("-", "-") if found is None else (f"{found['value']:+.4f}", f"{found['low']:+.4f} to {found['high']:+.4f}")),
        str(arm["steps"]),
        *_cost(arm["training"]),
        *_cost(arm["needs"]),
    )


def _remark(arm: Row) -> str:
    if arm["loss"] is None:
        return "; there were none, so nothing was trained"
    return "" if arm["trained_as"] == arm["arm"] else f" (which is `{arm['trained_as']}`)"


def _cost(cost: Mapping[str, float]) -> tuple[str, str, str]:
    return (
        f"{cost['tokens']:.0f}",
        f"{cost['seconds']:.0f}{'+' if cost['interrupted'] else ''}",
        f"{cost['flops']:.2e}",
    )


def _told_apart(found: Mapping[str, float] | None) -> tuple[str, ...]:
    if found is None:
        return ("0", "-", "-", "-")
    interval = f"{found['low']:.3f} to {found['high']:.3f}"
    return str(found["pairs"]), f"{found['kept_shuffled']:.2f}", f"{found['auroc']:.3f}", interval


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
