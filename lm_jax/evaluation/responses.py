"""Responses in a file, matched with the prompts of a benchmark by their text."""

import collections
import dataclasses
import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from lm_jax.data.rows import read_rows
from lm_jax.errors import UserError
from lm_jax.generation.answer_text import without_thoughts

_PROMPTS = ("prompt", "instruction")  # of ours and MuSC's, of AlpacaEval
_RESPONSES = ("response", "output", "generated")  # of ours, of AlpacaEval, of ComplexBench
_SHOWN = 60  # characters of a prompt in an error
_ALIKE = 0.9  # share of two prompts' characters that agree where one is the other, mended; the two known have 0.99


class Asked(Protocol):
    """A prompt of a benchmark: its text; its file and row, for errors."""

    @property
    def text(self) -> str: ...

    @property
    def where(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Responses:
    """What was answered.

    Attributes:
      texts: one for each prompt, None where it has none.
      edited: rows whose prompt differs a little from the one that they answer (see `read_responses`).
      others: rows that answer none of the prompts.
    """

    texts: tuple[str | None, ...]
    edited: tuple[int, ...]
    others: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Answers:
    """Responses without their thoughts.

    Attributes:
      texts: one for each prompt; None where it has no response, "" where the thoughts do not end.
      thinking: how many responses had thoughts, those that do not end included.
      unended: how many of those do not end.
    """

    texts: tuple[str | None, ...]
    thinking: int
    unended: int


def answers_of(responses: Sequence[str | None], think_end: str) -> Answers:
    """What is scored of responses; `think_end` as of `without_thoughts`."""
    answers = [None if text is None else without_thoughts(text, think_end) for text in responses]
    thinking = [answer for text, answer in zip(responses, answers, strict=True) if answer != text]
    texts = (None if text is None else answer or "" for text, answer in zip(responses, answers, strict=True))
    return Answers(tuple(texts), len(thinking), thinking.count(None))


def read_responses(path: str, prompts: Sequence[Asked], allow_missing: bool, allow_others: bool = False) -> Responses:
    """The response to each prompt, from rows with `prompt` and `response`, in any order.

    A response goes to the prompt with its very text; of several prompts with the same text to the first that has none,
    and a single one to all of them. IFEval's published prompts were mended after responses to them had been published,
    so a row whose text fits none goes to the prompt of the same row number where that one is left over and nearly the
    same.

    Args:
      path: a row's prompt may also be messages of which the last is the user's, or be called `instruction`; its
        response may be called `output` or `generated`. A response of null, as `launch.generate` leaves where it got
        none, is a missing one.
      allow_missing: else a prompt without a response is an error.
      allow_others: else a row that answers none of the prompts is an error.

    Raises:
      UserError: a prompt that is not among `prompts`, one that is answered twice or not at all, a response that is no
        text.
    """
    rows = read_rows(path)
    texts = [_last_user_text(row[_column(row, _PROMPTS, f"{path} row {n}")]) for n, row in enumerate(rows)]
    waiting: dict[str, list[int]] = collections.defaultdict(list)  # text -> its prompts without a row, in order
    for number, prompt in enumerate(prompts):
        waiting[prompt.text].append(number)
    left_over = set(waiting) - set(texts)
    responses: list[str | None] = [None] * len(prompts)
    last: dict[str, int] = {}  # text -> the row that answered it last
    edited, others = [], []
    for number, (text, row) in enumerate(zip(texts, rows, strict=True)):
        where = f"{path} row {number}"
        if text not in waiting and number < len(prompts) and _edited(prompts[number].text, text, left_over):
            text = prompts[number].text
            edited.append(number)
        if text not in waiting:
            if not allow_others:
                raise UserError(
                    f"{where}: its prompt ({_short(text)}) is not in config.prompts, letter for letter; drop the row, "
                    "or give the prompts that were answered"
                )
            others.append(number)
            continue
        if not waiting[text]:
            raise UserError(f"{where}: answers the same prompt as row {last[text]} ({_short(text)}); keep one of them")
        response = row[_column(row, _RESPONSES, where)]
        if not isinstance(response, str | None):
            raise UserError(
                f"{where}: response must be a text, got {type(response).__name__}; give one response a prompt"
            )
        responses[waiting[text].pop(0)] = response
        last[text] = number
    for text, number in last.items():
        for same in waiting[text]:
            responses[same] = rows[number][_column(rows[number], _RESPONSES, path)]
    _check_missing(path, prompts, responses, allow_missing)
    return Responses(tuple(responses), tuple(edited), tuple(others))


def _check_missing(path: str, prompts: Sequence[Asked], responses: Sequence[str | None], allow_missing: bool) -> None:
    lacking = [p for p, response in zip(prompts, responses, strict=True) if response is None]
    if len(lacking) == len(prompts):
        raise UserError(
            f"{path}: no response in it to any of the {len(prompts)} prompts; give the file that answers them"
        )
    if lacking and not allow_missing:
        raise UserError(
            f"{path}: {len(lacking)} of {len(prompts)} prompts have no response, the first is {lacking[0].where} "
            f"({_short(lacking[0].text)}); add them, or leave them out of the scores with --config.allow_missing=true"
        )


def _column(row: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    found = next((name for name in names if name in row), None)
    if found is None:
        raise UserError(
            f"{where}: column {names[0]!r} is missing; it has {', '.join(sorted(row)) or 'none'}; rename or add the "
            "column"
        )
    return found


def _edited(prompt: str, answered: str, left_over: Collection[str]) -> bool:
    return prompt in left_over and difflib.SequenceMatcher(None, prompt, answered, autojunk=False).ratio() >= _ALIKE


def _last_user_text(prompt: Any) -> Any:
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict) and prompt[-1].get("role") == "user":
        prompt = prompt[-1].get("content")
    return prompt if isinstance(prompt, str) else repr(prompt)


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}...")
