"""Which tokens a constraint decides, by hand, and what the rules weigh them."""

import random

import numpy as np
import pytest

from lab.musc_weights import mean_weights, placed_weights
from lab.worlds.governed import dropped, labels
from lab.worlds.grammar import Constraint, make_instruction
from lab.worlds.world import tokens
from lab.worlds.worlds import WORLDS
from lab.worlds.writer import write
from lm_jax.data.score_store import ScoreStore

LISTS, TRIPS = WORLDS["lists"], WORLDS["trips"]


@pytest.mark.parametrize(
    ("constraint", "response", "expected"),
    [
        (Constraint("count", "two"), "saw, axe", ".g."),  # what follows an item; the end token has its own label
        (Constraint("count", "two"), "( saw, axe )", "..g.g"),
        (Constraint("first", "saw"), "hello axe axe, saw", ".gg.."),  # the place, whoever stands there
        (Constraint("last", "saw"), "axe, file - knife", "....g"),
        (Constraint("include", "saw"), "axe, saw, saw", "..g.g"),
        (Constraint("exclude", "saw"), "axe, file", "g.g"),
        (Constraint("separator", "dash"), "axe - file, saw", ".g.g."),  # a wrong one stands in its slot too
        (Constraint("numbered"), "1 axe, 2 file", "g..g."),
        (Constraint("twice", "two"), "axe axe, file file", ".g..g"),
        (Constraint("bracket", "round"), "( axe )", "g.g"),
        (Constraint("last", "saw"), "", ""),
    ],
)
def test_the_tokens_that_a_constraint_decides(constraint, response, expected):
    found = labels(LISTS, [constraint], response)
    assert found[-1] == "end"
    assert "".join("g" if label == "governed" else "." for label in found[:-1]) == expected


def test_several_constraints_decide_what_any_of_them_does():
    found = labels(LISTS, [Constraint("numbered"), Constraint("last", "saw")], "1 axe, 2 saw")
    assert found == ["governed", "other", "other", "governed", "governed", "end"]
    assert labels(LISTS, [], "axe, saw") == ["other", "other", "other", "end"]


def test_what_was_dropped():
    full = "list tools. use exactly two words. start with saw."
    assert dropped(LISTS, full, "name some tools. the list has two words.") == [Constraint("first", "saw")]
    assert dropped(LISTS, full, "name some tools. start with axe. write two words.") == [Constraint("first", "saw")]
    assert dropped(LISTS, full, "sing a song.") == []


@pytest.mark.parametrize("world", [LISTS, TRIPS], ids=lambda world: world.name)
def test_every_kind_decides_something_of_a_response_that_meets_it(world):
    for kind in world.kinds:
        rng = random.Random(kind.name)
        instruction = make_instruction(world, [kind.name], rng)
        response = write(world, instruction.group, instruction.constraints, rng)
        found = labels(world, instruction.constraints, response)
        assert "governed" in found and len(found) == len(tokens(response)) + 1, (kind.name, response)


def test_mean_weights_by_hand(tmp_path):
    message = [{"role": "user", "content": "list tools. start with saw. use exactly two words."}]
    less = [{"role": "user", "content": "list tools. use exactly two words."}]
    sides = {"chosen": [{"content": "saw, axe"}], "rejected": [{"content": "axe, unknown.words"}]}
    rows = [{"prompt": message, "perturbed_prompt": less, "token_weights": {"row": 0}, **sides}]
    unread = {**rows[0], "perturbed_prompt": [{"content": "sing a song."}], "token_weights": {"row": 1}}
    store = str(tmp_path / "w.weights")
    written = [np.array([2.0, 0.5, 1.0, 0.25], np.float32), np.ones(3, np.float32)]
    stored = ScoreStore.create_or_open(store, {}, [4, 3, 4, 3], ["entropy"])
    stored.write(np.arange(4), {"entropy": [*written, 9 * written[0], written[1]]})
    found = mean_weights(LISTS, [*rows, unread], store, ("entropy",))
    assert found == {
        "weights_chosen_governed": {"entropy": 2.0},
        "weights_chosen_other": {"entropy": 0.75},
        "weights_chosen_end": {"entropy": 0.25},
    }  # the rejected one has tokens that the world does not cut as the tokenizer did
    (placed,) = placed_weights(LISTS, rows, store, 2.0, 0.5)
    assert placed["chosen_token_scores"] == [2.0, 0.5, 0.5, 0.5]
    assert placed["rejected_token_scores"] == [0.5, 0.5, 0.5] and "token_weights" not in placed
