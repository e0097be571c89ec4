"""What a command holds while it works, and whether that grows: memory, threads, open files, processes of its own."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from tests.e2e import common
from tests.e2e.common import SMALL_TRAIN, Fork, arguments

EVERY = 0.02  # seconds between two looks
_FEW = 16  # threads and files that a save under way holds


@dataclasses.dataclass(frozen=True)
class Footprint:
    resident: float  # bytes
    threads: float
    files: float
    children: float

    def __str__(self) -> str:
        counts = f"{self.threads:g} threads, {self.files:g} files, {self.children:g} processes"
        return f"{self.resident / 2**20:.1f} MiB, {counts}"


def footprint(pid: int) -> Footprint | None:
    """Of a process that may have ended meanwhile."""
    process = Path(f"/proc/{pid}")
    try:
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        children = [task.read_text().split() for task in process.glob("task/*/children")]
        resident = int(status["VmRSS"].split()[0]) * 1024
        return Footprint(resident, int(status["Threads"]), len([*(process / "fd").iterdir()]), sum(map(len, children)))
    except (OSError, KeyError):
        return None


def follow(command: Fork, done: Callable[[], int], spans: list[tuple[int, int]]) -> list[Footprint]:
    """The medians over the looks at each span of work done; a save or a log that comes and goes does not count."""
    looks: list[list[Footprint]] = [[] for _ in spans]
    while command.process.is_alive():
        number, look = done(), footprint(command.process.pid)
        for (begin, end), taken in zip(spans, looks, strict=True):
            if look is not None and begin <= number < end:
                taken.append(look)
        time.sleep(EVERY)
    command.wait().ok()
    assert all(len(taken) >= 5 for taken in looks), f"too fast to be looked at: {[*map(len, looks)]}"
    return [Footprint(*map(statistics.median, zip(*map(dataclasses.astuple, t), strict=True))) for t in looks]


class Work:
    """Training and generation with a small model, of any length."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._model = common.make_model(directory / "growing", max_position_embeddings=256)
        self._pairs = common.make_pairs(directory / "growing.jsonl", 40)

    def train(
        self, steps: int, spans: list[tuple[int, int]], *more: str, module: str = "musc_train"
    ) -> list[Footprint]:
        """With evaluations and checkpoints all along. `module` may be one of the tests that runs the launcher."""
        output = self._directory / f"trained_{steps}{''.join(more)}"
        given = (f"model={self._model}", f"input={self._pairs}", f"eval_input={self._pairs}", f"output={output}")
        given += (*SMALL_TRAIN, "epochs=1000", f"max_steps={steps}", "checkpoints.every=20", "eval_every=20", *more)
        return self._follow(module, arguments("musc_train", *given, preset="tiny"), output / "metrics.jsonl", spans)

    def generate(self, rows: int, spans: list[tuple[int, int]]) -> list[Footprint]:
        output = self._directory / f"generated_{rows}.jsonl"
        prompts = [{"prompt": f"say {i} cats sat on {'the hat and ' * (i % 9)}the mat"} for i in range(rows)]
        given = (f"model={self._model}", f"output={output}", "decode.slots=8", "decode.max_length=128")
        given += (f"input={common.write_rows(self._directory / f'prompts_{rows}.jsonl', prompts)}",)
        given += ("max_new_tokens=24", "temperature=1.0")
        return self._follow("generate", arguments("generate", *given), Path(f"{output}.partial"), spans)

    def _follow(self, module: str, flags: list[str], log: Path, spans: list[tuple[int, int]]) -> list[Footprint]:
        lines = _Lines(log)
        return follow(Fork(module, *flags), lines.count, spans)


class _Lines:
    """Of a file that grows."""

    def __init__(self, path: Path):
        self._path, self._read, self._number = path, 0, 0

    def count(self) -> int:
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._read)
                block = file.read()
            self._read, self._number = self._read + len(block), self._number + block.count(b"\n")
        return self._number


def assert_steady(before: Footprint, after: Footprint, growth: float) -> None:
    """`growth`: share by which the memory may grow. Saves come and go; processes do not grow."""
    what = f"{before} -> {after}"
    assert after.resident < (1 + growth) * before.resident, what
    assert after.threads <= before.threads + _FEW and after.files <= before.files + _FEW, what
    assert after.children <= before.children, what
