"""Dropout on adapters: the masks' statistics, what they depend on, and where there are none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.config import ComputeConfig, LoraConfig, MeshConfig, ModelConfig, OptimConfig, RopeConfig
from lm_jax.data.packing import Segment, fill_rows
from lm_jax.models.decoder import Decoder
from lm_jax.models.linear import Linear
from lm_jax.models.lora import dropout_key, init_adapters, join, without_dropout
from lm_jax.models.weights import flatten
from lm_jax.sharding import make_mesh
from lm_jax.training.program import step_program
from lm_jax.training.step import host_totals, make_evaluate
from lm_jax.training.supervised import VALUES, supervised_objective

MODEL = ModelConfig("llama", 64, 2, 16, 24, 4, 2, 4, RopeConfig(10_000.0), 1e-5, 64)
COMPUTE = ComputeConfig("float32", attention="reference", logprob_chunk=8)
LORA = LoraConfig(2, 4.0, "all-linear", False, dropout=0.25)
OFF = LoraConfig(2, 4.0, "all-linear", False)
OPTIM = OptimConfig(1e-2, "constant", 0.0, 0.0, 0.9, 0.999, 1e-8, 0.0, 0.0)
MESH = MeshConfig(1, 1, 1)


@functools.cache
def params():
    ids = jnp.ones((1, 4), jnp.int32)
    return jax.jit(Decoder(MODEL, COMPUTE).init)(jax.random.key(0), ids, ids, ids)["params"]


@functools.cache
def adapters():
    return jax.tree.map(lambda x: x + 0.2, init_adapters(MODEL, LORA, make_mesh(MESH), seed=0))


def test_the_mean_over_masks_is_no_dropout():
    rng = np.random.default_rng(0)
    x, w, a, b = (jnp.float32(rng.standard_normal(s)) for s in ((5, 3, 2), (3, 2, 4), (3, 2, 2), (2, 4)))
    layer, keep = Linear((4,), num_axes=2), jnp.float32(0.75)
    leaves = {"kernel": w, "lora_a": a, "lora_b": b}
    plain = layer.apply({"params": leaves}, x)

    def dropped(key):
        return layer.apply({"params": leaves | {"lora_key": key, "lora_keep": keep}}, x)

    drawn = np.asarray(jax.jit(jax.vmap(dropped))(jax.random.split(jax.random.key(1), 20_000)), np.float64)
    # By hand: each of the six inputs of an output is there with 3/4, and then 4/3 of it
    parts = np.einsum("ncd,cdr,rf->ncdf", x, a, b)
    deviation = np.sqrt((parts**2).sum(axis=(1, 2)) / 3)
    np.testing.assert_allclose(drawn.std(axis=0), deviation, rtol=0.05)
    assert (np.abs(drawn.mean(axis=0) - plain) < 5 * deviation / np.sqrt(len(drawn))).all()
    kept = drawn[0] - np.einsum("ncd,cdf->nf", x, w)
    assert not np.allclose(kept, plain - np.einsum("ncd,cdf->nf", x, w))  # the frozen path sees all of x


def keys_of(*at):
    joined = flatten(join(params(), adapters(), LORA, dropout_key(*at)))
    return np.concatenate([jax.random.key_data(x) for p, x in joined.items() if p.endswith("lora_key")])


def test_every_layer_target_step_and_microbatch_has_its_own_mask():
    points = [(seed, step, micro) for seed in (0, 1) for step in (0, 1, 2) for micro in (0, 1)]
    keys = np.concatenate([keys_of(*at) for at in points])
    assert len(keys) == len(points) * 7 * MODEL.num_layers == len(np.unique(keys, axis=0))
    np.testing.assert_array_equal(keys_of(1, 2, 1), keys_of(1, jnp.int32(2), jnp.int32(1)))


def test_without():
    plain, key = flatten(join(params(), adapters(), LORA)), dropout_key(0, 0, 0)
    for joined in (without_dropout(join(params(), adapters(), LORA, key)), join(params(), adapters(), OFF, key)):
        assert flatten(joined).keys() == plain.keys()
        jax.tree.map(np.testing.assert_array_equal, flatten(joined), plain)
    assert "layers/mlp/up/lora_key" in flatten(join(params(), adapters(), LORA, key))


def batch():
    """One microbatch of two rows."""
    rng = np.random.default_rng(0)
    segments = [
        (
            Segment(
                *(rng.integers(0, 64, n).astype(np.int32) for n in (2, 9)), {n: np.ones(9, np.float32) for n in VALUES}
            ),
        )
        for _ in range(4)
    ]
    rows = fill_rows([[0, 1], [2, 3]], segments, 24, 2, VALUES)
    return {k: jnp.asarray(x[None]) for k, x in rows.items()}


@functools.cache
def program(lora, seed=0):
    objective = supervised_objective(MODEL, COMPUTE)
    return step_program(MODEL, objective, OPTIM, lora, "float32", make_mesh(MESH), 10, seed)


def steps(lora, number, seed=0, state=None):
    made = program(lora, seed)
    state = made.begin(jax.tree.map(jnp.copy, adapters())) if state is None else state
    metrics = []
    for _ in range(number):
        state, found = made.step(state, [batch()], params())
        metrics.append(float(found["loss"]))
    return jax.device_get(state), metrics


@pytest.mark.slow
def test_a_step_goes_on_from_where_it_stood():
    whole, losses = steps(LORA, 3)
    half, before = steps(LORA, 1)
    rest, after = steps(LORA, 2, state=jax.tree.map(jnp.asarray, half))
    jax.tree.map(np.testing.assert_array_equal, rest, whole)
    assert before + after == losses


@pytest.mark.slow
def test_what_a_step_depends_on():
    first = steps(LORA, 1)[1][0]
    assert steps(LORA, 1)[1][0] == first
    assert abs(steps(LORA, 1, seed=1)[1][0] - first) > 1e-4
    fresh = program(LORA).begin(jax.tree.map(jnp.copy, adapters()))
    later = steps(LORA, 1, state=fresh.replace(step=jnp.int32(1)))[1][0]
    assert abs(later - first) > 1e-4
    # The same rows twice, as two microbatches: with one mask for both the mean would be that of the rows once
    twice = {k: jnp.concatenate([x, x]) for k, x in batch().items()}
    state = program(LORA).begin(jax.tree.map(jnp.copy, adapters()))
    assert abs(float(program(LORA).step(state, [twice], params())[1]["loss"]) - first) > 1e-4


def test_evaluation_has_none():
    objective = supervised_objective(MODEL, COMPUTE)
    totals = host_totals(objective, [batch()])
    found = make_evaluate(objective)(join(params(), adapters(), LORA), [batch()], totals)["loss"]
    assert found == pytest.approx(steps(OFF, 1)[1][0], rel=1e-6)
    assert abs(found - steps(LORA, 1)[1][0]) > 1e-4
