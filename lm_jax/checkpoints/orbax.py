"""Checkpoints of a run: asynchronous, atomic, the newest few kept. The only file that imports orbax.

A save goes on beside the training, in three parts: every process writes what its devices hold, process 0 joins that and
gives it its name, and each process sums its own files and copies them. What fails in one process ends all at once; who
waits for a save comes to a point after each part, so that a process that is behind there is named as anywhere else.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import multihost, v1

from lm_jax.checkpoints.checksums import damage, write_checksums
from lm_jax.distributed.processes import barrier, everywhere, fail, moving, reached
from lm_jax.errors import UserError

_FAULT_BYTES = 256  # of what a process found
_APPEARS = 60.0  # seconds until a checkpoint that all have written has its name
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of what is being written, and of what is being removed
_LONG = 7 * 24 * 3600  # seconds; who waits for a save is watched here, not by orbax


class _Save:
    """A save under way, and how far this process has come with it."""

    def __init__(self, step: int):
        self.step = step
        self.written, self.named, self.ended = (threading.Event() for _ in range(3))
        self.result: Future[None]

    def meet(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barrier: once this process has written its part, and once process 0 has given the whole its name."""
        (self.written if "write_complete" in key else self.named).set()
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


class Checkpoints:
    """The checkpoints of one run directory; a context manager that waits for what is still being written.

    Args:
      directory: of the checkpoints; made if need be.
      keep: newest checkpoints kept; None to read only, which leaves the directory as it is.
      copy: called with each step that is whole, in the background, before the next one is written.
    """

    def __init__(self, directory: str, keep: int | None, copy: Callable[[int], None] | None = None):
        self._directory = epath.Path(os.path.abspath(directory))  # orbax refuses relative paths
        self._keep, self._copy = keep, copy
        self._steps: list[int] = everywhere(self._found, "the checkpoints that are there")
        self._saving: _Save | None = None
        self._whole: int | None = None
        self._finisher = ThreadPoolExecutor(1, "checkpoint")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is not None and jax.process_count() > 1:
            return  # the other processes may not come to what closing waits for, and this one ends
        try:
            self.wait()
        finally:
            self._finisher.shutdown(wait=False)

    def _found(self) -> list[int]:
        """The steps that are there. What a killed save left goes, but not for a reader: it may be still under way."""
        if self._keep is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
            for path in self._directory.glob(f"*{_UNFINISHED}*"):
                path.rmtree()
        elif not self._directory.exists():
            return []
        return sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdecimal())

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return max(self._steps, default=None)

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        return list(self._steps)

    def save(self, step: int, items: dict[str, Any]) -> None:
        """Starts writing; returns once the arrays are copied, so the caller may donate them.

        Args:
          step: optimiser steps done.
          items: name -> pytree of arrays, ints, floats and strings. What is restored apart is saved apart.

        Raises:
          UserError: the save before this one failed, or this one could not begin.
        """
        self.wait()
        reached(f"the beginning of checkpoint {step}")
        save = _Save(step)
        # Directories made in the background are waited for by a time-out of orbax's own
        options = ocp.options.AsyncOptions(
            timeout_secs=_LONG, barrier_sync_fn=save.meet, create_directories_asynchronously=False
        )
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(async_options=options),
            **{name: ocp.PyTreeCheckpointHandler(use_zarr3=True) for name in items},
        )
        checkpointer = ocp.AsyncCheckpointer(handler, async_options=options)
        arguments = ocp.args.Composite(**{name: ocp.args.PyTreeSave(tree) for name, tree in items.items()})
        try:
            checkpointer.save(self._directory / str(step), args=arguments)
        except Exception as e:
            raise self._not_written(step, e) from e
        save.result = self._finisher.submit(self._finish, save, checkpointer)
        self._saving = save

    def _finish(self, save: _Save, checkpointer: ocp.AsyncCheckpointer) -> None:
        try:
            self._write(save.step, checkpointer)
            self._copy_whole(save.step)
        except UserError as e:
            fail(e)  # the other processes wait for this one
            raise
        finally:
            for event in (save.written, save.named, save.ended):
                event.set()

    def _write(self, step: int, checkpointer: ocp.AsyncCheckpointer) -> None:
        try:
            checkpointer.wait_until_finished()
            checkpointer.close()
            root, deadline = self._directory / str(step), time.monotonic() + _APPEARS
            while not root.exists():  # a shared disk may be late to show what process 0 did
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{root} did not appear")
                time.sleep(0.1)
            write_checksums(root, jax.process_index())
            if jax.process_index() == 0 and self._keep is not None:
                for old in sorted({step, *self._steps})[: -self._keep]:
                    doomed = (self._directory / str(old)).rename(self._directory / f"{old}{_UNFINISHED}-old")
                    doomed.rmtree()
        except Exception as e:
            raise self._not_written(step, e) from e

    def _copy_whole(self, step: int) -> None:
        try:
            if self._copy is not None:
                self._copy(step)
        except UserError as e:
            raise UserError(f"checkpoint of step {step}: not copied, though whole in {self._directory}: {e}") from e
        except Exception as e:
            raise self._not_written(step, e) from e

    def check(self) -> None:
        """Raises UserError where the save under way has failed by now; does not wait."""
        if self._saving is not None and self._saving.ended.is_set() and self._saving.result.exception():
            self.wait()

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
          UserError: it failed.
        """
        save, self._saving = self._saving, None
        if save is None:
            return
        what = f"checkpoint {save.step}"
        with moving(what):
            save.written.wait()
        barrier(f"the end of writing {what}")
        if jax.process_index() == 0:
            with moving(what):
                save.named.wait()
        barrier(f"the naming of {what}")
        with moving(what):
            save.result.result()
        self._steps = sorted({*self._steps, save.step})[-(self._keep or 0) :]

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
            path = self._directory / str(step)
            if (fault := _damage(path)) is None:
                self._whole = step
                for path, fault in damaged:
                    everywhere(partial(_move_away, path, fault), "the damaged checkpoint")
                self._steps = [s for s in self._steps if s <= step]
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
        path = self._directory / str(step)
        if step != self._whole and (fault := _damage(path, frozenset(abstract_items))):
            raise UserError(f"{path}: damaged: {fault}; delete that step to fall back to an older one")
        me = jax.process_index()  # orbax would wait for the others, unwatched
        alone = v1.options.MultiprocessingOptions(primary_host=me, active_processes={me})
        try:
            with moving(str(path)), v1.Context(multiprocessing_options=alone):
                saved = v1.checkpointables_metadata(path).metadata
            loading = v1.options.ArrayOptions.Loading(
                enable_padding_and_truncation=_differ_in_padding(saved, abstract_items)
            )
            arrays = v1.options.ArrayOptions(loading=loading)
            with moving(str(path)), v1.Context(multiprocessing_options=alone, array_options=arrays):
                items = v1.load_checkpointables(path, abstract_items)
        except Exception as e:
            raise UserError(
                f"{self._directory}/{step}: checkpoint does not fit this run or is damaged "
                f"({_first_cause(e)}); "
                f"use the model and optimiser it was written with, or delete that step to fall back to an older one"
            ) from e
        reached(f"the end of reading checkpoint {step}")
        return items


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
    with moving(str(path)):
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
