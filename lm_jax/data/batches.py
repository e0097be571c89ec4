"""A plan's batches as global arrays on the mesh.

Grain carries the position: its iterator state, two integers, is saved in every checkpoint.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

from lm_jax.data.packing import Example, example_lengths, fill_rows
from lm_jax.data.plans import BatchPlan, Rows, Stack
from lm_jax.sharding import batch_sharding

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class AuxiliaryBatch:
    """Further examples that travel with those of a batch, in rows of their own under `name/...`.

    Attributes:
      examples: `per_example` of them for each of the batch's, one after the other.
      length_ratio: their rows are so many times as long; row b holds what belongs to the batch's row b.
    """

    name: str
    examples: Sequence[Example]
    per_example: int
    length_ratio: int

    def fill(self, rows: Rows, row_length: int, max_examples: int) -> Arrays:
        """`fill_rows` of what belongs to `rows` of the batch, which are of `row_length`."""
        n = self.per_example
        own = [[item * n + i for item in row for i in range(n)] for row in rows]
        filled = fill_rows(own, self.examples, self.length_ratio * row_length, max_examples * n)
        return {f"{self.name}/{key}": array for key, array in filled.items()}

    def lengths(self) -> np.ndarray:
        """[N] int64: as many tokens of a row of the batch as each example's share of the row here, rounded up."""
        lengths = example_lengths(self.examples).reshape(-1, self.per_example).sum(axis=1)
        return -(-lengths // self.length_ratio)


class BatchIterator(Iterator[tuple[dict[str, jax.Array], ...]]):
    """A batch is a stack for each of its row lengths: arrays [microbatches, rows, row_length] on the mesh.

    Each process fills only its own rows. Filling runs ahead in Grain's threads, so that the device does not wait.
    """

    def __init__(
        self,
        plan: BatchPlan,
        examples: Sequence[Example],
        mesh: jax.sharding.Mesh,
        values: Sequence[str] = (),
        auxiliary: AuxiliaryBatch | None = None,
    ):
        self.plan = plan
        self._sharding = batch_sharding(mesh, leading=1)
        self._mine = _own_rows(plan.rows, mesh)
        contents = (plan.max_examples, examples, values, auxiliary)

        def fill(step: int, own: Sequence[int] | np.ndarray) -> tuple[Arrays, ...]:
            stacks = plan.steps[step]
            return tuple(_fill_stack(stack, _own(rows, stack, plan.rows, own), *contents) for stack, rows in stacks)

        self._fill = fill
        dataset = grain.MapDataset.source(range(len(plan))).map(lambda step: fill(step, self._mine))
        self._iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))

    def __next__(self) -> tuple[dict[str, jax.Array], ...]:
        return tuple({name: self._global(local) for name, local in stack.items()} for stack in next(self._iterator))

    def _global(self, local: np.ndarray) -> jax.Array:
        rows = self.plan.rows

        def of_device(index):
            begin, end, _ = index[1].indices(rows)
            start = int(np.searchsorted(self._mine, begin))
            return local[:, start : start + end - begin]

        return jax.make_array_from_callback((local.shape[0], rows, *local.shape[2:]), self._sharding, of_device)

    def whole(self, step: int) -> tuple[Arrays, ...]:
        """The stacks of a step, from 0, with the rows of every process."""
        return self._fill(step, range(self.plan.rows))

    def get_state(self) -> dict:
        """The position, for a checkpoint."""
        return self._iterator.get_state()

    def set_state(self, state: dict) -> None:
        """Continues where `get_state` was called."""
        self._iterator.set_state(state)


def _own(rows: Rows, stack: Stack, size: int, own: Sequence[int] | np.ndarray) -> Rows:
    """The rows numbered `own` of every microbatch of `size` rows, the last of which may be empty."""
    numbers = [m * size + r for m in range(stack.microbatches) for r in own]
    return [rows[i] if i < len(rows) else () for i in numbers]


def _fill_stack(
    stack: Stack,
    rows: Rows,
    max_examples: int,
    examples: Sequence[Example],
    values: Sequence[str],
    auxiliary: AuxiliaryBatch | None,
) -> Arrays:
    flat = fill_rows(rows, examples, stack.row_length, max_examples, values)
    if auxiliary is not None:
        flat |= auxiliary.fill(rows, stack.row_length, max_examples)
    return {k: v.reshape(stack.microbatches, -1, *v.shape[1:]) for k, v in flat.items()}


def _own_rows(rows: int, mesh: jax.sharding.Mesh) -> np.ndarray:
    """[n] which of `rows` this process's devices hold, ascending."""
    of_devices: Any = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return np.unique([row for (part,) in of_devices for row in range(*part.indices(rows))])


def batch_shapes(
    stacks: Sequence[Stack],
    rows: int,
    max_examples: int,
    mesh: jax.sharding.Mesh,
    values: Sequence[str] = (),
    auxiliary: AuxiliaryBatch | None = None,
) -> tuple[dict[str, jax.ShapeDtypeStruct], ...]:
    """What `BatchIterator` gives for a step of such stacks, with its sharding; of `auxiliary` no example is needed.

    Args:
      rows: of a microbatch, over all devices.
      max_examples: of a row.
    """
    sharding = batch_sharding(mesh, leading=1)

    def shapes(stack: Stack) -> dict[str, jax.ShapeDtypeStruct]:
        row = _fill_stack(Stack(1, stack.row_length), [()], max_examples, (), values, auxiliary)
        return {
            k: jax.ShapeDtypeStruct((stack.microbatches, rows, *v.shape[2:]), v.dtype, sharding=sharding)
            for k, v in row.items()
        }

    return tuple(map(shapes, stacks))
