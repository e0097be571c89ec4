"""A step that is not finite leaves no trace but its count, whichever way it came to be so; too many end the run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lab.controls import config as controls_config
from lm_jax.checkpoints import runs
from lm_jax.checkpoints.orbax import Checkpoints
from lm_jax.config import MeshConfig
from lm_jax.data.batches import BatchIterator
from lm_jax.data.packing import example_lengths
from lm_jax.data.plans import BatchPlan, plan_steps
from lm_jax.errors import UserError
from lm_jax.sharding import make_mesh
from lm_jax.training.checkpointing import checkpoint_items, resume
from lm_jax.training.objective import Objective
from lm_jax.training.optim import make_optimizer, make_schedule
from lm_jax.training.skipping import Skips
from lm_jax.training.step import TrainState, make_train_step
from lm_jax.training.supervised import supervised_objective
from main_jax.rounds import config as rounds_config
from main_jax.training.losses import mixed_coefficients
from main_jax.training.weighting import alpha_state
from musc_jax.rounds import command as rounds
from musc_jax.training.objective import preference_objective
from tests.unit import test_step, test_supervised_objective

HUGE = 63  # a token whose embedding lies at the end of fp32's range
LARGEST = float(np.finfo(np.float32).max)
STEPS = 10
METHODS = {"preference": test_step, "supervised": test_supervised_objective}


def without_huge(example):
    small = lambda ids: np.minimum(ids, HUGE - 1)  # noqa: E731
    return tuple(dataclasses.replace(s, prompt=small(s.prompt), response=small(s.response)) for s in example)


@functools.cache
def examples(method):
    module = METHODS[method]
    return [without_huge(e) for e in (module.pairs if method == "preference" else module.examples)()]


def spoiled(method, bad, how):
    """The examples, one of which cannot be learnt from."""
    made = examples(method)[:]
    segment = made[bad][-1]
    if how == "token":
        segment = dataclasses.replace(segment, prompt=np.full_like(segment.prompt, HUGE))
    else:
        weights = np.full(len(segment.response), LARGEST, np.float32)
        segment = dataclasses.replace(segment, values={**segment.values, "weights": weights})
    made[bad] = (*made[bad][:-1], segment)
    return made


@functools.cache
def program(method, dtype="float32"):
    """(the jitted step, which takes its state away; () -> a state to begin with)"""
    module = METHODS[method]
    compute, carried = dataclasses.replace(module.COMPUTE, dtype=dtype), None
    if method == "preference":
        objective = preference_objective(module.MODEL, compute, module.LOSS)
    else:
        objective = supervised_objective(module.MODEL, compute, mixed_coefficients, kept := alpha_state(module.ALPHA))
        carried = kept.initial
    schedule = make_schedule(dataclasses.replace(test_step.OPTIM, schedule="cosine"), STEPS)
    optimizer = make_optimizer(test_step.OPTIM, schedule)
    params = jax.tree.map(np.array, module.params())
    params["embed"]["embedding"][HUGE] = LARGEST

    def begin():
        return TrainState.create(jax.tree.map(jnp.array, params), optimizer, jax.tree.map(jnp.float32, carried))

    return jax.jit(make_train_step(objective, optimizer, schedule, num_steps=STEPS), donate_argnums=0), begin


def batch(method, rows, microbatches, given=None):
    make, given = METHODS[method].batch_of, given or examples(method)
    return [make(rows, microbatches, given)]


ROWS = {"preference": [test_step.ROWS, test_step.ROWS[::-1]], "supervised": test_supervised_objective.STEPS[::2]}


def train(method, batches, dtype="float32"):
    """[(state, metrics)] after every step, on the host."""
    step, begin = program(method, dtype)
    state, found = begin(), []
    for given in batches:
        before, (state, metrics) = state, step(state, given)
        assert not [p for p, leaf in jax.tree.leaves_with_path(before) if not leaf.is_deleted()], "not donated"
        copy = jax.tree.map(jnp.copy, state)  # what the host has looked at cannot be given away any more
        found.append((jax.device_get(copy), {k: float(v) for k, v in metrics.items()}))
    return found


def same(a, b):
    leaves = zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True)
    return [path for (path, x), y in leaves if not np.array_equal(x, y)] == []


@pytest.mark.parametrize(
    ("method", "dtype", "how", "microbatches"),
    [
        ("preference", "float32", "weight", 1),  # its gradient alone, the policy being its reference or not
        ("preference", "bfloat16", "token", 4),
        ("supervised", "bfloat16", "token", 1),
        ("supervised", "bfloat16", "token", 4),
    ],
)
def test_a_skipped_step_leaves_no_trace(method, dtype, how, microbatches):
    """Good, bad, bad, good, against good, good: to the bit, and with the same learning rates."""
    rows, bad = ROWS[method], 5 if method == "preference" else 2
    good, last = (batch(method, r, microbatches) for r in rows)
    worst = batch(method, rows[0], microbatches, spoiled(method, bad, how))
    found = train(method, [good, worst, worst, last], dtype)
    expected = train(method, [good, last], dtype)
    states, metrics = zip(*found, strict=True)
    assert [int(s.step) for s in states] == [1, 2, 3, 4] and [int(s.skipped) for s in states] == [0, 1, 2, 2]
    assert [m["skipped_steps"] for m in metrics] == [0, 1, 2, 2]
    assert [bool(np.isfinite([m["loss"], m["grad_norm"]]).all()) for m in metrics] == [True, False, False, True]
    for state, (whole, _) in zip(states, (expected[0], expected[0], expected[0], expected[1]), strict=True):
        for part in ("params", "opt_state", "objective_state"):
            assert same(getattr(state, part), getattr(whole, part)), part
    assert not same(states[0].params, states[3].params), "nothing was learnt, nothing is seen"
    rates = [m["learning_rate"] for m in metrics]
    assert rates[1] == rates[2] == rates[3] == expected[1][1]["learning_rate"] != rates[0]
    assert {k: v for k, v in metrics[3].items() if k != "skipped_steps"} == {
        k: v for k, v in expected[1][1].items() if k != "skipped_steps"
    }


@pytest.mark.parametrize(
    ("bad", "start", "not_finite"),
    [
        (jnp.sqrt, 0.0, {"grad_norm"}),  # 0, with a slope that is infinite
        (lambda p: 1e25 * p, 0.0, {"grad_norm"}),  # a slope whose square alone is too large
        (lambda p: LARGEST * p, 2.0, {"loss", "grad_norm"}),
        (lambda p: p * jnp.nan, 2.0, {"loss", "grad_norm"}),
        (lambda p: p + jax.lax.stop_gradient(jnp.inf), 2.0, {"loss"}),  # the slope of 1 would do no harm
    ],
)
def test_by_hand(bad, start, not_finite):
    """Then a step against a slope of 1, as if it were the first: by 0.1, and the momentum is 1."""

    def loss(params, micro, totals):
        return jax.lax.cond(micro["bad"][0], bad, lambda p: p, params["kernel"][0]), {}, jnp.int32(-1)

    optimizer = optax.sgd(lambda step: 0.1 + step, momentum=0.5)
    step = jax.jit(make_train_step(Objective(lambda micro: {}, loss), optimizer, lambda step: 0.1 + step))
    state = TrainState.create({"kernel": jnp.array([start, 5.0])}, optimizer)
    state, metrics = step(state, [{"bad": jnp.array([[True]])}])
    assert {name for name in ("loss", "grad_norm") if not np.isfinite(metrics[name])} == not_finite
    assert state.params["kernel"].tolist() == [start, 5] and state.skipped == metrics["skipped_steps"] == 1
    state, metrics = step(state, [{"bad": jnp.array([[False]])}])
    assert metrics["learning_rate"] == np.float32(0.1) and metrics["grad_norm"] == metrics["skipped_steps"] == 1
    assert state.params["kernel"].tolist() == [np.float32(start) - np.float32(0.1), 5]
    assert optax.tree_utils.tree_get(state.opt_state, "trace")["kernel"].tolist() == [1, 0]
    assert state.step == 2 and state.skipped == 1


def test_the_count_is_in_the_checkpoint(tmp_path):
    """And runs from before there was one go on with none."""
    _, begin = program("preference")
    state = begin().replace(step=jnp.int32(7), skipped=jnp.int32(3))
    with Checkpoints(str(tmp_path), keep=2) as checkpoints:
        for number, kept in ((7, {"skipped_steps": 3}), (8, {})):
            checkpoints.save(number, checkpoint_items(state, {"data": {"next": 7}, **kept}))
        checkpoints.wait()
        restored = [resume(checkpoints, jax.eval_shape(begin), number)[0] for number in (7, 8)]
    assert [int(r.skipped) for r in restored] == [3, 0] and [int(r.step) for r in restored] == [7, 7]
    assert same(jax.device_get(restored[0].params), jax.device_get(state.params))


# What is told


@pytest.fixture
def batches():
    """Steps of three pairs, in microbatches of one row."""
    pairs = examples("preference")
    plan = plan_steps(example_lengths(pairs), 3, 1, seed=0, rows=1, row_length=test_step.LENGTH)
    assert len(plan) == 3 and max(stack.microbatches for stack in plan.shapes[0]) > 1
    return BatchIterator(plan, pairs, make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), ("weights", "ref_logprobs"))


def values(skipped, bad=-1, loss=np.nan, grad_norm=np.nan):
    return {"loss": loss, "grad_norm": grad_norm, "bad_example": bad, "skipped_steps": skipped}


def test_what_a_skip_says(batches, tmp_path, capsys):
    skips = Skips(str(tmp_path), 2, 9, batches, lambda i: f"rows.jsonl row {10 * i}")

    def said(step, metrics):
        skips.on_metrics(step, metrics, None)
        return capsys.readouterr().err.removesuffix("\n")

    assert said(1, values(0, loss=0.5, grad_norm=1.0)) == "" and skips.last == 0
    rows = [f"rows.jsonl row {10 * i}" for i in batches.plan.examples(1)]
    assert said(2, values(1, batches.plan.examples(1)[0])) == (
        f"step 2: loss is nan (in {rows[0]}); skipped, number 1 of at most 2; the step's rows: {', '.join(rows)}"
    )
    assert said(3, values(2, loss=0.5, grad_norm=np.inf)).startswith("step 3: grad_norm is inf; skipped")
    assert skips.last == 3 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [0, 2])
def test_one_too_many(batches, tmp_path, limit):
    """The batch that is written down is the one that was trained on."""
    skips = Skips(str(tmp_path), limit, 9, batches, lambda i: f"rows.jsonl row {10 * i}")
    next(batches)
    trained = next(batches)
    with pytest.raises(UserError) as error:
        skips.on_metrics(2, values(limit + 1, 4), None)
    path = tmp_path / "skipped" / "step_2.npz"
    for part in ("step 2", "row 40", f"{limit} steps", f"skip_limit={limit}", str(path), "learning_rate", "intact"):
        assert part in str(error.value), error.value
    with np.load(path, allow_pickle=False) as written:
        arrays = {f"{len(s['tokens'][0, 0])}/{name}": array for s in trained for name, array in s.items()}
        assert {*written} == {"rows", *arrays}
        for name, array in arrays.items():
            assert np.array_equal(written[name], array), name
        ids = np.concatenate([a.ravel() for name, a in arrays.items() if name.endswith("/example_ids")])
        assert [f"rows.jsonl row {10 * i}" for i in sorted(ids[ids >= 0])] == [*written["rows"]]
    assert [p.name for p in path.parent.iterdir()] == ["step_2.npz"]


def test_a_batch_that_cannot_be_written_hides_nothing(batches, tmp_path):
    (tmp_path / "skipped").write_text("a file where a directory should be")
    with pytest.raises(UserError, match=r"step 1: loss is nan.*could not be written.*learning_rate"):
        Skips(str(tmp_path), 0, 9, batches, str).on_metrics(1, values(1), None)


def test_rows_beyond_some_are_counted(batches, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(BatchPlan, "examples", lambda plan, step: [*range(128)])
    Skips(str(tmp_path), 5, 9, batches, lambda i: f"p.jsonl row {i}").on_metrics(1, values(1), None)
    said = capsys.readouterr().err
    assert "p.jsonl row 7 and 120 more" in said and "row 8" not in said


def test_every_command_that_trains_may_go_on_with_another_limit():
    changing = {
        "": runs._MAY_CHANGE,
        "train.": rounds._MAY_CHANGE,
        "forward.": rounds_config.MAY_CHANGE,
        "reverse.": rounds_config.MAY_CHANGE,
        "rounds.forward.": controls_config.MAY_CHANGE,
    }
    assert [] == [part for part, keys in changing.items() if f"{part}optim.skip_limit" not in keys]
    assert "train.optim.skip_limit" in controls_config.MAY_CHANGE
