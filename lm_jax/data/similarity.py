"""Texts compared by their words: how much two share, and which of many nearly repeat an earlier one."""

import collections
import hashlib
import math
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

# Scripts without spaces between words: each character is a word
_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
NGRAM = 3


def tokens(text: str) -> list[str]:
    """Words, case and width folded; each Chinese or Japanese character is one."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


def similarity(a: str, b: str) -> float:
    """Share of the words of either text that both have (Jaccard), in [0, 1]; 1 for two texts without words."""
    first, second = set(tokens(a)), set(tokens(b))
    return len(first & second) / len(first | second) if first or second else 1.0


def near_duplicates(texts: Sequence[str], threshold: float = 0.7) -> list[int | None]:
    """For each text the first earlier kept one that it nearly repeats, or None where it is kept itself.

    Two texts repeat each other where the Jaccard similarity of their sets of word trigrams is at least `threshold`.
    Exact, and far from all pairs: sets that alike must share one of their few rarest trigrams (prefix filtering,
    Chaudhuri et al. 2006), so an inverted index over those of the kept texts gives a handful of candidates; trigrams
    that occur once are not indexed at all. 100,000 texts of 60 words take half a GB while it runs; time grows with
    the total length, unless very many kept texts share their rarest trigrams.

    Args:
      texts: in the order in which the earlier of two stays.
      threshold: in (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold}")
    rows, shared = _ranked([_grams(text) for text in texts])
    index: dict[int, list[int]] = collections.defaultdict(list)
    earlier: list[int | None] = []
    for i, row in enumerate(rows):
        # Similar sets share ceil(threshold * size) elements, so not all of these can be among the rest
        prefix = row[: len(row) - _least(threshold, len(row)) + 1]
        prefix = prefix[prefix >= shared].tolist()
        candidates = {j for gram in prefix for j in index[gram]} if len(prefix) else set()
        match = min((j for j in candidates if _alike(row, rows[j], threshold)), default=None)
        earlier.append(match)
        if match is None:
            for gram in prefix:
                index[gram].append(i)
    return earlier


def _grams(text: str) -> np.ndarray:
    """The text's word trigrams as 64 bits each, sorted, each once."""
    words = tokens(text)
    grams = {"\0".join(words[i : i + NGRAM]) for i in range(max(1, len(words) - NGRAM + 1))}
    digests = b"".join(hashlib.blake2b(gram.encode(), digest_size=8).digest() for gram in grams)
    return np.unique(np.frombuffer(digests, np.uint64))


def _ranked(rows: list[np.ndarray]) -> tuple[list[np.ndarray], int]:
    """The rows with every element's place in the order of frequency for it, sorted; and the first that occurs twice."""
    if not rows:
        return [], 0
    _, elements, counts = np.unique(np.concatenate(rows), return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), np.int64)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    ends = np.cumsum([len(row) for row in rows])[:-1]
    return [np.sort(row) for row in np.split(rank[elements], ends)], int((counts == 1).sum())


def _alike(a: np.ndarray, b: np.ndarray, threshold: float) -> bool:
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared >= _least(threshold, len(a) + len(b) - shared)


def _least(threshold: float, size: int) -> int:
    return math.ceil(threshold * size - 1e-9)  # 0.56 * 25 is more than 14 in floating point
