"""Preference rows: every layout gives the same pair, every fault is named with its row and its cure."""

import json
from pathlib import Path

import numpy as np
import pytest

from lm_jax.data.faults import Faults
from lm_jax.data.preference import IDENTICAL, check_weight_lengths, preference_rows
from lm_jax.data.rows import read_rows
from lm_jax.data.text import EncodedResponse
from lm_jax.errors import UserError

DEMO = Path(__file__).parents[3] / "shared" / "data" / "musc_tdpo_demo.json"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def one(row):
    data = preference_rows([row], "pairs.jsonl")
    assert data.dropped == {}
    (pair,) = data.rows
    return pair


def raised(rows):
    with pytest.raises(UserError) as caught:
        preference_rows(rows if isinstance(rows, list) else [rows], "pairs.jsonl")
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_strings_stay_strings():
    pair = one({"prompt": "Hi", "chosen": "a", "rejected": "b", "constraints": ["x"]})
    assert (pair.row, pair.id, pair.prompt, pair.chosen, pair.rejected) == (0, "0", "Hi", "a", "b")
    assert pair.chosen_scores is None and pair.rejected_scores is None


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("Hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"prompt": [user("Hi")], "chosen": "a", "rejected": "b"},
        {"chosen": [user("Hi"), assistant("a")], "rejected": [user("Hi"), assistant("b")]},
        {"instruction": "Hi", "input": "", "chosen": "a", "rejected": "b", "history": ""},
        {"instruction": "Hi", "input": None, "chosen": "a", "rejected": "b", "history": None, "prompt": None},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {"conversations": [{"role": "user", "content": "Hi"}], "chosen": "a", "rejected": "b", "system": ""},
    ],
)
def test_layouts_of_the_same_messages(row):
    pair = one(row | {"id": 5})
    assert (pair.prompt, pair.chosen, pair.rejected) == ([user("Hi")], [assistant("a")], [assistant("b")])
    assert pair.id == "5"


def test_system_messages():
    """D9: a column beside any prompt becomes the first message, once, and never without a word."""
    said = [{"role": "system", "content": "S"}, user("Hi")]
    for row in (
        {"prompt": "Hi", "system": "S"},
        {"question": "Hi", "System_Prompt": "S"},
        {"prompt": [user("Hi")], "system": "S"},
        {"prompt": said, "system": "S "},
        {"conversations": [{"from": "human", "value": "Hi"}], "system": "S"},
        {"instruction": "Hi", "system": "S"},
    ):
        pair = one(row | {"chosen": "a", "rejected": "b"})
        assert (pair.prompt, pair.chosen) == (said, [assistant("a")]), row
    whole = {"chosen": [user("Hi"), assistant("a")], "rejected": [user("Hi"), assistant("b")]}
    assert one(whole | {"system": "S"}).prompt == said
    assert "has a system message and another text in the column" in raised({**GOOD, "prompt": said, "system": "T"})
    # In one file with such rows those without it are chats as well
    data = preference_rows([GOOD | {"system": ""}, GOOD | {"system": "S"}], "f")
    assert [row.prompt for row in data.rows] == [[user("p")], [said[0], user("p")]]
    assert one(GOOD | {"system": ""}).prompt == "p"


def test_a_prompt_beside_conversations_must_be_asked_in_them():
    talk = [user("1"), assistant("2"), user("3")]
    row = {"chosen": [*talk, assistant("a")], "rejected": [*talk, assistant("b")]}
    for prompt in ("3", " 3\n", "1", talk):
        assert one(row | {"prompt": prompt}).prompt == talk
    assert "prompt is no question" in raised(row | {"prompt": "2"})
    assert one(row | {"prompt": "3", "instruction": "x", "system": "S"}).prompt[0]["content"] == "S"


def test_a_layout_that_has_the_columns_that_were_named_goes_first():
    row = GOOD | {"output_1": "x", "output_2": "y", "label": 2, "instruction": "i"}
    (pair,) = preference_rows([row], "f", named=("label",)).rows
    assert (pair.prompt, pair.chosen, pair.rejected) == ([user("i")], [assistant("y")], [assistant("x")])


def test_faulty_rows_are_all_named_and_few_are_left_out():
    rows = [GOOD] * 97 + [GOOD | {"chosen": 3}, GOOD | {"rejected": None}, GOOD | {"chosen": 4}]
    faults = Faults("f", 0.03)
    assert len(preference_rows(rows, "f", faults).rows) == 97 and sorted(faults.rows) == [97, 98, 99]
    faults.check(100)
    with pytest.raises(UserError) as caught:
        preference_rows(rows, "f")
    assert str(caught.value) == (
        "f: 3 of 100 rows are faulty: 2 like row 97 (chosen must be a string or messages, got int); 1 like row 98 "
        "(column 'rejected' is missing, of prompt, chosen, rejected); mend or drop them"
    )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("Hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"chosen": [user("Hi"), assistant("a")], "rejected": [user("Hi"), assistant("b")]},
        {"conversations": [{"from": "human", "value": "Hi"}], "chosen": "a", "rejected": "b"},
        {"instruction": "Hi", "chosen": "a", "rejected": "b"},
    ],
)
def test_tools_stand_before_the_prompt(row):
    tools = [{"type": "function", "function": {"name": "tide", "description": None}}]
    first, *prompt = one(row | {"tools": tools}).prompt
    assert first["role"] == "template_arguments"
    assert json.loads(first["content"]) == {"tools": [{"type": "function", "function": {"name": "tide"}}]}
    assert prompt == [user("Hi")]


def test_the_shared_leading_messages_are_the_prompt():
    start = [{"role": "system", "content": "S"}, user("1"), assistant("2"), user("3")]
    tail = [user("5"), assistant("6")]
    pair = one({"chosen": [*start, assistant("4"), *tail], "rejected": [*start, assistant("x"), *tail]})
    assert (pair.prompt, pair.chosen) == (start, [assistant("4"), *tail])


def test_alpaca_system_history_and_input():
    row = {"instruction": "Do", "input": "this", "system": "S", "history": [["q", "a"]], "chosen": "c", "rejected": "r"}
    expected = [{"role": "system", "content": "S"}, user("q"), assistant("a"), user("Do\nthis")]
    assert one(row).prompt == expected
    assert one({"instruction": "", "input": "this", "chosen": "c", "rejected": "r"}).prompt == [user("this")]


def test_identical_pairs_are_dropped_and_counted_and_rows_keep_their_numbers():
    rows = [{"prompt": "p", "chosen": "a", "rejected": b} for b in "abac"]
    data = preference_rows(rows, "f")
    assert [r.row for r in data.rows] == [1, 3] and data.dropped == {IDENTICAL: 2}
    conversation = [user("Hi"), assistant("a")]
    data = preference_rows([{"chosen": conversation, "rejected": list(conversation)}], "f")
    assert data.rows == [] and data.dropped == {IDENTICAL: 1}


GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}
SCORED = GOOD | {"chosen_token_scores": [0.0, 2], "rejected_token_scores": [1]}


@pytest.mark.parametrize(
    ("row", "says", "cure"),
    [
        ({"prompt": "p", "chosen": "a"}, "column 'rejected' is missing", "it has chosen, prompt"),
        ({"prompt": "p", "chosen": "a", "rejected": None}, "column 'rejected' is missing", "it has chosen, prompt"),
        ({"chosen": "a", "rejected": "b"}, "chosen is a text without turns", '--config.columns="prompt=..."'),
        ({"question": "a", "best": "b"}, "column 'chosen' is missing, of question", '--config.columns="chosen=..."'),
        (
            {"ask": "a", "best": "b"},
            "it has ask, best, no layout that is known",
            '"prompt=...,chosen=...,rejected=..."',
        ),
        (GOOD | {"chosen": 3}, "chosen must be a string or messages, got int", "give a list"),
        (GOOD | {"chosen": ["a"]}, "chosen is a list of str, neither a string nor messages", "mend"),
        (
            GOOD | {"chosen": [user("x"), assistant("a")], "rejected": [user("x"), assistant("b")]},
            "prompt is no question of the conversation in chosen or rejected",
            '--config.columns="prompt="',
        ),
        (GOOD | {"images": ["a.png"]}, "has images, and models here read text alone", '--config.columns="images="'),
        (GOOD | {"input": "this"}, "input would be left out", '--config.columns="instruction=prompt,input=input"'),
        (GOOD | {"system": 3}, "system must be a string", "mend"),
        (GOOD | {"system": "s", "system_prompt": "t"}, "system and system_prompt differ", "keep one"),
        (
            {"prompt": [user("x")], "chosen": [assistant("a") | {"weight": 0}], "rejected": "b"},
            "a turn of another weigh",
            "only supervised",
        ),
        (
            {"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": "x"},
            "preference_strength is 'x'",
            "a number, below 0 for the first",
        ),
        (
            {"instruction": "p", "output_1": "a", "output_2": "b", "label": 3},
            "label is 3, which must be 1 or 2",
            "mend",
        ),
        (GOOD | {"prompt": []}, "prompt is an empty list", "give a list"),
        (GOOD | {"prompt": 3}, "prompt must be a string or messages, got int", "give a list"),
        (GOOD | {"prompt": [{"role": "user"}]}, "prompt message 0 has no content", "give a list"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "share no leading message", "add a prompt column"),
        ({"chosen": [user("a")], "rejected": [user("a"), assistant("b")]}, "chosen has no message after", "drop"),
        (
            {"chosen": [user("a"), user("b")], "rejected": [user("a"), user("c")]},
            "chosen differs first in a user message",
            "mend the row",
        ),
        ({"instruction": "", "input": "", "chosen": "a", "rejected": "b"}, "both empty", "drop the row"),
        ({"instruction": 1, "chosen": "a", "rejected": "b"}, "instruction must be a string", "give a list"),
        ({"instruction": "i", "history": "q", "chosen": "a", "rejected": "b"}, "history must be a list", "mend"),
        ({"instruction": "i", "history": [["q"]], "chosen": "a", "rejected": "b"}, "history message 0 is no", "give a"),
        (SCORED | {"chosen_token_scores": None}, "has only one of chosen_token_scores and rejected", "both or neither"),
        (SCORED | {"chosen_token_scores": [1, float("nan")]}, "chosen_token_scores[1] is nan", "compute"),
        (SCORED | {"rejected_token_scores": [float("inf")]}, "rejected_token_scores[0] is inf", "compute the weights"),
        (SCORED | {"chosen_token_scores": [1, 2, -0.5]}, "chosen_token_scores[2] is -0.5", "compute the weights"),
        (SCORED | {"chosen_token_scores": ["1"]}, "must be a list of numbers", "compute the weights anew"),
        (SCORED | {"chosen_token_scores": [1, None]}, "must be a list of numbers", "compute the weights anew"),
        (SCORED | {"chosen_token_scores": [True, 1.0]}, "must be a list of numbers", "compute the weights anew"),
        (SCORED | {"chosen_token_scores": [[1], [1, 2]]}, "must be a list of numbers", "compute the weights anew"),
        (SCORED | {"chosen_token_scores": 1.0}, "must be a list of numbers", "compute the weights anew"),
    ],
)
def test_faulty_rows_are_named(row, says, cure):
    error = raised(row)
    assert error.startswith("pairs.jsonl row 0: ") and says in error and cure in error


def test_a_mixture_of_layouts_is_named():
    error = raised([GOOD, GOOD, {"instruction": "i", "chosen": "a", "rejected": "b"}])
    assert error.startswith("pairs.jsonl row 2: the columns are instruction") and "most rows prompt, chosen" in error
    assert "split it (it has chosen, instruction, rejected)" in error
    assert (
        "row 1: the prompt is a string, without token scores, but in most rows the prompt is a string, with"
        in raised([SCORED, GOOD])
    )


def encoded(length, full_length):
    ids = np.zeros(length, np.int32)
    return EncodedResponse(ids, ids, full_length=full_length, boundary_split=False)


def test_scores_must_fit_the_tokens():
    pair = one(SCORED)
    assert pair.chosen_scores.dtype == np.float32 and pair.chosen_scores.tolist() == [0, 2]
    check_weight_lengths(pair, encoded(2, 2), encoded(1, 1), "pairs.jsonl")
    check_weight_lengths(pair, encoded(1, 2), encoded(1, 1), "pairs.jsonl")  # truncated: the first score is used
    check_weight_lengths(one(GOOD), encoded(9, 9), encoded(9, 9), "pairs.jsonl")
    with pytest.raises(UserError) as caught:
        check_weight_lengths(pair, encoded(2, 2), encoded(2, 2), "pairs.jsonl")
    assert str(caught.value) == (
        "pairs.jsonl row 0: rejected_token_scores has 1 values but the response has 2 tokens with this tokenizer; "
        "weights computed with another tokenizer cannot be used: compute them anew (weights=...)"
    )
    with pytest.raises(UserError, match="chosen_token_scores has 2 values but the response has 3 tokens"):
        check_weight_lengths(pair, encoded(2, 3), encoded(1, 1), "pairs.jsonl")


@pytest.mark.skipif(not DEMO.exists(), reason=f"the MuSC authors' demo rows are not at {DEMO}")
def test_the_authors_rows():
    raw = json.loads(DEMO.read_text())
    data = preference_rows(read_rows(str(DEMO), ["instruction", "chosen", "rejected"]), DEMO.name)
    assert len(data.rows) == 98 and data.dropped == {IDENTICAL: 2}
    for pair in data.rows:
        assert pair.prompt == [user(raw[pair.row]["instruction"])]
        assert pair.chosen == [assistant(raw[pair.row]["chosen"])]
        for scores in (pair.chosen_scores, pair.rejected_scores):
            assert scores.min() >= 0 and scores.max() <= 2
