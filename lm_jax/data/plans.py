"""Which examples make up each row of each batch: pure functions of their lengths and a seed.

A training step holds a fixed number of examples, so its tokens vary. It is laid out in microbatches whose rows have one
of a few lengths, chosen once for the whole run, and takes as many of each as it needs. Lengths decide on the layout
alone: which examples a step holds is a random permutation's next ones.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lm_jax.config import BatchConfig
from lm_jax.data.packing import balance, first_fit, pack

_WORTH = 0.02  # share of the tokens, padding included, that a further row length must save
_CANDIDATES = 32  # row lengths to choose from
_SAMPLE = 512  # examples of the steps that the choice looks at

Rows = Sequence[Sequence[int]]  # each the numbers of its examples


class Stack(NamedTuple):
    """Microbatches of one row length.

    Attributes:
      microbatches: that there is room for; a step that needs fewer leaves the last ones empty, and skips them.
      row_length: tokens of a row.
    """

    microbatches: int
    row_length: int


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """The batches of a run.

    Attributes:
      steps: of each batch its stacks, each with the rows of its microbatches, one after the other.
      rows: of a microbatch, over all devices; the last one of a batch may have fewer and is filled up with empty ones.
    """

    steps: Sequence[Sequence[tuple[Stack, Rows]]]
    rows: int

    def __len__(self) -> int:
        return len(self.steps)

    def examples(self, step: int) -> list[int]:
        """Numbers of the examples of a step, from 0, ascending."""
        return sorted(item for _, rows in self.steps[step] for row in rows for item in row)

    def tokens(self, step: int) -> int:
        """That a step works on, padding included."""
        return sum(-(-len(rows) // self.rows) * self.rows * stack.row_length for stack, rows in self.steps[step])

    @property
    def shapes(self) -> list[tuple[Stack, ...]]:
        """The different shapes of steps, in the order in which they come."""
        return list(dict.fromkeys(tuple(stack for stack, _ in step) for step in self.steps))

    @property
    def max_examples(self) -> int:
        """Of a row."""
        return max((len(row) for step in self.steps for _, rows in step for row in rows), default=1)

    def with_any(self, wanted: np.ndarray) -> "BatchPlan":
        """The batches in which an example stands that `wanted` [N] is true of, each as it is here."""
        return BatchPlan([s for i, s in enumerate(self.steps) if wanted[self.examples(i)].any()], self.rows)


def plan_passes(lengths: np.ndarray, batch: BatchConfig, parts: int) -> BatchPlan:
    """Every example once, in dense rows and about the data's order, for passes in which batches have no meaning.

    Args:
      lengths: [N] tokens of each example.
      parts: into how many the mesh cuts the rows of a batch.
    """
    packed, rows = pack(lengths, batch.row_length), batch.rows_in(parts)
    stack = Stack(1, batch.row_length)
    return BatchPlan([((stack, packed[i : i + rows]),) for i in range(0, len(packed), rows)], rows)


def plan_steps(
    lengths: np.ndarray, size: int, epochs: int, seed: int, rows: int, row_length: int, row_lengths: int = 3
) -> BatchPlan:
    """Steps of `size` examples, those of an epoch in a random order of its own; its last step has what is left.

    Where every step fits into one microbatch, a step has one stack. Else all steps have the same stacks: one shape.

    Args:
      lengths: [N] tokens of each example, none above `row_length`.
      rows: of a microbatch, over all devices.
      row_length: tokens that a row may hold.
      row_lengths: different ones that may be, at most.
    """
    sizes, groups = lengths.tolist(), []
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(len(lengths))
        groups += [_longest_first(order[i : i + size], lengths) for i in range(0, len(order), size)]
    chosen = _row_lengths(groups, sizes, rows, row_length, row_lengths)
    steps = [_lay_out(group, sizes, rows, chosen) for group in groups]
    counts = {length: max(-(-len(step.get(length, ())) // rows) for step in steps) for length in chosen}
    if all(len(step) == 1 and len(*step.values()) <= rows for step in steps):
        return BatchPlan([[(Stack(1, length), own) for length, own in step.items()] for step in steps], rows)
    stacks = [Stack(count, length) for length, count in counts.items() if count]
    return BatchPlan([[(stack, step.get(stack.row_length, ())) for stack in stacks] for step in steps], rows)


def _longest_first(items: np.ndarray, lengths: np.ndarray) -> list[int]:
    return items[np.argsort(-lengths[items], kind="stable")].tolist()


def _lay_out(items: list[int], lengths: list[int], rows: int, row_lengths: list[int]) -> dict[int, list[list[int]]]:
    """Row length -> the rows of its microbatches, in the cheapest of some layouts.

    Args:
      items: of a step, the longest first.
      row_lengths: descending.
    """

    def fitting(tokens: int) -> int:
        return min(length for length in row_lengths if length >= tokens)

    def cost(way) -> tuple[int, int]:
        return sum(fitting(tokens) for tokens in way[1]), len(way[1])

    packed, longest = min(_layouts(items, lengths, rows, row_lengths), key=cost)
    found: dict[int, list[list[int]]] = {}
    for i, tokens in enumerate(longest):
        found.setdefault(fitting(tokens), []).extend(packed[i * rows : (i + 1) * rows])
    return found


def _layouts(
    items: list[int], lengths: list[int], rows: int, row_lengths: Sequence[int]
) -> Iterator[tuple[list[list[int]], list[int]]]:
    """Ways to lay a step out: its rows, the fullest first, and the tokens of the fullest row of each microbatch."""
    most = max(row_lengths)
    least = -(-sum(lengths[i] for i in items) // (most * rows))  # microbatches that it needs at least
    ways = [balance(items, lengths, count * rows) for count in (least, least + 1)]
    ways += [first_fit(items, lengths, length) for length in row_lengths if length >= lengths[items[0]]]
    for way in ways:
        filled = sorted(((sum(lengths[i] for i in row), row) for row in way if row), key=lambda x: -x[0])
        if filled[0][0] <= most:
            yield [row for _, row in filled], [tokens for tokens, _ in filled[::rows]]


def _row_lengths(groups: list[list[int]], lengths: list[int], rows: int, row_length: int, most: int) -> list[int]:
    """Row lengths, descending and `most` at most, with which steps like these take few tokens, padding included."""
    unit = max(-(-row_length // _CANDIDATES), 16)
    candidates = range(1, -(-row_length // unit) + 1)  # in units
    every = max(len(groups) * len(groups[0]) // _SAMPLE, 1)
    found = [
        list(_layouts(group, lengths, rows, [min(c * unit, row_length) for c in candidates]))
        for group in groups[::every]
    ]
    fullest = [[-(-tokens // unit) for tokens in microbatches] for ways in found for _, microbatches in ways]
    table = np.zeros((len(fullest), max(map(len, fullest))), int)
    for line, microbatches in zip(table, fullest, strict=True):
        line[: len(microbatches)] = microbatches
    starts = np.cumsum([0, *map(len, found[:-1])])
    longest = -(-max(lengths) // unit)

    def cost(chosen: Sequence[int]) -> float:
        """Units of rows' tokens; a microbatch costs one more, for reading parameters and adding gradients."""
        if max(chosen) < longest:
            return np.inf
        price = np.full(len(candidates) + 1, np.inf)
        for c in sorted(chosen, reverse=True):
            price[1 : c + 1] = c + 1
        price[0] = 0
        return float(np.minimum.reduceat(price[table].sum(axis=1), starts).sum())

    best: list[int] = []
    for _ in range(most):
        trial = _improved([*best, candidates[-1]], candidates, cost)
        if best and cost(trial) > (1 - _WORTH) * cost(best):
            break
        best = trial
    return [min(c * unit, row_length) for c in sorted(set(best), reverse=True)]


def _improved(chosen: list[int], candidates: Sequence[int], cost) -> list[int]:
    """The last one is chosen anew, then each in turn, until none is better."""
    before = np.inf
    while (now := cost(chosen)) < before:
        before = now
        for i in reversed(range(len(chosen))):
            chosen = min(([*chosen[:i], c, *chosen[i + 1 :]] for c in candidates), key=cost)
    return chosen
