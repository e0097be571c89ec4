"""Training that was stopped, on rows that changed meanwhile: refused, and with the old rows it goes on.

tests/unit/test_changed_inputs.py has what counts as a change.
"""

import os
import shutil
from pathlib import Path

import pytest

from tests.e2e import common
from tests.e2e.common import SMALL_TRAIN, TIMING, arguments, fork
from tests.e2e.test_main_train import make_rows

STEPS = ("epochs=30", "max_steps=12", "checkpoints.every=2", "eval_every=100", "seed=7")
MAKE = {"musc_train": common.make_pairs, "main_train": make_rows}


def metrics(output: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in TIMING} for r in common.read_rows(output / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("command", MAKE)
def test_stopped_after_four_steps_of_twelve(tmp_path, command):
    model, rows = common.make_model(tmp_path / "model"), tmp_path / "rows.jsonl"
    MAKE[command](rows, 24)
    old = common.read_rows(rows)

    def flags(name: str, **places: Path) -> list[str]:
        given = {"model": model, "input": rows, "output": tmp_path / name} | places
        return arguments(command, *(f"{k}={v}" for k, v in given.items()), *SMALL_TRAIN, *STEPS, preset="tiny")

    fork(command, *flags("whole")).ok()
    script = (f"--command={command}", "--stop_after=4")
    done = fork("tests.e2e.scripted_training", *script, *flags("stopped")).ok()
    assert "stopped after step 4 of 12" in done.stderr
    for changed in (old[:-1], [*old, old[0]]):
        common.write_rows(rows, changed)
        line = fork(command, *flags("stopped")).error()
        assert f"{tmp_path}/stopped/config.json: this run was begun with other rows than config.input={rows}" in line
        assert len(metrics(tmp_path / "stopped")) == 4

    # The old rows in another file, the model copied: the bits of a run that never stopped
    common.write_rows(tmp_path / "renamed.jsonl", [dict(reversed(row.items())) for row in old])
    shutil.copytree(model, tmp_path / "again", copy_function=shutil.copyfile)
    places = {"input": tmp_path / "renamed.jsonl", "model": tmp_path / "again"}
    done = fork(command, *flags("stopped", **places)).ok()
    assert f"continuing {tmp_path}/stopped after step 4" in done.stderr
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    assert "other rows" in fork(command, *flags("stopped")).error()  # and after its end


@pytest.mark.parametrize("command", ["generate", "musc_token_weights"])
def test_kept_rows_belong_to_a_model_wherever_it_lies(tmp_path, command):
    common.make_model(tmp_path / "model")
    common.make_pairs(tmp_path / "in.jsonl", 4, perturbed_prompt=lambda i: f"say that {i} sat")
    sizes = {"generate": ("max_new_tokens=4", "decode.max_length=64"), "musc_token_weights": SMALL_TRAIN}

    def flags(model: str) -> list[str]:
        output = f"output={tmp_path / 'out.jsonl'}"
        return arguments(
            command, f"model={tmp_path / model}", f"input={tmp_path / 'in.jsonl'}", output, *sizes[command]
        )

    fork(command, *flags("model")).ok()
    shutil.copytree(tmp_path / "model", tmp_path / "again", copy_function=shutil.copyfile)
    os.utime(tmp_path / "model/model.safetensors", (1, 1))
    before = (tmp_path / "out.jsonl").read_bytes()
    for name in ("model", "again"):
        fork(command, *flags(name)).ok()
        assert (tmp_path / "out.jsonl").read_bytes() == before
    common.make_model(tmp_path / "again", seed=1)
    line = fork(command, *flags("again")).error()
    assert str(tmp_path / "out") in line and "model" in line and "give another" in line, line
