"""The model's part in making pairs: stages, each one call of the generator whose answers are kept as they come."""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lm_jax.console import say
from lm_jax.data.journal import Journal, rows_fingerprint
from lm_jax.data.rows import read_rows
from lm_jax.distributed.processes import everywhere
from lm_jax.errors import UserError
from lm_jax.generation.answers import answer_requests, missing_rows
from lm_jax.generation.requests import Generator, Request, SamplingConfig


@dataclasses.dataclass(frozen=True)
class Answer:
    """What became of a request: a text, or an error (one line) and none."""

    text: str
    finish_reason: str
    error: str | None = None


class Stages:
    """Asks the generator, stage by stage; `<directory>/<stage>.jsonl` holds the answers of one that is done.

    A stage that was stopped goes on with the answers that are missing, one that is done asks nothing. In a run of many
    processes all of them get process 0's answers.

    Args:
      directory: appears with the first answer.
      generator: called once, when the first answer is missing.
      max_failed_share: of a stage's requests; above it the run stops, and the next one tries them again.
    """

    def __init__(self, directory: str, generator: Callable[[], Generator], max_failed_share: float):
        self._directory, self._open, self._max_failed_share = directory, generator, max_failed_share
        self._generator: Generator | None = None

    def ask(
        self, stage: str, requests: Sequence[Request], sampling: SamplingConfig, identity: Mapping[str, Any]
    ) -> list[Answer]:
        """The answers in the requests' order; for no requests there is no stage.

        Args:
          identity: settings that the requests depend on, named in the error where they changed.

        Raises:
          UserError: the stage was begun with other settings or requests; too many requests without answer.
        """
        if not requests:
            return []
        begin = time.monotonic()
        journal = None if jax.process_index() else self._journal(stage, requests, sampling, identity)
        try:
            missing = missing_rows(journal)
            if missing:
                self._generator = self._generator or self._open()
                wanted = {number: requests[number] for number in missing}
                share = self._max_failed_share
                answer_requests(self._generator, wanted, sampling, journal, len(requests), share, f"{stage} answer")
            if journal is not None and not journal.finished:
                journal.finish({"id": r.id, **journal.value(number)} for number, r in enumerate(requests))
        finally:
            if journal is not None:
                journal.close()
        say(f"{stage}: {len(missing)} of {len(requests)} answers in {time.monotonic() - begin:.1f} s")
        return [
            Answer(row["response"] or "", row["finish_reason"], row.get("error"))
            for row in everywhere(lambda: self._kept(stage, requests))
        ]

    def _journal(self, stage: str, requests, sampling, identity) -> Journal:
        rows = [{"id": request.id, "prompt": request.prompt} for request in requests]
        whole = {
            "command": "musc_pairs",
            "stage": stage,
            **identity,
            "stop": sampling.stop,
            "number of requests": len(rows),
            "fingerprint of its requests": rows_fingerprint(rows, stage),
        }
        path = self._path(stage)
        journal = Journal(path, whole, len(rows), lambda value: "error" in value)
        if journal.damaged:
            say(f"{path}.partial: {journal.damaged} damaged lines; their answers are asked for anew")
        return journal

    def _kept(self, stage: str, requests: Sequence[Request]) -> list[dict[str, Any]]:
        path = self._path(stage)
        rows = read_rows(path, ("id", "response", "finish_reason"))
        if [row["id"] for row in rows] != [request.id for request in requests]:
            raise UserError(f"{path}: no longer has the rows that it was written with; delete it to do them anew")
        return rows

    def _path(self, stage: str) -> str:
        return os.path.join(self._directory, f"{stage}.jsonl")
