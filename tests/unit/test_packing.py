"""Packing puts every example in one row, lays its tokens out in line with what they predict, and resumes exactly."""

import json

import jax
import numpy as np
import pytest

from lm_jax.config import BatchConfig, MeshConfig
from lm_jax.data.batches import BatchIterator, check_batch, plan_batches
from lm_jax.data.packing import Segment, example_lengths, fill_rows, pack, response_slice
from lm_jax.errors import UserError
from lm_jax.sharding import make_mesh


def lengths_like_real(n, seed=0):
    """Pairs of chat sequences: mostly some hundred tokens, a long tail, cut at 2048."""
    lengths = np.random.default_rng(seed).lognormal(6.2, 0.6, n)
    return np.clip(lengths, 20, 2048).astype(np.int64)


def segment(prompt, response, **values):
    values = {name: np.array(v, np.float32) for name, v in values.items()}
    return Segment(np.array(prompt, np.int32), np.array(response, np.int32), values)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("max_examples", [1, 3, 64])
def test_every_example_is_in_one_row_and_fits(shuffled, max_examples):
    lengths = lengths_like_real(2500)  # over two windows of 1024
    rows = pack(lengths, 2048, max_examples, np.random.default_rng(0) if shuffled else None)
    assert sorted(i for row in rows for i in row) == list(range(2500))
    assert max(lengths[row].sum() for row in rows) <= 2048
    assert max(map(len, rows)) <= max_examples
    assert min(map(len, rows)) >= 1


def test_rows_are_dense():
    lengths = lengths_like_real(3000)
    for rng in (None, np.random.default_rng(0)):
        rows = pack(lengths, 4096, 64, rng)
        assert lengths.sum() / (len(rows) * 4096) > 0.97


def test_shuffled_rows_hold_short_and_long_examples():
    """Of examples far below a row's length; in order of length each row would have those of one length alone."""
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(10, 20, 2000), rng.integers(100, 150, 500)])
    rows = pack(lengths, 1000, 1000, rng)
    assert lengths.sum() / (len(rows) * 1000) > 0.98
    long = [np.mean(lengths[row] >= 100) for row in rows]
    assert 0.2 == pytest.approx(np.mean(long), abs=0.04) and np.std(long) < 0.15
    assert np.std([np.mean(lengths[row] >= 100) for row in pack(lengths, 1000, 1000)]) > 0.2


def test_exact_fit_and_no_examples():
    assert [list(row) for row in pack(np.array([3, 7, 10, 10]), 10, 4)] == [[2], [3], [1, 0]]
    assert pack(np.array([], np.int64), 10, 4) == []


def test_deterministic_and_shuffled_by_seed_and_epoch():
    lengths, batch = lengths_like_real(300), BatchConfig(4, 2048, 1, 8)

    def plan(seed, epochs=2):
        return [tuple(row) for row in plan_batches(lengths, batch, epochs, seed).rows]

    assert plan(7) == plan(7)
    assert plan(7) != plan(8)
    one_epoch = len(plan(7)) // 2
    first, second = plan(7)[:one_epoch], plan(7)[one_epoch:]
    assert first != second and plan(7, 1) == plan(7)[: len(plan(7, 1))]
    assert plan(None, 1) == plan(None, 1)
    assert plan(None)[: len(plan(None, 1))] == plan(None, 1) == plan(None)[len(plan(None, 1)) :]


def test_each_epoch_holds_every_example_once():
    lengths, batch = lengths_like_real(101), BatchConfig(8, 2048, 2, 8)
    plan = plan_batches(lengths, batch, 3, seed=0)
    assert len(plan) == sum(plan.steps_per_epoch) and len(plan.rows) == 8 * len(plan)
    step = 0
    for steps in plan.steps_per_epoch:
        rows = [row for s in range(step, step + steps) for row in plan[s]]
        assert sorted(i for row in rows for i in row) == list(range(101))
        assert all(len(plan[s]) == 8 for s in range(step, step + steps))
        step += steps


def test_too_long():
    with pytest.raises(UserError, match="example 2 takes 11 tokens and a row holds 10; raise config.batch.row_length"):
        pack(np.array([3, 10, 11, 2]), 10, 4)


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


def make_iterator(epochs=2):
    rng = np.random.default_rng(0)
    pairs = [
        tuple(segment(rng.integers(1, 99, 3), r := rng.integers(1, 99, rng.integers(1, 9)), w=r) for _ in "cr")
        for _ in range(13)
    ]
    batch = BatchConfig(rows=2, row_length=32, microbatches=2, max_examples_per_row=2)
    plan = plan_batches(example_lengths(pairs), batch, epochs, seed=3)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    return plan, pairs, BatchIterator(plan, pairs, mesh, ("w",))


def test_iterator_gives_the_plan():
    plan, pairs, iterator = make_iterator()
    batches = list(iterator)
    assert len(batches) == len(plan) > 4
    for step, batch in enumerate(batches):
        expected = fill_rows(plan[step], pairs, 32, 2, ("w",))
        assert set(batch) == set(expected)
        for name, array in batch.items():
            assert array.shape[:2] == (2, 1), "[microbatches, rows of one]"
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
        for a, b in zip(batches, rest, strict=True):
            for name in a:
                np.testing.assert_array_equal(a[name], b[name])


class FakeMesh:
    shape = {"data": 2, "fsdp": 3, "tensor": 4}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (BatchConfig(12, 64, 1, 1), None),
        (BatchConfig(24, 64, 4, 1), None),
        (BatchConfig(8, 64, 1, 1), r"rows=8 must be a multiple of .*microbatches=1 times .*fsdp=6; the next one is 12"),
        (BatchConfig(12, 64, 4, 1), r"rows=12 must be a multiple of .*microbatches=4 times .* the next one is 24"),
        (BatchConfig(13, 64, 2, 1), r"rows=13 must .* the next one is 24"),
        (BatchConfig(0, 64, 1, 1), "config.batch: every size must be at least 1"),
        (BatchConfig(12, 64, 0, 1), "config.batch: every size must be at least 1"),
        (BatchConfig(12, 64, 1, 0), "config.batch: every size must be at least 1"),
    ],
)
def test_check_batch(batch, message):
    if message is None:
        check_batch(batch, FakeMesh)
    else:
        with pytest.raises(UserError, match=message):
            check_batch(batch, FakeMesh)


def test_iterator_checks_its_batch():
    plan, pairs, _ = make_iterator()
    with pytest.raises(UserError, match="rows=2 must be a multiple"):
        BatchIterator(plan, pairs, FakeMesh)
