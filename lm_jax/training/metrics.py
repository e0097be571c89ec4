"""Metrics of a run: metrics.jsonl and TensorBoard, written by process 0."""

import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath

from lm_jax.errors import UserError
from lm_jax.strict_json import dumps
from lm_jax.training.callbacks import Callback, Metrics, Timing

Log = Callable[[int, dict[str, float]], None]  # step, metrics


class MetricsWriter(Callback):
    """Appends one JSON object a line to `metrics.jsonl` and the same scalars to `tensorboard/`; a context manager.

    Resuming at step s drops what was logged after s, so that the file reads as if the run had never stopped.

    Args:
      loggers: what gets the same scalars too.
    """

    def __init__(self, directory: str, resume_step: int, loggers: Sequence[Log] = ()):
        self._loggers = loggers
        self._file: Any = None
        self._board: Any = None
        if jax.process_index():
            return
        from tensorboardX import SummaryWriter

        path = self._path = epath.Path(directory) / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= resume_step]
            temporary = path.parent / "metrics.jsonl.tmp"
            temporary.write_text("".join(line + "\n" for line in kept))
            temporary.replace(path)
        self._file = path.open("a")
        self._board = SummaryWriter(os.fspath(epath.Path(directory) / "tensorboard"), purge_step=resume_step + 1)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def on_metrics(self, step: int, metrics: Metrics, timing: Timing) -> None:
        self.write(step, metrics)

    def write(self, step: int, metrics: Metrics) -> None:
        """Writes scalars. NaN and infinities are null and counted in `num_nonfinite`; TensorBoard gets the count alone.

        A part `loss/NAME` that is NaN, not defined in this step, is left out.
        """
        if self._file is None:
            return
        known = {k: v for k, v in metrics.items() if not ("loss/" in k and math.isnan(v))}
        metrics = {k: v for k, v in known.items() if math.isfinite(v)}
        if nonfinite := len(known) - len(metrics):
            known["num_nonfinite"] = metrics["num_nonfinite"] = nonfinite
        try:
            self._file.write(dumps({"step": step, **known}) + "\n")
            self._file.flush()
        except OSError as e:
            raise UserError(
                f"{self._path}: {e.strerror or e}; the last checkpoint is intact: make room or mend the access, and "
                "start again to resume"
            ) from e
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        for log in self._loggers:
            log(step, metrics)

    def close(self) -> None:
        """Waits for TensorBoard's thread, which would otherwise complain of the process's end."""
        if self._file is not None:
            self._file.close()
            self._board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # a line that a kill cut short
