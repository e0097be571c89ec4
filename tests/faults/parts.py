"""A part of the work that fails, hangs, kills its process or is asked to stop, in one of two processes."""

import random
import shutil
from pathlib import Path

from tests.faults.bench import Bench, contents
from tests.multi_process.common import Group, assert_same, copy_run

_SAVE = "lm_jax.checkpoints.orbax:_Save.meet"
# Name, command, function, which call, in which processes, what. A hang where a process says that it is at work, as in
# tokenising, is what the others wait for.
_PARTS = (
    ("writing", "musc_train", _SAVE, 1, (0, 1), ("fail", "hang", "kill", "stop")),
    ("naming", "musc_train", _SAVE, 2, (0,), ("fail", "hang", "kill", "stop")),
    ("summing", "musc_train", "lm_jax.checkpoints.orbax:write_checksums", 1, (0, 1), ("fail", "hang", "kill", "stop")),
    ("checking", "resumed", "lm_jax.checkpoints.orbax:damage", 1, (0, 1), ("fail", "hang", "kill")),
    ("restoring", "resumed", "lm_jax.checkpoints.orbax:v1.load_checkpointables", 1, (0, 1), ("fail", "hang", "kill")),
    ("loading", "musc_train", "lm_jax.checkpoints.hf:load_params", 1, (0, 1), ("fail", "hang", "kill")),
    ("tokenising", "musc_train", "lm_jax.data.text:TextEncoder.encode_many", 1, (0, 1), ("fail", "kill")),
    ("reference", "reference", "lm_jax.data.score_store:ScoreStore.write", 1, (0,), ("fail", "hang", "kill")),
    ("evaluation", "musc_train", "lm_jax.training.trainer:Trainer._evaluation()", 1, (0, 1), ("fail", "hang", "kill")),
    ("metrics", "musc_train", "lm_jax.training.metrics:MetricsWriter.write", 3, (0,), ("fail", "hang", "kill")),
    ("plots", "musc_train", "lm_jax.training.plots:plot_run", 1, (0,), ("fail", "hang", "kill")),
    ("exporting", "export_hf", "lm_jax.checkpoints.hf:save_file", 1, (0,), ("fail", "hang", "kill")),
    ("answering", "generate", "lm_jax.data.journal:Journal.append", 1, (0,), ("fail", "hang", "kill")),
    ("weighing", "musc_token_weights", "lm_jax.data.score_store:ScoreStore.write", 1, (0,), ("fail", "hang", "kill")),
)
# Every one of them, in no order that the seeds follow
TRIES = [
    (name, command, where, call, process, does)
    for name, command, where, call, processes, does_all in _PARTS
    for process in processes
    for does in does_all
]
random.Random(0).shuffle(TRIES)


def part(bench: Bench, seed: int) -> str:
    name, command, where, call, process, does = TRIES[seed % len(TRIES)]
    at = bench.directory / f"part_{seed}"
    mark = at.with_suffix(".mark")
    fault = {"process": process, "where": where, "call": call, "does": does, "mark": str(mark)}
    work = _Training(bench, at.name, command) if command in _Training.KINDS else _Command(bench, at, command)
    group = work.start(fault)
    group.until(mark.exists)
    done = bench.ended(group, mark.stat().st_mtime if does == "hang" else None)
    if does == "stop":
        assert all(d.status == 0 for d in done.values()), done
    else:
        lines = {i: d.error(noise=True) for i, d in done.items() if not (does == "kill" and i == process)}
        named = {"fail": "No space left", "hang": "(--process_timeout)", "kill": f"process {process} is gone"}[does]
        assert all(named in line for line in lines.values()), lines
        assert all(f"process {process} " in line for i, line in lines.items() if i != process), lines
    work.finish()
    return f"{name}: {does} in process {process}"


class _Training:
    KINDS = ("musc_train", "resumed", "reference")

    def __init__(self, bench: Bench, name: str, kind: str):
        self._runs, self._name, self._whole = bench.training, name, bench.undisturbed()
        self._settings = (f"reference_cache={bench.directory}/{name}",) if kind == "reference" else ()
        if kind == "resumed":
            output = copy_run(self._whole, self._runs.directory / name)
            newest = max((output / "checkpoints").iterdir(), key=lambda path: int(path.name))
            shutil.rmtree(newest)

    def start(self, fault: dict) -> Group:
        return self._runs.start(self._name, 2, 1, *self._settings, fault=fault)

    def finish(self) -> None:
        assert_same(self._runs.finish(self._name, 2, 1, *self._settings), self._whole)


class _Command:
    def __init__(self, bench: Bench, out: Path, name: str):
        self._bench, self._out, self._name, self._whole = bench, out, name, bench.written(name)

    def start(self, fault: dict) -> Group:
        return self._bench.command(self._name, self._out, fault)

    def finish(self) -> None:
        self._bench.command(self._name, self._out).ok()
        assert contents(self._out) == contents(self._whole)
