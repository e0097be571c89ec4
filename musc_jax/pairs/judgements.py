"""A score, a list of faults or a revised response, read from a model's answer about a response of its own."""

import re

from lm_jax.generation.answer_text import unfenced, visible
from lm_jax.generation.refusals import is_refusal
from lm_jax.generation.verdicts import read_score
from musc_jax.pairs.constraints import folded
from musc_jax.pairs.drops import Drop
from musc_jax.pairs.lists import list_items
from musc_jax.pairs.prompts import SEPARATOR

_END = re.compile(rf"^[ \t]*{SEPARATOR}[ \t]*$", re.MULTILINE)
_FAULTS_LABEL = re.compile(
    r"[\s*_#]*(?:list of |the |remaining )*(?:faults?|critique|problems?|issues?|缺点|问题|错误)"
    r"(?: (?:found|in the response))?[\s*_]*[:：][*_ \t]*",
    re.IGNORECASE,
)
_FAULTS = r"(?:\w+ )?(?:faults?|problems?|issues?|errors?|mistakes?|corrections?|revisions?|changes?)"
_NO_FAULTS = re.compile(
    rf"\W*(?:(?:none(?! of)|n/?a|no {_FAULTS}|nothing(?=\W*$| (?:to|else|is (?:missing|wrong)))"
    rf"|there (?:is|are) (?:no {_FAULTS}|none|nothing (?:to|wrong|missing))"
    r"|(?:(?:the|this|your) response|it|everything) (?:already |fully )?"
    r"(?:(?:does|meets|follows|fulfils|fulfills|satisfies) (?:all|every|the (?:whole )?instruction)"
    rf"|(?:needs|has|contains) no {_FAULTS}|is (?:already )?(?:correct|fine|good|perfect|complete)))\b"
    r"|无(?:\W*$|需)|没有(?:任何|什么)?(?:缺点|问题|错误|需要)|不需要(?:修改|更正)|回答(?:正确|很好))",
    re.IGNORECASE,
)
_STILL = re.compile(r"\b(?:but|however|except|although|though|yet|still)\b|但是?|不过|然而|除了", re.IGNORECASE)
_REVISION_LABEL = re.compile(
    r"(?:(?:sure|certainly|of course|okay|ok)[!,. ]+)?(?:here(?: is|'s|’s) )?[\s*_#]*"
    r"(?:the |my |a |an |your )*(?:revised|corrected|improved|rewritten|new|final)"
    r"(?: (?:response|version|answer|text)(?: of the response)?)?"
    r"[\s*_]*[:：][*_ \t]*|(?:修改后的?(?:回答|回复|版本)?|修订版?)\s*[:：]\s*",
    re.IGNORECASE,
)


def parse_score(answer: str, finish_reason: str = "stop") -> float | Drop:
    """Reads the answer to `judge_prompts.score` as `read_score` does; what that cannot read is UNPARSABLE.

    Returns:
      The score, or EMPTY, TRUNCATED, REFUSAL, UNPARSABLE.
    """
    text = _readable(answer, finish_reason)
    if isinstance(text, Drop):
        return text
    score = read_score(text)
    return Drop.UNPARSABLE if score is None else float(score)


def parse_critique(answer: str, finish_reason: str = "stop") -> str | Drop:
    """Reads the answer to `judge_prompts.critique`: the faults as they were written, without a label before them.

    Returns:
      The text, or EMPTY, TRUNCATED, REFUSAL, NOTHING_TO_CORRECT.
    """
    text = _readable(answer, finish_reason)
    if isinstance(text, Drop):
        return text
    if label := _FAULTS_LABEL.match(text):
        text = text[label.end() :].strip()
    if not text:
        return Drop.EMPTY
    return Drop.NOTHING_TO_CORRECT if _says_none(text) else text


def parse_revision(answer: str, instruction: str, finish_reason: str = "stop") -> str | Drop:
    """Reads the answer to `judge_prompts.revise`: the new response, without a label or an announcement before it.

    Returns:
      The response, or EMPTY, TRUNCATED, REFUSAL, ECHO (the instruction again), NOTHING_TO_CORRECT.
    """
    text = _readable(answer, finish_reason)
    if isinstance(text, Drop):
        return text
    if label := _REVISION_LABEL.match(text):
        text = text[label.end() :].strip()
    if not text:
        return Drop.EMPTY
    if folded(text) == folded(instruction):
        return Drop.ECHO
    return Drop.NOTHING_TO_CORRECT if len(text) < 200 and "response" in text.lower() and _says_none(text) else text


def _readable(answer: str, finish_reason: str) -> str | Drop:
    """The answer itself, without thoughts, a fence around it and a further example behind it."""
    text = visible(answer)
    if text is None:
        return Drop.TRUNCATED
    if not text.strip():
        return Drop.EMPTY
    first, *more = _END.split(unfenced(text).strip())
    if finish_reason == "length" and not more:
        return Drop.TRUNCATED
    if not first.strip():
        return Drop.EMPTY
    return Drop.REFUSAL if is_refusal(first) else first.strip()


def _says_none(text: str) -> bool:
    """Whether a critique finds no fault. One that names any beside its praise does not."""
    items = list_items(text)
    first = items[0] if len(items) == 1 else text
    return bool(_NO_FAULTS.match(first)) and len(items) <= 1 and not _STILL.search(text)
