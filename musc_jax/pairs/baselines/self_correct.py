"""Self-correction: the model names the faults of its own response and writes it anew; the first one is rejected."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from musc_jax.pairs import filters, judge_prompts
from musc_jax.pairs.baselines.best_of import read_response
from musc_jax.pairs.judgements import parse_critique, parse_revision
from musc_jax.pairs.row import FULL, Row, left, read
from musc_jax.pairs.sources import Source


@dataclasses.dataclass(frozen=True)
class SelfCorrect:
    """Chosen is the revised response, rejected the first. A row without a fault to correct is dropped and counted."""

    source: Source

    def pairs(self, rows: Sequence[Row]) -> None:
        """Gives every row that is left a pair, or drops it."""
        rows = left(rows)
        for row in rows:
            row.instructions = {FULL: row.task.text}
        answers = self.source.ask("respond", {(row.id, ""): row.task.text for row in rows})
        for row in rows:
            answer = answers[row.id, ""]
            row.rejected, fault = read_response(answer, row.task.text)
            if fault:
                row.drop("respond", fault, answer=answer.text or None, error=answer.error)
        self._correct(left(rows))

    def provenance(self, row: Row) -> dict[str, Any]:
        """The critique."""
        return {"critique": row.added.get("critique")}

    def _correct(self, rows: list[Row]) -> None:
        questions = {(row.id, ""): judge_prompts.critique(row.task.text, row.rejected) for row in rows}
        answers = self.source.ask("critique", questions)
        for row in rows:
            if faults := read(row, "critique", answers[row.id, ""], parse_critique):
                row.added["critique"] = faults
        rows = left(rows)
        questions = {
            (row.id, ""): judge_prompts.revise(row.task.text, row.rejected, row.added["critique"]) for row in rows
        }
        answers = self.source.ask("revise", questions)
        for row in rows:
            answer = answers[row.id, ""]
            if revision := read(row, "revise", answer, parse_revision, row.task.text):
                row.chosen = revision
                if fault := filters.pair_fault(row.chosen, row.rejected, answer.finish_reason):
                    row.drop("revise", fault)
