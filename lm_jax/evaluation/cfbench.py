"""CFBench (arXiv 2408.01122): instructions with requirements, each primary (主需) or secondary (次需).

Three scores, as in the benchmark's own code: CSR, the mean over instructions of the share of requirements met; ISR, the
share of instructions with all of them met; PSR, the share of instructions that satisfy by priority (`satisfies`).
One call of the judge an instruction. Where the file has a reference answer (`gold`), the judge sees it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lm_jax.data.rows import read_rows
from lm_jax.errors import UserError
from lm_jax.evaluation import judge_prompts
from lm_jax.evaluation.intervals import Estimate, estimate
from lm_jax.evaluation.judged import Question, Scores, Verdict, known, text_item

PRIMARY, SECONDARY = "主需", "次需"
_ENOUGH = 0.8


@dataclasses.dataclass(frozen=True)
class _Row:
    requirements: tuple[str, ...]
    primary: tuple[bool, ...]
    types: tuple[str, ...]
    gold: str
    split: str


class CFBench:
    """The benchmark from its file; see `judged.Benchmark`.

    Args:
      path: rows with `prompt` and `criteria`, a list of [requirement, priority, type, subtype]; `gold` and `split`
        (easy, hard) may lack.
      limit: the first so many rows; none: all. A row with an empty prompt, of which the released file has one, is left
        out.

    Raises:
      UserError: a row that is not of this form, or none with a prompt.
    """

    def __init__(self, path: str, limit: int | None):
        rows = read_rows(path, ("prompt", "criteria"))[:limit]
        asked = [(row, f"{path} row {number}") for number, row in enumerate(rows) if row["prompt"] != ""]
        self.items = [text_item(row, "prompt", where) for row, where in asked]
        self._rows = [_read(row, where) for row, where in asked]
        self._num_empty = len(rows) - len(asked)
        if not asked:
            raise UserError(f"{path}: no row has a prompt; give CFBench's data file")

    def questions(self, responses: Sequence[str | None]) -> list[Question]:
        found = []
        for number, (item, row, response) in enumerate(zip(self.items, self._rows, responses, strict=True)):
            if response is not None:
                prompt = judge_prompts.requirements(item.text, row.requirements, response, row.gold)
                found.append(Question(str(number), number, prompt, len(row.requirements)))
        return found

    def ruled(self, responses: Sequence[str | None]) -> dict[int, Verdict]:
        return {}

    def score(self, responses: Sequence[str | None], verdicts: Mapping[str, Verdict]) -> tuple[Scores, dict[str, Any]]:
        """Groups `all`, each split, and each type of requirement, whose `met` is over requirements."""
        judged = [
            (row, met)
            for number, row in enumerate(self._rows)
            if str(number) in verdicts and (met := verdicts[str(number)].met) is not None
        ]
        groups = {"all": _scores(judged)}
        for split in sorted({row.split for row, _ in judged} - {""}):
            groups[split] = _scores([(row, met) for row, met in judged if row.split == split])
        for name in sorted({name for row, _ in judged for name in row.types} - {""}):
            groups[name] = {"met": _of_type(name, judged)}
        return known(groups), {"num_without_prompt": self._num_empty}


def satisfies(met: Sequence[bool], primary: Sequence[bool]) -> bool:
    """Whether an instruction satisfies by priority, as PSR counts it.

    Every primary requirement must be met. If all are primary, that is enough. With secondary ones too, 0.5 + 0.5 * the
    share of those that are met must be above 0.8; with secondary ones alone, their share. Shares are rounded to two
    digits first.
    """
    first = [m for m, p in zip(met, primary, strict=True) if p]
    second = [m for m, p in zip(met, primary, strict=True) if not p]
    if not all(first):
        return False
    if not second:
        return True
    share = round(sum(second) / len(second), 2)
    return (0.5 + 0.5 * share if first else share) > _ENOUGH


def _scores(judged: Sequence[tuple[_Row, Sequence[bool]]]) -> dict[str, Estimate | None]:
    return {
        "CSR": estimate([sum(met) / len(met) for _, met in judged]),
        "ISR": estimate([all(met) for _, met in judged]),
        "PSR": estimate([satisfies(met, row.primary) for row, met in judged]),
    }


def _of_type(name: str, judged: Sequence[tuple[_Row, Sequence[bool]]]) -> Estimate | None:
    own = [[m for m, kind in zip(met, row.types, strict=True) if kind == name] for row, met in judged]
    own = [met for met in own if met]
    return estimate([sum(met) for met in own], [len(met) for met in own])


def _read(row: Mapping[str, Any], where: str) -> _Row:
    criteria = row["criteria"]
    if not isinstance(criteria, list) or not criteria:
        raise UserError(f"{where}: criteria must be a list of at least one requirement, got {criteria!r}; mend the row")
    for number, one in enumerate(criteria):
        if not isinstance(one, list) or len(one) < 2 or not all(isinstance(part, str) for part in one):
            raise UserError(
                f"{where}: criteria[{number}] must be [requirement, priority, type, subtype], got {one!r}; mend the row"
            )
        if one[1] not in (PRIMARY, SECONDARY):
            raise UserError(
                f"{where}: criteria[{number}] has the priority {one[1]!r}; it must be {PRIMARY} or {SECONDARY}"
            )
    gold, split = row.get("gold") or "", row.get("split") or ""
    for name, value in (("gold", gold), ("split", split)):
        if not isinstance(value, str):
            raise UserError(f"{where}: {name} must be a text, got {value!r}; mend the row")
    return _Row(
        tuple(one[0] for one in criteria),
        tuple(one[1] == PRIMARY for one in criteria),
        tuple(one[2] if len(one) > 2 else "" for one in criteria),
        gold,
        split,
    )
