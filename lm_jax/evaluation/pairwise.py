"""Responses against those of a reference, in AlpacaEval's file format: the share that a judge prefers.

Every pair is judged in both orders. A preferred response counts 1, a tie 0.5, the other 0; an instruction counts the
mean of its two orders. That is a plain win rate: nothing corrects it for length, which AlpacaEval 2 does.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lm_jax.data.rows import read_rows
from lm_jax.errors import UserError
from lm_jax.evaluation import judge_prompts
from lm_jax.evaluation.intervals import estimate
from lm_jax.evaluation.judged import Item, Question, Scores, Verdict, known
from lm_jax.evaluation.responses import answers_of

_OURS_FIRST, _OURS_SECOND = "ours first", "ours second"
_POINTS = {_OURS_FIRST: {"A": 1.0, "TIE": 0.5, "B": 0.0}, _OURS_SECOND: {"A": 0.0, "TIE": 0.5, "B": 1.0}}


class Pairwise:
    """A comparison with the outputs of a file; see `judged.Benchmark`.

    Args:
      path: AlpacaEval's outputs of the reference: rows with `instruction`, `output`; `generator` and `dataset` may
        lack.
      limit: the first so many rows; none: all.
      think_end: the reference's outputs are compared without their thoughts, up to here; empty: whole.

    Raises:
      UserError: a row that is not of this form.
    """

    def __init__(self, path: str, limit: int | None, think_end: str = ""):
        self._rows = read_rows(path, ("instruction", "output"))[:limit]
        for number, row in enumerate(self._rows):
            for name in ("instruction", "output"):
                if not isinstance(row[name], str):
                    raise UserError(f"{path} row {number}: {name} must be a text, got {row[name]!r}; mend the row")
            if not row["instruction"].strip():
                raise UserError(f"{path} row {number}: instruction is empty; mend the row")
        self._theirs = answers_of([row["output"] for row in self._rows], think_end).texts
        self.items = [Item(row["instruction"], f"{path} row {number}") for number, row in enumerate(self._rows)]

    def questions(self, responses: Sequence[str | None]) -> list[Question]:
        found = []
        for number, (row, ours, theirs) in enumerate(zip(self._rows, responses, self._theirs, strict=True)):
            if ours is not None:
                for order, pair in ((_OURS_FIRST, (ours, theirs)), (_OURS_SECOND, (theirs, ours))):
                    prompt = judge_prompts.preference(row["instruction"], *pair)
                    found.append(Question(_id(number, order), number, prompt, 0))
        return found

    def ruled(self, responses: Sequence[str | None]) -> dict[int, Verdict]:
        return {}

    def score(self, responses: Sequence[str | None], verdicts: Mapping[str, Verdict]) -> tuple[Scores, dict[str, Any]]:
        """`win rate` and `inconsistent` (the two orders disagree) over instructions whose orders could both be read."""
        both = []
        for number in range(len(self._rows)):
            said = [verdicts.get(_id(number, order), Verdict(None)).value for order in _POINTS]
            read = [value for value in said if isinstance(value, str)]
            if len(read) == len(said):
                both.append((number, [_POINTS[order][value] for order, value in zip(_POINTS, read, strict=True)], read))
        scores = known(
            {
                "all": {
                    "win rate": estimate([sum(points) / 2 for _, points, _ in both]),
                    "inconsistent": estimate([points[0] != points[1] for _, points, _ in both]),
                }
            }
        )
        counts = {
            "num_won": sum(points == [1, 1] for _, points, _ in both),
            "num_lost": sum(points == [0, 0] for _, points, _ in both),
            "num_first_preferred": sum(value == "A" for _, _, read in both for value in read),
            "num_second_preferred": sum(value == "B" for _, _, read in both for value in read),
            "mean_characters": _mean([len(responses[number] or "") for number, _, _ in both]),
            "mean_characters_of_reference": _mean([len(self._theirs[number] or "") for number, _, _ in both]),
        }
        return scores, counts

    def outputs(self, responses: Sequence[str | None], generator: str) -> list[dict[str, str]]:
        """The responses as AlpacaEval reads them."""
        return [
            {
                "instruction": row["instruction"],
                "output": response,
                "generator": generator,
                "dataset": row.get("dataset") or "",
            }
            for row, response in zip(self._rows, responses, strict=True)
            if response is not None
        ]


def _id(number: int, order: str) -> str:
    return f"{number}, {order}"


def _mean(values: Sequence[int]) -> float | None:
    return sum(values) / len(values) if values else None
