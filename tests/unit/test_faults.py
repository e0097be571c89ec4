"""Faulty rows: of every kind all are named at once; a few are left out and listed, more stop the run."""

import json

import numpy as np
import pytest

from lm_jax.data.faults import Faults, RowIds, write_faults
from lm_jax.data.supervised import load_supervised
from lm_jax.data.text import TextEncoder
from lm_jax.errors import UserError
from musc_jax.training.examples import load_pairs, read_pairs
from tests.unit.test_shares import Processes
from tests.unit.test_text import CHATML, byte_level

# A template that insists on turns, as many do
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user begins') }}{% endif %}" + CHATML
USER, ANSWER = {"role": "user", "content": "name a sea"}, {"role": "assistant", "content": "the sea"}
PAIR = {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "blue"}]}
WORDS = [{**USER, "content": "sea " * 200}]
# What is wrong with a row -> what is said of it
PAIR_FAULTS = {
    "the response is lost to truncation: the prompt alone has": {"prompt": WORDS},
    "(chosen): the response is empty": {"chosen": [{**ANSWER, "content": " "}]},
    "(rejected): the response is empty": {"rejected": ""},
    "column 'rejected' is missing": {"rejected": None},
    "chosen must be a string or messages, got float": {"chosen": 3.5},
    "prompt message 0 has no content": {"prompt": [{"role": "user", "content": None}]},
    "prompt message 0 has no role": {"prompt": [{"content": "a"}]},
    "the chat template refuses the messages with roles assistant": {"prompt": [ANSWER]},
    "doubled EOS": {"chosen": "the sea<|im_end|>"},
    "half a surrogate pair": {"chosen": "\ud800"},
    "has images": {"images": ["a.png"]},
    "tools must be a list": {"tools": 5},
    "system must be a string": {"system": ["a"]},
    "has a part of type 'image_url'": {"prompt": [{"role": "user", "content": [{"type": "image_url"}]}]},
}
SEED = {"prompt": [USER], "completion": [ANSWER]}
SEED_FAULTS = {
    "the response is lost to truncation": {"prompt": WORDS},
    "the response is empty": {"completion": ""},
    "column 'completion' is missing": {"completion": None},
    "weight is -1": {"weight": -1},
    "no assistant message": {"completion": [USER]},
    "the chat template refuses": {"prompt": [ANSWER]},
}


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(byte_level(STRICT, eos="<|im_end|>"), 100)


def write(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def mixed(good, faults, number):
    """`number` rows, one of them with each fault, and where these are."""
    places = [i * (number // len(faults)) + 3 for i in range(len(faults))]
    rows = [good] * number
    for place, changed in zip(places, faults.values(), strict=True):
        rows[place] = {k: v for k, v in (good | changed).items() if v is not None or place % 2}
    return rows, places


@pytest.mark.parametrize("kind", ["pairs", "supervised"])
def test_all_faults_are_named_and_their_rows_left_out(tmp_path, encoder, capsys, kind):
    good, kinds = (PAIR, PAIR_FAULTS) if kind == "pairs" else (SEED, SEED_FAULTS)
    rows, places = mixed(good, kinds, 400)
    path, share = write(tmp_path, rows), len(kinds) / 400

    def load(max_dropped_share):
        if kind == "pairs":
            return load_pairs(path, encoder, "uniform", max_dropped_share=max_dropped_share)
        return load_supervised(path, encoder, max_dropped_share=max_dropped_share)

    found = load(share)
    assert [row.row for row in found.rows] == [i for i in range(400) if i not in places]
    assert sorted(found.faults.rows) == places
    for place, says in zip(places, kinds, strict=True):
        assert found.faults.rows[place].startswith(f"rows.jsonl row {place}") and says in found.faults.rows[place]
    assert len(found.segments) == len(found.rows) * (2 if kind == "pairs" else 1)
    found.faults.say("run/dropped.jsonl")
    said = capsys.readouterr().err.splitlines()
    assert (
        said[0] == f"rows.jsonl: {len(kinds)} of 400 rows are faulty and left out; all of them are in run/dropped.jsonl"
    )
    write_faults(str(tmp_path / "dropped.jsonl"), [found.faults])
    listed = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert [(row["file"], row["row"]) for row in listed] == [("rows.jsonl", place) for place in places]
    assert all(
        says.removeprefix("(chosen): ").removeprefix("(rejected): ") in row["error"]
        for row, says in zip(listed, kinds, strict=True)
    )
    with pytest.raises(UserError) as caught:
        load(share - 1e-6)
    line = str(caught.value)
    assert line.startswith(f"rows.jsonl: {len(kinds)} of 400 rows are faulty: ") and len(line) < 1000
    assert line.endswith(f"or raise config.max_dropped_share={share - 1e-6:g}") and "\n" not in line


def test_the_share_is_of_the_rows_of_the_file():
    for number, share, fits in ((1, 0.01, False), (200, 0.01, True), (199, 0.01, False), (100, 0.29, True)):
        faults = Faults("f", share)
        count = 29 if share == 0.29 else 2
        for row in range(count if number > 1 else 1):
            faults.add(row, f"f row {row}: empty; drop it")
        if fits:
            faults.check(number)
        else:
            with pytest.raises(UserError):
                faults.check(number)


def test_kinds_are_counted_whatever_their_rows_say(capsys):
    faults = Faults("f", 0.5)
    for row in range(7):
        faults.add(row, f"f row {row} (chosen): the prompt alone has {row + 9} tokens; raise it")
    faults.add(50, "f row 50: role 'x' is unknown (it has a, b); mend")
    faults.add(51, "f row 51: role 'y' is unknown (it has a, c); mend")
    faults.check(100)
    faults.say()
    assert capsys.readouterr().err.splitlines() == [
        "f: 9 of 100 rows are faulty and left out",
        "  7: row 0, 1, 2, 3, 4, ...: the prompt alone has 9 tokens",
        "  2: row 50, 51: role 'x' is unknown (it has a, b)",
    ]
    with pytest.raises(UserError) as caught:
        faults.check(17)
    assert str(caught.value) == (
        "f: 9 of 17 rows are faulty: 7 like row 0 (the prompt alone has 9 tokens); 2 like row 50 (role 'x' is "
        "unknown); mend or drop them, or raise config.max_dropped_share=0.5"
    )


def test_one_fault_is_told_whole():
    faults = Faults("f", 0.01)
    faults.add(3, "f row 3: empty; drop it")
    with pytest.raises(
        UserError, match=r"^f row 3: empty; drop it \(1 of 9 rows\), or raise config.max_dropped_share=0.01$"
    ):
        faults.check(9)


def test_ids_that_differ():
    faults = Faults("f")
    ids = RowIds(faults)
    assert [ids.of(row, given) for row, given in enumerate(["a", None, 1, "a", "", 2.5])][:3] == ["a", 1, 1]
    assert sorted(faults.rows) == [2, 3, 4, 5]


def test_scores_of_another_length(tmp_path, encoder):
    (pair,) = load_pairs(write(tmp_path, [PAIR]), encoder, "uniform").segments[:1]
    scores = {"chosen_token_scores": [1.0] * len(pair.response), "rejected_token_scores": [1.0] * len(pair.response)}
    rejected = load_pairs(write(tmp_path, [PAIR]), encoder, "uniform").segments[1]
    scores["rejected_token_scores"] = [1.0] * len(rejected.response)
    rows = [PAIR | scores] * 200
    rows[7] = rows[7] | {"chosen_token_scores": [1.0]}
    rows[9] = PAIR
    found = load_pairs(write(tmp_path, rows), encoder, "auto", max_dropped_share=0.01)
    assert found.rule == "columns" and len(found) == 198 and sorted(found.faults.rows) == [7, 9]
    assert "has 1 values but the response has" in found.faults.rows[7] and "without token sc" in found.faults.rows[9]
    assert all(len(s.values["weights"]) == len(s.response) for s in found.segments)


def test_rows_that_are_not_taken_are_not_encoded(tmp_path, encoder):
    rows, places = mixed(PAIR, PAIR_FAULTS, 400)
    path = write(tmp_path, rows)
    assert len(read_pairs(path, lambda n: range(2), max_dropped_share=1.0).rows) == 2
    found = load_pairs(path, encoder, "uniform", lambda n: range(2), max_dropped_share=1.0)
    assert len(found) == 2 and len(found.faults.rows) < len(places)


def test_processes_agree_on_the_rows(monkeypatch, tmp_path, encoder):
    rows, _ = mixed(PAIR, PAIR_FAULTS, 60)
    path = write(tmp_path, rows)
    alone = load_pairs(path, encoder, "uniform", max_dropped_share=1.0)

    def load():
        found = load_pairs(path, encoder, "uniform", max_dropped_share=1.0)
        return found.faults.rows, [s.response.tolist() for s in found.segments]

    expected = alone.faults.rows, [s.response.tolist() for s in alone.segments]
    assert all(found == expected for found in Processes(monkeypatch).run(load))
    assert np.unique([len(alone.rows)]) == [60 - len(PAIR_FAULTS)]
