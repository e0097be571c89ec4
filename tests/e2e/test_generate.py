"""`launch.generate` as users start it: what it refuses, and that a kill at any moment leaves no trace in the output."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.e2e import common
from tests.e2e.common import Done, arguments, fork

SMALL = ("max_new_tokens=12", "decode.slots=4", "decode.max_length=48", "decode.chunk=2")
# The command with a generator that takes its time, and needs no model
FAKE = """
from launch import cli
from tests.unit.test_generate import Fake

def command():
    from lm_jax.generation.command import GenerateConfig, generate_rows
    return GenerateConfig, lambda config: generate_rows(config, Fake(seconds=0.02))

cli.run(command)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return common.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def generate(model, tmp_path):
    """generate(*settings, rows=...): the launcher on good input but for these settings; the line of its error."""

    def call(*settings, rows=({"prompt": "say"}, {"prompt": "say it"})) -> str:
        path = common.write_rows(tmp_path / "rows.jsonl", list(rows))
        given = (f"model={model}", f"input={path}", f"output={tmp_path}/out.jsonl", *SMALL, *settings)
        return fork("generate", *arguments("generate", *given)).error()

    yield call
    assert not (tmp_path / "out.jsonl").exists()


def names(line: str, *parts: str) -> None:
    """The line names all of these."""
    assert [] == [part for part in parts if part not in line], line


# --- refused before the weights are read: the directory holds nothing but the inputs afterwards ----------------------


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("temperature=-0.5", ["config.temperature=-0.5", "0 (greedy)"]),
        ("temperature=nan", ["config.temperature=nan"]),
        ("temperature=hot", ["temperature=hot"]),
        ("top_p=0", ["config.top_p=0.0", "above 0"]),
        ("num_samples=0", ["config.num_samples=0", "at least 1"]),
        ("max_failed_share=2", ["config.max_failed_share=2.0", "between 0 and 1"]),
        ("stop=<|nope|>", ["config.stop", "'<|nope|>'", "<|im_end|>"]),
        ("stop=(999,)", ["config.stop", "999"]),
        ("stop=('',)", ["config.stop", "empty text"]),
        ("decode.slots=0", ["config.decode.slots"]),
        ("mesh.data=3", ["config.mesh"]),
        ("compute.attention=flashy", ["config.compute.attention", "flashy"]),
        ("dtype=int8", ["config.dtype", "int8"]),
        ("temprature=1", ["config.temprature", "unknown key", "temperature?"]),
        ("decode.slot=1", ["config.decode.slot", "unknown key"]),
        ("endpoint.url=http://localhost:1/v1", ["config.model", "config.endpoint.url", "leave one"]),
        ("output=", ["output", "empty"]),
        ("output=/dev/null", ["/dev/null", "ends in .jsonl"]),
        ("output=gs://bucket/out.jsonl", ["gs://bucket/out.jsonl", "local path"]),
        ("input=no.jsonl", ["no.jsonl", "check the path"]),
        ("model=nowhere", ["nowhere", "no such directory"]),
    ],
)
def test_settings(generate, tmp_path, setting, parts):
    names(generate(setting), *parts)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_what_is_not_set(tmp_path):
    path = common.write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    for settings, part in (
        ((f"input={path}", f"output={tmp_path}/out.jsonl"), "config.model"),
        (("model=x", f"output={tmp_path}/out.jsonl"), "config.input"),
        (("model=x", f"input={path}"), "config.output"),
    ):
        names(fork("generate", *arguments("generate", *settings)).error(), part, "not set")


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([{"prompt": "a"}, {"text": "b"}], ["rows.jsonl row 1", "'prompt' is missing", "it has text"]),
        ([{"prompt": "a", "id": 5}, {"prompt": "b", "id": 5}], ["rows.jsonl row 1", "same id 5", "row 0"]),
        ([{"prompt": "a", "response": "b"}], ["rows.jsonl row 0", "'response'", "rename"]),
        ([{"prompt": "a", "max_new_tokens": 13}], ["rows.jsonl row 0", "config.max_new_tokens=12", "13"]),
        ([[1]], ["rows.jsonl row 0", "object"]),
        ([], ["rows.jsonl", "empty"]),
    ],
)
def test_rows(generate, tmp_path, rows, parts):
    names(generate(rows=rows), *parts)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_outputs(generate, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "mine.jsonl").write_text("mine")
    names(generate(f"output={tmp_path}/file/out.jsonl"), f"{tmp_path}/file", "check the path")
    names(generate(f"output={tmp_path}"), "is a directory", "file name")
    names(generate(f"output={tmp_path}/mine.jsonl"), "mine.jsonl", "there already", "another output")
    names(generate(f"output={tmp_path}/rows.jsonl"), "rows.jsonl", "there already")
    names(generate("output=/proc/out.jsonl"), "/proc/out.jsonl", "check the path")
    assert (tmp_path / "mine.jsonl").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine.jsonl", "rows.jsonl"]


# --- one row's fault is its own --------------------------------------------------------------------------------------


FAULTS = (
    ("", "the prompt is empty"),
    ("the cat and the hat " * 40, "tokens"),
    (7, "must be a string or messages"),
    (None, "column 'prompt' is missing"),
    ([], "empty list of messages"),
    ([{"role": "user"}], "no content"),
)


@pytest.mark.parametrize(("prompt", "part"), FAULTS)
def test_a_prompt_that_cannot_be_answered(generate, prompt, part):
    share = "max_failed_share" if isinstance(prompt, str) else "max_dropped_share"  # the model's limits, or the row's
    names(generate(rows=[{"prompt": "say"}, {"prompt": prompt}]), "1 of 2 rows", f"config.{share}", part)


def test_faults_beside_good_rows(model, tmp_path):
    rows = [{"prompt": prompt, "id": f"bad {i}"} for i, (prompt, _) in enumerate(FAULTS)]
    rows += [{"prompt": f"say {i}", "id": f"good {i}"} for i in range(5)]
    path = common.write_rows(tmp_path / "rows.jsonl", rows)
    given = (f"model={model}", f"input={path}", f"output={tmp_path}/out.jsonl", *SMALL, "max_failed_share=0.6")
    done = fork("generate", *arguments("generate", *given, "max_dropped_share=0.6")).ok()
    assert json.loads(done.stdout)["failed"] == len(FAULTS)
    answers = common.read_rows(tmp_path / "out.jsonl")
    for answer, (prompt, part) in zip(answers[: len(FAULTS)], FAULTS, strict=True):
        assert answer["response"] is None and answer["finish_reason"] == "error" and answer["prompt"] == prompt
        assert part in answer["error"] and "\n" not in answer["error"], answer
    for answer in answers[len(FAULTS) :]:
        assert isinstance(answer["response"], str) and answer["finish_reason"] in ("stop", "length")
        assert "error" not in answer


# --- killed ----------------------------------------------------------------------------------------------------------

ROWS = 60


class Runs:
    """The same command on the same rows with several outputs; `kind`: the model, or a fake that needs none."""

    def __init__(self, directory: Path, kind: str):
        self.directory, self.kind = directory, kind
        # Lengths that differ, and one row that has no answer, so that it is tried in every run
        rows = [{"id": f"r{i}", "prompt": f"say {i}" * (1 + i % 3), "max_new_tokens": 2 + i % 11} for i in range(ROWS)]
        rows[17]["prompt"] = ""
        self.seconds_to_start = 0.0  # until the first row is kept; measured by the undisturbed run
        self.rows = common.write_rows(directory / "rows.jsonl", rows)
        self.flags = [f"input={self.rows}", *SMALL, "num_samples=2", "seed=4"]
        if kind == "fake":
            (directory / "fake.py").write_text(FAKE)
            self.command = [sys.executable, str(directory / "fake.py")]
        else:
            self.flags.append(f"model={common.make_model(directory / 'model')}")
            self.command = [sys.executable, "-m", "launch.generate"]

    def start(self, name: str, *settings: str, **options) -> subprocess.Popen:
        flags = arguments("generate", *self.flags, f"output={self.output(name)}", *settings)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen([*self.command, *flags], cwd=ROOT, env=environment, text=True, **options)

    def run(self, name: str, *settings: str) -> Done:
        process = self.start(name, *settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        stdout, stderr = process.communicate(timeout=300)
        return Done(process.returncode, stdout, stderr)

    def output(self, name: str) -> Path:
        return self.directory / name / "out.jsonl"

    def kept(self, name: str) -> int:
        """Whole lines of the journal."""
        try:
            return self.output(name).with_name("out.jsonl.partial").read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0


@pytest.fixture(scope="module", params=["fake", "model"])
def runs(request, tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def undisturbed(runs) -> bytes:
    begin = time.monotonic()
    process = runs.start("undisturbed", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not runs.kept("undisturbed"):
        time.sleep(0.001)
    runs.seconds_to_start = time.monotonic() - begin
    stdout, stderr = process.communicate(timeout=300)
    done = Done(process.returncode, stdout, stderr).ok()
    report = json.loads(done.stdout)
    assert report["rows"] == ROWS and report["failed"] == 1 and report["tokens"] > ROWS
    assert f"row {ROWS}/{ROWS}" in done.stderr and "tok/s" in done.stderr
    return runs.output("undisturbed").read_bytes()


def assert_same(runs: Runs, name: str, undisturbed: bytes) -> None:
    assert runs.output(name).read_bytes() == undisturbed
    assert sorted(p.name for p in runs.output(name).parent.iterdir()) == ["out.jsonl", "out.jsonl.run.json"]


def test_the_undisturbed_run_is_worth_comparing_with(runs, undisturbed):
    rows = [json.loads(line) for line in undisturbed.splitlines()]
    assert [row["id"] for row in rows] == [f"r{i}" for i in range(ROWS)]
    assert [i for i, row in enumerate(rows) if row["response"] is None] == [17]
    assert all(len(row["response"]) == 2 for i, row in enumerate(rows) if i != 17)
    assert len({row["response"][0] for i, row in enumerate(rows) if i != 17}) > ROWS // 2
    assert len(set(rows[0]["response"])) == 2  # two samples are two


@pytest.mark.slow
def test_killed_at_ten_random_moments(runs, undisturbed):
    """Each run goes on from the one before: three die while they start, five as rows come, two as the last ones do."""
    draw = random.Random(20)
    lines = [draw.randrange(10 * i + 2, 10 * i + 8) for i in range(5)] + [ROWS - 4]

    def ending() -> bool:
        return runs.output("killed").exists() or any(runs.output("killed").parent.glob(".out.jsonl.*.tmp"))

    statuses, kept = [], [0]
    for moment in [None, None, None, *lines, ending]:
        process = runs.start("killed", stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        if moment is None:
            time.sleep(draw.uniform(0, 0.5) * runs.seconds_to_start)
        elif moment is ending:
            while process.poll() is None and not ending():
                pass
        else:
            while process.poll() is None and runs.kept("killed") < max(moment, kept[-1] + 1):
                time.sleep(0.0005)
            time.sleep(draw.uniform(0, 0.005))
        process.send_signal(signal.SIGKILL)
        statuses.append(process.wait())
        kept.append(runs.kept("killed"))
    assert statuses[:8] == [-signal.SIGKILL] * 8 and {*statuses} <= {0, -signal.SIGKILL}, (statuses, kept)
    assert kept[1] == 0 and kept[3:9] == sorted({*kept[3:9]}), (statuses, kept)  # each came further than the last
    runs.run("killed").ok()
    assert_same(runs, "killed", undisturbed)


@pytest.mark.slow
def test_killed_in_the_middle_of_a_line_and_around_the_output(runs, undisturbed):
    process = runs.start("torn", stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while runs.kept("torn") < 10:
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    partial = runs.output("torn").with_name("out.jsonl.partial")
    content = partial.read_bytes()
    partial.write_bytes(content[: content.rindex(b"\n", 0, -1) + 30])
    runs.run("torn").ok()
    assert_same(runs, "torn", undisturbed)
    partial.write_bytes(content)  # as if it had been killed between the output and the removal of this
    done = runs.run("torn").ok()
    assert "finished already" in done.stderr and json.loads(done.stdout)["failed"] == 1
    assert_same(runs, "torn", undisturbed)


def test_a_finished_run_and_other_settings(runs, undisturbed):
    done = runs.run("undisturbed").ok()
    assert "finished already" in done.stderr and json.loads(done.stdout)["rows"] == ROWS
    line = runs.run("undisturbed", "temperature=0.25").error()
    names(line, "out.jsonl", "config.temperature=0.7, now 0.25", "another output")
    assert_same(runs, "undisturbed", undisturbed)


@pytest.mark.slow
def test_resumed_with_other_settings(runs, undisturbed):
    shutil.copytree(runs.output("undisturbed").parent, runs.output("other").parent)
    runs.output("other").unlink()
    partial = runs.output("other").with_name("out.jsonl.partial")
    process = runs.start("other", stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while runs.kept("other") < 3:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    line = runs.run("other").error()
    names(line, "out.jsonl.partial", "another process")
    process.kill()
    process.wait()
    before = partial.read_bytes()
    names(runs.run("other", "seed=9").error(), "run.json", "config.seed=4, now 9", "go on with the same settings")
    names(runs.run("other", "max_new_tokens=13").error(), "config.max_new_tokens=12, now 13")
    assert partial.read_bytes() == before
    runs.run("other", "decode.slots=3", "max_failed_share=0.2").ok()
    assert_same(runs, "other", undisturbed)


def test_batches_and_order_leave_no_trace(runs, undisturbed):
    runs.run("batches", "decode.slots=7", "decode.chunk=5").ok()
    assert_same(runs, "batches", undisturbed)
