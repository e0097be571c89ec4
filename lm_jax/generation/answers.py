"""Requests -> answers in a journal, with progress and a limit to how many may fail: what generating commands share."""

import collections
import re
import time
from collections.abc import Mapping
from typing import Any

from lm_jax.console import Progress
from lm_jax.data.journal import Journal
from lm_jax.distributed.processes import everywhere
from lm_jax.errors import UserError
from lm_jax.generation.requests import Completion, Generator, Request, SamplingConfig

_SHOWN = 300  # characters of a row's error in the run's


def missing_rows(journal: Journal | None) -> list[int]:
    """The rows that are still to do, the same in every process; only process 0 has a journal."""
    return everywhere(lambda: [] if journal is None else journal.missing().tolist())


def answer_requests(
    generator: Generator,
    requests: Mapping[int, Request],
    sampling: SamplingConfig,
    journal: Journal | None,
    num_rows: int,
    max_failed_share: float,
    unit: str = "row",
) -> tuple[int, int]:
    """Answers the missing rows of a run and keeps them as they finish.

    A kept value has `response` and `finish_reason`, lists of them for several samples; that of a row without an answer
    `response` None, `finish_reason` "error" and `error`, one line.

    Args:
      requests: row number -> what is asked.
      journal: process 0's; the others have none and write nothing.
      num_rows: of the whole run, done and missing.
      unit: what progress counts.

    Returns:
      (rows without answer, tokens generated).

    Raises:
      UserError: more than `max_failed_share` of all rows without answer; what the generator raises.
    """
    if getattr(generator, "collective", False):
        return _answer(generator, requests, sampling, journal, num_rows, max_failed_share, unit)
    # What answers by itself, as a server does, is asked by process 0 alone
    return tuple(
        everywhere(
            lambda: _answer(generator, requests, sampling, journal, num_rows, max_failed_share, unit),
            f"the last {unit}",
        )
    )


def _answer(generator, requests, sampling, journal, num_rows, max_failed_share, unit) -> tuple[int, int]:
    numbers = {request.id: number for number, request in requests.items()}
    done, tokens = num_rows - len(requests), 0
    reasons: collections.Counter[str] = collections.Counter()
    progress, begin = Progress(num_rows, done, unit), time.monotonic()
    first: dict[str, str] = {}
    answers = generator.generate(list(requests.values()), sampling)
    try:
        for completions in answers:
            values = [(numbers[c.id], _value(c, sampling.num_samples)) for c in completions]
            if journal is not None:
                journal.append(values)
            for completion, (_, value) in zip(completions, values, strict=True):
                if "error" in value:
                    alike = rf"(?<!\w){re.escape(completion.id)}(?!\w)|\d+"  # but for its row's name and numbers
                    reasons[reason := re.sub(alike, "#", value["error"])] += 1
                    first.setdefault(reason, value["error"])
            done += len(values)
            tokens += sum(sample.num_tokens or 0 for c in completions for sample in c.samples)
            progress.update(done, {"tok/s": f"{tokens / max(time.monotonic() - begin, 1e-9):.0f}"})
            if reasons.total() > max_failed_share * num_rows:
                _raise_failed(max_failed_share, reasons, first, num_rows, journal)
    finally:
        if hasattr(answers, "close"):
            answers.close()  # else requests under way would go on
        progress.close()
    return reasons.total(), tokens


def _value(completion: Completion, num_samples: int) -> dict[str, Any]:
    if completion.error is not None:
        return without_answer(completion.error)
    if len(completion.samples) != num_samples:
        raise ValueError(f"row {completion.id}: {len(completion.samples)} samples, {num_samples} were asked for")
    texts = [sample.text for sample in completion.samples]
    reasons = [sample.finish_reason for sample in completion.samples]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:  # what a server sends may hold it
        return without_answer("the response has half a surrogate pair, which no file can hold")
    return {
        "response": texts if num_samples > 1 else texts[0],
        "finish_reason": reasons if num_samples > 1 else reasons[0],
    }


def without_answer(error: str) -> dict[str, Any]:
    """What is kept of a row that has none."""
    return {"response": None, "finish_reason": "error", "error": " ".join(error.split())}


def _raise_failed(
    max_failed_share: float, reasons: collections.Counter, first: dict[str, str], num_rows: int, journal: Journal | None
) -> None:
    (reason, count), failed = reasons.most_common(1)[0], reasons.total()
    kept = f": the rows in {journal.output}.partial stay" if journal is not None else ""
    raise UserError(
        f"{failed} of {num_rows} rows could not be answered ({failed / num_rows:.1%}, more than "
        f"config.max_failed_share={max_failed_share}), {count} of them like this: {first[reason][:_SHOWN]}; "
        f"mend the cause, or raise config.max_failed_share, and run the command again{kept}"
    )
