"""Processes that are killed, stopped, halted, or never start."""

import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

from tests.faults.bench import COMMANDS, Bench, assert_same_rounds, contents
from tests.multi_process import test_missing, test_training
from tests.multi_process.common import assert_same, logged, newest


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
    assert contents(out) == contents(whole), (out, whole)
    return f"{name}, process {victim} after {delay:.1f} s"


def kill_rounds(bench: Bench, number: int) -> str:
    name, victim = ("main_rounds", "musc_rounds")[number % 2], bench.rng.randrange(2)
    whole, out = bench.whole_rounds(name), bench.rounds_output(name)
    shutil.rmtree(out, ignore_errors=True)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.jsonl"))
    begun = out / bench.rng.choice(files)
    group = bench.rounds(name)
    group.until(begun.exists)
    time.sleep(bench.rng.uniform(0, 1.5))
    group.members[victim].process.kill()
    other = group.wait()[1 - victim]
    assert other.status == 0 or f"process {victim}" in other.error(noise=True), other
    bench.rounds(name).ok()
    assert_same_rounds(out, whole)
    return f"{name}, process {victim} once there was {begun.relative_to(out)}"


def stop_training(bench: Bench, number: int) -> str:
    whole, name = bench.undisturbed(), f"stopped_{number}"
    output, step = bench.training.directory / name, bench.rng.randrange(1, test_training.STEPS // 2)
    victims = bench.rng.choice([(0,), (1,), (0, 1)])
    group = bench.training.start(name, 2, 1)
    group.until(lambda: logged(output) >= step)
    for victim in victims:
        os.kill(group.pids()[victim], bench.rng.choice([signal.SIGTERM, signal.SIGINT]))
    heeded = {"as asked" in done.stderr for done in group.ok().values()}
    saved, _ = newest(output)
    assert heeded == {saved < test_training.STEPS}, heeded  # it may come after the end
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
