"""What a judge's answers are read as: harmless dress passes, ambiguity never does."""

import pytest

from lm_jax.evaluation.judged import Question, read_verdict
from lm_jax.generation.verdicts import read_points, read_preference, read_score

POINTS = [
    ("1: YES\n2: NO\n3: YES", (True, False, True)),
    ("1: yes.\n2: No\n3: YES ", (True, False, True)),
    ("**1: YES**\n- **2:** NO\n* 3: `YES`", (True, False, True)),
    ("1. Yes\n2) no\n(3) yes", (True, False, True)),
    ("1：是\n2、否。\n３： 是", (True, False, True)),
    ("Requirement 1: YES\nConstraint 2 - NO\n#3: YES", (True, False, True)),
    ("3: YES\n1: YES\n2: NO", (True, False, True)),  # in any order: the numbers say which
    ("1. The title: YES, it is there.\n2. No author.\n\n1: YES\n2: NO\n3: YES\n", (True, False, True)),
    ("<think>1: NO\n2: YES\n3: NO</think>\n1: YES\n2: NO\n3: YES", (True, False, True)),
    ("```\n1: YES\n2: NO\n3: YES\n```", (True, False, True)),
    ("1: YES\n2: NO\n3: YES\n\n1: YES\n2: NO\n3: YES", (True, False, True)),  # said twice
    ("1: YES\n2: NO", None),
    ("1: YES\n2: NO\n3: YES\n4: NO", None),
    ("1: YES\n2: NO\n3: YES\n2: YES", None),  # taken back
    ("1: YES\n2: NO\n3: MAYBE", None),
    ("1: YES\n2: NO\n3: YES or NO", None),
    ("1: YES\n2: NO\n3: YES/NO", None),
    ("1: YES\n2: NO\n3: NOT YES", None),
    ("1: YES\n2: NO\n3: partly yes", None),
    ("0: YES\n1: YES\n2: NO\n3: YES", None),
    ("YES\nNO\nYES", None),  # no numbers: which is which?
    ("1: YES, 2: NO, 3: YES", None),
    ("All of them are met.", None),
    ("<think>1: YES\n2: NO\n3: YES", None),
    ("", None),
]


@pytest.mark.parametrize(("answer", "expected"), POINTS)
def test_points(answer, expected):
    assert read_points(answer, 3) == expected


def test_a_single_point():
    assert read_points("YES.", 1) == read_points("**1: yes**", 1) == (True,)
    assert read_points("No", 1) == (False,)
    assert read_points("Yes, but no.", 1) is None and read_points("YES", 2) is None


PREFERENCES = [
    ("A is better.\n\nVerdict: A", "A"),
    ("**Verdict: B.**", "B"),
    ("Final verdict: [[Response A]]", "A"),
    ("verdict: tie", "TIE"),
    ("My verdict is draw", "TIE"),
    ("Verdict：B", "B"),
    ("B", "B"),
    ("Verdict: A\nOn reflection:\nVerdict: B", None),
    ("Verdict: A or B", None),
    ("Verdict: neither", None),
    ("Verdict:", None),
    ("A is better than B.", None),
    ("Verdict: A\nVerdict: B\nVerdict: TIE", None),  # the form itself
    ("", None),
]


@pytest.mark.parametrize(("answer", "expected"), PREFERENCES)
def test_preferences(answer, expected):
    assert read_preference(answer) == expected


def test_faults():
    question = Question("0", 0, "?", 2)
    assert read_verdict(question, None, "error").fault == "no answer"
    assert read_verdict(question, "1: YES\n2: NO", "length").fault == "truncated"
    assert read_verdict(question, "1: YES", "stop").fault == "unparsable"
    assert read_verdict(question, "1: YES\n2: NO", "stop").value == (True, False)
    assert read_verdict(Question("0", 0, "?", 0), "Verdict: A", "stop").value == "A"


def test_thoughts_are_no_verdict():
    thoughts = "<think>Score: 2\n1: NO\nVerdict: A</think>\n"
    assert read_score(f"{thoughts}Score: 4") == 4 and read_score("<think>Score: 4") is None
    assert read_points(f"{thoughts}1: YES", 1) == (True,) and read_preference(f"{thoughts}Verdict: B") == "B"
