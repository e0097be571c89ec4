"""A step holds exactly its number of examples, whatever their lengths, in few shapes and with little padding."""

import numpy as np
import pytest

from lm_jax.data import plans
from lm_jax.data.plans import plan_steps

# Tokens of both sequences of 98 real preference pairs (two thirds of a row of 4,096 at most), in no order.
REAL = np.random.default_rng(7).permutation(
    np.interp(np.linspace(0, 1, 98), [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1], [212, 610, 829, 1270, 1786, 2242, 3442])
).astype(np.int64)  # fmt: skip


def steps_of(plan):
    return [plan.examples(step) for step in range(len(plan))]


def padding(plan, lengths, epochs):
    return 1 - epochs * lengths.sum() / sum(plan.tokens(step) for step in range(len(plan)))


LENGTHS = {
    "alike": np.full(50, 100),
    "short": np.random.default_rng(0).integers(5, 20, 50),
    "some very long": np.where(np.arange(50) % 10, 30, 4096),
    "real": REAL,
}


@pytest.mark.parametrize("rows", [1, 4, 64])
@pytest.mark.parametrize("size", [1, 8, 200])
@pytest.mark.parametrize("name", LENGTHS)
def test_a_step_is_the_next_examples_of_a_permutation(name, size, rows):
    """Whatever the lengths: only an epoch's last step has fewer."""
    lengths = LENGTHS[name]
    plan = plan_steps(lengths, size, 3, seed=5, rows=rows, row_length=4096)
    steps, each = steps_of(plan), -(-len(lengths) // size)
    assert len(plan) == 3 * each
    for epoch in range(3):
        order = np.random.default_rng((5, epoch)).permutation(len(lengths))
        expected = [sorted(order[i : i + size].tolist()) for i in range(0, len(order), size)]
        assert steps[epoch * each : (epoch + 1) * each] == expected
    assert steps[0] != steps[each] or size > len(lengths)


@pytest.mark.parametrize("rows", [1, 2, 8, 64])
@pytest.mark.parametrize("name", LENGTHS)
def test_every_row_fits_and_shapes_are_few(name, rows):
    lengths = LENGTHS[name]
    plan = plan_steps(lengths, 8, 3, seed=0, rows=rows, row_length=4096)
    assert 1 <= len({stack.row_length for shape in plan.shapes for stack in shape}) <= 3
    alone = all(sum(stack.microbatches for stack in shape) == 1 for shape in plan.shapes)
    assert len(plan.shapes) <= (3 if alone else 1)
    for step in plan.steps:
        for stack, held in step:
            assert len(held) <= stack.microbatches * plan.rows and stack.row_length <= 4096
            assert max((lengths[row].sum() for row in held), default=0) <= stack.row_length


def test_another_seed_another_order_and_more_epochs_the_same_first():
    assert steps_of(plan_steps(REAL, 8, 1, 3, 1, 4096)) == steps_of(plan_steps(REAL, 8, 2, 3, 1, 4096))[:13]
    assert plan_steps(REAL, 8, 2, 3, 1, 4096) == plan_steps(REAL, 8, 2, 3, 1, 4096)
    assert steps_of(plan_steps(REAL, 8, 1, 4, 1, 4096)) != steps_of(plan_steps(REAL, 8, 1, 3, 1, 4096))


def test_how_a_step_is_cut_does_not_touch_its_examples():
    assert steps_of(plan_steps(REAL, 8, 2, 3, 1, 4096)) == steps_of(plan_steps(REAL, 8, 2, 3, 64, 8192))


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize(("rows", "most"), [(1, 0.1), (2, 0.15)])
def test_eight_real_pairs_a_step_have_little_padding(rows, most, epochs):
    for seed in range(8):
        assert padding(plan_steps(REAL, 8, epochs, seed, rows, 4096), REAL, epochs) < most


def test_more_devices_than_pairs():
    """A pair is never cut: each device has one at most, and the others nothing."""
    plan = plan_steps(REAL, 8, 1, 0, 64, 4096)
    assert all(len(rows) <= 8 and all(len(row) == 1 for row in rows) for step in plan.steps for _, rows in step)
    assert all(sum(stack.microbatches for stack in shape) == 1 for shape in plan.shapes)


def test_a_row_length_must_be_worth_its_compilation(monkeypatch):
    lengths = np.full(64, 100)
    assert plan_steps(lengths, 8, 1, 0, 2, 800).shapes == [(plans.Stack(1, 400),)]
    found = plan_steps(REAL, 8, 1, 0, 2, 4096)
    assert len(plan_steps(REAL, 8, 1, 0, 2, 4096, row_lengths=1).shapes[0]) == 1
    monkeypatch.setattr(plans, "_WORTH", 0.5)
    (one,) = plan_steps(REAL, 8, 1, 0, 2, 4096).shapes
    assert len(one) == 1 < len(found.shapes[0])
