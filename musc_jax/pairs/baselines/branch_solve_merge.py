"""Branch-Solve-Merge (arXiv 2310.15123) as MuSC compares with it: yes or no for each constraint of the instruction."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from musc_jax.pairs import judge_prompts
from musc_jax.pairs.baselines.best_of import BestOf
from musc_jax.pairs.drops import Drop
from musc_jax.pairs.instructions import parse_verdicts
from musc_jax.pairs.prompts import Prompt
from musc_jax.pairs.row import FULL, Row
from musc_jax.pairs.sources import Source


@dataclasses.dataclass(frozen=True)
class BranchSolveMerge:
    """Branch: the instruction's constraints. Solve: which of them a response meets. Merge: the share of yes.

    All constraints of a response are asked about in one prompt, so that a verdict costs one call and not one a
    constraint.
    """

    best_of: BestOf

    def pairs(self, rows: Sequence[Row]) -> None:
        """Gives every row that is left a pair, or drops it."""
        self.best_of.source.decompose(rows, material=False)
        self.best_of.pairs(rows)

    def provenance(self, row: Row) -> dict[str, Any]:
        """The constraints and the scores."""
        constraints = [*row.constraints(FULL)] if row.decomposition else None
        return {"constraints": constraints, **self.best_of.provenance(row)}


def branch_solve_merge(source: Source, num_samples: int, judge_samples: int) -> BranchSolveMerge:
    """Best of `num_samples` responses against the worst, by the mean share of yes in `judge_samples` verdicts."""
    return BranchSolveMerge(BestOf(source, num_samples, judge_samples, _question, _verdict))


def _question(row: Row, response: str) -> Prompt:
    return judge_prompts.meets(row.task.text, row.constraints(FULL), response)


def _verdict(row: Row, answer: str, finish_reason: str) -> float | Drop:
    verdicts = parse_verdicts(answer, len(row.constraints(FULL)), finish_reason)
    return verdicts if isinstance(verdicts, Drop) else sum(verdicts) / len(verdicts)
