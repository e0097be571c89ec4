"""A disk that fills up: under a run's checkpoints, under rows, under an export."""

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.bench import Bench, contents
from tests.multi_process.common import Group, assert_same

NOT_TRIED = "not tried: no tmpfs can be mounted"


@contextlib.contextmanager
def _small_disk(at: Path, kib: int) -> Iterator[Callable[[], None] | None]:
    """A tmpfs of so many KiB and what makes it larger; None where none can be mounted."""
    at.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(at)]
    if subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(at)], check=True) and None
    finally:
        subprocess.run(["umount", str(at)])


def _full(group: Group) -> str:
    """Its first error, which says what is full; one that had nothing to write may have ended before."""
    lines = [done.error(noise=True) for done in group.wait().values() if done.status]
    assert any("No space left" in line for line in lines), lines
    return lines[0][:120]


def full_in_training(bench: Bench, number: int) -> str:
    whole, name = bench.undisturbed(), f"full_{number}"
    size = bench.rng.randrange(600, 1200, 4)
    with _small_disk(bench.training.directory / name, size) as enlarge:
        if enlarge is None:
            return NOT_TRIED
        line = _full(bench.training.start(name, 2, 1))
        enlarge()
        assert_same(bench.training.finish(name, 2, 1), whole)
    return f"{size} KiB: {line}"


def full_in_rows(bench: Bench, number: int) -> str:
    return _full_in(bench, number, ("generate", "musc_pairs", "musc_token_weights")[number % 3])


def full_in_export(bench: Bench, number: int) -> str:
    return _full_in(bench, number, "export_hf")


def _full_in(bench: Bench, number: int, name: str) -> str:
    whole, out = bench.written(name), bench.directory / f"full_{name}_{number}"
    pages = sum(-(-len(content) // 4096) for content in contents(whole).values())
    size = 4 * bench.rng.randrange(1, max(2, pages))  # KiB, too few for what is written
    with _small_disk(out, size) as enlarge:
        if enlarge is None:
            return NOT_TRIED
        line = _full(bench.command(name, out))
        there, expected = contents(out), contents(whole)
        assert [] == [name for name in there if name in expected and there[name] != expected[name]]
        enlarge()
        bench.command(name, out).ok()
        assert contents(out) == contents(whole)
    shutil.rmtree(out, ignore_errors=True)
    return f"{name}, {size} KiB: {line}"
