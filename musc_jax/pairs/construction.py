"""From instructions to pairs of responses, step by step (MuSC, arXiv 2502.11541, section 3.2).

Every step asks the model about the rows that are left, reads the answers, and drops the rows whose answer will not do.
Between the questions everything is a function of (answers, seed, row id): gone through again, it comes out the same.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from musc_jax.pairs import filters, prompts
from musc_jax.pairs.demonstrations import Demonstration
from musc_jax.pairs.drops import Drop
from musc_jax.pairs.instructions import parse_constraint, parse_instruction, parse_verdicts
from musc_jax.pairs.perturb import PerturbConfig, Pool, perturb
from musc_jax.pairs.row import FULL, PERTURBED, SIDES, Row, drop_near_duplicates, left, parse_response, read
from musc_jax.pairs.sources import Source


@dataclasses.dataclass(frozen=True)
class Construction:
    """How MuSC makes pairs.

    Attributes:
      source: where the rows came from; its model is asked on.
      original: whether the full instruction is the row's own, not the recombined one.
      verify: whether the instructions are checked for their constraints.
    """

    source: Source
    perturb: PerturbConfig
    original: bool
    verify: bool

    def pairs(self, rows: Sequence[Row]) -> None:
        """Gives every row that is left all of a pair, or drops it."""
        self.source.decompose(rows, material=True)
        self._perturb(left(rows))
        self._recombine(left(rows))
        if self.verify:
            self._check(left(rows))
        self._respond(left(rows))

    def provenance(self, row: Row) -> dict[str, Any]:
        """What the pair was made from; of a dropped row as far as it came."""
        made, perturbation = row.decomposition, row.perturbation
        return {
            "constraints": list(made.constraints) if made else None,
            "perturbed_constraints": list(perturbation.constraints) if perturbation else None,
            "perturbations": perturbation.rows() if perturbation else None,
        }

    def _perturb(self, rows: list[Row]) -> None:
        pool = Pool({row.id: row.constraints(FULL) for row in rows}) if self.perturb.substitute else None
        for row in rows:
            row.perturbation = perturb(row.constraints(FULL), row.id, self.perturb, pool)
        pending = [(row, edit) for row in rows for edit in row.perturbed.pending]
        answers = self.source.ask("negate", {(row.id, str(e.index)): prompts.negate(e.old) for row, e in pending})
        negations: dict[str, dict[int, str | None]] = {row.id: {} for row in rows}
        for row, edit in pending:
            answer = answers[row.id, str(edit.index)]
            text = None if answer.error else parse_constraint(answer.text, edit.old, answer.finish_reason)
            # Without one that will do the constraint is dropped from the instruction, not the row
            negations[row.id][edit.index] = None if isinstance(text, Drop) else text
        for row in rows:
            row.perturbation = row.perturbed.resolve(negations[row.id])

    def _recombine(self, rows: list[Row]) -> None:
        sides = (PERTURBED,) if self.original else SIDES
        questions = {
            (row.id, side): prompts.recombine(row.constraints(side), row.input, self._examples(row))
            for row in rows
            for side in sides
        }
        answers = self.source.ask("recombine", questions)
        for row in rows:
            row.instructions = {FULL: row.task.text}
            for side in sides:
                made = read(
                    row,
                    "recombine",
                    answers[row.id, side],
                    parse_instruction,
                    row.constraints(side),
                    row.input,
                    side=side,
                    examples=self.source.examples,
                )
                row.instructions[side] = made or ""
            fault = filters.instructions_fault(*(row.instructions[side] for side in SIDES))
            if row.dropped is None and fault:
                row.drop("recombine", fault, answer=answers[row.id, PERTURBED].text)
        if not self.original:
            threshold = self.source.near_duplicate
            drop_near_duplicates(rows, "recombine", lambda row: row.instructions[FULL], threshold)

    def _examples(self, row: Row) -> tuple[Demonstration, ...]:
        """The in-context examples of a row's recombination.

        Where the full side keeps the row's own words, these are the last example: the perturbed side is then the same
        text with less asked for, instead of another text.
        """
        if not self.original:
            return self.source.examples
        instruction = row.task.text.removesuffix(row.input).strip()
        return *self.source.examples, Demonstration(instruction, row.input, row.constraints(FULL))

    def _check(self, rows: list[Row]) -> None:
        questions = {
            (row.id, side): prompts.check(row.constraints(FULL), row.instructions[side], self.source.examples)
            for row in rows
            for side in SIDES
        }
        answers = self.source.ask("check", questions)
        for row in rows:
            count = len(row.constraints(FULL))
            for side, expected in ((FULL, (True,) * count), (PERTURBED, row.perturbed.kept)):
                answer = answers[row.id, side]
                verdicts = read(row, "check", answer, parse_verdicts, count, side=side)
                if verdicts and (fault := filters.verdicts_fault(verdicts, expected)):
                    row.drop("check", fault, side=side, answer=answer.text)

    def _respond(self, rows: list[Row]) -> None:
        answers = self.source.ask("respond", {(row.id, side): row.instructions[side] for row in rows for side in SIDES})
        for row in rows:
            given = {side: answers[row.id, side] for side in SIDES}
            row.chosen, row.rejected = (
                read(row, "respond", answer, parse_response, row.instructions[side], side=side) or ""
                for side, answer in given.items()
            )
            if row.dropped is None:
                reasons = (given[side].finish_reason for side in SIDES)
                if fault := filters.pair_fault(row.chosen, row.rejected, *reasons):
                    row.drop("respond", fault)
