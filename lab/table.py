"""An ablation's report: means over seeds with 95% intervals and paired tests, as JSON, Markdown and a picture."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lab.worlds.answers import Estimate
from lab.worlds.governed import END, GOVERNED, OTHER
from lab.worlds.statistics import Comparison, compare_runs, mean_of_runs

Row = dict[str, Any]
# In the table -> where a result has it
_MEASURES = {
    "all_met": ("test", "sampled", "all_met"),
    "all_met_greedy": ("test", "greedy", "all_met"),
    "each": ("test", "sampled", "each"),
    "well_formed": ("test", "sampled", "well_formed"),
    "truth": ("truth",),
    "rows": ("rows",),
    "seconds": ("seconds",),
}
_COMPARED = ("all_met", "all_met_greedy")
_SIGNIFICANT = 0.05


@dataclasses.dataclass(frozen=True)
class Method:
    """What a method's table shows.

    Attributes:
      name: of the method.
      about: arm -> what it is, in order.
      base: the arm that others are compared with.
      left_out: arms that could not be measured -> why.
    """

    name: str
    about: Mapping[str, str]
    base: str
    left_out: Mapping[str, str]


def report_of(method: Method, results: Sequence[Row], extras: Mapping[int, Row]) -> Row:
    """All numbers of a method's table, ready for JSON.

    Args:
      results: one a seed and arm, as `launch.lab_ablation` writes them.
      extras: seed -> groups of numbers by name, as {"auroc": {"mutual": 0.9}}.

    Returns:
      `arms`: arm -> `seeds`, `rates` (learning rate -> seeds that had it), `at_edge` (seeds that had the lowest or
      highest of several), measures (mean, half_width, values by seed) and `against_base` (by measure: difference,
      half_width, p); None where it cannot be computed. `comparisons`: how many p there are of each measure.
      `extras`: group -> name -> mean, half_width, values.
    """
    by_arm = {arm: {r["seed"]: r for r in results if r["arm"] == arm} for arm in method.about}
    base = by_arm.get(method.base, {})
    arms = {arm: _arm(found, {} if arm == method.base else base) for arm, found in by_arm.items() if found}
    groups: dict[str, dict[str, dict[int, float]]] = {}
    for seed, row in extras.items():
        for group, values in row.items():
            for name, value in values.items():
                groups.setdefault(group, {}).setdefault(name, {})[seed] = value
    return {
        "base": method.base,
        "arms": arms,
        "comparisons": sum(arm["against_base"]["all_met"] is not None for arm in arms.values()),
        "extras": {
            group: {name: _summary(values) for name, values in names.items()} for group, names in groups.items()
        },
    }


def _arm(found: Mapping[int, Row], base: Mapping[int, Row]) -> Row:
    chosen = Counter(f"{row['rate']:g}" for row in found.values() if row["rate"] is not None)
    edges = [len(row["rates"]) > 1 and row["rate"] in (min(row["rates"]), max(row["rates"])) for row in found.values()]
    against = {
        name: _compared(compare_runs(_there(_values(found, name)), _there(_values(base, name)))) if base else None
        for name in _COMPARED
    }
    return {
        "seeds": sorted(found),
        "rates": dict(chosen),
        "at_edge": sum(edges),
        **{name: _summary(_values(found, name)) for name in _MEASURES},
        "against_base": against,
    }


def _values(found: Mapping[int, Row], name: str) -> dict[int, float | None]:
    def of(row: Any) -> float | None:
        for key in _MEASURES[name]:
            row = row[key]
        return row

    return {seed: of(row) for seed, row in found.items()}


def _there(values: Mapping[int, float | None]) -> dict[int, float]:
    return {seed: value for seed, value in values.items() if value is not None}


def _summary(values: Mapping[int, float | None]) -> Row | None:
    there = _there(values)
    if not there:
        return None
    over_seeds = mean_of_runs(list(there.values()))
    return {
        "mean": float(np.mean(list(there.values()))),
        "half_width": None if over_seeds is None else over_seeds.half_width,
        "values": {str(seed): value for seed, value in there.items()},
    }


def _compared(found: Comparison | None) -> Row | None:
    if found is None:
        return None
    return {
        "difference": found.difference.mean,
        "half_width": found.difference.half_width,
        "p": found.p,
        "pairs": found.pairs,
    }


def markdown(method: Method, report: Row, temperature: float) -> str:
    """The report as a table for README or an issue."""
    base = report["base"]
    head = (
        "arm",
        "seeds",
        f"all met, T {temperature:g}, %",
        f"less {base}",
        "p",
        "all met, greedy, %",
        f"less {base}",
        "each constraint, %",
        "well formed, %",
        "pairs",
        "true pairs, %",
        "learning rate",
    )
    lines = [f"## {method.name}"]
    if report["arms"]:
        lines += ["", _line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for name, arm in report["arms"].items():
        sampled, greedy = (arm["against_base"][measure] for measure in _COMPARED)
        lines.append(
            _line(
                (
                    name,
                    str(len(arm["seeds"])),
                    _percent(arm["all_met"]),
                    _difference(sampled),
                    _p(sampled),
                    _percent(arm["all_met_greedy"]),
                    _difference(greedy),
                    _percent(arm["each"]),
                    _percent(arm["well_formed"]),
                    "-" if arm["rows"] is None else f"{arm['rows']['mean']:.0f}",
                    _percent(arm["truth"]),
                    _rates(arm),
                )
            )
        )
    if report["arms"]:
        lines += ["", *_notes(method, report)]
    for group, found in report["extras"].items():
        shown = ", ".join(f"{name} {_percent(value)}" for name, value in found.items())
        lines += ["", f"{_EXTRAS.get(group, group)}: {shown}."]
    return "\n".join([*lines, ""])


_EXTRAS = {
    "auroc": "Real pairs against shuffled ones, area under the ROC curve in %, by the filter's score",
    "truth": "Candidates that their response truly answers, in %, of as many that each keeps",
    **{
        f"weights_{side}_{label}": f"Mean weight, in %, by rule: {side} responses, {what}"
        for side in ("chosen", "rejected")
        for label, what in (
            (GOVERNED, "tokens that a dropped constraint decides"),
            (OTHER, "other tokens"),
            (END, "the end token"),
        )
    },
}


def _notes(method: Method, report: Row) -> list[str]:
    lines = [f"- {name}: {what}" for name, what in method.about.items() if name in report["arms"]]
    lines += [f"- {name}: left out, {why}" for name, why in method.left_out.items()]
    count = report["comparisons"]
    lines += [
        "",
        "Means over seeds with 95% intervals (Student's t); differences and p are paired by seed."
        + (
            f" {count} comparisons were made: by chance alone {_SIGNIFICANT * count:.1f} of them would have p below "
            f"{_SIGNIFICANT}; Bonferroni's threshold is {_SIGNIFICANT / count:.4f}."
            if count
            else " Of one seed, or without its base, nothing is compared."
        ),
    ]
    if any(arm["at_edge"] for arm in report["arms"].values()):
        lines.append("A learning rate with * was the lowest or highest that was tried.")
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(value: Row | None) -> str:
    if value is None:
        return "-"
    if value["half_width"] is None:
        return f"{100 * value['mean']:.1f}"
    return Estimate(value["mean"], value["half_width"]).percent()


def _difference(found: Row | None) -> str:
    return "" if found is None else Estimate(found["difference"], found["half_width"]).percent(signed=True)


def _p(found: Row | None) -> str:
    return "" if found is None else f"{found['p']:.4f}"


def _rates(arm: Row) -> str:
    chosen = ", ".join(rate if len(arm["rates"]) == 1 else f"{rate} ({n})" for rate, n in arm["rates"].items())
    return f"{chosen}{'*' if arm['at_edge'] else ''}" or "-"


def plot_method(method: Method, report: Row, path: str) -> None:
    """Writes one picture: each arm's share of instructions met, every seed a dot, means with their intervals."""
    arms = report["arms"]
    figure = Figure(figsize=(7, 1.2 + 0.3 * max(len(arms), 1)), layout="constrained")
    axis = figure.subplots()
    for place, arm in enumerate(arms.values()):
        values = [100 * value for value in arm["all_met"]["values"].values()]
        axis.plot(values, [place] * len(values), ".", color="0.6")
        width = 100 * (arm["all_met"]["half_width"] or 0.0)
        axis.errorbar(100 * arm["all_met"]["mean"], place, xerr=width, fmt="o", color="tab:blue", capsize=3)
    if method.base in arms:
        axis.axvline(100 * arms[method.base]["all_met"]["mean"], color="0.6", linewidth=0.8)
    axis.set_yticks(range(len(arms)), list(arms))
    axis.invert_yaxis()
    axis.set_xlabel("held-out instructions with all constraints met, %")
    figure.savefig(path, dpi=120)
