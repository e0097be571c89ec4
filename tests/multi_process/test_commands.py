"""The commands that write rows and models: two processes write what one does, each file once."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lm_jax.data.score_store import ScoreStore
from musc_jax.weights.rules import DEFAULT_RULE
from tests.e2e import common
from tests.e2e.common import arguments
from tests.e2e.test_main_filter import candidate
from tests.lm_eval_tasks import make_tasks
from tests.multi_process.common import Group
from tests.unit.test_pairs import instructions

SMALL = ("batch.rows=2", "mesh.fsdp=2")


class Place:
    """The inputs, and the same outputs in a directory for each number of processes."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.model = common.make_model(directory / "model", max_position_embeddings=256)
        self.other = common.make_model(directory / "other", max_position_embeddings=256, seed=1)
        self.pairs = common.make_pairs(directory / "pairs.jsonl", perturbed_prompt=lambda i: f"say that {i}")
        self.prompts = common.write_rows(directory / "prompts.jsonl", [{"prompt": f"say {i} cats"} for i in range(9)])
        rows = [{"prompt": f"say that {i}", "response": "9 cats sat on the mat"[: 4 + i]} for i in range(9)]
        self.responses = common.write_rows(directory / "responses.jsonl", rows)
        self.candidates = common.write_rows(directory / "candidates.jsonl", [candidate(i) for i in range(12)])
        self.tasks = common.write_rows(directory / "tasks.jsonl", instructions()[:6])

    def flags(self, out: Path) -> list[tuple[str, list[str]]]:
        model = f"model={self.model}"
        scored = ("max_length=64", "batch.row_length=192", *SMALL)
        sampled = ("max_new_tokens=12", "decode.slots=4", "decode.max_length=64", "temperature=1.0", "num_samples=2")
        filtered = ("max_length=200", "batch.row_length=256", *SMALL, f"forward={self.model}", f"reverse={self.other}")
        return [
            ("score", [model, f"input={self.responses}", f"output={out}/scores.jsonl", *scored]),
            ("generate", [model, f"input={self.prompts}", f"output={out}/texts.jsonl", "mesh.fsdp=2", *sampled]),
            ("musc_token_weights", [model, f"input={self.pairs}", f"output={out}/weighed.jsonl", *scored]),
            ("main_filter", [f"input={self.candidates}", f"output={out}/kept.jsonl", *filtered]),
            ("export_hf", [model, f"output={out}/hf", "mesh.fsdp=2"]),
            ("musc_pairs", [f"input={self.tasks}", f"output={out}/made.jsonl"]),
        ]

    def run(self, name: str, processes: int, devices: int) -> Path:
        out = self.directory / name
        commands = [
            [command, arguments(command, *settings, preset="tiny" if command == "main_filter" else "")]
            for command, settings in self.flags(out)
        ]
        file = common.write_rows(self.directory / f"{name}.commands", commands)
        script = "tests.multi_process.scripted_commands"
        flags = [*arguments("export_hf", "model=x", "output=y"), f"--commands={file}"]
        group = Group(script, *flags, processes=processes, devices=devices)
        group.ok()
        return out


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def both(place) -> tuple[Path, Path]:
    return place.run("one", 1, 2), place.run("two", 2, 1)


def files(out: Path) -> list[str]:
    return sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file() and p.suffix != ".png")


@pytest.mark.slow
def test_the_files_are_the_same(both):
    one, two = map(files, both)
    assert one == two and {"scores.jsonl", "texts.jsonl", "weighed.jsonl", "kept.jsonl", "made.jsonl"} <= {*one}


@pytest.mark.parametrize("file", ["texts.jsonl", "made.jsonl", "made.jsonl.counts.json", "kept.jsonl"])
def test_rows_are_equal_to_the_byte(both, file):
    one, two = ((out / file).read_bytes() for out in both)
    assert one and one == two


@pytest.mark.parametrize("file", ["scores.jsonl", "kept.jsonl.candidates.jsonl"])
def test_scores_are_equal_but_for_rounding(both, file):
    def close(a, b):
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
        if isinstance(a, list):
            return len(a) == len(b) and all(map(close, a, b))
        return abs(a - b) < 1e-4 * max(1, abs(a)) if isinstance(a, float) else a == b

    one, two = (common.read_rows(out / file) for out in both)
    assert close(one, two)


def test_weights_are_equal_but_for_rounding(both):
    one, two = (ScoreStore.open(str(out / "weighed.weights")) for out in both)
    rows = np.arange(len(one.lengths))
    for a, b in zip(one.read(rows)[DEFAULT_RULE], two.read(rows)[DEFAULT_RULE], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    one, two = (common.read_rows(out / "weighed.jsonl") for out in both)
    assert json.dumps(one) == json.dumps(two)


def test_exports_are_equal(both):
    one, two = (load_file(out / "hf" / "model.safetensors") for out in both)
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_a_judged_benchmark_gives_the_same_files(tmp_path):
    """Responses and verdicts by the same small model, whose verdicts nobody can read."""
    model = common.make_model(tmp_path / "model", max_position_embeddings=1024)
    criteria = [["is it short?", "主需", "form", "length"], ["is it long?", "次需", "form", "length"]]
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"prompt": f"say {i} cats", "criteria": criteria} for i in range(5)]))
    small = ("decode.slots=4", "decode.max_length=1024", "max_new_tokens=8", "mesh.fsdp=2", "mesh.tensor=1")
    found = []
    for processes in (1, 2):
        out = tmp_path / f"out_{processes}"
        given = (f"input={rows}", f"output={out}", f"model={model}", f"judge.model={model}")
        flags = arguments("evaluate", *given, *small, *(f"judge.{s}" for s in small), preset="cfbench")
        Group("evaluate", *flags, processes=processes, devices=2 // processes).ok()
        found.append({str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()})
    assert found[0] == found[1] and {"scores.json", "verdicts.jsonl", "responses.jsonl"} <= found[0].keys()


@pytest.mark.slow
def test_tasks_of_lm_eval_give_the_same_results(tmp_path):
    """Choices, written answers and whole texts; of the log-probs the last digits may differ."""
    model = common.make_model(tmp_path / "model", max_position_embeddings=256)
    tasks = ",".join(make_tasks(tmp_path, number=10).values())
    small = ("max_length=64", "batch.row_length=128", "batch.rows=2", "decode.slots=4", "mesh.fsdp=2", "mesh.tensor=1")
    outs = [tmp_path / f"out_{processes}" for processes in (1, 2)]
    for processes, out in enumerate(outs, 1):
        flags = arguments("evaluate", f"models={model}", f"tasks={tasks}", f"output={out}", *small)
        Group("evaluate", *flags, processes=processes, devices=2 // processes).ok()
    one, two = map(files, outs)
    assert one == two and len(one) == 8  # a result and its samples of three tasks, and two tables
    rows = [json.loads((out / "table.json").read_text())["rows"] for out in outs]
    for a, b in zip(*rows, strict=True):
        assert a["metric"] == b["metric"] and a["values"] == pytest.approx(b["values"], rel=1e-5)
    (written,) = (name for name in one if name.endswith("write.yaml.samples.jsonl"))
    assert (outs[0] / written).read_bytes() == (outs[1] / written).read_bytes()


def test_arrays_reach_all_and_parts_of_a_round_wait_for_what_process_0_writes(tmp_path):
    flags = (f"--file={tmp_path}/rows.jsonl", *arguments("export_hf", "model=m", "output=o"))
    done = Group("tests.multi_process.scripted_parts", *flags, devices=1).ok()
    assert {i: member.stdout.split()[-1] for i, member in done.items()} == {0: "whole", 1: "whole"}
