"""The methods of making pairs from instructions, by the names that `config.method` knows."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from musc_jax.pairs.row import Row


class Method(Protocol):
    """Makes pairs of rows that have an instruction each; see `construction.Construction` and `baselines`."""

    def pairs(self, rows: Sequence[Row]) -> None:
        """Gives every row that is left a chosen and a rejected response, or drops it."""
        ...

    def provenance(self, row: Row) -> dict[str, Any]:
        """Columns that say what the pair was made from, always the same ones; None where a row did not come so far."""
        ...


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which stages a method has, in their order, and which settings decide a stage's answers.

    Those come beside how a stage samples, which has the stage's name, and all that earlier stages read.
    """

    stages: tuple[str, ...]
    reads: Mapping[str, tuple[str, ...]]


_JUDGED = {"respond": ("text_template", "num_samples"), "judge": ("judge_samples",)}
MUSC = "musc"
PLANS = {
    MUSC: Plan(
        ("self_instruct", "decompose", "negate", "recombine", "check", "respond"),
        {
            "negate": ("perturb",),
            "recombine": ("full_instruction",),
            "check": ("verify",),
            "respond": ("text_template",),
        },
    ),
    "self_reward": Plan(("self_instruct", "respond", "judge"), _JUDGED),
    "branch_solve_merge": Plan(("self_instruct", "decompose", "respond", "judge"), _JUDGED),
    "self_correct": Plan(("self_instruct", "respond", "critique", "revise"), {"respond": ("text_template",)}),
}
BEST_OF = ("self_reward", "branch_solve_merge")  # those that choose among several responses
