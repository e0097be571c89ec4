"""Instructions with yes/no questions about their response, as ComplexBench (arXiv 2407.03978) has them.

The score is the share of all questions that are answered with yes; a question counts as no where one that it depends
on does. The judge answers all questions of an instruction in one call, those too for which ComplexBench has a rule.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lm_jax.data.rows import read_rows
from lm_jax.errors import UserError
from lm_jax.evaluation import judge_prompts
from lm_jax.evaluation.intervals import Estimate, estimate
from lm_jax.evaluation.judged import Question, Scores, Verdict, known, text_item

_TYPES = ("constraint_dimensions", "composition_types")


@dataclasses.dataclass(frozen=True)
class _Point:
    """A question; `depends` has the numbers of others, `types` what it is about."""

    question: str
    depends: tuple[int, ...]
    types: tuple[str, ...]


class ComplexBench:
    """The benchmark from its file; see `judged.Benchmark`.

    Args:
      path: rows with `instruction` and `scoring_questions`: objects with `question`, and, where they are there, `dep`
        (numbers of questions of the row, from 0), `constraint_dimensions` and `composition_types` (lists of names).
      limit: the first so many rows; none: all.

    Raises:
      UserError: a row that is not of this form, questions that depend on each other.
    """

    def __init__(self, path: str, limit: int | None):
        rows = read_rows(path, ("instruction", "scoring_questions"))[:limit]
        self.items = [text_item(row, "instruction", f"{path} row {number}") for number, row in enumerate(rows)]
        self._points = [_points(row, item.where) for row, item in zip(rows, self.items, strict=True)]

    def questions(self, responses: Sequence[str | None]) -> list[Question]:
        found = []
        for number, (item, points, response) in enumerate(zip(self.items, self._points, responses, strict=True)):
            if response is not None:
                prompt = judge_prompts.requirements(item.text, [point.question for point in points], response)
                found.append(Question(str(number), number, prompt, len(points)))
        return found

    def ruled(self, responses: Sequence[str | None]) -> dict[int, Verdict]:
        return {}

    def score(self, responses: Sequence[str | None], verdicts: Mapping[str, Verdict]) -> tuple[Scores, dict[str, Any]]:
        """Groups `all` and each type, with `met` over questions; `all met` over instructions."""
        judged = [
            (points, with_dependencies(value, [point.depends for point in points]))
            for number, points in enumerate(self._points)
            if str(number) in verdicts and (value := verdicts[str(number)].met) is not None
        ]
        types = sorted({name for points, _ in judged for point in points for name in point.types})
        return known(
            {
                "questions": {"met": _share([met for _, met in judged])},
                "instructions": {"all met": estimate([all(met) for _, met in judged])},
                **{
                    name: {
                        "met": _share(
                            [
                                [m for m, point in zip(met, points, strict=True) if name in point.types]
                                for points, met in judged
                            ]
                        )
                    }
                    for name in types
                },
            }
        ), {}


def with_dependencies(met: Sequence[bool], depends: Sequence[Sequence[int]]) -> list[bool]:
    """`met`, but False where anything that it depends on, directly or not, is.

    Args:
      depends: of each, numbers of others. Without circles.
    """

    def counts(number: int) -> bool:
        return met[number] and all(map(counts, depends[number]))

    return [counts(number) for number in range(len(met))]


def _share(met: Sequence[Sequence[bool]]) -> Estimate | None:
    own = [values for values in met if values]
    return estimate([sum(values) for values in own], [len(values) for values in own])


def _points(row: Mapping[str, Any], where: str) -> tuple[_Point, ...]:
    given = row["scoring_questions"]
    if not isinstance(given, list) or not given:
        raise UserError(f"{where}: scoring_questions must be a list of at least one, got {given!r}; mend the row")
    points = tuple(_point(one, len(given), f"{where}: scoring_questions[{i}]") for i, one in enumerate(given))
    settled: set[int] = set()
    while left := set(range(len(points))) - settled:
        free = {number for number in left if settled.issuperset(points[number].depends)}
        if not free:
            raise UserError(f"{where}: scoring_questions {sorted(left)} depend on each other in a circle; mend dep")
        settled |= free
    return points


def _point(given: Any, count: int, where: str) -> _Point:
    if not isinstance(given, dict) or not isinstance(given.get("question"), str) or not given["question"].strip():
        raise UserError(f"{where} must be an object with a question, got {given!r}; mend the row")
    depends = given.get("dep") or []
    if not isinstance(depends, list) or not all(type(d) is int and 0 <= d < count for d in depends):
        raise UserError(f"{where}: dep must list numbers of questions, 0 to {count - 1}, got {depends!r}; mend the row")
    types: list[str] = []
    for name in _TYPES:
        own = given.get(name) or []
        if not isinstance(own, list) or not all(isinstance(one, str) for one in own):
            raise UserError(f"{where}: {name} must be a list of names, got {own!r}; mend the row")
        types += own
    return _Point(given["question"], tuple(depends), tuple(dict.fromkeys(types)))
