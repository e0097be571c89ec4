"""`launch.musc_rounds` from start to end: killed in each part, and with a model that makes its own pairs."""

import math
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs.musc_rounds import get_config
from lm_jax.checkpoints.orbax import Checkpoints
from lm_jax.checkpoints.runs import open_model
from lm_jax.config import from_config_dict
from musc_jax.rounds import command as rounds
from tests.e2e import common
from tests.e2e.common import TIMING, Done, Fork, arguments, fork

SMALL = (
    *("pairs.near_duplicate=0.0", "weights.max_length=128", "weights.batch.row_length=512", "weights.batch.rows=2"),
    *("train.max_length=128", "train.batch.pairs=3", "train.checkpoints.every=2"),
    *("train.epochs=2", "train.compute.scan_unroll=1"),
)
THINGS = "tea rain bread chess wool salt snow glass moss clay ink corn rope smoke".split()
ROWS = [{"prompt": f"Write on {thing}. Use {i} lines. Name a tool. Rhyme."} for i, thing in enumerate(THINGS)]


def records(run: Path) -> list[dict]:
    """Of a training run, what is no timing."""
    rows = common.read_rows(run / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


def params(run: Path) -> dict:
    with Checkpoints(f"{run}/checkpoints", keep=None) as checkpoints:
        return checkpoints.restore({"params": None, "optimizer": None, "progress": None})


def without_seconds(path: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in common.read_rows(path)]


class Runs:
    """The same rounds, in one place: what they are called is part of what they depend on."""

    def __init__(self, directory: Path):
        self.directory, self.output = directory, directory / "out"
        self.model = common.make_model(directory / "model", max_position_embeddings=2048)
        self.rows = common.write_rows(directory / "in.jsonl", ROWS)

    def flags(self, *settings: str) -> list[str]:
        given = (f"model={self.model}", f"input={self.rows}", f"output={self.output}", "rounds=2", "reference=seed")
        learning = ("train.optim.learning_rate=1e-2", "train.optim.schedule=constant", "train.optim.warmup_ratio=0.0")
        return arguments("musc_rounds", *given, *SMALL, *learning, *settings, preset="tiny")

    def run(self, *settings: str) -> Done:
        return Fork("tests.e2e.scripted_rounds", *self.flags(*settings)).wait()

    def kill_when(self, reached: Callable[[], bool]) -> None:
        """Starts the rounds and sends SIGKILL as soon as a state is `reached`."""
        run = Fork("tests.e2e.scripted_rounds", *self.flags())
        while run.process.is_alive() and not reached():
            time.sleep(0.0005)
        run.process.kill()
        assert run.wait().status == -signal.SIGKILL


@pytest.mark.slow
def test_two_rounds_killed_in_each_part(tmp_path):
    runs = Runs(tmp_path)
    first, second = runs.output / "round_1", runs.output / "round_2"
    done = runs.run().ok()
    whole = runs.output.rename(tmp_path / "whole")
    assert_two_rounds(whole, done, runs)

    def lines(path: Path) -> int:
        return path.read_bytes().count(b"\n") if path.exists() else 0

    runs.kill_when(lambda: lines(first / "pairs.jsonl.stages/respond.jsonl.partial") > 3)
    assert not (first / "pairs.jsonl").exists()
    runs.kill_when(lambda: any(first.glob("weighed.weights/**/c/*")))
    assert not (first / "weighed.jsonl").exists()
    runs.kill_when(lambda: any(path.name.isdigit() for path in (second / "train/checkpoints").glob("*")))
    assert (first / "round.json").exists() and not (second / "round.json").exists()
    last = runs.run().ok()
    assert "round 1: done already" in last.stderr and f"continuing {second}/train after step" in last.stderr

    files = ("instructions.jsonl", "pairs.jsonl", "pairs.jsonl.counts.json", "pairs.jsonl.dropped.jsonl")
    for name in ("round_1", "round_2"):
        for file in (*files, "weighed.jsonl"):
            assert (runs.output / name / file).read_bytes() == (whole / name / file).read_bytes(), (name, file)
        ours, theirs = (params(where / name / "train") for where in (runs.output, whole))
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True))
        assert records(runs.output / name / "train") == records(whole / name / "train")
    assert without_seconds(runs.output / "rounds.jsonl") == without_seconds(whole / "rounds.jsonl")

    # Done: nothing is read again; other settings are refused, more rounds are not
    assert "round 2: done already" in fork("musc_rounds", *runs.flags("pairs.decode.slots=2")).ok().stderr
    line = fork("musc_rounds", *runs.flags("train.loss.beta=0.3")).error()
    assert "config.train.loss.beta=0.1, now 0.3" in line and str(runs.output) in line
    line = fork("musc_rounds", *runs.flags("rounds=3")).error()
    assert "config.instructions_per_round=7, now 4" in line


def assert_two_rounds(output: Path, done: Done, runs: Runs) -> None:
    """Each round on instructions of its own, from the model that the one before trained; the seed is the reference."""
    rows = common.read_rows(output / "rounds.jsonl")
    assert [row["model"] for row in rows] == [runs.model, f"{runs.output}/round_1/train"]
    asked = [{row["id"] for row in common.read_rows(output / f"round_{n}/instructions.jsonl")} for n in (1, 2)]
    assert asked[0] | asked[1] == {*range(14)} and not asked[0] & asked[1] and len(asked[0]) == 7
    for n, row in enumerate(rows, 1):
        pairs = common.read_rows(output / f"round_{n}/pairs.jsonl")
        assert {pair["id"] for pair in pairs} <= asked[n - 1] and row["pairs"] == len(pairs) > 4
        assert row["instructions"] == 7 and row["steps"] == len(records(output / f"round_{n}/train"))
        assert "weights: store" in done.stderr and row["loss"] < math.log(2)
    losses = [records(output / f"round_{n}/train")[0]["loss"] for n in (1, 2)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(losses[1] - math.log(2)) > 0.01  # the policy is no longer the seed
    head, *table = done.stdout.splitlines()[-3:]
    assert head.split() == "round instructions pairs dropped steps loss margin accuracy seconds".split()
    assert [line.split()[:2] for line in table] == [["1", "7"], ["2", "7"]]


@pytest.mark.slow
def test_rounds_of_a_model_that_runs_here(tmp_path, monkeypatch):
    """A random model corrects itself: every part runs in one process, and leaves none of its arrays to the next."""
    model = common.make_model(tmp_path / "model", max_position_embeddings=8192)
    weights = load_file(f"{model}/model.safetensors")
    weights["lm_head.weight"][0] *= 4  # else hardly a response would end
    save_file(weights, f"{model}/model.safetensors", metadata={"format": "pt"})
    rows = common.write_rows(tmp_path / "in.jsonl", [{"prompt": f"Say {thing}."} for thing in THINGS])
    config, alive = get_config("tiny"), []
    config.update({"model": model, "input": rows, "output": f"{tmp_path}/out", "rounds": 2})
    config.pairs.update({"method": "self_correct", "near_duplicate": 0.0, "decode": {"slots": 4}})
    for stage in ("respond", "critique", "revise"):
        config.pairs[stage].update({"temperature": 1.0, "max_new_tokens": 16})
    config.train.update({"max_length": 64, "batch": {"pairs": 4}, "optim": {"learning_rate": 1e-2}})

    def watched(part):
        def run(*given):
            part(*given)
            alive.append(sum(array.nbytes for array in jax.live_arrays()))

        return run

    for name in ("make_pairs", "train"):
        monkeypatch.setattr(rounds, name, watched(getattr(rounds, name)))
    before = sum(array.nbytes for array in jax.live_arrays())
    rounds.run_rounds(from_config_dict(rounds.RoundsConfig, config.to_dict()))
    size = sum(array.nbytes for array in weights.values())
    assert len(alive) == 4 and max(alive) < before + size / 10

    first, second = (tmp_path / f"out/round_{n}" for n in (1, 2))
    trained = open_model(f"{first}/train").fingerprint
    assert trained in (second / "pairs.jsonl.run.json").read_text()
    assert trained not in (first / "pairs.jsonl.run.json").read_text()
    for run in (first / "train", second / "train"):
        assert "weights" in records(run)[0] or records(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert not (second / "weighed.jsonl").exists()
