"""Breaks real runs in every way that is promised to be survived, and counts: `python -m tests.faults --times=3`.

Each fault has a name; --only=NAME,NAME runs some. A line for each try, a table at the end, exit status 1 where
something did not hold. Moments and victims are drawn from the seed. As root a small tmpfs is mounted to be filled.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.e2e import common
from tests.e2e.common import Fork, arguments
from tests.footprint import Work, assert_steady
from tests.multi_process import test_commands, test_missing, test_training
from tests.multi_process.common import Group, assert_same, copy_run, logged, newest

COMMANDS = ("score", "generate", "musc_token_weights", "main_filter", "export_hf", "musc_pairs")


class Bench:
    """What the faults share: inputs, and undisturbed outputs to compare with, made when first asked for."""

    def __init__(self, directory: Path, rng: random.Random):
        self.directory, self.rng = directory, rng
        for part in ("train", "rows"):
            (directory / part).mkdir()
        self.training, self.rows = test_training.Runs(directory / "train"), test_commands.Place(directory / "rows")
        self._made: dict[str, Path] = {}
        self._work: Work | None = None

    def work(self) -> Work:
        if self._work is None:
            self._work = Work(self.directory)
        return self._work

    def undisturbed(self) -> Path:
        return self._once("training", lambda: self.training.finish("undisturbed", 2, 1))

    def command(self, name: str, out: Path) -> Group:
        """One of COMMANDS on two processes."""
        flags = dict(self.rows.flags(out))[name]
        preset = "tiny" if name == "main_filter" else ""
        module = "tests.e2e.scripted_pairs" if name == "musc_pairs" else name
        return Group(module, *arguments(name, *flags, preset=preset), processes=2, devices=1)

    def written(self, name: str) -> Path:
        def make():
            out = self.directory / f"whole_{name}"
            self.command(name, out).ok()
            return out

        return self._once(name, make)

    def _once(self, name: str, make: Callable[[], Path]) -> Path:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


def kill_training(bench: Bench, number: int) -> str:
    whole, name = bench.undisturbed(), f"killed_{number}"
    output, victim = bench.training.directory / name, bench.rng.randrange(2)
    step = bench.rng.randrange(0, test_training.STEPS)
    group = bench.training.start(name, 2, 1)
    group.until(lambda: output.exists() and logged(output) >= step)
    time.sleep(bench.rng.uniform(0, 0.5))
    group.members[victim].process.kill()
    other = group.wait()[1 - victim]
    assert other.status == 0 or f"process {victim} is gone" in other.error(noise=True)
    assert_same(bench.training.finish(name, 2, 1), whole)
    return f"process {victim} after step {step}"


def kill_command(bench: Bench, number: int) -> str:
    name, victim = COMMANDS[number % len(COMMANDS)], bench.rng.randrange(2)
    whole, out = bench.written(name), bench.directory / f"killed_{name}_{number}"
    group, delay = bench.command(name, out), bench.rng.uniform(0.5, 8)
    time.sleep(delay)
    group.members[victim].process.kill()
    other = group.wait()[1 - victim]
    assert other.status == 0 or f"process {victim}" in other.error(noise=True), other
    group = bench.command(name, out)
    again = group.wait()
    if name == "export_hf" and any("exists and is not empty" in done.stderr for done in again.values()):
        again = {}  # it was done before the kill
    [done.ok() for done in again.values()]
    assert _contents(out) == _contents(whole), (out, whole)
    return f"{name}, process {victim} after {delay:.1f} s"


def _contents(out: Path) -> dict[str, bytes]:
    """Of what a user reads; scores are stored by rows of a batch, whose packing a restart may not change."""
    return {
        str(p.relative_to(out)): p.read_bytes().replace(str(out).encode(), b"")
        for p in out.rglob("*")
        if p.suffix in (".jsonl", ".safetensors") and ".scores" not in str(p)
    }


def stop_training(bench: Bench, number: int) -> str:
    whole, name = bench.undisturbed(), f"stopped_{number}"
    output, step = bench.training.directory / name, bench.rng.randrange(1, test_training.STEPS - 3)
    victims = bench.rng.choice([(0,), (1,), (0, 1)])
    group = bench.training.start(name, 2, 1)
    group.until(lambda: logged(output) >= step)
    for victim in victims:
        os.kill(group.pids()[victim], bench.rng.choice([signal.SIGTERM, signal.SIGINT]))
    assert all("as asked" in done.stderr for done in group.ok().values())
    saved, _ = newest(output)
    assert_same(bench.training.finish(name, 2, 1), whole)
    return f"process {victims} asked after step {step}, saved at {saved}"


def missing_process(bench: Bench, number: int) -> str:
    kind, victim = ("absent", "hang", "halted")[number % 3], bench.rng.randrange(4)
    if kind == "absent":
        test_missing.test_one_never_starts(victim if victim == 0 else 3)
    elif kind == "hang":
        test_missing.test_one_hangs(victim)
    else:
        with tempfile.TemporaryDirectory() as path:
            test_missing.test_one_is_halted(Path(path), victim)
    return f"process {victim} {kind}"


def damaged_checkpoint(bench: Bench, number: int) -> str:
    whole, rng = bench.undisturbed(), bench.rng
    output = copy_run(whole, bench.training.directory / f"damaged_{number}")
    step, _ = newest(output)
    files = [p for p in (output / "checkpoints" / str(step)).rglob("*") if p.is_file() and p.stat().st_size]
    file = rng.choice([p for p in files if not p.name.startswith("checksums")])
    how = _damage(file, rng)
    done = bench.training.start(output.name, 2, 1).ok()
    said = "".join(d.stderr for d in done.values())
    assert f"checkpoints/{step}: damaged" in said and file.name in said, said[-2000:]
    assert_same(output, whole)
    return f"{how} in {file.relative_to(output)}"


def damaged_safetensors(bench: Bench, number: int) -> str:
    model = Path(shutil.copytree(bench.rows.model, bench.directory / f"model_{number}"))
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[: bench.rng.randrange(1, file.stat().st_size)])
    flags = [f"model={model}", *dict(bench.rows.flags(bench.directory / f"out_{number}"))["score"][1:]]
    line = Fork("score", *arguments("score", *flags), devices=2).wait().error()
    assert str(model) in line, line
    return "cut short"


def _damage(file: Path, rng: random.Random) -> str:
    content = bytearray(file.read_bytes())
    at = rng.randrange(len(content))
    if rng.random() < 0.3:
        file.write_bytes(content[:at])
        return "truncated"
    content[at] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return f"bit of byte {at} flipped"


def disk_full(bench: Bench, number: int) -> str:
    whole, name = bench.undisturbed(), f"full_{number}"
    output = bench.training.directory / name
    output.mkdir()
    size = bench.rng.randrange(600, 1200, 4)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", str(output)]
    if subprocess.run(mount, capture_output=True).returncode:
        return "not tried: no tmpfs can be mounted"
    try:
        lines = [done.error(noise=True) for done in bench.training.start(name, 2, 1).wait().values()]
        assert any("No space left" in line for line in lines), lines
        subprocess.run(["mount", "-o", "remount,size=64m", str(output)], check=True)
        assert_same(bench.training.finish(name, 2, 1), whole)
    finally:
        subprocess.run(["umount", str(output)])
    return f"{size} KiB: {lines[0][:120]}"


def growth(bench: Bench, number: int) -> str:
    """No fault: work that goes on for long. Training and generation in turn."""
    if number % 2:
        before, after = bench.work().generate(2000, [(400, 500), (1900, 2000)])
    else:
        seldom = ("checkpoints.every=100", "eval_every=100")  # as by default
        before, after = bench.work().train(1000, [(200, 250), (950, 1000)], *seldom)
    assert_steady(before, after, 0.02)
    return f"{'generation' if number % 2 else 'training'}: {before} -> {after}"


FAULTS = {
    "kill_training": kill_training,
    "kill_command": kill_command,
    "stop_training": stop_training,
    "missing_process": missing_process,
    "damaged_checkpoint": damaged_checkpoint,
    "damaged_safetensors": damaged_safetensors,
    "disk_full": disk_full,
    "growth": growth,
}


def tries(names: list[str], times: int) -> Iterator[tuple[str, int]]:
    return ((name, number) for name in names for number in range(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--only", default=",".join(FAULTS))
    parser.add_argument("--output", help="JSON lines, one for each try")
    given = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), random.Random(given.seed))
        for name, number in tries(given.only.split(","), given.times):
            begin = time.monotonic()
            try:
                what, held = FAULTS[name](bench, number), True
            except Exception as error:
                traceback.print_exc()
                what, held = f"{type(error).__name__}: {str(error)[:500]}", False
            row = {"fault": name, "try": number, "held": held, "what": what, "seconds": round(time.monotonic() - begin)}
            results.append(row)
            print(json.dumps(row), flush=True)
    for name in dict.fromkeys(row["fault"] for row in results):
        own = [row for row in results if row["fault"] == name]
        print(f"{name:<22} {sum(row['held'] for row in own):>3} of {len(own)} held")
    if given.output:
        common.write_rows(Path(given.output), results)
    sys.exit(0 if all(row["held"] for row in results) else 1)


if __name__ == "__main__":
    main()
