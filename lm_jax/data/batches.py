"""The order of training batches: a pure function of (seed, epoch, lengths), so resuming needs only a step number.

Grain carries the position: its iterator state, two integers, is saved in every checkpoint.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

from lm_jax.config import BatchConfig
from lm_jax.data.packing import Example, example_lengths, fill_rows, pack
from lm_jax.errors import UserError
from lm_jax.sharding import batch_divisor, batch_sharding


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """Which examples make up each row of each step.

    Attributes:
      rows: the rows of all steps, `batch.rows` a step; an epoch's last step is filled up with empty rows.
      steps_per_epoch: steps of each epoch.
      batch: the shape of a step.
    """

    rows: Sequence[np.ndarray]
    steps_per_epoch: tuple[int, ...]
    batch: BatchConfig

    def __len__(self) -> int:
        return len(self.rows) // self.batch.rows

    def __getitem__(self, step: int) -> Sequence[np.ndarray]:
        return self.rows[step * self.batch.rows : (step + 1) * self.batch.rows]

    def with_any(self, wanted: np.ndarray) -> "BatchPlan":
        """The steps in which an example stands that `wanted` [N] is true of, each as it is here."""
        steps = [step for step in range(len(self)) if any(wanted[row].any() for row in self[step])]
        return BatchPlan([row for step in steps for row in self[step]], (len(steps),), self.batch)


@dataclasses.dataclass(frozen=True)
class Beside:
    """Examples that go along with those of a batch, laid out in rows of their own under `name/...`.

    Attributes:
      examples: `per_example` of them for each of the batch's, one after the other.
      row_length: tokens of their rows; row b holds what belongs to the batch's row b.
    """

    name: str
    examples: Sequence[Example]
    per_example: int
    row_length: int

    def fill(self, rows: Sequence[Sequence[int] | np.ndarray], max_examples: int) -> dict[str, np.ndarray]:
        """`fill_rows` of what belongs to `rows` of the batch."""
        n = self.per_example
        own = [[item * n + i for item in row for i in range(n)] for row in rows]
        filled = fill_rows(own, self.examples, self.row_length, max_examples * n)
        return {f"{self.name}/{key}": array for key, array in filled.items()}

    def lengths(self, row_length: int) -> np.ndarray:
        """[N] int64: as many tokens of a row of `row_length` as each example's share of the row here, rounded up."""
        lengths = example_lengths(self.examples).reshape(-1, self.per_example).sum(axis=1)
        return -(-lengths * row_length // self.row_length)


def plan_batches(lengths: np.ndarray, batch: BatchConfig, epochs: int, seed: int | None) -> BatchPlan:
    """Packs every epoch anew; each epoch holds every example once.

    Args:
      lengths: [N] tokens of each example.
      batch: the shape of a step.
      epochs: passes over the data.
      seed: of the shuffling; None keeps the data's order (evaluation).
    """
    rows: list[np.ndarray] = []
    steps = []
    for epoch in range(epochs):
        rng = None if seed is None else np.random.default_rng((seed, epoch))
        packed = pack(lengths, batch.row_length, batch.max_examples_per_row, rng)
        steps.append(-(-len(packed) // batch.rows))
        rows += packed + [np.zeros(0, np.int64)] * (steps[-1] * batch.rows - len(packed))
    return BatchPlan(rows, tuple(steps), batch)


class BatchIterator(Iterator[dict[str, jax.Array]]):
    """Global batches [microbatches, rows, row_length] on the mesh; each process fills only its own rows.

    Filling runs ahead in Grain's threads, so that the device does not wait for it.
    """

    def __init__(
        self,
        plan: BatchPlan,
        examples: Sequence[Example],
        mesh: jax.sharding.Mesh,
        values: Sequence[str] = (),
        beside: Beside | None = None,
    ):
        batch = plan.batch
        check_batch(batch, mesh)
        self._plan = plan
        self._sharding = batch_sharding(mesh, leading=1)
        self._micro_rows = batch.rows // batch.microbatches
        self._mine = _own_rows(self._micro_rows, mesh)

        def fill(step: int, own: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
            rows = plan[step]
            flat_rows = [rows[m * self._micro_rows + r] for m in range(batch.microbatches) for r in own]
            flat = fill_rows(flat_rows, examples, batch.row_length, batch.max_examples_per_row, values)
            if beside is not None:
                flat |= beside.fill(flat_rows, batch.max_examples_per_row)
            return {k: v.reshape(batch.microbatches, len(own), *v.shape[1:]) for k, v in flat.items()}

        self._fill = fill
        dataset = grain.MapDataset.source(range(len(plan))).map(lambda step: fill(step, self._mine))
        self._iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))

    def __next__(self) -> dict[str, jax.Array]:
        return {name: self._global(local) for name, local in next(self._iterator).items()}

    def _global(self, local: np.ndarray) -> jax.Array:
        shape = (local.shape[0], self._micro_rows, *local.shape[2:])

        def of_device(index):
            begin, end, _ = index[1].indices(self._micro_rows)
            start = int(np.searchsorted(self._mine, begin))
            return local[:, start : start + end - begin]

        return jax.make_array_from_callback(shape, self._sharding, of_device)

    def whole(self, step: int) -> dict[str, np.ndarray]:
        """The arrays of a step, from 0, with the rows of every process."""
        return self._fill(step, range(self._micro_rows))

    def examples(self, step: int) -> list[int]:
        """Numbers of the examples of a step, from 0, ascending."""
        return sorted(int(item) for row in self._plan[step] for item in row)

    def get_state(self) -> dict:
        """The position, for a checkpoint."""
        return self._iterator.get_state()

    def set_state(self, state: dict) -> None:
        """Continues where `get_state` was called."""
        self._iterator.set_state(state)


def _own_rows(rows: int, mesh: jax.sharding.Mesh) -> np.ndarray:
    """[n] which of `rows` this process's devices hold, ascending."""
    of_devices: Any = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return np.unique([row for (part,) in of_devices for row in range(*part.indices(rows))])


def batch_shapes(
    batch: BatchConfig, mesh: jax.sharding.Mesh, values: Sequence[str] = (), beside: Beside | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """What `BatchIterator` gives for these arguments, with its sharding; of `beside` no example is needed."""
    row = fill_rows([()], (), batch.row_length, batch.max_examples_per_row, values)
    if beside is not None:
        row |= beside.fill([()], batch.max_examples_per_row)
    leading, sharding = (batch.microbatches, batch.rows // batch.microbatches), batch_sharding(mesh, leading=1)
    return {k: jax.ShapeDtypeStruct((*leading, *v.shape[1:]), v.dtype, sharding=sharding) for k, v in row.items()}


def check_batch(batch: BatchConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError where rows, microbatches and mesh do not fit."""
    parts = batch_divisor(mesh)
    if min(batch.rows, batch.microbatches, batch.row_length, batch.max_examples_per_row) < 1:
        raise UserError(f"config.batch: every size must be at least 1, got {batch}")
    if batch.rows % batch.microbatches or (batch.rows // batch.microbatches) % parts:
        raise UserError(
            f"config.batch.rows={batch.rows} must be a multiple of config.batch.microbatches={batch.microbatches} "
            f"times the mesh's data x fsdp={parts}; the next one is "
            f"{-(-batch.rows // (batch.microbatches * parts)) * batch.microbatches * parts}"
        )
