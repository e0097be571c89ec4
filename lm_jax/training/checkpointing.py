"""When a run is saved, what a checkpoint holds, and the way back to it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.checkpoints.orbax import Checkpoints
from lm_jax.data.batches import BatchIterator
from lm_jax.errors import UserError
from lm_jax.training.callbacks import Callback
from lm_jax.training.skipping import Skips
from lm_jax.training.step import TrainState


class Checkpointing(Callback):
    """Saves every `every` steps and after the last.

    A checkpoint that is due after a skipped step waits for the next one that is not skipped: where the parameters are
    at fault rather than the batch, the sound checkpoints before are not pushed out by unsound ones.

    Args:
      done: the step that is saved already.
      skips: comes before this among the callbacks.
    """

    def __init__(
        self, checkpoints: Checkpoints, every: int, done: int, last: int, batches: BatchIterator, skips: Skips
    ):
        self._checkpoints, self._every, self._last = checkpoints, every, last
        self._batches, self._skips = batches, skips
        self._saved, self._due = done, False

    def before_step(self, step: int, state: TrainState) -> None:
        self._checkpoints.check()

    def wants_state(self, step: int) -> bool:
        self._due = self._due or step % self._every == 0 or step == self._last
        return self._due

    def on_state(self, step: int, state: TrainState) -> None:
        if self._due and (self._skips.last != step or step == self._last):
            self._save(step, state)

    def stop(self, step: int, state: TrainState) -> None:
        if step > self._saved:
            self._save(step, state)
        self._checkpoints.wait()

    def end(self, step: int, state: TrainState) -> None:
        self._checkpoints.wait()

    def _save(self, step: int, state: TrainState) -> None:
        """Begins to save.

        Raises:
          UserError: not finite, though the loss and the gradient that led there were; or as `Checkpoints.save`.
        """
        if not _all_finite((state.params, state.opt_state)):
            raise UserError(
                f"step {step}: its update made parameters that are not finite; nothing is saved of it and the last "
                "checkpoint is intact: lower config.optim.learning_rate"
            )
        progress = {"data": self._batches.get_state(), "skipped_steps": int(state.skipped)}
        self._checkpoints.save(step, checkpoint_items(state, progress))
        self._saved, self._due = step, False


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def checkpoint_items(state: TrainState, progress: Any) -> dict[str, Any]:
    """What a checkpoint holds, by item; parameters apart, since exporting and scoring need nothing else.

    The objective's state is an item where it has one.
    """
    items = {
        "params": state.params,
        "optimizer": {"step": state.step, "opt_state": state.opt_state},
        "progress": progress,
    }
    return items | ({"objective": state.objective_state} if jax.tree.leaves(state.objective_state) else {})


def resume(checkpoints: Checkpoints, abstract: TrainState, step: int | None = None) -> tuple[TrainState, dict]:
    """A checkpoint, the newest by default, as (state, data position)."""
    items = checkpoints.restore(checkpoint_items(abstract, None), step)
    optimizer, progress = items["optimizer"], items["progress"]
    state = TrainState(
        step=optimizer["step"],
        params=items["params"],
        opt_state=optimizer["opt_state"],
        objective_state=items.get("objective", abstract.objective_state),
        # Runs from before steps were skipped do not have it
        skipped=jax.device_put(np.int32(progress.get("skipped_steps", 0)), abstract.skipped.sharding),
    )
    return state, progress["data"]
