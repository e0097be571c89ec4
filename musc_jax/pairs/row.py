"""A row on its way from an instruction to a pair, and what every method of making pairs does with it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from lm_jax.data.similarity import near_duplicates
from lm_jax.generation.answer_text import visible
from musc_jax.pairs.constraints import Decomposition, folded
from musc_jax.pairs.drops import Drop
from musc_jax.pairs.perturb import Perturbation
from musc_jax.pairs.prompts import Prompt
from musc_jax.pairs.stages import Answer
from musc_jax.pairs.tasks import Task

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
      instructions: side -> the whole instruction, the input in it. Only MuSC has a perturbed side.
      chosen, rejected: the responses, without thoughts and white space around them.
      added: columns of the method's own.
      left_out: (stage, reason) of single answers that were of no use while the row went on.
    """

    task: Task
    decomposition: Decomposition | None = None
    perturbation: Perturbation | None = None
    instructions: dict[str, str] = dataclasses.field(default_factory=dict)
    chosen: str = ""
    rejected: str = ""
    added: dict[str, Any] = dataclasses.field(default_factory=dict)
    left_out: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    dropped: Dropped | None = None

    @property
    def id(self) -> str:
        return str(self.task.id)

    @property
    def input(self) -> str:
        """The material that the instruction works on: the user's, else what the decomposition found."""
        return self.task.input or (self.decomposition.input if self.decomposition else None) or ""

    @property
    def perturbed(self) -> Perturbation:
        """The perturbation of a row that has one already."""
        if self.perturbation is None:
            raise ValueError(f"row {self.id} has not been perturbed")
        return self.perturbation

    def constraints(self, side: str) -> tuple[str, ...]:
        made = self.decomposition if side == FULL else self.perturbation
        if made is None:
            raise ValueError(f"row {self.id} has no {side} constraints yet")
        return made.constraints

    def drop(self, stage: str, reason: str, **known: str | None) -> None:
        self.dropped = self.dropped or Dropped(stage, str(reason), **known)


# (stage, (row id, part) -> question) -> (row id, part) -> answer; parts name what of a row is asked about
Ask = Callable[[str, Mapping[tuple[str, str], Prompt | str]], Mapping[tuple[str, str], Answer]]


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


def parse_response(answer: str, instruction: str, finish_reason: str = "stop") -> str | Drop:
    """A response as it is trained on, without thoughts; it may be "". ECHO where it only repeats what was asked."""
    text = visible(answer)
    if text is None:
        return Drop.TRUNCATED
    return Drop.ECHO if text.strip() and folded(text) == folded(instruction) else text.strip()


def drop_near_duplicates(rows: Sequence[Row], stage: str, text: Callable[[Row], str], threshold: float) -> None:
    """Drops rows whose text nearly repeats that of an earlier one; a threshold of 0 keeps all."""
    rows = left(rows)
    if threshold:
        earlier = near_duplicates([text(row) for row in rows], threshold)
        for row, found in zip(rows, earlier, strict=True):
            if found is not None:
                row.drop(stage, Drop.NEAR_DUPLICATE)
