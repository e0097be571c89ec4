"""What the faults share: small inputs and undisturbed outputs."""

import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.e2e import test_main_rounds, test_musc_rounds
from tests.e2e.common import Done, arguments
from tests.footprint import Work
from tests.multi_process import test_commands, test_training
from tests.multi_process.common import TIMEOUT, Group, assert_same

COMMANDS = ("score", "generate", "musc_token_weights", "main_filter", "export_hf", "musc_pairs")
LATE = 30  # seconds that ending may take on a machine that does other things too

_ROUNDS = {
    "main_rounds": ("tests.e2e.scripted_main_rounds", test_main_rounds.Scripted, ()),
    "musc_rounds": ("tests.e2e.scripted_rounds", test_musc_rounds.Runs, ("train.batch.pairs=6",)),
}


class Bench:
    """What the faults share: inputs, and undisturbed outputs to compare with, made when first asked for.

    Attributes:
      rng: of this try.
      waited: seconds that a process of this try waited for another one; None where none did.
    """

    def __init__(self, directory: Path):
        self.directory, self.rng = directory, random.Random()
        self.waited: float | None = None
        for part in ("train", "rows", "main_rounds", "musc_rounds"):
            (directory / part).mkdir()
        self.training, self.rows = test_training.Runs(directory / "train"), test_commands.Place(directory / "rows")
        self._made: dict[str, Any] = {}

    def work(self) -> Work:
        return self._once("work", lambda: Work(self.directory))

    def undisturbed(self) -> Path:
        return self._once("training", lambda: self.training.finish("undisturbed", 2, 1))

    def ended(self, group: Group, since: float | None = None) -> dict[int, Done]:
        """All processes have ended in time: after the first one, or since a moment of `time.time`."""
        done = group.wait()
        self.waited = group.lasted if since is None else time.time() - since
        assert self.waited < TIMEOUT + LATE, (self.waited, done)
        return done

    def command(self, name: str, out: Path, fault: dict | None = None) -> Group:
        """One of COMMANDS on two processes."""
        flags = dict(self.rows.flags(out))[name]
        preset = "tiny" if name == "main_filter" else ""
        module = "tests.e2e.scripted_pairs" if name == "musc_pairs" else name
        return Group(module, *arguments(name, *flags, preset=preset), processes=2, devices=1, fault=fault)

    def rounds(self, name: str) -> Group:
        """`main_rounds` or `musc_rounds` on two processes; they go on with what lies at `rounds_output`."""
        script, make, settings = _ROUNDS[name]
        runs = self._once(f"{name} inputs", lambda: make(self.directory / name))
        return Group(script, *runs.flags(*settings), processes=2, devices=1)

    def rounds_output(self, name: str) -> Path:
        return self.directory / name / "out"

    def whole_rounds(self, name: str) -> Path:
        def make():
            self.rounds(name).ok()
            return self.rounds_output(name).rename(self.directory / name / "whole")

        return self._once(name, make)

    def written(self, name: str) -> Path:
        def make():
            out = self.directory / f"whole_{name}"
            self.command(name, out).ok()
            return out

        return self._once(name, make)

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


def contents(out: Path) -> dict[str, bytes]:
    """Of what a user reads; scores are stored by rows of a batch, whose packing a restart may not change."""
    return {
        str(p.relative_to(out)): p.read_bytes().replace(str(out).encode(), b"")
        for p in out.rglob("*")
        if p.suffix in (".jsonl", ".safetensors") and ".scores" not in str(p)
    }


def assert_same_rounds(out: Path, whole: Path) -> None:
    """Rows to the byte, trainings to the bit; the seconds of the reports differ."""
    for run in sorted(path.parent for path in whole.rglob("metrics.jsonl")):
        assert_same(out / run.relative_to(whole), run)
    timed = ("metrics.jsonl", "rounds.jsonl")
    # A store is named by a digest of what was weighed, of whose command the coordinator's port is a part
    ours, theirs = (
        {k: re.sub(rb"[0-9a-f]{16,}", b"", v) for k, v in contents(at).items() if not k.endswith(timed)}
        for at in (out, whole)
    )
    assert ours == theirs, [name for name in theirs if ours.get(name) != theirs[name]]


def said(group: Group) -> str:
    """All that the processes wrote for people, when they have ended."""
    return "".join(done.stderr for done in group.wait().values())
