"""What judged benchmarks share: texts to be answered, questions to a judge, its verdicts, and tables of scores."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lm_jax.errors import UserError
from lm_jax.evaluation.intervals import Estimate
from lm_jax.generation.verdicts import read_points, read_preference

Scores = dict[str, dict[str, Estimate]]  # group -> metric -> estimate


@dataclasses.dataclass(frozen=True)
class Item:
    """One text that is to be answered, and its file and row, for errors."""

    text: str
    where: str


def text_item(row: Mapping[str, Any], column: str, where: str) -> Item:
    """The text in `column` of a row; UserError where it is none, or empty."""
    if not isinstance(row[column], str) or not row[column].strip():
        raise UserError(f"{where}: {column} must be a text, got {row[column]!r}; mend the row")
    return Item(row[column], where)


@dataclasses.dataclass(frozen=True)
class Question:
    """One call of the judge.

    Attributes:
      id: unique within a run.
      item: number of the item that it is about.
      prompt: what is asked.
      points: yes or no is asked for each of so many; 0: which of two responses is better.
    """

    id: str
    item: int
    prompt: str
    points: int


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a judge, or a rule, said.

    Attributes:
      value: yes or no for each point, or "A", "B", "TIE"; None where nothing could be read.
      fault: why nothing could be read: "no answer", "truncated" or "unparsable".
    """

    value: tuple[bool, ...] | str | None
    fault: str | None = None

    @property
    def met(self) -> tuple[bool, ...] | None:
        """`value` of a verdict on points."""
        return self.value if isinstance(self.value, tuple) else None


class Benchmark(Protocol):
    """Instructions with what is asked about responses to them.

    Attributes:
      items: what is to be answered.
    """

    @property
    def items(self) -> Sequence[Item]: ...

    def questions(self, responses: Sequence[str | None]) -> list[Question]:
        """All calls of the judge; none about a response that is None."""
        ...

    def ruled(self, responses: Sequence[str | None]) -> dict[int, Verdict]:
        """Item number -> verdict of those that are decided by a rule."""
        ...

    def score(self, responses: Sequence[str | None], verdicts: Mapping[str, Verdict]) -> tuple[Scores, dict[str, Any]]:
        """Scores from the verdict of each question, by its id; and further counts for the report.

        An instruction with a verdict that could not be read is left out of every score that needs it.
        """
        ...


def read_verdict(question: Question, answer: str | None, finish_reason: str) -> Verdict:
    """Reads a judge's answer; None for one that never came."""
    if answer is None:
        return Verdict(None, "no answer")
    if finish_reason == "length":  # what would have followed may have taken it back
        return Verdict(None, "truncated")
    value = read_points(answer, question.points) if question.points else read_preference(answer)
    return Verdict(value, "unparsable" if value is None else None)


def known(groups: Mapping[str, Mapping[str, Estimate | None]]) -> Scores:
    """Without metrics that no instruction is left for, and groups without metrics."""
    found = {name: {k: v for k, v in metrics.items() if v is not None} for name, metrics in groups.items()}
    return {name: metrics for name, metrics in found.items() if metrics}


def markdown(title: str, scores: Scores) -> str:
    """A Markdown table for each set of metrics: groups down, metrics across."""
    tables: dict[tuple[str, ...], list[str]] = {}
    for group, metrics in scores.items():
        row = [group, *map(str, metrics.values()), str(max(e.n for e in metrics.values()))]
        tables.setdefault(tuple(metrics), []).append(_line(row))
    shown = [
        _line([title, *names, "n"]) + _line(["---", *["---:"] * (len(names) + 1)]) + "".join(rows)
        for names, rows in tables.items()
    ]
    return "\n".join(shown)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |\n"
