"""What became of a text, word by word."""

import difflib
import re

KEPT, DROPPED, ADDED = 0, -1, 1

# Scripts without spaces count sign by sign; a word keeps the punctuation inside of it ("don't", "1,000")
_SIGNS = "\u2e80-\u9fff\uf900-\ufaff\u3040-\u30ff\u0e00-\u0e7f"
_WORDS = re.compile(rf"\s+|[{_SIGNS}]|[^\W{_SIGNS}]+(?:['’.,-][^\W{_SIGNS}]+)*|[^\w\s]")
_SHARED = 0.35  # of the words; below it hardly more than articles and commas are shared, and a diff is confetti


def word_diff(old: str, new: str) -> list[tuple[int, str]] | None:
    """Parts of `old` and `new` in order, each KEPT, DROPPED (of old alone) or ADDED (of new alone).

    Without the ADDED ones the parts join to `old`, without the DROPPED ones to `new`. None where the two share so
    little that the parts would say nothing.
    """
    before, after = _WORDS.findall(old), _WORDS.findall(new)
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    said = [sum(not word.isspace() for word in words) for words in (before, after)]
    blocks = [(i, j, n) for i, j, n in matcher.get_matching_blocks() if n]
    shared = sum(not word.isspace() for i, _, n in blocks for word in before[i : i + n])
    if shared < _SHARED * min(said):
        return None
    # A lone space or comma between two changes is a part of the change
    blocks = [
        (i, j, n)
        for i, j, n in blocks
        if any(map(_speaks, before[i : i + n])) or i == j == 0 or (i + n, j + n) == (len(before), len(after))
    ]
    parts: list[tuple[int, str]] = []
    at = into = 0
    for i, j, n in [*blocks, (len(before), len(after), 0)]:
        parts += [(DROPPED, "".join(before[at:i])), (ADDED, "".join(after[into:j])), (KEPT, "".join(before[i : i + n]))]
        at, into = i + n, j + n
    return [part for part in parts if part[1]]


def _speaks(word: str) -> bool:
    return any(sign.isalnum() for sign in word)
