"""One optimiser step and one evaluation pass, for any objective.

Axes: M microbatches, B rows, T tokens. A step's batch is one stack of microbatches for each row length, a stack a dict
of [M, B, ...] arrays.
"""

import collections
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm_jax.distributed.processes import reached
from lm_jax.models.linear import matmul_precision
from lm_jax.training.objective import Batch, Objective, Sums


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes.

    Attributes:
      step: batches seen, the skipped ones too; the optimiser and its schedule have seen `step - skipped`.
      objective_state: what the objective keeps, see `ObjectiveState`.
      skipped: steps whose loss or gradient was not finite, so that they changed nothing but these two counts.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    objective_state: Any
    skipped: jax.Array

    @classmethod
    def create(cls, params: Any, optimizer: optax.GradientTransformation, objective_state: Any = None) -> "TrainState":
        step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)  # two: each is donated
        return cls(step, params, optimizer.init(params), objective_state, skipped)


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    assemble: Callable[..., Any] = lambda trained, frozen, step, microbatch: trained,
    num_steps: int = 1,
) -> Callable[..., tuple[TrainState, Sums]]:
    """The step function, to be jitted by the caller with the state's shardings and the state donated.

    A step whose loss or gradient norm is not finite is skipped: parameters, optimiser and the objective's state stay
    bit for bit as they are, and the schedule does not move. Nothing of it waits for the host, and no batch is ever let
    through after so many skips, as `optax.apply_if_finite` does: the caller looks at `skipped_steps` and ends the run.

    Args:
      assemble: (what is trained, what is not, number of the step and of the microbatch, from 0) -> the objective's
        parameters.
      num_steps: of the whole run, for an objective that follows its progress.

    Returns:
      (state, batch, frozen) -> (state, metrics): the objective's metrics and what its state reads, `loss`, `grad_norm`
      (before clipping), `learning_rate`, `skipped_steps` (of the run so far, this one included) and `bad_example`.
    """

    def loss_fn(trained, frozen, at, micro, totals):
        loss, metrics, bad = objective.loss(assemble(trained, frozen, *at), micro, totals)
        return loss, ({**metrics, "loss": loss}, bad)

    def gradients(trained, frozen, at, micro, totals):
        with matmul_precision(objective.dtype):
            (_, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained, frozen, at, micro, totals)
        return grads, *aux

    def train_step(state: TrainState, batch: Sequence[Batch], frozen: Any = None):
        known = objective.state.read(state.objective_state, jnp.minimum(state.step / max(num_steps - 1, 1), 1.0))
        counts = [jax.vmap(objective.count)(stack) for stack in batch]
        totals = jax.tree.map(lambda *x: sum(map(jnp.sum, x)), *counts) | known
        first = jax.tree.map(lambda x: x[0], batch[0])
        one = functools.partial(gradients, state.params, frozen, totals=totals)

        def accumulate(sums, microbatch):
            number, count, micro = microbatch

            def add(sums):
                grads, metrics, bad = one((state.step, number), micro)
                return (*jax.tree.map(jnp.add, sums[:2], (grads, metrics)), jnp.maximum(sums[2], bad))

            # One that holds nothing is not computed: steps need more or fewer of them
            holds = jnp.any(jnp.array(jax.tree.leaves(count)) != 0)
            return jax.lax.cond(holds, add, lambda sums: sums, sums), None

        sizes = [len(jax.tree.leaves(stack)[0]) for stack in batch]
        if sum(sizes) == 1:
            summed = one((state.step, 0), first)
        else:
            *like, bad = jax.eval_shape(one, (state.step, 0), first)
            summed = (*jax.tree.map(jnp.zeros_like, like), jnp.full_like(bad, -1))
            for start, size, count, stack in zip(np.cumsum([0, *sizes]), sizes, counts, batch, strict=False):
                summed, _ = jax.lax.scan(accumulate, summed, (start + jnp.arange(size), count, stack))
        grads, metrics, bad = summed
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        skipped = state.skipped + ~finite
        kept = objective.state.update(state.objective_state, totals, metrics)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # A choice of elements rather than a branch, for which XLA on GPUs brings the condition to the host; on a TPU it
        # takes no more memory either
        params, opt_state, kept = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state, kept),
            (state.params, state.opt_state, state.objective_state),
        )
        metrics |= known
        metrics |= {
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step - state.skipped),
            "skipped_steps": skipped,
            "bad_example": bad,
        }
        return TrainState(state.step + 1, params, opt_state, kept, skipped), metrics

    return train_step


def host_totals(objective: Objective, batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.float32]:
    """The totals of all batches together, counted where the data lie: nothing goes to a device.

    Args:
      batches: with the rows of every process, [M, B, ...] as the step takes them.
    """
    totals: dict[str, float] = collections.defaultdict(float)
    for batch in batches:
        for m in range(len(next(iter(batch.values())))):
            for name, number in objective.count({key: array[m] for key, array in batch.items()}).items():
                totals[name] += float(number)
    return {name: np.float32(number) for name, number in totals.items()}


def make_evaluate(objective: Objective) -> Callable[..., dict[str, float]]:
    """(params, batches, totals) -> metrics over all batches, exact where `totals` are those of all: see `host_totals`.

    A batch is on the device while it and the next one are computed, no longer.
    """

    @jax.jit
    def contribution(params, batch, totals):
        loss, metrics, _ = jax.lax.map(lambda micro: objective.loss(params, micro, totals), batch)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), {**metrics, "loss": loss})

    def evaluate(params: Any, batches: Iterable[Batch], totals: Mapping[str, Any]) -> dict[str, float]:
        sums: Sums | None = None
        for batch in batches:
            reached("a batch of the evaluation")
            part = contribution(params, batch, totals)
            jax.block_until_ready(sums)  # else all batches may be put there before the first one is done
            sums = part if sums is None else jax.tree.map(jnp.add, sums, part)
        return {k: float(v) for k, v in (sums or {}).items()}

    return evaluate
