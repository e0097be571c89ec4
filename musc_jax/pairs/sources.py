"""Where instructions come from: a user's tasks or the model's own, and what the model finds in them.

MuSC, arXiv 2502.11541, section 3.2; every method of making pairs begins here.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from musc_jax.pairs import prompts
from musc_jax.pairs.constraints import Decomposition, parse_decomposition, parse_self_instructed
from musc_jax.pairs.demonstrations import Demonstration, pick
from musc_jax.pairs.drops import Drop
from musc_jax.pairs.row import Ask, Row, drop_near_duplicates, left, read
from musc_jax.pairs.tasks import Task


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows with an instruction each.

    Attributes:
      ask: the model.
      demonstrations: all examples; one choice of `num_examples` of them serves all rows but self-instruct's.
      near_duplicate: see `lm_jax.data.similarity.near_duplicates`; 0 keeps all.
    """

    ask: Ask
    demonstrations: Sequence[Demonstration]
    num_examples: int
    seed: int
    near_duplicate: float

    @functools.cached_property
    def examples(self) -> tuple[Demonstration, ...]:
        return pick(self.demonstrations, self.num_examples, self.seed)

    def from_tasks(self, tasks: Sequence[Task]) -> list[Row]:
        """Every task's row; blank and repeated ones are dropped."""
        rows = [Row(task) for task in tasks]
        for row in rows:
            if not row.task.instruction.strip():
                row.drop("input", Drop.EMPTY)
        drop_near_duplicates(rows, "input", lambda row: row.task.text, self.near_duplicate)
        return rows

    def from_nothing(self, count: int) -> list[Row]:
        """Rows of as many tasks that the model invents, each with its constraints or dropped."""
        rows = [Row(Task(i, "")) for i in range(count)]
        seed, n = self.seed, self.num_examples
        questions = {(row.id, ""): prompts.self_instruct(self.demonstrations, seed, i, n) for i, row in enumerate(rows)}
        answers = self.ask("self_instruct", questions)
        for i, row in enumerate(rows):
            examples = pick(self.demonstrations, n, seed, "self_instruct", i)  # those of its prompt
            answer = answers[row.id, ""]
            if made := read(row, "self_instruct", answer, parse_self_instructed, examples=examples):
                row.task = dataclasses.replace(row.task, instruction=made.instruction)
                row.decomposition = made.decomposition
        drop_near_duplicates(rows, "self_instruct", lambda row: row.task.text, self.near_duplicate)
        return rows

    def decompose(self, rows: Sequence[Row], material: bool) -> None:
        """Gives the rows that are left their constraints, or drops them.

        Args:
          material: whether the rows' input will be needed apart. What has several lines may bring material that no
            constraint holds, so invented tasks of several lines are taken apart once more, for that alone.
        """
        asked = [row for row in left(rows) if row.decomposition is None or (material and "\n" in row.task.text)]
        for row, found in self._decomposed(asked, material):
            known = row.decomposition
            row.decomposition = found if known is None else dataclasses.replace(known, input=found.input)

    def _decomposed(self, rows: list[Row], material: bool) -> Iterator[tuple[Row, Decomposition]]:
        """Each row with its decomposition, but for those that are dropped for it."""
        answers = self.ask("decompose", {(r.id, ""): prompts.decompose(r.task.text, self.examples) for r in rows})
        for row in rows:
            options: dict[str, Any] = {"examples": self.examples, "material": material and not row.task.input}
            if found := read(row, "decompose", answers[row.id, ""], parse_decomposition, row.task.text, **options):
                yield row, found
