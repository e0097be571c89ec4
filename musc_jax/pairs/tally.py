"""How many rows came into each stage and how many left there, for what reason."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from musc_jax.pairs.row import Row

_ORDER = (
    *("input", "self_instruct", "decompose", "recombine", "check", "respond"),
    *("judge", "critique", "revise"),  # of the baselines
)


def tally(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts, ready for JSON: `input` = `pairs` + `dropped`; `stages`, those that dropped rows, in their order.

    A stage's `rows` came into it, its `reasons` say how many of them it dropped for what. `left_out` counts single
    answers, of rows that have several at a stage, that could not be used: stage -> reason -> number.
    """
    found: dict[str, collections.Counter[str]] = {stage: collections.Counter() for stage in _ORDER}
    for row in rows:
        if row.dropped:
            found[row.dropped.stage][row.dropped.reason] += 1
    stages, remaining = [], len(rows)
    for stage, reasons in found.items():
        if reasons:
            dropped = reasons.total()
            stages.append({"stage": stage, "rows": remaining, "dropped": dropped, "reasons": _ordered(reasons)})
            remaining -= reasons.total()
    left_out: dict[str, collections.Counter[str]] = {stage: collections.Counter() for stage in _ORDER}
    for stage, reason in (found for row in rows for found in row.left_out):
        left_out[stage][reason] += 1
    return {
        "input": len(rows),
        "pairs": remaining,
        "dropped": len(rows) - remaining,
        "stages": stages,
        "left_out": {stage: _ordered(reasons) for stage, reasons in left_out.items() if reasons},
    }


def _ordered(reasons: collections.Counter) -> dict[str, int]:
    """The commonest first, and in one order among equals."""
    return dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))


def table(counts: Mapping[str, Any]) -> str:
    """The counts as lines of text."""
    lines = [("stage", "rows", "dropped", "reason")]
    for stage in counts["stages"]:
        first = (stage["stage"], str(stage["rows"]), str(stage["dropped"]))
        for reason, count in stage["reasons"].items():
            lines.append((*first, f"{count} {reason}"))
            first = ("", "", "")
    lines.append(("pairs", str(counts["pairs"]), str(counts["dropped"]), f"of {counts['input']} rows"))
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    told = [
        f"{name:<{widths[0]}}  {rows:>{widths[1]}}  {dropped:>{widths[2]}}  {reason}".rstrip()
        for name, rows, dropped, reason in lines
    ]
    for stage, reasons in counts["left_out"].items():
        told.append(f"{stage}: answers left out: {', '.join(f'{n} {reason}' for reason, n in reasons.items())}")
    return "\n".join(told)


def summed(counts: Mapping[str, Any]) -> str:
    """The counts as part of one line."""
    parts = [
        f"{count} {reason} ({stage['stage']})"
        for stage in counts["stages"]
        for reason, count in stage["reasons"].items()
    ]
    return f"of {counts['input']} rows all were dropped, {', '.join(parts)}"
