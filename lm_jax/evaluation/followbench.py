"""FollowBench (arXiv 2310.20410): instructions that gain a constraint a level, from 1 to 5.

HSR, the share of a level's instructions with all constraints met; SSR, the mean over them of the share of constraints
met; CSL, the mean over initial instructions of how many levels from 1 on are wholly met one after the other. The judge
sees the chain of instructions up to the level, since what a level added shows only beside the one before. What
`followbench_rules` decides counts 0 or 1 in HSR and SSR, as in the benchmark's own code. Unlike there, examples 22 and
30 of the format category go to the judge: their rules count the 1 of "1." as a sentence.
"""

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_jax.data.rows import read_rows
from lm_jax.errors import UserError
from lm_jax.evaluation import followbench_rules, judge_prompts
from lm_jax.evaluation.intervals import Estimate, estimate
from lm_jax.evaluation.judged import Item, Question, Scores, Verdict, known

LEVELS = (1, 2, 3, 4, 5)
_COLUMNS = ("example_id", "category", "source", "level", "instruction", "target")
_FILES = "*_constraints.json"


@dataclasses.dataclass(frozen=True)
class _Row:
    """A level of an initial instruction. `chain` numbers these; `above` has the instructions up to this level."""

    chain: int
    category: str
    level: int
    source: str
    target: str
    answer: str
    above: tuple[str, ...]


class FollowBench:
    """The benchmark from its files; see `judged.Benchmark`.

    Args:
      path: a directory with the files NAME_constraints.json, or one such file. An initial instruction's rows stand one
        after the other, from level 0, which may be empty, or from 1.
      limit: the first so many rows of each file; none: all.

    Raises:
      UserError: a row that is not of this form, a level whose lower ones are missing.
    """

    def __init__(self, path: str, limit: int | None):
        files = sorted(Path(path).glob(_FILES)) if Path(path).is_dir() else [path]
        if not files:
            raise UserError(f"{path}: no file {_FILES} in it; give FollowBench's data directory or one of its files")
        self.items: list[Item] = []
        self._rows: list[_Row] = []
        self._num_chains = 0
        for file in map(str, files):
            self._add(read_rows(file, _COLUMNS)[:limit], file)

    def questions(self, responses: Sequence[str | None]) -> list[Question]:
        found = []
        for number, (row, response) in enumerate(zip(self._rows, responses, strict=True)):
            if response is not None and not _is_ruled(row):
                first = row.level - len(row.above) + 1
                prompt = judge_prompts.added_constraints(row.above, first, response)
                found.append(Question(str(number), number, prompt, row.level))
        return found

    def ruled(self, responses: Sequence[str | None]) -> dict[int, Verdict]:
        return {
            number: Verdict((self._follows(number, response),))
            for number, (row, response) in enumerate(zip(self._rows, responses, strict=True))
            if response is not None and _is_ruled(row)
        }

    def score(self, responses: Sequence[str | None], verdicts: Mapping[str, Verdict]) -> tuple[Scores, dict[str, Any]]:
        """Groups `all` and each category, with their CSL, and these at each level, with HSR and SSR.

        An initial instruction whose level is missing or could not be judged before one that is not met has no CSL.
        """
        ruled = self.ruled(responses)
        met = [ruled.get(number) or verdicts.get(str(number)) or Verdict(None) for number in range(len(self._rows))]
        judged = [(row, own.met) for row, own in zip(self._rows, met, strict=True) if own.met is not None]
        whole: dict[int, dict[int, bool]] = collections.defaultdict(dict)
        for row, own in judged:
            whole[row.chain][row.level] = all(own)
        category = {row.chain: row.category for row in self._rows}
        lengths = {chain: _consecutive(whole[chain]) for chain in category}
        groups: dict[str, dict[str, Estimate | None]] = {}
        for name in ("all", *dict.fromkeys(category.values())):
            mine = [(row, own) for row, own in judged if name in ("all", row.category)]
            for level in LEVELS:
                at = [own for row, own in mine if row.level == level]
                groups[f"{name}, level {level}"] = {
                    "HSR": estimate([all(own) for own in at]),
                    "SSR": estimate([sum(own) / len(own) for own in at]),
                }
            mean = [n for chain, n in lengths.items() if name in ("all", category[chain]) and n is not None]
            groups[name] = {"CSL": estimate(mean, maximum=len(LEVELS))}
        without = sum(n is None for n in lengths.values())
        return known(groups), {"num_ruled": len(ruled), "num_initial": len(lengths), "num_without_csl": without}

    def _add(self, rows: Sequence[Mapping[str, Any]], file: str) -> None:
        for chain in _chains(rows, file):
            above: list[str] = []
            categories = {row["category"] for _, row in chain}
            # In the mixed category only level 0 is called so; the others list what was added
            category = categories.pop() if len(categories) == 1 else "mixed"
            for where, row in chain:
                if row["instruction"].strip():  # at level 0 the released files have some that are empty
                    above.append(row["instruction"])
                if row["level"]:
                    kept = (row["source"], row["target"], row.get("answer") or "", tuple(above))
                    self._rows.append(_Row(self._num_chains, category, row["level"], *kept))
                    self.items.append(Item(row["instruction"], where))
            self._num_chains += 1

    def _follows(self, number: int, response: str) -> bool:
        row = self._rows[number]
        if row.category == "example":
            return followbench_rules.has_form(row.target, row.answer, response)
        try:
            return followbench_rules.follows(row.source, row.level, row.target, response)
        except ValueError as error:
            where = self.items[number].where
            raise UserError(f"{where}: target {row.target!r} of source {row.source}: {error}; mend the row") from error


def _consecutive(met: Mapping[int, bool]) -> int | None:
    """Levels from 1 on that are met one after the other; None where that is not known."""
    length = len(list(itertools.takewhile(lambda level: met.get(level), LEVELS)))
    return length if length == len(LEVELS) or length + 1 in met else None


def _chains(rows: Sequence[Mapping[str, Any]], file: str) -> list[list[tuple[str, Mapping[str, Any]]]]:
    """(file and row, row) of each initial instruction, by level."""
    chains: list[list[tuple[str, Mapping[str, Any]]]] = []
    before: tuple[Any, int] | None = None  # example and level of the row before
    for number, row in enumerate(rows):
        where = f"{file} row {number}"
        _check(row, where)
        example, level = row["example_id"], row["level"]
        if before != (example, level - 1):
            if level > 1:
                raise UserError(
                    f"{where}: example {example!r} is at level {level}, but the row before is not its level "
                    f"{level - 1}; give all levels of an example, from 0 or 1 on, one after the other"
                )
            chains.append([])
        before = (example, level)
        chains[-1].append((where, row))
    return chains


def _check(row: Mapping[str, Any], where: str) -> None:
    if type(row["level"]) is not int or row["level"] not in (0, *LEVELS):
        raise UserError(f"{where}: level must be a whole number from 0 to 5, got {row['level']!r}; mend the row")
    for name in ("category", "source", "instruction", "target"):
        if not isinstance(row[name], str):
            raise UserError(f"{where}: {name} must be a text, got {row[name]!r}; mend the row")
    if row["level"] and not row["instruction"].strip():
        raise UserError(f"{where}: instruction is empty; mend the row")


def _is_ruled(row: _Row) -> bool:
    return row.category == "example" or row.source in followbench_rules.RULED
