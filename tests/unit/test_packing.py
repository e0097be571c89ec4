"""Packing puts every example in one row, lays its tokens out in line with what they predict, and resumes exactly."""

import json

import jax
import numpy as np
import pytest

from lm_jax.config import BatchConfig, MeshConfig
from lm_jax.data.batches import BatchIterator, batch_shapes
from lm_jax.data.packing import Segment, balance, example_lengths, fill_rows, first_fit, pack, response_slice
from lm_jax.data.plans import plan_passes, plan_steps
from lm_jax.errors import UserError
from lm_jax.sharding import make_mesh


def lengths_like_real(n, seed=0):
    """Pairs of chat sequences: mostly some hundred tokens, a long tail, cut at 2048."""
    lengths = np.random.default_rng(seed).lognormal(6.2, 0.6, n)
    return np.clip(lengths, 20, 2048).astype(np.int64)


def segment(prompt, response, **values):
    values = {name: np.array(v, np.float32) for name, v in values.items()}
    return Segment(np.array(prompt, np.int32), np.array(response, np.int32), values)


def test_every_example_is_in_one_row_and_fits():
    lengths = lengths_like_real(2500)  # over two windows of 1024
    rows = pack(lengths, 2048)
    assert sorted(i for row in rows for i in row) == list(range(2500))
    assert max(lengths[row].sum() for row in rows) <= 2048
    assert min(map(len, rows)) >= 1
    assert lengths.sum() / (len(pack(lengths, 4096)) * 4096) > 0.97


def test_exact_fit_and_no_examples():
    assert pack(np.array([3, 7, 10, 10]), 10) == [[2], [3], [1, 0]]
    assert pack(np.array([], np.int64), 10) == []
    assert first_fit([3, 1, 0, 2], [3, 7, 2, 9], 10) == [[3], [1, 0], [2]]
    assert balance([3, 1, 0, 2], [3, 7, 2, 9], 2) == [[3, 2], [1, 0]]
    assert balance([3, 1, 0, 2], [3, 7, 2, 9], 5)[4] == []


def test_passes_hold_every_example_once():
    lengths = lengths_like_real(101)
    plan = plan_passes(lengths, BatchConfig(rows=6, row_length=2048), parts=4)
    assert plan.rows == 8, "the next multiple"
    assert sorted(i for step in range(len(plan)) for i in plan.examples(step)) == list(range(101))
    wanted = np.isin(np.arange(101), plan.examples(1))
    (found,) = plan.with_any(wanted).steps
    assert found == plan.steps[1]


def test_too_long():
    with pytest.raises(UserError, match="example 2 takes 11 tokens and a row holds 10; raise config.batch.row_length"):
        pack(np.array([3, 10, 11, 2]), 10)


def test_token_by_token():
    """Two pairs in one row, by hand. A weight sits at the position that predicts its token."""
    pairs = [
        (
            segment([11, 12], [13, 14, 15], w=[0.5, 1.5, 2.5], r=[-1, -2, -3]),
            segment([11, 12], [16], w=[0.25], r=[-4]),
        ),
        (segment([21], [22], w=[9], r=[-5]), segment([21], [23, 24], w=[7, 8], r=[-6, -7])),
    ]
    assert list(example_lengths(pairs)) == [8, 5]
    batch = fill_rows([[1, 0], []], pairs, row_length=15, max_examples=3, values=("w", "r"))
    expected = {
        "example_ids": [1, 0, -1],
        #               pair 1          pair 0                          padding
        "tokens":       [21, 22, 21, 23, 24, 11, 12, 13, 14, 15, 11, 12, 16, 0, 0],
        "positions":    [0, 1, 0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 0, 0],
        "segment_ids":  [1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 4, 4, 4, 0, 0],
        "targets":      [22, 0, 23, 24, 0, 12, 13, 14, 15, 0, 12, 16, 0, 0, 0],
        "loss_mask":    [1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0],
        "w":            [9, 0, 7, 8, 0, 0, 0.5, 1.5, 2.5, 0, 0, 0.25, 0, 0, 0],
        "r":            [-5, 0, -6, -7, 0, 0, -1, -2, -3, 0, 0, -4, 0, 0, 0],
    }  # fmt: skip
    assert set(batch) == set(expected)
    for name, row in expected.items():
        np.testing.assert_array_equal(batch[name][0], row, err_msg=name)
        assert not (batch[name][1] + (name == "example_ids")).any(), f"{name} of an empty row"
        assert batch[name].dtype == (np.float32 if name in ("loss_mask", "w", "r") else np.int32), name


def test_response_slice_predicts_the_response():
    s = segment([5, 6, 7], [8, 9])
    assert response_slice(s, 10) == slice(12, 14)
    batch = fill_rows([[0]], [(s,)], 8, 1)
    np.testing.assert_array_equal(batch["targets"][0, response_slice(s, 0)], [8, 9])


def make_iterator(size=4, rows=2):
    """Steps of `size` pairs, in several microbatches unless a step has one pair alone."""
    rng = np.random.default_rng(0)
    pairs = [
        tuple(segment(rng.integers(1, 99, 3), r := rng.integers(1, 99, rng.integers(1, 9)), w=r) for _ in "cr")
        for _ in range(13)
    ]
    plan = plan_steps(example_lengths(pairs), size, 2, seed=3, rows=rows, row_length=32)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    return plan, pairs, BatchIterator(plan, pairs, mesh, ("w",))


def described_as(stacks):
    return [{name: (array.shape, array.dtype) for name, array in arrays.items()} for arrays in stacks]


@pytest.mark.parametrize("size", [1, 4])
def test_iterator_gives_the_plan(size):
    plan, pairs, iterator = make_iterator(size)
    batches = list(iterator)
    assert len(batches) == len(plan) == 2 * -(-13 // size)
    assert (max(stack.microbatches for shape in plan.shapes for stack in shape) > 1) == (size > 1)
    mesh = make_mesh(MeshConfig(1, 1, 1))
    described = [described_as(batch_shapes(shape, 2, plan.max_examples, mesh, ("w",))) for shape in plan.shapes]
    for step, stacks in enumerate(batches):
        assert described_as(stacks) in described
        for (stack, rows), arrays in zip(plan.steps[step], stacks, strict=True):
            padded = [*rows] + [()] * (2 * stack.microbatches - len(rows))
            expected = fill_rows(padded, pairs, stack.row_length, plan.max_examples, ("w",))
            assert set(arrays) == set(expected)
            for name, array in arrays.items():
                assert array.shape[:2] == (stack.microbatches, 2)
                np.testing.assert_array_equal(np.asarray(array).reshape(expected[name].shape), expected[name])


@pytest.mark.parametrize("done", [0, 1, 4])
def test_state_round_trip(done):
    """A state that went through JSON continues with the same batches, in a new iterator and in the old one."""
    _, _, iterator = make_iterator()
    for _ in range(done):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    rest = list(iterator)
    other = make_iterator()[2]
    for again in (other, iterator):
        again.set_state(state)
        batches = list(again)
        assert len(batches) == len(rest)
        jax.tree.map(np.testing.assert_array_equal, batches, rest)
