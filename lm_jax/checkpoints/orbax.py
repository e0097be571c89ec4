"""Checkpoints of a run: asynchronous, atomic, the newest few kept. The only file that imports orbax."""

import os
import sys
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from lm_jax.checkpoints.checksums import damage, write_checksums
from lm_jax.distributed.processes import everywhere, reached
from lm_jax.errors import UserError

_FAULT_BYTES = 256  # of what a process found
_APPEARS = 60.0  # seconds until a checkpoint that all have written has its name


class Checkpoints:
    """The checkpoints of one run directory; a context manager that waits for what is still being written.

    Args:
      directory: of the checkpoints; made if need be.
      keep: newest checkpoints kept; None to read only, which leaves the directory as it is.
      copy: called with each step that is whole, in the background, before the next one is written.
    """

    def __init__(self, directory: str, keep: int | None, copy: Callable[[int], None] | None = None):
        policies = ocp.training
        self._directory, self._copy = directory, copy
        self._checkpointer = ocp.training.Checkpointer(
            os.path.abspath(directory),  # orbax refuses relative paths
            # When to save is the training loop's decision, which also has to save the final step.
            save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.preservation_policies.LatestN(keep),
            # What a killed save left behind. A reader leaves it alone: it may be a save under way in another process.
            cleanup_tmp_directories=keep is not None,
        )
        self._saving: tuple[int, Future[None]] | None = None
        self._whole: int | None = None
        self._finisher = ThreadPoolExecutor(1, "checksums")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is not None and jax.process_count() > 1:
            return  # the other processes may not come to what closing waits for, and this one ends
        try:
            self.wait()
        finally:
            self._finisher.shutdown(wait=False)
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
          UserError: the save before this one failed, or this one could not begin.
        """
        self.wait()
        try:
            response = self._checkpointer.save_checkpointables_async(step, items, force=True)
        except Exception as e:
            raise self._not_written(step, e) from e
        self._saving = step, self._finisher.submit(self._finish, step, response)

    def _finish(self, step: int, response: Any) -> None:
        self._checkpointer.wait()  # a response alone does not come back from every failure
        response.result()  # ends its thread
        root, deadline = epath.Path(self._directory) / str(step), time.monotonic() + _APPEARS
        while not root.exists():  # process 0 gives it its name
            if time.monotonic() > deadline:
                raise TimeoutError(f"{root} did not appear")
            time.sleep(0.1)
        write_checksums(root, jax.process_index())
        if self._copy is not None:
            self._copy(step)

    def check(self) -> None:
        """Raises UserError where the save under way has failed by now; does not wait."""
        if self._saving is not None and self._saving[1].done():
            self.wait()

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
          UserError: it failed.
        """
        if self._saving is None:
            return
        (step, saved), self._saving = self._saving, None
        try:
            saved.result()
        except UserError as e:
            raise UserError(f"checkpoint of step {step}: not copied, though whole in {self._directory}: {e}") from e
        except Exception as e:
            raise self._not_written(step, e) from e

    def _not_written(self, step: int, error: Exception) -> UserError:
        return UserError(
            f"{self._directory}: checkpoint of step {step} could not be written ({_first_cause(error)}); the one "
            f"before it is intact: free space or mend the storage and start again to resume"
        )

    def whole_step(self) -> int | None:
        """The newest step that is whole, or None where there is none at all; damaged ones are moved away, and named.

        Raises:
          UserError: there are some, and all are damaged. They stay where they are, or the next start would find none
            and begin anew.
        """
        damaged: list[tuple[epath.Path, str]] = []
        for step in reversed(self.steps()):
            path = epath.Path(self._directory) / str(step)
            if (fault := _damage(path)) is None:
                self._whole = step
                for path, fault in damaged:
                    everywhere(partial(_move_away, path, fault), "the damaged checkpoint")
                if damaged:
                    self._checkpointer.reload()
                return step
            damaged.append((path, fault))
        if damaged:
            names = ", ".join(f"{path.name}: {fault}" for path, fault in damaged)
            raise UserError(
                f"{self._directory}: every checkpoint is damaged ({names}); restore one from a copy, or give another "
                "config.output to start anew"
            )
        return None

    def restore(self, abstract_items: dict[str, Any], step: int | None = None) -> dict[str, Any]:
        """The named items of a step, the newest by default.

        Rows of padding, which `sharding.padded_shape` has on another mesh than the one that saved, come and go.

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
        path = epath.Path(self._directory) / str(step)
        if step != self._whole and (fault := _damage(path, frozenset(abstract_items))):
            raise UserError(f"{path}: damaged: {fault}; delete that step to fall back to an older one")
        try:
            saved = self._checkpointer.checkpointables_metadata(step).metadata
            loading = ocp.options.ArrayOptions.Loading(
                enable_padding_and_truncation=_differ_in_padding(saved, abstract_items)
            )
            with ocp.Context(array_options=ocp.options.ArrayOptions(loading=loading)):
                return self._checkpointer.load_checkpointables(step, abstract_items)
        except Exception as e:
            raise UserError(
                f"{self._directory}/{step}: checkpoint does not fit this run or is damaged "
                f"({_first_cause(e)}); "
                f"use the model and optimiser it was written with, or delete that step to fall back to an older one"
            ) from e


def _differ_in_padding(saved: Any, wanted: Any) -> bool:
    """Whether arrays differ from those on disk, and all that do in rows of padding at the end alone.

    Padding is less than the parts that a first axis is cut into, so that one number of true rows must fit both.
    """
    there, here = _by_path(saved), _by_path(wanted)
    differ = [(there[path], x) for path, x in here.items() if path in there and there[path].shape != x.shape]
    return bool(differ) and all(
        len(a.shape) == len(b.shape) > 0
        and a.shape[1:] == b.shape[1:]
        and a.shape[0] - a.shape[0] // a.storage_metadata.write_shape[0] < b.shape[0]
        and b.shape[0] - b.shape[0] // b.sharding.shard_shape(b.shape)[0] < a.shape[0]
        for a, b in differ
    )


def _by_path(items: Any) -> dict[str, Any]:
    found, _ = jax.tree_util.tree_flatten_with_path(items)
    named = ((jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in found)
    return {path: leaf for path, leaf in named if hasattr(leaf, "shape")}


def _damage(path: epath.Path, items: Collection[str] | None = None) -> str | None:
    """What is wrong with a checkpoint, or with some items of it; each process looks at a part."""
    fault = damage(path, jax.process_index(), jax.process_count(), items)
    if jax.process_count() == 1:
        return fault
    from jax.experimental import multihost_utils

    reached("the look at a checkpoint")
    text = np.frombuffer((fault or "").encode()[:_FAULT_BYTES].ljust(_FAULT_BYTES, b"\0"), np.uint8)
    told = (bytes(row).rstrip(b"\0").decode(errors="replace") for row in multihost_utils.process_allgather(text))
    return next(filter(None, told), None)


def _move_away(path: epath.Path, fault: str) -> None:
    """Out of the way of the step's next save, and of every reader."""
    target = path.parent.parent / "damaged" / path.name
    target.parent.mkdir(exist_ok=True)
    if target.exists():
        target.rmtree()
    path.rename(target)
    print(f"{path}: damaged: {fault}; moved to {target}, going on from an older one", file=sys.stderr, flush=True)


def _first_cause(error: BaseException) -> str:
    """What orbax wraps in pages of its own: its first line."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def abstract_like(state: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs with shardings, for `Checkpoints.restore`."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
