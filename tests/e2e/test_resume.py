"""Killed at any moment and started again with the same command: the run ends as if it had never been killed.

The kills come from outside, as a machine's end does. What is compared is exact: parameters, optimiser, data position
and every metric that is no timing.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from lm_jax.checkpoints.orbax import Checkpoints
from tests.e2e import common
from tests.e2e.common import SMALL_TRAIN, TIMING, Fork, arguments, fork, run

pytestmark = pytest.mark.slow

STEPS = 240  # enough of them that a kill lands between two saves, which take as long as dozens of these small steps
SETTINGS = ("epochs=100", f"max_steps={STEPS}", "checkpoints.every=80", "eval_every=40", "weights=entropy", "seed=7")


class Runs:
    """The same training in several run directories."""

    def __init__(self, directory: Path):
        self.directory = directory
        # Many responses: the reference pass takes several batches, so a kill can land between them
        self.model = common.make_model(directory / "model")
        self.pairs = common.make_pairs(directory / "pairs.jsonl", 40)
        self.held_out = common.make_pairs(directory / "held_out.jsonl", 4)

    def flags(self, name: str, *settings: str) -> list[str]:
        given = (f"model={self.model}", f"input={self.pairs}", f"eval_input={self.held_out}")
        output = f"output={self.directory / name}"
        return arguments("musc_train", *given, output, *SMALL_TRAIN, *SETTINGS, *settings, preset="tiny")

    def kill_when(self, name: str, reached: Callable[[Path], bool], delay: float = 0.0) -> Path:
        """Starts the run and sends it SIGKILL as soon as its directory has `reached` a state."""
        output = self.directory / name
        run = Fork("musc_train", *self.flags(name))
        while not reached(output):
            assert run.process.is_alive(), f"over before it could be killed:\n{run.wait().stderr[-2000:]}"
            time.sleep(0.0005)
        time.sleep(delay)
        run.process.kill()
        assert run.wait().status == -signal.SIGKILL
        return output

    def finish(self, name: str) -> Path:
        fork("musc_train", *self.flags(name)).ok()
        return self.directory / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def undisturbed(runs) -> Path:
    run("musc_train", *runs.flags("undisturbed")).ok()
    return runs.directory / "undisturbed"


def saved_steps(output: Path) -> list[int]:
    """Of the whole checkpoints."""
    return sorted(int(p.name) for p in (output / "checkpoints").glob("*") if p.name.isdigit())


def saving(output: Path) -> list[Path]:
    """Checkpoints that are being written."""
    return list((output / "checkpoints").glob("*tmp*"))


def logged(output: Path) -> int:
    """Complete lines of metrics."""
    path = output / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saved(step: int) -> Callable[[Path], bool]:
    return lambda output: step in saved_steps(output)


def saving_step(step: int) -> Callable[[Path], bool]:
    return lambda output: any(p.name.startswith(f"{step}.") for p in saving(output))


def contents(output: Path) -> dict:
    """The last checkpoint, all of it."""
    with Checkpoints(f"{output}/checkpoints", keep=None) as checkpoints:
        return checkpoints.restore({"params": None, "optimizer": None, "progress": None}, STEPS)


def metrics(output: Path) -> list[dict]:
    return [
        {name: value for name, value in record.items() if name not in TIMING}
        for record in common.read_rows(output / "metrics.jsonl")
    ]


def assert_same(output: Path, undisturbed: Path) -> None:
    ours, theirs = contents(output), contents(undisturbed)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    leaves = zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True)
    assert [] == [path for (path, a), b in leaves if not np.array_equal(np.asarray(a), np.asarray(b))]
    assert metrics(output) == metrics(undisturbed)
    assert saved_steps(output) == saved_steps(undisturbed)
    assert not saving(output)


def test_the_undisturbed_run_is_worth_comparing_with(undisturbed):
    records = metrics(undisturbed)
    assert [r["step"] for r in records if "loss" in r] == [*range(1, STEPS + 1)]
    assert [r["step"] for r in records if "eval_loss" in r] == [*range(40, STEPS + 1, 40)]
    losses = [r["eval_loss"] for r in records if "eval_loss" in r]
    assert losses[-1] < losses[0] < np.log(2)  # it learns, so a lost or repeated step would show
    assert contents(undisturbed)["optimizer"]["step"] == STEPS


def test_killed_between_saves(runs, undisturbed):
    for last in (80, 160):  # twice in a row, each time further
        output = runs.kill_when("between", lambda o, last=last: saved(last)(o) and logged(o) > last + 20)
        assert saved_steps(output)[-1] == last and not saving(output) and logged(output) > last
    assert_same(runs.finish("between"), undisturbed)


def test_killed_while_saving(runs, undisturbed):
    runs.kill_when("saving", saving_step(80))
    output = runs.kill_when("saving", saving_step(80), delay=0.05)  # twice at the same place
    assert saving(output) and not saved_steps(output)
    output = runs.kill_when("saving", saving_step(160), delay=0.1)
    assert saving(output) and saved_steps(output) == [80]
    assert_same(runs.finish("saving"), undisturbed)


def test_killed_before_there_is_anything_to_go_on_from(runs, undisturbed):
    """While it starts, in the reference pass, and before the first checkpoint."""
    output = runs.kill_when("early", Path.exists)
    assert not logged(output)
    runs.kill_when("early", lambda o: (o / "config.json").exists())
    output = runs.kill_when("early", lambda o: any(o.glob("reference/*/*/logprobs/c/*")))
    assert not logged(output)
    output = runs.kill_when("early", lambda o: logged(o) > 5)
    assert not saved_steps(output)
    assert_same(runs.finish("early"), undisturbed)


def test_killed_anywhere(runs, undisturbed):
    """At moments that nobody chose, through the checkpoints' writing and what follows it."""
    output = runs.directory / "anywhere"
    for delay in (0.02, 0.16):
        before = saved_steps(output)
        runs.kill_when("anywhere", lambda o, b=before: saved_steps(o) != b or saving(o), delay)
    assert_same(runs.finish("anywhere"), undisturbed)


def test_a_finished_run_stays_as_it_is(runs, undisturbed):
    before = {p: p.read_bytes() for p in undisturbed.rglob("*") if p.is_file() and "tensorboard" not in p.parts}
    done = fork("musc_train", *runs.flags("undisturbed")).ok()
    assert f"continuing {undisturbed} after step {STEPS}" in done.stderr
    after = {p: p.read_bytes() for p in undisturbed.rglob("*") if p.is_file() and "tensorboard" not in p.parts}
    assert before == after


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("optim.learning_rate=1e-4", ["config.optim.learning_rate=5e-06", "now 0.0001", "config.output"]),
        ("weights=uniform", ["config.weights='entropy'", "now 'uniform'"]),
        ("batch.pairs=4", ["config.batch.pairs=5", "now 4"]),
    ],
)
def test_going_on_with_other_settings_is_refused(runs, undisturbed, setting, parts):
    line = fork("musc_train", *runs.flags("undisturbed", setting)).error()
    assert [] == [p for p in (*parts, "undisturbed") if p not in line], line


def test_what_may_change_between_a_run_and_its_continuation(runs, undisturbed):
    fork("musc_train", *runs.flags("undisturbed", "checkpoints.every=7", "compute.logprob_chunk=32")).ok()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_on_request(runs, undisturbed, number):
    for attempt in range(3):  # on a busy machine the run may end before it is looked at
        name = f"stopped_{number}_{attempt}"
        run = Fork("musc_train", *runs.flags(name))
        while logged(runs.directory / name) < 110:
            assert run.process.is_alive(), run.wait().stderr[-2000:]
            time.sleep(0.0005)
        os.kill(run.process.pid, number)
        done = run.wait().ok()
        step = saved_steps(runs.directory / name)[-1]
        if step < STEPS:
            break
    assert 100 < step < STEPS
    assert f"stopped after step {step} of {STEPS}, as asked; all is saved" in done.stderr
    assert_same(runs.finish(name), undisturbed)  # with as many checkpoints: the newest are kept


@pytest.mark.parametrize("where", ["evaluation", "save"])
def test_stopped_at_the_very_end(runs, undisturbed, where):
    """In the last step's evaluation or save: all of it is done, and the same command finds nothing left to do."""
    name = f"late_{where}"
    done = fork("tests.e2e.scripted_training", *runs.flags(name), f"--sigterm_in={where}").ok()
    assert f"all {STEPS} steps are done; stopped, as asked" in done.stderr, done.stderr[-2000:]
    assert_same(runs.directory / name, undisturbed)
    again = fork("musc_train", *runs.flags(name)).ok()
    assert f"continuing {runs.directory / name} after step {STEPS}" in again.stderr and "done: " in again.stderr
    assert "as asked" not in again.stderr
    assert_same(runs.directory / name, undisturbed)


def test_two_runs_stay_out_of_one_directory(runs, undisturbed):
    run = Fork("musc_train", *runs.flags("locked"))
    while logged(runs.directory / "locked") < 1:
        assert run.process.is_alive(), run.wait().stderr[-2000:]
        time.sleep(0.0005)
    os.kill(run.process.pid, signal.SIGSTOP)
    try:
        line = fork("musc_train", *runs.flags("locked")).error()
        assert "locked: another process is training there" in line, line
    finally:
        os.kill(run.process.pid, signal.SIGCONT)
    run.wait().ok()


def damage(step_directory: Path, how: str) -> None:
    if how == "flipped":
        data = max((step_directory / "optimizer").rglob("d/*"), key=lambda p: p.stat().st_size)
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
        return
    data = max((step_directory / "params").rglob("d/*"), key=lambda p: p.stat().st_size)
    if how == "cut short":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    elif how == "gone":
        data.unlink()
    else:
        (step_directory / "params" / "_METADATA").write_text("{")


@pytest.mark.parametrize("how", ["cut short", "gone", "no metadata", "flipped"])
def test_a_damaged_checkpoint_is_named_and_never_trained_on(runs, undisturbed, how):
    name = f"damaged {how}".replace(" ", "_")
    output = copy_of(undisturbed, name)
    damage(output / "checkpoints" / str(STEPS), how)
    what = {"cut short": "bytes instead of", "gone": "is gone", "no metadata": "_METADATA has 1 bytes"}
    export = arguments("export_hf", f"model={output}", f"output={output}-hf")
    if how == "flipped":  # in the optimizer's state, which an export does not read
        fork("export_hf", *export).ok()
    else:
        line = fork("export_hf", *export).error()
        assert f"{output}/checkpoints/{STEPS}: damaged: " in line and "delete" in line, line
        assert what[how] in line, line
        assert not Path(f"{output}-hf").exists()
    done = fork("musc_train", *runs.flags(name)).ok()
    assert f"{output}/checkpoints/{STEPS}: damaged: " in done.stderr and what.get(how, "changed") in done.stderr
    assert f"continuing {output} after step {saved_steps(undisturbed)[-2]}" in done.stderr
    assert (output / "damaged" / str(STEPS)).is_dir()
    assert_same(output, undisturbed)


def test_no_whole_checkpoint_is_left(runs, undisturbed):
    output = copy_of(undisturbed, "all_damaged")
    for step in saved_steps(output):
        damage(output / "checkpoints" / str(step), "flipped")
    for _ in range(2):  # what restarts a failed command must not begin anew
        line = fork("musc_train", *runs.flags("all_damaged")).error()
        assert "every checkpoint is damaged" in line, line
    assert saved_steps(output) == saved_steps(undisturbed)


def test_a_checkpoint_from_before_there_were_checksums(runs, undisturbed):
    """It is read, and what does not fit or cannot be read is told as it is."""
    output = copy_of(undisturbed, "unsummed")
    for file in output.glob("checkpoints/*/checksums.*"):
        file.unlink()
    damage(output / "checkpoints" / str(STEPS), "cut short")
    line = fork("musc_train", *runs.flags("unsummed")).error(noise=True)  # of reads that outlive the failed load
    assert f"{output}/checkpoints/{STEPS}" in line and "damaged" in line and "delete" in line, line
    assert "handler" not in line, line  # what orbax wraps the cause in


def copy_of(run: Path, name: str) -> Path:
    output = shutil.copytree(run, run.parent / name)
    description = json.loads((output / "config.json").read_text())
    description["config"]["output"] = str(output)
    (output / "config.json").write_text(json.dumps(description))
    return output
