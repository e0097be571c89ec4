"""An instruction, read from what the reverse model answered (MAIN, arXiv 2504.12913)."""

import enum
import re

from lm_jax.data.similarity import tokens
from lm_jax.generation.answer_text import unfenced, unquoted, visible, without_closing, without_opening
from lm_jax.generation.refusals import is_refusal

NGRAM = 5  # words in a row that two texts do not share by chance
MIN_TOKENS = 3  # "Write." asks for nothing
MAX_TOKENS = 200  # longer than all but a few instructions; what runs on is mostly a response
MAX_COPIED = 0.9  # of the instruction's 5-grams; many answers begin by saying the question again, but for its verb
_NAMES = (
    r"(?:the |new |user(?:'s|’s)? |original |possible |likely |final )*"
    r"(?:instructions?|questions?|prompts?|tasks?|quer(?:y|ies)|requests?)|user|human|指令|问题|任务"
)
_LABEL = re.compile(rf"[\s>#*_\[]*(?:{_NAMES})[ \t*_\]]*(?:[:：][\s*_]*|\n+)", re.IGNORECASE)
_NEXT = re.compile(r"\n[ \t>#*_]*(?:response|answer|output|assistant|回答|答案)[ \t*_]*(?:[:：]|\n|$)", re.IGNORECASE)
_OPENING = re.compile(  # what a reverse model says before the instruction, besides what any model says
    r"(?:(?:here(?: is|'s|’s)|this is|one|a) )?(?:an? |the |one )?(?:likely |possible |plausible )*"
    r"(?:instruction|question|prompt|request) (?:is|that|for|which|could|might|would|to|this)\b[^\n:：]{0,80}[:：]\s*",
    re.IGNORECASE,
)


class Fault(enum.StrEnum):
    """Why an answer is no instruction; runs count rows by these names."""

    EMPTY = "empty"  # nothing but white space, or an opening that nothing follows
    REFUSAL = "refusal"
    TRUNCATED = "truncated"  # ran into the limit of tokens before it was complete
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    COPY = "copy"  # says what the response says instead of asking for it


def read_instruction(answer: str, response: str, finish_reason: str = "stop") -> str | Fault:
    """Reads the answer to `Prompts.reverse`.

    Openings ("Instruction:", "Sure! Here is the instruction:"), quotation marks, fences and closings are taken off, and
    a response that the model went on to write. Line breaks and Markdown within the instruction stay.

    Args:
      response: what the instruction was asked for.
      finish_reason: `length` where the answer ran into the limit of tokens.

    Returns:
      The instruction, or EMPTY, REFUSAL, TRUNCATED, TOO_SHORT (fewer than 3 words), TOO_LONG (more than 200), COPY
      (more than 9 in 10 of its 5-grams stand in the response).
    """
    text = visible(answer)
    if text is None:
        return Fault.TRUNCATED
    text = _bare(text)
    ran_on = _NEXT.search(text)
    if finish_reason == "length" and not ran_on:
        return Fault.TRUNCATED
    text = _bare(text[: ran_on.start()]) if ran_on else text
    words = tokens(text)
    if not words:
        return Fault.EMPTY
    if is_refusal(text):
        return Fault.REFUSAL
    if len(words) < MIN_TOKENS:
        return Fault.TOO_SHORT
    if len(words) > MAX_TOKENS:
        return Fault.TOO_LONG
    return Fault.COPY if copy_rate(text, response) > MAX_COPIED else text


def copy_rate(instruction: str, response: str) -> float:
    """Share of the instruction's word 5-grams that stand in the response too, in [0, 1]; 0 where it has none."""
    grams = _grams(instruction)
    return len(grams & _grams(response)) / len(grams) if grams else 0.0


def _grams(text: str) -> set[tuple[str, ...]]:
    words = tokens(text)
    return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


def _bare(text: str) -> str:
    """The text without what stands around it, however often and in whatever order."""
    while True:
        before = text
        text = without_opening(without_closing(unfenced(text.strip()))).strip()
        for opening in (_LABEL, _OPENING):
            if found := opening.match(text):
                text = text[found.end() :].strip()
        text = _unemphasised(unquoted(text))
        if text == before:
            return text


def _unemphasised(text: str) -> str:
    inner = text[2:-2]
    return inner.strip() if len(text) > 4 and text[:2] == text[-2:] == "**" and "**" not in inner else text
