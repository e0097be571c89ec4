"""A score from 1 to 5, read from what a model answered when it was asked for one."""

import re

_MARKS = str.maketrans("", "", "*_`#>[](){}【】「」\"'")
_LABEL = re.compile(
    r"^[ \t]*(?:(?:final|total|overall|the|my) )*(?:score|rating|mark|评分|得分|分数|总分)\s*(?:is|[:：=])[ \t]*"
    r"(?P<value>.*)$",
    re.IGNORECASE | re.MULTILINE,
)
_VALUE = re.compile(
    r"\s*(?P<score>[1-5])\s*(?:(?:/|out of|of)\s*5)?\s*(?:points?|stars?|分)?\s*[.。]?\s*", re.IGNORECASE
)


def read_score(text: str) -> int | None:
    """One whole number from 1 to 5, on a line that begins with its label; a text that is a number alone passes too.

    Strict, since a number that was guessed at decides what is trained on: halves, ranges, another scale, and lines that
    give different scores are none.

    >>> read_score("It is short.\\nScore: 4 out of 5")
    4
    >>> read_score("between 3 and 4") is None
    True
    """
    bare = text.translate(_MARKS)
    values = [found["value"] for found in _LABEL.finditer(bare)] or [bare]
    scores = {int(found["score"]) if (found := _VALUE.fullmatch(value)) else None for value in values}
    return None if len(scores) > 1 else scores.pop()
