"""How many rows came into each stage and how many left there, for what reason."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from musc_jax.construction import Row

_ORDER = ("input", "self_instruct", "decompose", "recombine", "check", "respond")


def tally(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts, ready for JSON: `input` = `pairs` + `dropped`; `stages`, those that dropped rows, in their order.

    A stage's `rows` came into it, its `reasons` say how many of them it dropped for what.
    """
    found = {stage: collections.Counter() for stage in _ORDER}
    for row in rows:
        if row.dropped:
            found[row.dropped.stage][row.dropped.reason] += 1
    stages, remaining = [], len(rows)
    for stage, reasons in found.items():
        if reasons:
            # The commonest first, and in one order among equals
            ordered = dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
            stages.append({"stage": stage, "rows": remaining, "dropped": reasons.total(), "reasons": ordered})
            remaining -= reasons.total()
    return {"input": len(rows), "pairs": remaining, "dropped": len(rows) - remaining, "stages": stages}


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
    return "\n".join(
        f"{name:<{widths[0]}}  {rows:>{widths[1]}}  {dropped:>{widths[2]}}  {reason}".rstrip()
        for name, rows, dropped, reason in lines
    )


def summed(counts: Mapping[str, Any]) -> str:
    """The counts as part of one line."""
    parts = [
        f"{count} {reason} ({stage['stage']})"
        for stage in counts["stages"]
        for reason, count in stage["reasons"].items()
    ]
    return f"of {counts['input']} rows all were dropped, {', '.join(parts)}"
