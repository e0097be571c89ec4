"""What came out of rounds: a row a round, as JSON and as a table."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from lm_jax.checkpoints.settings import training_records
from lm_jax.generation.rounds import aligned

_TRAINED = ("loss", "rewards/margins", "rewards/accuracies")


def summary(directory: str) -> dict[str, Any]:
    """Of a round's files: the counts of its pairs, and how training ended.

    `loss`, `rewards/margins` and `rewards/accuracies` are means over as many of the last pairs trained on as there are
    pairs, so over about one epoch; `eval_*` is the last evaluation where there was one.
    """
    here = epath.Path(directory)
    counts = json.loads((here / "pairs.jsonl.counts.json").read_text())
    records = training_records(f"{directory}/train")
    steps = [record for record in records if record.keys() >= {"pairs", *_TRAINED}]
    evaluated = [record for record in records if "eval_loss" in record][-1:]
    trained, left = dict.fromkeys(_TRAINED, 0.0), float(counts["pairs"])
    for record in reversed(steps):
        share = min(record["pairs"], left)
        left -= share
        for name in _TRAINED:
            trained[name] += record[name] * share
    total = counts["pairs"] - left
    names = {f"eval_{name}" for name in _TRAINED}
    return {
        "instructions": counts["input"],
        "pairs": counts["pairs"],
        "dropped": {f"{s['stage']}/{reason}": n for s in counts["stages"] for reason, n in s["reasons"].items()},
        "steps": steps[-1]["step"],
        **{name: value / total for name, value in trained.items()},
        **{name: value for record in evaluated for name, value in record.items() if name in names},
    }


def rounds_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as lines of text, a line a round."""
    head = ("round", "instructions", "pairs", "dropped", "steps", "loss", "margin", "accuracy", "seconds")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        trained = (f"{row[name]:.4f}" for name in _TRAINED)
        counts = (row["round"], row["instructions"], row["pairs"], sum(row["dropped"].values()), row["steps"])
        lines.append((*map(str, counts), *trained, f"{sum(row['seconds'].values()):.1f}"))
    return aligned(lines)
