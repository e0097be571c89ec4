"""What the two models learn in a round (MAIN, arXiv 2504.12913): the target is always real text.

Forward: instruction -> response. Reverse: response -> instruction. In a synthetic row the prompt was sampled and the
target is real; in a seed row both are real.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lm_jax.data.messages import TEMPLATE_KWARGS, Text
from lm_jax.data.supervised import SEED, SYNTHETIC
from lm_jax.data.text import TextEncoder, checked
from lm_jax.generation.answer_text import visible
from lm_jax.generation.refusals import is_refusal
from main_jax.prompts import Prompts, supervised_example
from main_jax.rounds.inputs import SeedPair
from main_jax.rounds.instructions import Fault, read_instruction

FORWARD, REVERSE = DIRECTIONS = ("forward", "reverse")
NO_ANSWER = "no_answer"  # the model could not be asked; the answer's own error says why
NO_LIMIT = 2**31 - 1  # texts are counted here, never cut
Row = dict[str, Any]


def candidate_rows(responses: Sequence[Row], answers: Sequence[Row], opened: str = "") -> Iterator[Row]:
    """A row for each instruction that was sampled, for `launch.main_filter`: `instruction`, or None and its `fault`.

    Args:
      responses: rows with `id` and `response`.
      answers: of the reverse model, in the same order: `response` and `finish_reason`, lists of several samples.
      opened: see `samples`.
    """
    for row, answer in zip(responses, answers, strict=True):
        for number, (text, reason) in enumerate(samples(answer, opened)):
            read = NO_ANSWER if text is None else read_instruction(text, row["response"], reason)
            fault = str(read) if text is None or isinstance(read, Fault) else None
            yield {**row, "candidate": number, "instruction": None if fault else read, "fault": fault}


def sampled_responses(answers: Sequence[Row], opened: str = "") -> list[tuple[str | None, str | None]]:
    """Of the forward model's answers: (response, None), or (None, fault).

    What ran into the limit of tokens is left out, as are thoughts: the reverse model is to read whole responses.
    """
    found: list[tuple[str | None, str | None]] = []
    for answer in answers:
        ((said, reason),) = samples(answer, opened)
        text, fault = None if said is None else visible(said), None
        if text is None:
            fault = NO_ANSWER if said is None else str(Fault.TRUNCATED)
        elif not text.strip():
            fault = str(Fault.EMPTY)
        elif reason == "length":
            fault = str(Fault.TRUNCATED)
        elif is_refusal(text):
            fault = str(Fault.REFUSAL)
        found.append((None, fault) if fault or text is None else (text.strip(), None))
    return found


def samples(answer: Mapping[str, Any], opened: str = "") -> list[tuple[str | None, str]]:
    """(text or None, finish reason) of each sample of an answer of `launch.generate`.

    Args:
      opened: the opening of thoughts that the prompts end with, which is put before the texts; see `visible`.
    """
    texts, reasons = answer["response"], answer["finish_reason"]
    pairs = list(zip(texts, reasons, strict=True)) if isinstance(texts, list) else [(texts, reasons)]
    return [(None if text is None else opened + text, reason) for text, reason in pairs]


def seed_rows(direction: str, seeds: Iterable[SeedPair], prompts: Prompts) -> list[Row]:
    """Supervised rows of the seeds, for one of DIRECTIONS."""
    rows = []
    for seed in seeds:
        if direction == FORWARD:
            prompt, target = prompts.forward(seed.instruction, SEED, seed.kwargs), seed.response
        else:
            prompt, target = prompts.reverse(seed.response, seed.kwargs), seed.instruction
        rows.append(_row(f"{SEED}-{seed.row}", prompt, target, SEED, seed.weight))
    return rows


def forward_rows(candidates: Iterable[Row], prompts: Prompts) -> list[Row]:
    """Sampled instruction -> real response, a row for each candidate with an instruction; see `shared_weights`."""
    rows = []
    for row in candidates:
        if row["instruction"] is not None:
            prompt = prompts.forward(row["instruction"], SYNTHETIC, row.get(TEMPLATE_KWARGS))
            rows.append(_row(row["id"], prompt, row["response"], SYNTHETIC, 1.0))
    return rows


def reverse_rows(seeds: Sequence[SeedPair], sampled: Sequence[str | None], prompts: Prompts) -> list[Row]:
    """Sampled response -> real instruction.

    Args:
      sampled: for each seed, its instruction's sampled response; None: there is none.
    """
    rows = []
    for seed, response in zip(seeds, sampled, strict=True):
        if response is not None:
            prompt = prompts.reverse(response, seed.kwargs)
            rows.append(_row(f"{SYNTHETIC}-{seed.row}", prompt, seed.instruction, SYNTHETIC, seed.weight))
    return rows


def _row(id: int | str, prompt: Text, response: str, source: str, weight: float) -> Row:
    return {"id": id, "prompt": prompt, "response": response, "source": source, "weight": weight}


def supervised_row(row: Row) -> Row:
    """The row as `launch.main_train` reads it, in the layout of what `launch.main_filter` keeps: they can be joined."""
    rest = {name: value for name, value in row.items() if name not in ("prompt", "response")}
    return {"id": row["id"], **supervised_example(row["prompt"], row["response"]), **rest}


def shared_weights(rows: Sequence[Row], most: int | None) -> list[Row]:
    """The first `most` rows of each id (None: all), sharing a weight of 1: a response counts once.

    Args:
      rows: those of one id stand together.
    """
    shared = []
    for _, group in itertools.groupby(rows, key=lambda row: row["id"]):
        learnt = list(itertools.islice(group, most))
        shared += [{**row, "weight": row["weight"] / len(learnt)} for row in learnt]
    return shared


def fitting(rows: Sequence[Row], encoder: TextEncoder, max_length: int) -> list[Row]:
    """The rows whose prompt and response have at most `max_length` tokens: of a cut target the end is never learnt.

    Args:
      encoder: with NO_LIMIT.
    """
    columns = ([row["prompt"] for row in rows], [row["response"] for row in rows], [f"row {row['id']}" for row in rows])
    encoded = checked(encoder.encode_many(*columns))
    return [
        row
        for row, text in zip(rows, encoded, strict=True)
        if len(text.prompt_ids) + len(text.response_ids) <= max_length
    ]


def room_to_answer(prompts: Sequence[Text], encoder: TextEncoder, max_length: int) -> list[bool]:
    """Whether each prompt has at most `max_length` tokens."""
    names = [f"prompt {number}" for number in range(len(prompts))]
    return [len(ids) <= max_length for ids in checked(encoder.encode_prompts(prompts, names))]


def counted(faults: Iterable[str | None]) -> dict[str, int]:
    """How often each fault occurs, the commonest first."""
    return dict(Counter(fault for fault in faults if fault).most_common())
