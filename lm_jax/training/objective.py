"""What a method minimises, in a form that adds up exactly over microbatches, devices and hosts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from lm_jax.data.batches import AuxiliaryBatch

Batch = dict[str, jax.Array]  # one microbatch: arrays [B, ...] of `fill_rows`
Sums = dict[str, jax.Array]  # named scalars, fp32


@dataclasses.dataclass(frozen=True)
class ObjectiveState:
    """What an objective keeps from step to step, such as moving averages; it is saved in every checkpoint.

    A value that depends on earlier losses is so known before the step and the same for all of its microbatches, devices
    and hosts, and no gradient goes through it.

    Attributes:
      initial: pytree of fp32 scalars before the first step; None: nothing is kept.
      read: (kept, progress) -> named scalars that hold for the whole step: they join its totals and are reported among
        its metrics. `progress` goes from 0 in the run's first step to 1 in its last.
      update: (kept, totals, metrics) -> what the next step reads; `metrics` are those of the whole step.
    """

    initial: Any = None
    read: Callable[[Any, jax.Array], Sums] = lambda kept, progress: {}
    update: Callable[[Any, Sums, Sums], Any] = lambda kept, totals, metrics: kept


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a method minimises.

    Attributes:
      count: microbatch -> denominators (pairs, tokens) that its arrays hold; from data alone. It takes arrays of JAX
        and of NumPy alike, so by their methods (`x.sum()`). Where all are 0 there is nothing to compute.
      loss: (params, microbatch, totals) -> (loss, metrics, bad_example): the microbatch's *contributions*, sums
        already divided by the totals of the whole step, so that adding contributions gives the mean. `bad_example` is
        the largest id of an example whose loss is not finite, or -1. A part of the loss, `loss/NAME`, that a step does
        not define is NaN.
      values: what the batch holds for every response token, as `Segment.values` has it.
      auxiliary: further examples that travel with the batch; its own may be lacking until the data are read.
      state: in training alone; `totals` lack what it reads in an evaluation.
      dtype: that `loss` computes in; see `lm_jax.models.linear.matmul_precision`.
    """

    count: Callable[[Batch], Sums]
    loss: Callable[[Any, Batch, Sums], tuple[jax.Array, Sums, jax.Array]]
    values: tuple[str, ...] = ()
    auxiliary: AuxiliaryBatch | None = None
    state: ObjectiveState = ObjectiveState()
    dtype: str = "float32"


def name_of(function: Callable[..., Any]) -> str:
    """A user's function in words; of what has no name, such as a `functools.partial`, its type's."""
    return getattr(function, "__qualname__", type(function).__name__)
