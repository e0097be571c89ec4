"""Runs of several real processes on this machine, with fake devices each."""

import json
import math
import shutil
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from tests.e2e.common import TIMING, Done, Fork, read_rows

TIMEOUT = 30  # seconds without a sign of a process until all end


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


class Group:
    """The same command in `processes` processes of `devices` devices; `absent` ones are never started.

    `fault`: what goes wrong in one of them, see `tests.faults.disturbed`. `settings`: environment variables.

    Attributes:
      lasted: seconds between the first one's end and the last one's, once all have ended.
    """

    def __init__(
        self,
        name: str,
        *flags: str,
        processes: int = 2,
        devices: int = 2,
        absent: tuple[int, ...] = (),
        cache: Path | None = None,
        fault: dict | None = None,
        settings: dict[str, str] | None = None,
    ):
        if fault is not None:
            settings = {"FAULT": json.dumps({"command": name, **fault})}
            name = "tests.faults.disturbed"
        one_run = [f"--coordinator_address=localhost:{free_port()}", f"--num_processes={processes}"]
        one_run += ["--start_timeout=120", f"--process_timeout={TIMEOUT}"]
        self.members = {
            i: Fork(name, *one_run, f"--process_id={i}", *flags, devices=devices, cache=cache, settings=settings)
            for i in range(processes)
            if i not in absent
        }

    def pids(self) -> dict[int, int]:
        return {i: member.process.pid for i, member in self.members.items()}

    def wait(self, but: tuple[int, ...] = ()) -> dict[int, Done]:
        """How those ended that are not in `but`."""
        members = {i: member for i, member in self.members.items() if i not in but}
        left, ended = {member.process.sentinel for member in members.values()}, []
        while left and (now := wait(left, 900)):
            left -= {*now}
            ended.append(time.monotonic())
        self.lasted = ended[-1] - ended[0] if ended and not left else math.inf
        return {i: member.wait() for i, member in members.items()}

    def ok(self) -> dict[int, Done]:
        return {i: done.ok() for i, done in self.wait().items()}

    def until(self, reached: Callable[[], bool]) -> None:
        """Waits for a state of the run, which must come before its end."""
        while not reached():
            assert all(m.process.is_alive() for m in self.members.values()), self.wait()
            time.sleep(0.002)


def logged(output: Path) -> int:
    """Steps in the metrics."""
    path = output / "metrics.jsonl"
    return sum(b'"loss"' in line for line in path.read_bytes().splitlines()) if path.exists() else 0


def metrics(output: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in TIMING} for record in read_rows(output / "metrics.jsonl")]


def newest(output: Path) -> tuple[int, dict]:
    """The last checkpoint, all of it."""
    with ocp.training.Checkpointer(output / "checkpoints") as checkpointer:
        step = checkpointer.latest.step
        items = checkpointer.checkpointables_metadata(step).metadata
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = {
            name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), items[name])
            for name in ("params", "optimizer")
        }
        return step, checkpointer.load_checkpointables(step, {**wanted, "progress": None})


def assert_same(output: Path, expected: Path) -> None:
    """To the bit: parameters, optimiser, data position, metrics."""
    (step, ours), (their_step, theirs) = newest(output), newest(expected)
    assert step == their_step
    leaves = zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True)
    assert [] == [path for (path, a), b in leaves if not np.array_equal(np.asarray(a), np.asarray(b))]
    assert metrics(output) == metrics(expected)


def assert_close(output: Path, expected: Path, tolerance: float = 1e-4) -> None:
    """The same steps on the same data, but for the order of sums."""
    ours, theirs = metrics(output), metrics(expected)
    assert [record.keys() for record in ours] == [record.keys() for record in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for name, value in b.items():
            if name == "padding_fraction":  # rows are cut for the devices at hand
                continue
            exact = name in ("step", "num_tokens", "num_flops", "pairs")
            assert a[name] == value if exact else abs(a[name] - value) < tolerance * max(abs(value), 0.1), (a, b, name)


def copy_run(run: Path, target: Path) -> Path:
    """The same run elsewhere."""
    shutil.copytree(run, target)
    settings = json.loads((target / "config.json").read_text())
    settings["config"]["output"] = str(target)
    (target / "config.json").write_text(json.dumps(settings))
    return target
