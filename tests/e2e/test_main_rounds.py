"""`launch.main_rounds` from start to end: killed in each part, and with two adapters that write for themselves."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from lm_jax.checkpoints.orbax import Checkpoints
from tests.e2e import common
from tests.e2e.common import TIMING, Done, Fork, arguments, fork

DIRECTIONS = ("forward", "reverse")
WORDS = ("prompts.seed_system=S", "prompts.synthetic_system=W", "prompts.reverse_question=Ask for: {response}")
THINGS = "cat hat dog mat rat bat".split()
SEEDS = [{"instruction": f"say that the {thing} sat", "output": f"the {thing} sat"} for thing in THINGS[:4]]
RESPONSES = [{"id": f"u{i}", "response": f"the {thing} sat on the mat"} for i, thing in enumerate(THINGS)]


def training(*settings: str) -> list[str]:
    small = (
        "max_length=96",
        "batch.examples=3",
        "optim.learning_rate=1e-2",
        "compute.scan_unroll=1",
    )
    return [f"{direction}.{setting}" for direction in DIRECTIONS for setting in (*small, *settings)]


def sampling(*settings: str) -> list[str]:
    small = ("max_new_tokens=24", "decode.slots=4", "decode.max_length=128")
    return [f"{sampled}.{setting}" for sampled in ("instructions", "responses") for setting in (*small, *settings)]


class Runs:
    """The same rounds, in one place: what they are called is part of what they depend on."""

    def __init__(self, directory: Path):
        self.output = directory / "out"
        self.model = common.make_model(directory / "model", max_position_embeddings=256)
        self.seeds = common.write_rows(directory / "seeds.jsonl", SEEDS)
        self.responses = common.write_rows(directory / "responses.jsonl", RESPONSES)

    def flags(self, *settings: str) -> list[str]:
        given = (f"model={self.model}", f"seeds={self.seeds}", f"unlabelled={self.responses}", f"output={self.output}")
        return arguments("main_rounds", *given, *WORDS, *settings, preset="tiny")


class Scripted(Runs):
    def flags(self, *settings: str) -> list[str]:
        learning = training("epochs=2", "batch.examples=6", "checkpoints.every=1", "optim.schedule=constant")
        return super().flags("rounds=2", "start=previous", *sampling(), *learning, *settings)

    def run(self, *settings: str) -> Done:
        return Fork("tests.e2e.scripted_main_rounds", *self.flags(*settings)).wait()

    def kill_when(self, reached: Callable[[], bool]) -> None:
        """Starts the rounds and sends SIGKILL as soon as a state is `reached`."""
        run = Fork("tests.e2e.scripted_main_rounds", *self.flags())
        while run.process.is_alive() and not reached():
            time.sleep(0.0005)
        run.process.kill()
        assert run.wait().status == -signal.SIGKILL


def records(run: Path) -> list[dict]:
    """Of a training run, what is no timing."""
    rows = common.read_rows(run / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


def contents(run: Path) -> dict:
    with Checkpoints(f"{run}/checkpoints", keep=None) as checkpoints:
        return checkpoints.restore({"params": None, "optimizer": None, "progress": None})


def report(output: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in common.read_rows(output / "rounds.jsonl")]


@pytest.mark.slow
def test_two_rounds_killed_in_each_part(tmp_path):
    runs = Scripted(tmp_path)
    out, first, second = runs.output, runs.output / "round_1", runs.output / "round_2"
    done = runs.run().ok()
    whole = out.rename(tmp_path / "whole")
    assert_rounds(whole, done, runs)

    def lines(path: Path) -> int:
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def saved(run: Path) -> bool:
        return any(path.name.isdigit() for path in (run / "checkpoints").glob("*"))

    runs.kill_when(lambda: saved(out / "round_0/forward"))
    assert not (out / "round_0/round.json").exists()
    runs.kill_when(lambda: lines(first / "instructions.jsonl.partial") > 2)
    assert (out / "round_0/round.json").exists() and not (first / "instructions.jsonl").exists()
    runs.kill_when(lambda: lines(first / "responses.jsonl.partial") > 1)
    assert (first / "instructions.jsonl").exists() and not (first / "candidates.jsonl").exists()
    runs.kill_when(lambda: saved(second / "reverse"))
    assert (first / "round.json").exists() and not (second / "round.json").exists()
    last = runs.run().ok()
    assert "round 1: done already" in last.stderr and f"continuing {second}/reverse after step" in last.stderr

    for number in range(3):
        here, there = (where / f"round_{number}" for where in (out, whole))
        assert {path.name for path in here.iterdir()} == {path.name for path in there.iterdir()}
        for file in there.glob("*.jsonl"):
            assert (here / file.name).read_bytes() == file.read_bytes(), file
        for direction in DIRECTIONS:
            ours, theirs = contents(here / direction), contents(there / direction)
            assert jax.tree.structure(ours) == jax.tree.structure(theirs)
            assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True))
            assert records(here / direction) == records(there / direction)
    assert report(out) == report(whole)


def assert_rounds(output: Path, done: Done, runs: Runs) -> None:
    """Each round from the models that the one before trained, on what they wrote."""
    rows = common.read_rows(output / "rounds.jsonl")
    for direction in DIRECTIONS:
        assert [row[direction]["model"] for row in rows] == [
            runs.model,
            *(f"{runs.output}/round_{n}/{direction}" for n in (0, 1)),
        ]
        for n, row in enumerate(rows):
            learnt = common.read_rows(output / f"round_{n}/{direction}.jsonl")
            assert row[direction]["rows"]["seed"] == 4 and sum(row[direction]["rows"].values()) == len(learnt)
            assert ("alpha" in row[direction]) == ("loss/synthetic" in row[direction]) == (n > 0)
            first = records(output / f"round_{n}/{direction}")[0]
            if n:  # no longer the base, whose loss round 0 began with
                assert first["loss/seed"] < records(output / f"round_0/{direction}")[0]["loss"] - 0.5
    head, *lines = done.stdout.splitlines()[-7:]
    assert head.split()[:4] == ["round", "model", "seed", "synthetic"]
    assert [line.split()[:3] for line in lines] == [[str(n), d, "4"] for n in range(3) for d in DIRECTIONS]


@pytest.mark.slow
def test_two_adapters_write_for_each_other_and_filter(tmp_path):
    """A tiny model learns the seeds by heart as adapters, writes with them, and what it wrote is filtered."""
    runs = Runs(tmp_path)
    lora = ("lora.rank=8", "lora.alpha=16", "epochs=40", "batch.examples=12", "checkpoints.every=1000")
    settings = (*training(*lora), *sampling("temperature=0.5"), "sharing=adapters", "rounds=1", "candidates=2")
    fork("main_rounds", *runs.flags(*settings)).ok()
    for number in range(2):
        for direction in DIRECTIONS:  # of the one base, not of another run
            base = json.loads((runs.output / f"round_{number}/{direction}/config.json").read_text())["base"]
            assert base["model"] == runs.model and base["step"] is None
    here = runs.output / "round_1"
    candidates = common.read_rows(here / "candidates.jsonl")
    assert len(candidates) == 12 and any((c["instruction"] or "").startswith("say that the") for c in candidates)
    kept = tmp_path / "kept.jsonl"
    given = (f"forward={here}/forward", f"reverse={here}/reverse", f"input={here}/candidates.jsonl", f"output={kept}")
    small = ("max_length=96", "batch.row_length=96", "batch.rows=2", "fraction=1.0")
    fork("main_filter", *arguments("main_filter", *given, *WORDS, *small, preset="tiny")).ok()
    dropped = json.loads(Path(f"{kept}.report.json").read_text())["dropped"]
    assert dropped.get("no_instruction", 0) == sum(c["instruction"] is None for c in candidates)
    assert {row["id"] for row in common.read_rows(kept)} == {c["id"] for c in candidates if c["instruction"]}
