"""A trace of a few training steps, for TensorBoard's profiler or Perfetto."""

import re

import jax

from lm_jax.console import say
from lm_jax.errors import UserError
from lm_jax.training.callbacks import Callback
from lm_jax.training.step import TrainState


def steps_to_trace(profile: str | None) -> range:
    """`FIRST:LAST`, both included, as a range; none for None.

    Raises:
      UserError: written otherwise.
    """
    if profile is None:
        return range(0)
    found = re.fullmatch(r"(\d+):(\d+)", profile)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"config.profile={profile!r}: give the first and the last step to trace, as 5:8")
    return range(first, last + 1)


class Tracer(Callback):
    """Traces what of `steps` lies in (done, last], into `directory`; process 0 does.

    Args:
      done: steps that lie behind the run.
    """

    def __init__(self, steps: range, done: int, last: int, directory: str):
        self._steps = range(max(steps.start, done + 1), min(steps.stop, last + 1))
        self._directory = directory
        if steps and not self._steps:
            say(f"nothing is traced: {done} of {last} steps are done, config.profile={steps[0]}:{steps[-1]}")

    def before_step(self, step: int, state: TrainState) -> None:
        if self._steps and step == self._steps[0]:
            jax.block_until_ready(state.step)  # nothing of an earlier step is under way
            if jax.process_index() == 0:
                jax.profiler.start_trace(self._directory)

    def wants_state(self, step: int) -> bool:
        return bool(self._steps) and step == self._steps[-1]

    def on_state(self, step: int, state: TrainState) -> None:
        if self.wants_state(step) and jax.process_index() == 0:
            jax.profiler.stop_trace()
            say(f"traced steps {self._steps[0]} to {step}: tensorboard --logdir {self._directory}")
