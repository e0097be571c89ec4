"""A process that does not start, dies, halts, hangs or fails ends the run of all, with its name and in time.

The steps gather over the devices, where the others wait without end or break, as they would in training.
"""

import os
import signal
import time

import pytest

from tests.e2e.common import arguments
from tests.multi_process.common import Group

TIMEOUT = 8  # seconds, where it is waited for
LATE = 20  # seconds from the first one's end to the last one's
SOON = f"--process_timeout={TIMEOUT}"
FLAGS = arguments("export_hf", "model=x", "output=y")
SCRIPT = "tests.multi_process.scripted_steps"


def start(*flags: str, processes: int = 4, absent=()) -> Group:
    return Group(SCRIPT, *FLAGS, *flags, processes=processes, devices=1, absent=absent)


def ended(group: Group, missing: tuple[int, ...] = ()) -> dict[int, str]:
    """The error lines of those that are not missing; all end together."""
    lines = {i: done.error(noise=True) for i, done in group.wait(missing).items()}
    assert group.lasted < LATE, group.lasted
    return lines


def pids(group: Group, path) -> dict[int, int]:
    files = {i: path.with_name(f"{path.name}.{i}") for i in group.members}
    group.until(lambda: all(f.exists() and f.read_text() for f in files.values()))
    time.sleep(0.5)  # into the steps
    return {i: int(f.read_text()) for i, f in files.items()}


def test_nothing_is_wrong():
    group = start("--steps=5")
    assert [done.stdout.split()[-1] for done in group.ok().values()] == ["70"] * 4  # gloo writes there too


@pytest.mark.parametrize("absent", [3, 0])
def test_one_never_starts(absent):
    lines = ended(start("--start_timeout=15", absent=(absent,)))
    for line in lines.values():
        assert ("process 3 of 4 did not start" if absent else "process 0 did not answer") in line
        assert "within 15 s (--start_timeout)" in line


@pytest.mark.parametrize("killed", [2, 0])
def test_one_is_killed(tmp_path, killed):
    group = start("--steps=100000", f"--pids={tmp_path}/pid")
    os.kill(pids(group, tmp_path / "pid")[killed], signal.SIGKILL)
    for line in ended(group, (killed,)).values():
        assert f"process {killed} is gone" in line and "run the same command again" in line


@pytest.mark.parametrize("stopped", [1, 0])
def test_one_is_halted(tmp_path, stopped):
    group = start("--steps=100000", f"--pids={tmp_path}/pid", SOON)
    pid = pids(group, tmp_path / "pid")[stopped]
    os.kill(pid, signal.SIGSTOP)
    try:
        for line in ended(group, (stopped,)).values():
            assert f"process {stopped} gave no sign of life within {TIMEOUT} s" in line
    finally:
        os.kill(pid, signal.SIGCONT)
    assert group.members[stopped].wait().status == 1  # it learns of it and ends too


@pytest.mark.parametrize("hanging", [1, 0])
def test_one_hangs(hanging):
    for line in ended(start(f"--fault={hanging}:hang:3", SOON)).values():
        assert f"process {hanging} did not come to step 3 within {TIMEOUT} s" in line and "after step 2" in line


@pytest.mark.parametrize("waiting", ["1", "all"])
def test_a_disk_that_does_not_answer(waiting):
    """Though nobody is behind, where all wait for it."""
    lines = ended(start(f"--fault={waiting}:disk:3", SOON, processes=2))
    said = f"the file: nothing was read or written within {TIMEOUT} s (--process_timeout)"
    assert all(said in line or "process 1 did not come to step 3" in line for line in lines.values()), lines


def test_a_main_thread_that_the_kernel_keeps(tmp_path):
    """A file system whose server says nothing."""
    from tests.faults.disk import lost_disk

    with lost_disk(tmp_path, "silent") as mounted:
        if not mounted:
            pytest.skip("no such file system can be mounted here")
        lines = ended(start("--steps=100000", f"--pids={tmp_path}/pid", SOON, processes=2))
    assert all(f"the disk has not answered within {TIMEOUT} s (--process_timeout)" in line for line in lines.values())


def test_one_that_is_at_work_may_take_its_time():
    start("--fault=0:busy:3", "--process_timeout=2", processes=2).ok()
    start("--alone=6", "--process_timeout=2", processes=2).ok()


OWN = {
    "error": "the input: row 3 is wrong; mend it",
    "crash": "ZeroDivisionError: by accident",
    "memory": "out of memory (RESOURCE_EXHAUSTED: 12 GB)",
}


@pytest.mark.parametrize(("failing", "what"), [(2, "error"), (0, "error"), (2, "crash"), (1, "memory")])
def test_one_fails(failing, what):
    lines = ended(start(f"--fault={failing}:{what}:2"))
    own = OWN[what]
    assert lines.pop(failing).startswith(own)
    for line in lines.values():
        assert line.startswith(f"process {failing} ended with an error: {own}")
