"""E1: of 20,000 rows 1% of every kind of fault train, 2% stop the run before anything is written."""

import json

import pytest

from tests.e2e.common import SMALL_TRAIN, arguments, fork, make_model, read_rows

ROWS = 20_000
LONG, MISSING, EMPTY, TYPE, END = ("the cat " * 60, None, " ", 3, "yes<|im_end|><|im_end|>")
PAIRS = [{"prompt": LONG}, {"rejected": MISSING}, {"chosen": EMPTY}, {"chosen": TYPE}, {"rejected": END}]
PAIRS += [{"prompt": MISSING}, {"images": ["a.png"]}, {"prompt": "say \ud800"}]
SEEDS = [{"prompt": LONG}, {"response": MISSING}, {"response": EMPTY}, {"response": TYPE}, {"response": END}]
SEEDS += [{"weight": -1}, {"tools": 3}, {"prompt": "say \ud800"}]
COMMANDS = {
    "musc_train": ({"prompt": "say it", "chosen": "yes it is", "rejected": "no"}, PAIRS),
    "main_train": ({"prompt": "say it", "response": "yes it is"}, SEEDS),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def write(path, good, faults, share, number=ROWS):
    rows, count = [json.dumps(good)] * number, int(share * number)
    for i in range(count):
        rows[i * (number // count)] = json.dumps(good | faults[i % len(faults)])
    path.write_text("\n".join(rows))
    return count


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_twenty_thousand_rows(tmp_path, model, name):
    good, faults = COMMANDS[name]
    path, output = tmp_path / "rows.jsonl", tmp_path / "run"
    small = ["max_steps=1", *SMALL_TRAIN, *(["loss.kind=simpo"] if name == "musc_train" else [])]  # no reference
    flags = arguments(name, f"model={model}", f"input={path}", f"output={output}", *small, preset="tiny")
    count = write(path, good, faults, 0.01)
    done = fork(name, *flags).ok()
    assert done.stderr.count(f"rows.jsonl: {count} of {ROWS} rows are faulty and left out") == 1
    listed = read_rows(output / "dropped.jsonl")
    assert [row["row"] for row in listed] == [i * (ROWS // count) for i in range(count)]
    kinds = done.stderr.split("left out; all of them are in")[1].splitlines()[1 : len(faults) + 1]
    assert sum(int(line.split(":")[0]) for line in kinds) == count and all("row " in line for line in kinds)

    other = tmp_path / "other"
    count = write(path, good, faults, 0.02)
    line = fork(name, *flags, f"--config.output={other}").error()
    assert line.startswith(f"rows.jsonl: {count} of {ROWS} rows are faulty: ")
    assert line.count(" like row ") == len(faults) and line.endswith("or raise config.max_dropped_share=0.01")
    assert not other.exists() and not list(tmp_path.glob("other*"))


@pytest.mark.parametrize("name", ["generate", "score"])
def test_a_faulty_row_stands_in_the_output_with_its_error(tmp_path, model, name):
    good = {"prompt": "say it", "response": "yes it is"} if name == "score" else {"prompt": "say it"}
    path, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    write(path, good, [{"prompt": MISSING}, {"prompt": 5}], 0.02, 100)
    small = ["max_new_tokens=2", "decode.max_length=64"] if name == "generate" else ["max_length=64"]
    small += ["batch.row_length=64", "batch.rows=2"] if name == "score" else []
    flags = arguments(name, f"model={model}", f"input={path}", f"output={output}", *small)
    line = fork(name, *flags).error()
    assert line.startswith("rows.jsonl: 2 of 100 rows are faulty: ") and not output.exists()
    done = fork(name, *flags, "--config.max_dropped_share=0.02").ok()
    rows = read_rows(output)
    assert len(rows) == 100 and [i for i, row in enumerate(rows) if "error" in row] == [0, 50]
    assert "column 'prompt' is missing" in rows[0]["error"] and "prompt must be a string" in rows[50]["error"]
    assert all(row.get("response") for i, row in enumerate(rows) if i not in (0, 50))
    assert json.loads(done.stdout.splitlines()[-1])["rows"] == 100
