"""A disk that fills up, is lost, or takes no more: under a run's checkpoints, under rows, under an export."""

import contextlib
import ctypes
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.bench import Bench, contents
from tests.multi_process import test_training
from tests.multi_process.common import Group, assert_same, logged

NOT_TRIED = "not tried: nothing can be mounted"
_LOST = {
    "read-only": "Read-only file system",
    "gone": "Transport endpoint is not connected",
    "silent": "(--process_timeout)",
    "limited": "File too large",
}


def _mount(*arguments: str) -> bool:
    return not subprocess.run(["mount", *arguments], capture_output=True).returncode


@contextlib.contextmanager
def _small_disk(at: Path, kib: int) -> Iterator[Callable[[], None] | None]:
    """A tmpfs of so many KiB and what makes it larger; None where none can be mounted."""
    at.mkdir()
    if not _mount("-t", "tmpfs", "-o", f"size={kib}k", "none", str(at)):
        yield None
        return
    try:
        yield lambda: _mount("-o", "remount,size=64m", str(at)) and None
    finally:
        subprocess.run(["umount", str(at)])


@contextlib.contextmanager
def lost_disk(at: Path, how: str) -> Iterator[bool]:
    """Within, what lies at `at` is read-only, gone, or on a disk that does not answer; False where it cannot be."""
    fuse = None
    if how == "read-only":
        mounted = _mount("--bind", str(at), str(at)) and _mount("-o", "remount,bind,ro", str(at))
    else:
        # A file system whose server says nothing, or which has none any more
        fuse = os.open("/dev/fuse", os.O_RDWR) if os.access("/dev/fuse", os.W_OK) else None
        given = f"fd={fuse},rootmode=40000,user_id=0,group_id=0".encode()
        mounted = fuse is not None and not ctypes.CDLL(None).mount(b"lost", bytes(at), b"fuse", 0, given)
        if fuse is not None and how == "gone":
            os.close(fuse)
            fuse = None
    try:
        yield mounted
    finally:
        if fuse is not None:
            os.close(fuse)
        subprocess.run(["umount", "-l", str(at)], capture_output=True)


def lost_in_training(bench: Bench, seed: int) -> str:
    """At any moment, for good; or only what one process writes is refused, its large files."""
    whole, name, rng = bench.undisturbed(), f"lost_{seed}", bench.rng
    how, output = list(_LOST)[seed % len(_LOST)], bench.training.directory / name
    victim, step = rng.randrange(2), rng.randrange(0, test_training.STEPS)
    group = bench.training.start(name, 2, 1)
    group.until(lambda: (output / "checkpoints").exists() and logged(output) >= step)
    time.sleep(rng.uniform(0, 0.5))
    with contextlib.ExitStack() as stack:
        if how == "limited":
            resource.prlimit(group.pids()[victim], resource.RLIMIT_FSIZE, (8192, 8192))
        elif not stack.enter_context(lost_disk(output / "checkpoints", how)):
            group.wait()
            return NOT_TRIED
        lines = [done.error(noise=True) for done in bench.ended(group).values() if done.status]
        assert not lines or any(_LOST[how] in line for line in lines), lines  # it may have ended before
    assert_same(bench.training.finish(name, 2, 1), whole)
    return f"{how} after step {step}: {lines[0][:120] if lines else 'at its end'}"


def _full(bench: Bench, group: Group) -> str:
    """Its first error, which says what is full; one that had nothing to write may have ended before."""
    lines = [done.error(noise=True) for done in bench.ended(group).values() if done.status]
    assert any("No space left" in line for line in lines), lines
    return lines[0][:120]


def full_in_training(bench: Bench, seed: int) -> str:
    whole, name = bench.undisturbed(), f"full_{seed}"
    size = bench.rng.randrange(600, 1200, 4)
    with _small_disk(bench.training.directory / name, size) as enlarge:
        if enlarge is None:
            return NOT_TRIED
        line = _full(bench, bench.training.start(name, 2, 1))
        enlarge()
        assert_same(bench.training.finish(name, 2, 1), whole)
    return f"{size} KiB: {line}"


def full_in_rows(bench: Bench, seed: int) -> str:
    return _full_in(bench, seed, ("generate", "musc_pairs", "musc_token_weights")[seed % 3])


def full_in_export(bench: Bench, seed: int) -> str:
    return _full_in(bench, seed, "export_hf")


def _full_in(bench: Bench, seed: int, name: str) -> str:
    whole, out = bench.written(name), bench.directory / f"full_{name}_{seed}"
    pages = sum(-(-len(content) // 4096) for content in contents(whole).values())
    size = 4 * bench.rng.randrange(1, max(2, pages))  # KiB, too few for what is written
    with _small_disk(out, size) as enlarge:
        if enlarge is None:
            return NOT_TRIED
        line = _full(bench, bench.command(name, out))
        there, expected = contents(out), contents(whole)
        assert [] == [name for name in there if name in expected and there[name] != expected[name]]
        enlarge()
        bench.command(name, out).ok()
        assert contents(out) == contents(whole)
    shutil.rmtree(out, ignore_errors=True)
    return f"{name}, {size} KiB: {line}"
