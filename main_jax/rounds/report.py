"""What came out of MAIN's rounds: a row a round, as JSON and as a table."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lm_jax.checkpoints.settings import training_records
from lm_jax.generation.rounds import aligned
from main_jax.rounds.rows import DIRECTIONS, FORWARD

_MEANS = ("loss", "loss/seed", "loss/synthetic", "alpha", "mean_token_accuracy")


def training_summary(run: str, epochs: int) -> dict[str, Any]:
    """How a training ended: `steps`, `tokens` (of all epochs), and means over the steps of the last epoch.

    `loss` and its parts are nats a token; what no step of that epoch defines is left out.
    """
    records = [record for record in training_records(run) if "loss" in record]
    last = records[-math.ceil(len(records) / epochs) :]
    means = {name: [record[name] for record in last if name in record] for name in _MEANS}
    return {
        "steps": records[-1]["step"],
        "tokens": records[-1]["num_tokens"],
        **{name: sum(values) / len(values) for name, values in means.items() if values},
    }


def rounds_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as lines of text: a line a round and model, each with the seconds of its data and its training."""
    head = "round model seed synthetic dropped steps loss loss/seed loss/synthetic alpha tokens seconds".split()
    lines: list[Sequence[str]] = [head]
    for row in rows:
        for direction in DIRECTIONS:
            found = row[direction]
            parts = ("instructions" if direction == FORWARD else "responses", direction)
            counts = (found["rows"]["seed"], found["rows"]["synthetic"], sum(found["dropped"].values()), found["steps"])
            lines.append(
                (
                    str(row["round"]),
                    direction,
                    *map(str, counts),
                    *(f"{found[name]:.4f}" if name in found else "-" for name in _MEANS[:4]),
                    str(found["tokens"]),
                    f"{sum(row['seconds'].get(part, 0.0) for part in parts):.1f}",
                )
            )
    return aligned(lines)
