"""Best against worst: the model answers an instruction several times and says itself which answer is best."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from musc_jax.pairs import filters
from musc_jax.pairs.drops import Drop
from musc_jax.pairs.prompts import Prompt
from musc_jax.pairs.row import FULL, NO_ANSWER, Row, left, parse_response
from musc_jax.pairs.sources import Source
from musc_jax.pairs.stages import Answer


@dataclasses.dataclass(frozen=True)
class BestOf:
    """Scores several responses; chosen is the best, rejected the worst, of equals the first.

    A response that will not do (empty, refused, truncated, an echo) and a verdict that cannot be read are left out and
    counted, each by itself. The row is dropped where fewer than two responses differ, have a score, or differ in it.

    Attributes:
      source: where the rows came from; its model is asked on.
      num_samples: responses of each instruction.
      judge_samples: verdicts on each response, whose mean is its score.
      question: (row, response) -> what is asked about it.
      verdict: (row, answer's text, its finish reason) -> a number, or why there is none.
    """

    source: Source
    num_samples: int
    judge_samples: int
    question: Callable[[Row, str], Prompt]
    verdict: Callable[[Row, str, str], float | Drop]

    def pairs(self, rows: Sequence[Row]) -> None:
        """Gives every row that is left a pair, or drops it."""
        rows = left(rows)
        for row in rows:
            row.instructions = {FULL: row.task.text}
        responses = self._respond(rows)
        scores = self._judge(left(rows), responses)
        for row in left(rows):
            found = zip(scores[row.id], responses[row.id], strict=True)
            known = [(score, text) for score, text in found if score is not None]
            row.added["scores"] = [score for score, _ in known]
            if len(known) < 2:
                row.drop("judge", Drop.NOT_ENOUGH_SCORED)
                continue
            best, worst = (choose(known, key=lambda scored: scored[0]) for choose in (max, min))
            if best[0] == worst[0]:
                row.drop("judge", Drop.TIE)
                continue
            (row.added["chosen_score"], row.chosen), (row.added["rejected_score"], row.rejected) = best, worst

    def provenance(self, row: Row) -> dict[str, Any]:
        """The scores: the pair's, and those of all responses that have one, in the order of their samples."""
        return {name: row.added.get(name) for name in ("chosen_score", "rejected_score", "scores")}

    def _respond(self, rows: list[Row]) -> dict[str, list[str]]:
        """Row id -> its responses, each once."""
        parts = [str(i) for i in range(self.num_samples)]
        answers = self.source.ask("respond", {(row.id, i): row.task.text for row in rows for i in parts})
        responses = {}
        for row in rows:
            kept: dict[str, str] = {}
            faults: list[tuple[str, Answer]] = []
            for i in parts:
                text, fault = read_response(answers[row.id, i], row.task.text)
                if fault:
                    faults.append((fault, answers[row.id, i]))
                else:
                    kept.setdefault(" ".join(text.split()), text)
            responses[row.id] = [*kept.values()]
            row.left_out += [("respond", fault) for fault, _ in faults]
            if len(kept) < 2:
                reason, answer = faults[0] if faults else (Drop.IDENTICAL_PAIR, answers[row.id, parts[0]])
                row.drop("respond", reason, answer=answer.text or None, error=answer.error)
        return responses

    def _judge(self, rows: list[Row], responses: dict[str, list[str]]) -> dict[str, list[float | None]]:
        """Row id -> the mean of the verdicts on each response, None where none can be read."""
        questions = {
            (row.id, f"{n}/{sample}"): self.question(row, text)
            for row in rows
            for n, text in enumerate(responses[row.id])
            for sample in range(self.judge_samples)
        }
        answers = self.source.ask("judge", questions)
        scores: dict[str, Any] = {}
        for row in rows:
            scores[row.id] = []
            for n in range(len(responses[row.id])):
                verdicts = []
                for sample in range(self.judge_samples):
                    answer = answers[row.id, f"{n}/{sample}"]
                    found = NO_ANSWER if answer.error else self.verdict(row, answer.text, answer.finish_reason)
                    if isinstance(found, str):
                        row.left_out.append(("judge", str(found)))
                    else:
                        verdicts.append(found)
                scores[row.id].append(statistics.fmean(verdicts) if verdicts else None)
        return scores


def read_response(answer: Answer, instruction: str) -> tuple[str, str | None]:
    """A response as it is trained on, and why it will not do, None where it does."""
    if answer.error is not None:
        return "", NO_ANSWER
    text = parse_response(answer.text, instruction, answer.finish_reason)
    if isinstance(text, Drop):
        return "", str(text)
    fault = filters.response_fault(text, answer.finish_reason)
    return text, fault and str(fault)
