"""What a model answered when it was asked for a verdict: a score from 1 to 5, yes or no to numbered points, A or B.

Strict, since a verdict that was guessed at decides what is trained on or published. How it is dressed (case, markdown,
bullets, brackets, a full stop) does not matter; two verdicts that differ, or one that is neither, are none.
"""

import re
import unicodedata

from lm_jax.generation.answer_text import visible

YES = r"yes|true|是的|是|sí|si|oui|ja|sim|да|はい|예|네|✓|✔|✅"  # as regular expressions
NO = r"no|false|不是|否|non|nein|não|нет|いいえ|아니(?:요|오)|✗|✘|❌"

_MARKS = str.maketrans("", "", "*_`#>[](){}【】「」\"'")
_LABEL = re.compile(
    r"^[ \t]*(?:(?:final|total|overall|the|my) )*(?:score|rating|mark|评分|得分|分数|总分)\s*(?:is|[:：=])[ \t]*"
    r"(?P<value>.*)$",
    re.IGNORECASE | re.MULTILINE,
)
_VALUE = re.compile(
    r"\s*(?P<score>[1-5])\s*(?:(?:/|out of|of)\s*5)?\s*(?:points?|stars?|分)?\s*[.。]?\s*", re.IGNORECASE
)
_END = r"\s*[.,;。!]?\s*"
_POINT = re.compile(
    rf"\s*[-•+]?\s*(?:(?:requirement|constraint|question|point)\s+)?(?P<number>\d{{1,3}})(?:\s*[.:,、-]\s*|\s+)"
    rf"(?:(?P<yes>{YES})|{NO}){_END}",
    re.IGNORECASE,
)
_ALONE = re.compile(rf"\s*(?:(?P<yes>{YES})|{NO}){_END}", re.IGNORECASE)
_PREFERENCE_LABEL = re.compile(
    r"^[ \t]*[-•+]?[ \t]*(?:(?:final|overall|the|my) )*verdict\s*(?:is\b|[:=])[ \t]*(?P<value>.*)$",
    re.IGNORECASE | re.MULTILINE,
)
_PREFERENCE = re.compile(rf"\s*(?:response\s+)?(?:(?P<side>[ab])|tie|draw){_END}", re.IGNORECASE)


def read_score(text: str) -> int | None:
    """One whole number from 1 to 5, on a line that begins with its label; a text that is a number alone passes too.

    Halves, ranges, another scale, and lines that give different scores are none.

    >>> read_score("It is short.\\nScore: 4 out of 5")
    4
    >>> read_score("between 3 and 4") is None
    True
    """
    bare = _bare(text)
    if bare is None:
        return None
    values = [found["value"] for found in _LABEL.finditer(bare)] or [bare]
    scores = {int(found["score"]) if (found := _VALUE.fullmatch(value)) else None for value in values}
    return None if len(scores) > 1 else scores.pop()


def read_points(text: str, count: int) -> tuple[bool, ...] | None:
    """Yes or no for each of `count` points, each on a line of its own with the point's number, in any order.

    Lines of another form are reasons and are passed over. A point without a verdict, one with two that differ, or a
    number that no point has makes it none. Of a single point a text that is yes or no alone passes too.

    >>> read_points("The title is there.\\n**1: YES**\\n- 2) no.", 2)
    (True, False)
    >>> read_points("1: YES\\n2: perhaps", 2) is None
    True
    """
    bare = _bare(text)
    if bare is None:
        return None
    if count == 1 and (found := _ALONE.fullmatch(bare)):
        return (bool(found["yes"]),)
    verdicts: dict[int, bool] = {}
    for line in bare.splitlines():
        if found := _POINT.fullmatch(line):
            met = bool(found["yes"])
            if verdicts.setdefault(int(found["number"]), met) != met:
                return None
    return tuple(verdicts[n] for n in range(1, count + 1)) if verdicts.keys() == set(range(1, count + 1)) else None


def read_preference(text: str) -> str | None:
    """ "A", "B" or "TIE", on a line that begins with "Verdict:"; a text that is one of them alone passes too.

    >>> read_preference("A is longer, but wrong.\\n**Verdict: B**")
    'B'
    """
    bare = _bare(text)
    if bare is None:
        return None
    values = [found["value"] for found in _PREFERENCE_LABEL.finditer(bare)] or [bare]
    read = {(found["side"] or "tie").upper() if (found := _PREFERENCE.fullmatch(v)) else None for v in values}
    return None if len(read) > 1 else read.pop()


def _bare(text: str) -> str | None:
    """Without thoughts, marks and full-width forms."""
    seen = visible(text)
    return None if seen is None else unicodedata.normalize("NFKC", seen).translate(_MARKS)
