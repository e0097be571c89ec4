"""Checkpoints of a run: asynchronous, atomic, the newest few kept. The only file that imports orbax."""

import os
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from lm_jax.errors import UserError


class Checkpoints:
    """The checkpoints of one run directory; a context manager that waits for what is still being written.

    Args:
      directory: of the checkpoints; made if need be.
      keep: newest checkpoints kept; None to read only, which leaves the directory as it is.
    """

    def __init__(self, directory: str, keep: int | None):
        policies = ocp.training
        self._directory = directory
        absolute = directory if "://" in directory else os.path.abspath(directory)  # orbax refuses relative paths
        self._checkpointer = ocp.training.Checkpointer(
            absolute,
            # When to save is the training loop's decision, which also has to save the final step.
            save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.preservation_policies.LatestN(keep),
            # What a killed save left behind. A reader leaves it alone: it may be a save under way in another process.
            cleanup_tmp_directories=keep is not None,
        )
        self._saving = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        return sorted(c.step for c in self._checkpointer.checkpoints)

    def save(self, step: int, items: dict[str, Any]) -> None:
        """Starts writing; returns once the arrays are copied, so the caller may donate them.

        Args:
          step: optimiser steps done.
          items: name -> pytree of arrays, ints, floats and strings. What is restored apart is saved apart.

        Raises:
          UserError: the save before this one failed.
        """
        self.wait()
        self._saving = step, self._checkpointer.save_checkpointables_async(step, items, force=True)

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
          UserError: it failed.
        """
        if self._saving is None:
            return
        (step, response), self._saving = self._saving, None
        try:
            response.result()
        except Exception as e:
            raise UserError(
                f"{self._directory}: checkpoint of step {step} could not be written ({e}); the one before it is "
                f"intact: free space or mend the storage and start again to resume"
            ) from e

    def restore(self, abstract_items: dict[str, Any], step: int | None = None) -> dict[str, Any]:
        """The named items of a step, the newest by default.

        Args:
          abstract_items: name -> pytree of ShapeDtypeStructs whose shardings the arrays are born with; None takes an
            item as it was saved, for those without arrays.

        Raises:
          UserError: no such checkpoint, or one that does not fit (another model or optimiser).
        """
        steps = self.steps()
        step = steps[-1] if step is None and steps else step
        if step not in steps:
            raise UserError(f"{self._directory}: no checkpoint of step {step}; there are {steps or 'none'}")
        try:
            return self._checkpointer.load_checkpointables(step, abstract_items)
        except Exception as e:
            raise UserError(
                f"{self._directory}/{step}: checkpoint does not fit this run or is damaged "
                f"({_first_cause(e)}); "
                f"use the model and optimiser it was written with, or delete that step to fall back to an older one"
            ) from e


def _first_cause(error: BaseException) -> str:
    """What orbax wraps in pages of its own: its first line."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def abstract_like(state: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs with shardings, for `Checkpoints.restore`."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
