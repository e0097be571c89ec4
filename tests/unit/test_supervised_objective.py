"""The supervised step: means over the whole step whatever it is cut into, moving averages included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm_jax.checkpoints.orbax import Checkpoints
from lm_jax.config import ComputeConfig, ModelConfig, RopeConfig
from lm_jax.data.packing import Segment, fill_rows
from lm_jax.models.decoder import Decoder
from lm_jax.training.checkpointing import checkpoint_items, resume
from lm_jax.training.step import TrainState, host_totals, make_evaluate, make_train_step
from lm_jax.training.supervised import VALUES, supervised_objective
from main_jax.training.losses import mixed_coefficients, plain_coefficients
from main_jax.training.weighting import AlphaConfig, alpha_state

MODEL = ModelConfig("llama", 64, 2, 16, 24, 4, 2, 4, RopeConfig(10_000.0), 1e-5, 64)
COMPUTE = ComputeConfig("float32", attention="reference", logprob_chunk=8)  # what compiles fastest
ALPHA = AlphaConfig("loss_ratio", 0.5, 0.0, 0.5, decay=0.5)
LENGTH = 24
# Rows of a step; examples 0 to 3 and 7 are synthetic. The second step has none of them, and padding rows.
STEPS = [[[0, 1], [2], [3], [4, 5]], [[6], [], [8], []], [[0, 6], [7], [9], [1, 2]]]


@functools.cache
def examples():
    rng = np.random.default_rng(0)

    def segment(i):
        size = int(rng.integers(3, 9))
        values = {
            "weights": np.full(size, [1.0, 0.5, 3.0][i % 3]),
            "synthetic": np.full(size, float(i in (0, 1, 2, 3, 7))),
        }
        mask = None if i % 2 else np.arange(size) % 3 != 1  # others' turns in between
        return (Segment(rng.integers(0, 64, 3), rng.integers(0, 64, size), values, mask),)

    return [segment(i) for i in range(10)]


def batch_of(rows, microbatches=1, spoiled=None):
    arrays = fill_rows(rows, spoiled or examples(), LENGTH, 2, VALUES)
    return {k: v.reshape(microbatches, -1, *v.shape[1:]) for k, v in arrays.items()}


@functools.cache
def params():
    ids = jnp.ones((1, 4), jnp.int32)
    made = jax.jit(Decoder(MODEL, COMPUTE).init)(jax.random.key(0), ids, ids, ids)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + jnp.float32(0.2 * rng.standard_normal(x.shape)), made)


OPTIMIZER = optax.sgd(0.1)


@functools.cache
def train_step():
    objective = supervised_objective(MODEL, COMPUTE, mixed_coefficients, alpha_state(ALPHA))
    return jax.jit(make_train_step(objective, OPTIMIZER, lambda step: 0.1, num_steps=3))


@functools.cache
def start():
    return TrainState.create(params(), OPTIMIZER, jax.tree.map(jnp.float32, alpha_state(ALPHA).initial))


@functools.cache
def trained(microbatches):
    """[(state, metrics)] of the steps."""
    state, found = start(), []
    for rows in STEPS:
        state, metrics = train_step()(state, [batch_of(rows, microbatches)])
        found.append((state, {k: float(v) for k, v in metrics.items()}))
    return found


@functools.cache
def evaluate():
    objective = supervised_objective(MODEL, COMPUTE, plain_coefficients)
    run = make_evaluate(objective)
    return lambda params, batches: run(params, batches, host_totals(objective, batches))


def means(rows, params):
    """{source: mean by weight}, and the share of tokens that are likeliest, from every example alone."""
    sums = {"seed": [0.0, 0.0], "synthetic": [0.0, 0.0]}
    hits = tokens = 0.0
    for i in (i for row in rows for i in row):
        alone = evaluate()(params, [batch_of([[i], [], [], []])])
        (segment,) = examples()[i]
        number = len(segment.response) if segment.loss_mask is None else segment.loss_mask.sum()
        weight = number * segment.values["weights"][0]
        side = sums["synthetic" if segment.values["synthetic"][0] else "seed"]
        side[0] += weight * alone["loss"]
        side[1] += weight
        hits, tokens = hits + number * alone["mean_token_accuracy"], tokens + number
    return {name: total / weight if weight else np.nan for name, (total, weight) in sums.items()}, hits / tokens


def test_every_step_by_hand():
    """alpha from the averages of the steps before; each source's mean; a step without synthetic rows."""
    before, averages = params(), {"seed": [], "synthetic": []}
    for (state, metrics), rows in zip(trained(1), STEPS, strict=True):
        expected, accuracy = means(rows, before)
        alpha = 0.5
        if all(averages.values()):
            seed, synthetic = (
                np.average(seen, weights=[0.5 ** (len(seen) - i) for i in range(len(seen))])
                for seen in averages.values()
            )
            alpha = seed / (seed + synthetic)
        np.testing.assert_allclose(metrics["alpha"], alpha, rtol=1e-5)
        for source, mean in expected.items():
            np.testing.assert_allclose(metrics[f"loss/{source}"], mean, rtol=1e-5)
            averages[source] += [] if np.isnan(mean) else [mean]
        parts = alpha * np.nan_to_num(expected["synthetic"]) + (1 - alpha) * expected["seed"]
        np.testing.assert_allclose(metrics["loss"], parts, rtol=1e-5)
        np.testing.assert_allclose(metrics["mean_token_accuracy"], accuracy, rtol=1e-5)
        before = state.params
    alphas = [metrics["alpha"] for _, metrics in trained(1)]
    assert len(averages["synthetic"]) == 2 and len({*alphas}) == 3, "nothing to see"


def test_accumulated_equals_one_batch():
    """Over three steps, with microbatches of one source alone and of padding."""
    for (state, metrics), (one, expected) in zip(trained(4), trained(1), strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
        for a, b in zip(jax.tree.leaves(state.objective_state), jax.tree.leaves(one.objective_state), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(one.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_evaluation_is_plain_and_exact_over_uneven_batches():
    rows = [[0, 1], [2], [3, 4], [5]]
    whole = evaluate()(params(), [batch_of(rows)])
    uneven = evaluate()(params(), [batch_of([row, [], [], []]) for row in rows])
    expected, accuracy = means(rows, params())
    for found in (whole, uneven):
        assert set(found) == {"loss", "loss/seed", "loss/synthetic", "mean_token_accuracy"}
        for name in ("seed", "synthetic"):
            np.testing.assert_allclose(found[f"loss/{name}"], expected[name], rtol=1e-5)
        np.testing.assert_allclose(found["mean_token_accuracy"], accuracy, rtol=1e-5)
        np.testing.assert_allclose(found["loss"], whole["loss"], rtol=1e-5)
    assert min(expected.values()) < whole["loss"] < max(expected.values())


def test_what_is_carried_is_in_the_checkpoint(tmp_path):
    """Saved after two steps and restored, the third is the same to the bit; without a carry there is no such item."""
    state = trained(1)[1][0]
    with Checkpoints(str(tmp_path), keep=1) as checkpoints:
        checkpoints.save(2, checkpoint_items(state, {"data": {"next": 2}}))
        checkpoints.wait()
        restored, position = resume(checkpoints, jax.eval_shape(start))
    assert position == {"next": 2}
    kept = restored.objective_state
    assert float(kept["seed"]["weight"]) == 0.75 and float(kept["synthetic"]["weight"]) == 0.5
    again, metrics = train_step()(jax.device_get(restored), [batch_of(STEPS[2])])
    last, expected = trained(1)[2]
    assert {k: float(v) for k, v in metrics.items()} == expected
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(last), strict=True))
    plain = checkpoint_items(TrainState.create(params(), OPTIMIZER), {})
    assert set(plain) == {"params", "optimizer", "progress"} and set(plain["optimizer"]) == {"step", "opt_state"}


def test_a_bad_example_is_named():
    spoiled = list(examples())
    (segment,) = spoiled[5]
    outside = np.where(np.arange(len(segment.prompt)) == 1, 10**6, segment.prompt)  # fill mode: its embedding is NaN
    spoiled[5] = (Segment(outside, segment.response, segment.values, segment.loss_mask),)
    _, metrics = train_step()(start(), [batch_of(STEPS[0], 1, spoiled)])
    assert metrics["bad_example"] == 5 and not np.isfinite(metrics["loss"])
    assert trained(1)[0][1]["bad_example"] == -1
