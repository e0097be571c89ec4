"""One optimiser step and one evaluation pass, for any objective.

Axes: M microbatches, B rows, T tokens. A batch is a dict of [M, B, ...] arrays.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from lm_jax.models.linear import matmul_precision

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Carry:
    """What an objective takes along from step to step; it is part of the state, and of every checkpoint.

    So a value that depends on earlier losses is known before the step and the same for all of its microbatches,
    devices and hosts, and no gradient goes through it.

    Attributes:
      initial: pytree of fp32 scalars before the first step; None: nothing is taken along.
      read: (carried, progress) -> named scalars that hold for the whole step: they join its totals and are reported
        among its metrics. `progress` goes from 0 in the run's first step to 1 in its last.
      update: (carried, totals, metrics) -> what the next step reads; `metrics` are those of the whole step.
    """

    initial: Any = None
    read: Callable[[Any, jax.Array], Sums] = lambda carried, progress: {}
    update: Callable[[Any, Sums, Sums], Any] = lambda carried, totals, metrics: carried


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a method minimises, in a form that adds up exactly over microbatches, devices and hosts.

    Attributes:
      count: microbatch -> denominators (pairs, tokens) that its arrays hold; from data alone.
      loss: (params, microbatch, totals) -> (loss, metrics, bad_example): the microbatch's *contributions*, sums
        already divided by the totals of the whole step, so that adding contributions gives the mean. `bad_example` is
        the largest id of an example whose loss is not finite, or -1. A metric that is not defined in a step is NaN.
      dtype: that `loss` computes in; see `lm_jax.models.linear.matmul_precision`.
      carry: in training alone; `totals` lack what it reads in an evaluation.
    """

    count: Callable[[Batch], Sums]
    loss: Callable[[Any, Batch, Sums], tuple[jax.Array, Sums, jax.Array]]
    dtype: str
    carry: Carry = Carry()


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes.

    Attributes:
      step: batches seen, the skipped ones too; the optimiser and its schedule have seen `step - skipped`.
      carried: of the objective.
      skipped: steps whose loss or gradient was not finite, so that they changed nothing but these two counts.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    carried: Any
    skipped: jax.Array

    @classmethod
    def create(cls, params: Any, optimizer: optax.GradientTransformation, carried: Any = None) -> "TrainState":
        step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)  # two: each is donated
        return cls(step=step, params=params, opt_state=optimizer.init(params), carried=carried, skipped=skipped)


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    assemble: Callable[..., Any] = lambda trained, frozen, step, microbatch: trained,
    num_steps: int = 1,
) -> Callable[..., tuple[TrainState, Sums]]:
    """The step function, to be jitted by the caller with the state's shardings and the state donated.

    A step whose loss or gradient norm is not finite is skipped: parameters, optimiser and carry stay bit for bit as
    they are, and the schedule does not move. Nothing of it waits for the host, and no batch is ever let through after
    so many skips, as `optax.apply_if_finite` does: it is the caller who looks at `skipped_steps` and ends the run.

    Args:
      assemble: (what is trained, what is not, number of the step and of the microbatch, from 0) -> the objective's
        parameters.
      num_steps: of the whole run, for an objective that follows its progress.

    Returns:
      (state, batch, frozen) -> (state, metrics): the objective's metrics and what its carry reads, `loss`, `grad_norm`
      (before clipping), `learning_rate`, `skipped_steps` (of the run so far, this one included) and `bad_example`.
    """

    def loss_fn(trained, frozen, at, micro, totals):
        loss, metrics, bad = objective.loss(assemble(trained, frozen, *at), micro, totals)
        return loss, ({**metrics, "loss": loss}, bad)

    def gradients(trained, frozen, at, micro, totals):
        with matmul_precision(objective.dtype):
            (_, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained, frozen, at, micro, totals)
        return grads, *aux

    def train_step(state: TrainState, batch: Batch, frozen: Any = None):
        known = objective.carry.read(state.carried, jnp.minimum(state.step / max(num_steps - 1, 1), 1.0))
        totals = jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.vmap(objective.count)(batch)) | known
        first, rest = jax.tree.map(lambda x: x[0], batch), jax.tree.map(lambda x: x[1:], batch)
        summed = gradients(state.params, frozen, (state.step, 0), first, totals)

        def accumulate(carry, numbered):
            number, micro = numbered
            grads, metrics, bad = gradients(state.params, frozen, (state.step, number), micro, totals)
            add = (jax.tree.map(jnp.add, carry[0], grads), jax.tree.map(jnp.add, carry[1], metrics))
            return (*add, jnp.maximum(carry[2], bad)), None

        if left := jax.tree.leaves(rest)[0].shape[0]:
            summed, _ = jax.lax.scan(accumulate, summed, (jnp.arange(1, left + 1), rest))
        grads, metrics, bad = summed
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        skipped = state.skipped + ~finite
        carried = objective.carry.update(state.carried, totals, metrics)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # A choice of elements rather than a branch, for which XLA on GPUs brings the condition to the host; on a TPU it
        # takes no more memory either
        params, opt_state, carried = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state, carried),
            (state.params, state.opt_state, state.carried),
        )
        metrics |= known
        metrics |= {
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step - state.skipped),
            "skipped_steps": skipped,
            "bad_example": bad,
        }
        return TrainState(state.step + 1, params, opt_state, carried, skipped), metrics

    return train_step


def make_evaluate(objective: Objective) -> Callable[[Any, Iterable[Batch]], dict[str, float]]:
    """(params, batches) -> metrics over all of them, exact: the totals are those of the whole evaluation set."""

    @jax.jit
    def count(batch):
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.vmap(objective.count)(batch))

    @jax.jit
    def contribution(params, batch, totals):
        loss, metrics, _ = jax.lax.map(lambda micro: objective.loss(params, micro, totals), batch)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), {**metrics, "loss": loss})

    def evaluate(params, batches):
        batches = list(batches)
        add = lambda a, b: jax.tree.map(jnp.add, a, b)  # noqa: E731
        totals, sums = None, None
        for batch in batches:
            totals = count(batch) if totals is None else add(totals, count(batch))
        for batch in batches:
            part = contribution(params, batch, totals)
            sums = part if sums is None else add(sums, part)
        return {k: float(v) for k, v in (sums or {}).items()}

    return evaluate
