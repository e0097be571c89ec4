"""What became of a text, word by word."""

import random

import pytest

from musc_jax.report.word_diff import ADDED, DROPPED, KEPT, word_diff


def sides(parts):
    return ["".join(text for what, text in parts if what != other) for other in (ADDED, DROPPED)]


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("a b c", "a b c", [(KEPT, "a b c")]),
        (
            "Write a poem, in two lines, about rain.",
            "Write a poem, about rain.",
            [(KEPT, "Write a poem, "), (DROPPED, "in two lines, "), (KEPT, "about rain.")],
        ),
        (
            "Do not use the word sea.",
            "Do use the word lake.",
            [(KEPT, "Do"), (DROPPED, " not"), (KEPT, " use the word "), (DROPPED, "sea"), (ADDED, "lake"), (KEPT, ".")],
        ),
        ("写一首雨的诗。", "写一首雪的诗。", [(KEPT, "写一首"), (DROPPED, "雨"), (ADDED, "雪"), (KEPT, "的诗。")]),
        ("it costs 1,000 don't", "it costs 1,001 don't", None),
        ("", "", []),
    ],
)
def test_parts(old, new, parts):
    found = word_diff(old, new)
    assert sides(found) == [old, new]
    if parts is None:  # numbers and contractions are words
        assert (DROPPED, "1,000") in found and (KEPT, " don't") in found
    else:
        assert found == parts


def test_texts_without_anything_in_common():
    assert word_diff("Write a poem about rain", "1. Is it good? 2. Is it bad?") is None


def test_both_texts_come_back():
    rng = random.Random(0)
    words = ["rain", "sea", ", ", ". ", " ", "\n", "雨", "don't", "the "]
    for _ in range(500):
        old = [rng.choice(words) for _ in range(rng.randint(1, 30))]
        new = [w for w in old if rng.random() < 0.8] + [rng.choice(words) for _ in range(rng.randint(0, 3))]
        parts = word_diff("".join(old), "".join(new))
        if parts is not None:
            assert sides(parts) == ["".join(old), "".join(new)]
            assert all(text for _, text in parts)
