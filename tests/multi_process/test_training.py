"""Training on several processes: equal to one, stopped on request, resumed on as many or on others."""

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e import common, test_skipping
from tests.e2e.common import arguments
from tests.multi_process.common import Group, assert_close, assert_same, copy_run, logged, newest

STEPS = 12


class Runs:
    def __init__(self, directory: Path):
        self.directory = directory
        self.model = common.make_model(directory / "model")
        self.pairs = common.make_pairs(directory / "pairs.jsonl", 40)
        self.held_out = common.make_pairs(directory / "held_out.jsonl", 4)

    def start(self, name: str, processes: int, devices: int, *settings: str, **given: Any) -> Group:
        """`given`: as `Group` has it, a fault or environment variables."""
        keys = (f"model={self.model}", f"input={self.pairs}", f"eval_input={self.held_out}")
        keys += (f"output={self.directory / name}", f"reference_cache={self.directory}/reference")
        keys += ("max_length=64", "batch.pairs=5", "weights=entropy", "seed=7", "epochs=9")
        keys += (f"max_steps={STEPS}", "checkpoints.every=5", f"eval_every={STEPS}", *settings)
        flags = arguments("musc_train", *keys, preset="tiny")
        cache = self.directory / "cache"
        return Group("musc_train", *flags, processes=processes, devices=devices, cache=cache, **given)

    def finish(self, name: str, processes: int, devices: int, *settings: str) -> Path:
        self.start(name, processes, devices, *settings).ok()
        return self.directory / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def two(runs) -> Path:
    return runs.finish("two", 2, 2)


def stop(runs: Runs, name: str, processes: int, devices: int) -> Path:
    """A run of which one process was asked to stop."""
    output = runs.directory / name
    group = runs.start(name, processes, devices)
    group.until(lambda: logged(output) > 1)
    os.kill(group.pids()[1], signal.SIGTERM)
    done = group.ok()
    step, _ = newest(output)
    assert 2 < step < STEPS
    for member in done.values():
        assert f"stopped after step {step} of {STEPS}, as asked" in member.stderr
    return output


@pytest.fixture(scope="module")
def stopped(runs, two) -> Path:
    return stop(runs, "stopped", 2, 2)


def test_two_processes_equal_one(runs, two):
    assert_close(two, runs.finish("one", 1, 4))


@pytest.mark.slow
def test_stopped_and_resumed_is_bit_equal(runs, two, stopped):
    copy_run(stopped, runs.directory / "resumed")
    assert_same(runs.finish("resumed", 2, 2), two)


def test_killed_and_resumed_is_bit_equal(runs, two):
    name, killed = "killed", 0  # the one that the others ask who is there
    group = runs.start(name, 2, 2)
    group.until(lambda: logged(runs.directory / name) > 6)
    group.members[killed].process.kill()
    line = group.members[1 - killed].wait().error(noise=True)
    assert f"process {killed} is gone" in line, line
    assert_same(runs.finish(name, 2, 2), two)


def test_a_step_that_is_not_finite_is_skipped_by_all(tmp_path):
    """And one too many ends all, with the whole batch written once."""
    place = test_skipping.Place(tmp_path)
    group = Group("musc_train", *place.flags("limited", "optim.skip_limit=1"), processes=2, devices=1)
    said = {i: done.error(noise=True) for i, done in group.wait().items()}
    (first,) = test_skipping.skipped_steps(tmp_path / "limited")
    # Both end with a line of their own, or the later one with the word of the one that was first
    own = [line for line in said.values() if re.match(r"step \d+: ", line)]
    second = int(own[0].split()[1].rstrip(":"))
    # The last save may be under way when all end
    assert first < second and {*test_skipping.saved_steps(tmp_path / "limited")} <= {*range(second)} - {first}
    assert all(test_skipping.NAME in line and "1 steps were skipped" in line for line in own), said
    assert all(line in own or f"process {1 - i} " in line for i, line in said.items()), said
    (path,) = (tmp_path / "limited" / "skipped").iterdir()
    assert path.name == f"step_{second}.npz"
    with np.load(path, allow_pickle=False) as batch:
        ids = np.concatenate([batch[name].ravel() for name in batch if name.endswith("/example_ids")])
        assert len(ids[ids >= 0]) == len(batch["rows"]) == 2 and test_skipping.NAME in batch["rows"]


def test_resumed_on_another_number_of_processes(runs, two, stopped):
    copy_run(stopped, runs.directory / "elastic")
    assert "after step" in runs.start("elastic", 1, 2, "mesh.tensor=2", "mesh.fsdp=1").ok()[0].stderr
    assert_close(runs.directory / "elastic", two)
    shutil.rmtree(runs.directory / "elastic")


@pytest.mark.slow
def test_stopped_on_four_processes_and_resumed_on_two_and_on_eight(runs, two):
    """Data, their order and the global batch stay; the mesh does not."""
    output = stop(runs, "four", 4, 1)
    for processes, devices in ((2, 1), (8, 1)):
        name = f"from_four_on_{processes}"
        copy_run(output, runs.directory / name)
        tensor = processes // 4 or 1
        mesh = (f"mesh.tensor={tensor}", f"mesh.fsdp={processes // tensor}")
        assert "after step" in runs.start(name, processes, devices, *mesh).ok()[0].stderr  # it did not begin anew
        assert_close(runs.directory / name, two)
        shutil.rmtree(runs.directory / name)
