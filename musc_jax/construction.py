"""From instructions to pairs of responses, step by step (MuSC, arXiv 2502.11541, section 3.2).

Every step asks the model about the rows that are left, reads the answers, and drops the rows whose answer will not do.
Between the questions everything is a function of (answers, seed, row id): gone through again, it comes out the same.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from musc_jax import filters, prompts
from musc_jax.constraints import Decomposition, folded, parse_decomposition, parse_self_instructed
from musc_jax.demonstrations import Demonstration, pick
from musc_jax.drops import Drop
from musc_jax.instructions import parse_constraint, parse_instruction, parse_verdicts
from musc_jax.perturb import Perturbation, PerturbConfig, Pool, perturb
from musc_jax.prompts import Prompt
from musc_jax.sections import visible
from musc_jax.stages import Answer
from musc_jax.tasks import Task

NO_ANSWER = "no_answer"  # a reason beside those of `Drop`: the generator had none, as for a prompt that is too long
FULL, PERTURBED = "full", "perturbed"
SIDES = (FULL, PERTURBED)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Dropped:
    """Where and why a row left.

    Attributes:
      stage: `input` or one of the model's.
      reason: a `Drop`, or NO_ANSWER.
      side: whose answer it was, where a stage asks about both.
      answer: what was answered, as it came; None where that is not the reason.
      error: of a row without answer.
    """

    stage: str
    reason: str
    side: str | None = None
    answer: str | None = None
    error: str | None = None


@dataclasses.dataclass(eq=False)
class Row:
    """One row on its way; None stands for what is not there yet.

    Attributes:
      instructions: side -> the whole instruction, the input in it.
      responses: side -> the response, without thoughts and white space around it.
    """

    task: Task
    decomposition: Decomposition | None = None
    perturbation: Perturbation | None = None
    instructions: dict[str, str] = dataclasses.field(default_factory=dict)
    responses: dict[str, str] = dataclasses.field(default_factory=dict)
    dropped: Dropped | None = None

    @property
    def id(self) -> str:
        return str(self.task.id)

    @property
    def input(self) -> str:
        """The material that the instruction works on: the user's, else what the decomposition found."""
        return self.task.input or (self.decomposition.input if self.decomposition else None) or ""

    def constraints(self, side: str) -> tuple[str, ...]:
        return self.decomposition.constraints if side == FULL else self.perturbation.constraints

    def drop(self, stage: str, reason: str, **known: str | None) -> None:
        self.dropped = self.dropped or Dropped(stage, str(reason), **known)


# (stage, (row id, part) -> question) -> (row id, part) -> answer; parts name what of a row is asked about
Ask = Callable[[str, Mapping[tuple[str, str], Prompt | str]], Mapping[tuple[str, str], Answer]]


@dataclasses.dataclass(frozen=True)
class Construction:
    """How pairs are made.

    Attributes:
      ask: the model.
      demonstrations: all examples; one choice of `num_examples` of them serves all rows but self-instruct's.
      original: whether the full instruction is the row's own, not the recombined one.
      verify: whether the instructions are checked for their constraints.
      near_duplicate: see `filters.near_duplicates`; 0 keeps all.
    """

    ask: Ask
    demonstrations: Sequence[Demonstration]
    num_examples: int
    perturb: PerturbConfig
    original: bool
    verify: bool
    near_duplicate: float

    @functools.cached_property
    def examples(self) -> tuple[Demonstration, ...]:
        return pick(self.demonstrations, self.num_examples, self.perturb.seed)

    def from_tasks(self, tasks: Sequence[Task]) -> list[Row]:
        """Every task's row, either with all of a pair or dropped."""
        rows = [Row(task) for task in tasks]
        for row in rows:
            if not row.task.instruction.strip():
                row.drop("input", Drop.EMPTY)
        self._drop_near_duplicates(rows, "input", lambda row: row.task.text)
        for row, decomposition in self._decomposed(left(rows)):
            row.decomposition = decomposition
        return self._pairs(rows)

    def from_nothing(self, count: int) -> list[Row]:
        """Rows of as many tasks that the model invents."""
        rows = [Row(Task(i, "")) for i in range(count)]
        seed, n = self.perturb.seed, self.num_examples
        questions = {(row.id, ""): prompts.self_instruct(self.demonstrations, seed, i, n) for i, row in enumerate(rows)}
        answers = self.ask("self_instruct", questions)
        for i, row in enumerate(rows):
            examples = pick(self.demonstrations, n, seed, "self_instruct", i)  # those of its prompt
            answer = answers[row.id, ""]
            if made := read(row, "self_instruct", answer, parse_self_instructed, examples=examples):
                row.task = dataclasses.replace(row.task, instruction=made.instruction)
                row.decomposition = made.decomposition
        self._drop_near_duplicates(rows, "self_instruct", lambda row: row.task.text)
        # What has several lines may bring material, which no constraint holds: both sides need it as their input
        for row, found in self._decomposed([row for row in left(rows) if "\n" in row.task.text]):
            row.decomposition = dataclasses.replace(row.decomposition, input=found.input)
        return self._pairs(rows)

    def _decomposed(self, rows: list[Row]) -> Iterator[tuple[Row, Decomposition]]:
        """Each row with its decomposition, but for those that are dropped for it."""
        answers = self.ask("decompose", {(r.id, ""): prompts.decompose(r.task.text, self.examples) for r in rows})
        for row in rows:
            answer = answers[row.id, ""]
            if found := read(row, "decompose", answer, parse_decomposition, row.task.text, examples=self.examples):
                yield row, found

    def _pairs(self, rows: list[Row]) -> list[Row]:
        self._perturb(left(rows))
        self._recombine(left(rows))
        if self.verify:
            self._check(left(rows))
        self._respond(left(rows))
        return rows

    def _perturb(self, rows: list[Row]) -> None:
        pool = Pool({row.id: row.constraints(FULL) for row in rows}) if self.perturb.substitute else None
        for row in rows:
            row.perturbation = perturb(row.constraints(FULL), row.id, self.perturb, pool)
        pending = [(row, edit) for row in rows for edit in row.perturbation.pending]
        answers = self.ask("negate", {(row.id, str(e.index)): prompts.negate(e.old) for row, e in pending})
        negations: dict[str, dict[int, str | None]] = {row.id: {} for row in rows}
        for row, edit in pending:
            answer = answers[row.id, str(edit.index)]
            text = None if answer.error else parse_constraint(answer.text, edit.old, answer.finish_reason)
            # Without one that will do the constraint is dropped from the instruction, not the row
            negations[row.id][edit.index] = None if isinstance(text, Drop) else text
        for row in rows:
            row.perturbation = row.perturbation.resolve(negations[row.id])

    def _recombine(self, rows: list[Row]) -> None:
        sides = (PERTURBED,) if self.original else SIDES
        questions = {
            (row.id, side): prompts.recombine(row.constraints(side), row.input, self.examples)
            for row in rows
            for side in sides
        }
        answers = self.ask("recombine", questions)
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
                    examples=self.examples,
                )
                row.instructions[side] = made or ""
            if row.dropped is None and (fault := filters.instructions_fault(*map(row.instructions.get, SIDES))):
                row.drop("recombine", fault, answer=answers[row.id, PERTURBED].text)
        if not self.original:
            self._drop_near_duplicates(rows, "recombine", lambda row: row.instructions[FULL])

    def _check(self, rows: list[Row]) -> None:
        questions = {
            (row.id, side): prompts.check(row.constraints(FULL), row.instructions[side], self.examples)
            for row in rows
            for side in SIDES
        }
        answers = self.ask("check", questions)
        for row in rows:
            count = len(row.constraints(FULL))
            for side, expected in ((FULL, (True,) * count), (PERTURBED, row.perturbation.kept)):
                answer = answers[row.id, side]
                verdicts = read(row, "check", answer, parse_verdicts, count, side=side)
                if verdicts and (fault := filters.verdicts_fault(verdicts, expected)):
                    row.drop("check", fault, side=side, answer=answer.text)

    def _respond(self, rows: list[Row]) -> None:
        answers = self.ask("respond", {(row.id, side): row.instructions[side] for row in rows for side in SIDES})
        for row in rows:
            given = {side: answers[row.id, side] for side in SIDES}
            for side, answer in given.items():
                response = read(row, "respond", answer, _parse_response, row.instructions[side], side=side)
                row.responses[side] = response or ""
            if row.dropped is None:
                reasons = (given[side].finish_reason for side in SIDES)
                if fault := filters.pair_fault(*map(row.responses.get, SIDES), *reasons):
                    row.drop("respond", fault)

    def _drop_near_duplicates(self, rows: Sequence[Row], stage: str, text: Callable[[Row], str]) -> None:
        rows = left(rows)
        if self.near_duplicate:
            earlier = filters.near_duplicates([text(row) for row in rows], self.near_duplicate)
            for row, found in zip(rows, earlier, strict=True):
                if found is not None:
                    row.drop(stage, Drop.NEAR_DUPLICATE)


def left(rows: Sequence[Row]) -> list[Row]:
    """Those that are not dropped."""
    return [row for row in rows if row.dropped is None]


def read(
    row: Row, stage: str, answer: Answer, parse: Callable[..., T | Drop], *args: Any, side: str | None = None, **options
) -> T | None:
    """What `parse` makes of an answer, or None and the row is dropped for it."""
    if answer.error is not None:
        row.drop(stage, NO_ANSWER, side=side, error=answer.error)
        return None
    found = parse(answer.text, *args, finish_reason=answer.finish_reason, **options)
    if isinstance(found, Drop):
        row.drop(stage, found, side=side, answer=answer.text)
        return None
    return found


def _parse_response(answer: str, instruction: str, finish_reason: str) -> str | Drop:
    """A response as it is trained on, without thoughts; it may be "". ECHO where it only repeats what was asked."""
    text = visible(answer)
    if text is None:
        return Drop.TRUNCATED
    return Drop.ECHO if text.strip() and folded(text) == folded(instruction) else text.strip()
