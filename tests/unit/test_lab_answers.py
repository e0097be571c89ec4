"""What answers in a world are worth: hand-made answers, intervals worked out by hand."""

import math

import pytest

from lab.worlds.answers import Estimate, estimate, shares, truly_answers, verdicts
from lab.worlds.lists import LISTS

ASKED = "list tools. use exactly two words. start with saw."


def rows(*responses):
    return [{"prompt": [{"role": "user", "content": ASKED}], "response": response} for response in responses]


def test_verdicts_read_the_last_message_and_take_no_answer_for_a_wrong_one():
    right, short, wrong, none = verdicts(LISTS, rows("saw, axe", "saw, axe, drill", "axe, saw", None))
    assert (right.met, right.all_met) == ((True, True), True)
    assert (short.met, wrong.met, none.met) == ((False, True), (True, False), (False, False))
    assert not none.well_formed and not none.all_met
    tagged = [{"prompt": [{"role": "system", "content": "be good"}, *row["prompt"]], **row} for row in rows("saw, axe")]
    assert verdicts(LISTS, tagged) == [right]
    with pytest.raises(ValueError, match="no instruction: 'saw'"):
        verdicts(LISTS, [{"prompt": [{"role": "user", "content": "saw"}], "response": "saw"}])


def test_shares_of_answers():
    # Of eight constraints: both, the number, the start, none
    found = shares(verdicts(LISTS, rows("saw, axe", "axe, saw", "saw axe", None)))
    assert found == {"all_met": 0.25, "each": 0.625, "well_formed": 0.5}


def test_what_a_model_writes_may_be_no_instruction_at_all():
    assert truly_answers(LISTS, ASKED, "saw, axe")
    assert truly_answers(LISTS, "list tools. start with saw.", "saw, axe")  # it need not ask for everything
    assert not truly_answers(LISTS, ASKED, "axe, saw")
    assert not truly_answers(LISTS, "list tools start with saw", "saw, axe")


def test_an_estimate_is_the_mean_and_its_interval():
    # Variance (3 x 0.25^2 + 0.75^2) / 3 = 0.25, standard error 0.5 / 2
    assert estimate([True, False, False, False]) == Estimate(0.25, pytest.approx(1.96 * 0.25))
    assert estimate([1, -1, 1, -1]).half_width == pytest.approx(1.96 * math.sqrt(4 / 3) / 2)
    assert Estimate(0.1234, 0.02).percent() == "12.3 ± 2.0"
    assert Estimate(0.1234, 0.02).percent(signed=True) == "+12.3 ± 2.0"
