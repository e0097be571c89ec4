"""Steps that are skipped because their loss or gradient is not finite: each one is told, and too many end the run."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from lm_jax.console import say
from lm_jax.data.batches import BatchIterator
from lm_jax.data.rows import replacing
from lm_jax.distributed.processes import everywhere
from lm_jax.errors import UserError
from lm_jax.training.callbacks import Callback, Metrics, Timing
from lm_jax.training.step import TrainState

_NAMED = 8  # rows of a step that a line lists


class Skips(Callback):
    """Tells of the steps that `make_train_step` skipped, and ends the run where they are too many.

    Args:
      output: the run directory.
      limit: steps of a run that may be skipped.
      last: the run's last step.
      describe: example number -> how a user finds that row.

    Attributes:
      last: the step that was skipped last, 0 before there is one.
      number: skipped steps of the run, up to that one.
    """

    def __init__(self, output: str, limit: int, last: int, batches: BatchIterator, describe: Callable[[int], str]):
        self._output, self._limit, self._last_step = output, limit, last
        self._batches, self._describe = batches, describe
        self.last = self.number = 0

    def on_metrics(self, step: int, metrics: Metrics, timing: Timing) -> None:
        """Says what there is to say of the step.

        Raises:
          UserError: it is one too many. The batch is in the run directory by then.
        """
        example = int(metrics.pop("bad_example"))
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]
        if not bad:
            return
        self.last, self.number = step, int(metrics["skipped_steps"])
        where = f" (in {self._describe(example)})" if example >= 0 else ""
        what = f"step {step}: {bad[0]} is {metrics[bad[0]]}{where}"
        examples = self._batches.plan.examples(step - 1)
        rows = ", ".join(map(self._describe, examples[:_NAMED]))
        rows += f" and {len(examples) - _NAMED} more" if len(examples) > _NAMED else ""
        if self.number <= self._limit:
            say(f"{what}; skipped, number {self.number} of at most {self._limit}; the step's rows: {rows}")
            return
        written = everywhere(lambda: self._write(step), "the batch that is written down")
        raise UserError(
            f"{what}; {self.number - 1} steps were skipped for such before and config.optim.skip_limit={self._limit}; "
            f"the step's rows: {rows}; {written}; the last checkpoint is intact: check those rows' text and weights, "
            "lower config.optim.learning_rate, or train in float32; docs/troubleshooting.md has more under NaN"
        )

    def on_state(self, step: int, state: TrainState) -> None:
        """Raises UserError where every step of the run was skipped."""
        if step == self.number == self._last_step:
            raise UserError(
                f"all {step} steps were skipped, since their loss or gradient was not finite; nothing was trained and "
                "nothing is saved: check the model and the rows, or train in float32"
            )

    def end(self, step: int, state: TrainState) -> None:
        if self.last == step:
            say(f"warning: step {step}, the last, was skipped: no loss was seen of the final parameters; evaluate them")

    def _write(self, step: int) -> str:
        """The step's stacks as arrays `T/...` [M, B, ...] and its rows' names; returns what to say of it."""
        names = [self._describe(i) for i in self._batches.plan.examples(step - 1)]
        arrays: dict[str, Any] = {"rows": np.array(names)}
        for stack in self._batches.whole(step - 1):
            arrays |= {f"{stack['tokens'].shape[-1]}/{name}": array for name, array in stack.items()}
        path = f"{self._output}/skipped/step_{step}.npz"
        try:
            with replacing(path) as out:
                np.savez(out, **arrays)
        except OSError as e:  # what is wrong with the step is the error to tell
            return f"its batch could not be written ({e.strerror or e})"
        return f"its batch is in {path}"
