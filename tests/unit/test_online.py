"""Online weights: those of the weighing pass with the same parameters, in place, and no part of the gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.config import BatchConfig, ComputeConfig, LoraConfig, MeshConfig, ModelConfig, RopeConfig
from lm_jax.data.batches import AuxiliaryBatch, BatchIterator
from lm_jax.data.packing import Segment, example_lengths, fill_rows
from lm_jax.data.plans import plan_steps
from lm_jax.models.decoder import Decoder
from lm_jax.models.lora import dropout_key, init_adapters, join
from lm_jax.scoring.contexts import contrast
from lm_jax.sharding import make_mesh
from musc_jax.training.losses import LossConfig
from musc_jax.training.objective import preference_objective
from musc_jax.weights.command import response_scores
from musc_jax.weights.online import online_weights
from musc_jax.weights.rules import CHOSEN, CONTEXTS, ONLINE_RULES, REJECTED, WEIGHING_RULES, check_rule, online_rule

MODEL = ModelConfig("llama", 64, 2, 16, 24, 4, 2, 4, RopeConfig(10_000.0), 1e-5, 64)
COMPUTE = ComputeConfig("float32", attention="reference", logprob_chunk=8)
LENGTH, MAX_PAIRS = 40, 3
ROWS = [[0, 1], [2], [], [3, 4, 5]]
LOSS = LossConfig("sigmoid", 0.5, 0.0, 0.0, nll_weight=0.3)


@functools.cache
def params():
    ids = jnp.ones((1, 4), jnp.int32)
    made = jax.jit(Decoder(MODEL, COMPUTE).init)(jax.random.key(0), ids, ids, ids)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + jnp.float32(0.3 * rng.standard_normal(x.shape)), made)


@functools.cache
def prompts_and_responses():
    """Of each pair: prompts by context, and both responses."""
    rng = np.random.default_rng(0)

    def draw(low, high):
        return rng.integers(0, 64, rng.integers(low, high)).astype(np.int32)

    return [({c: draw(1, 4) for c in CONTEXTS}, (draw(1, 5), draw(1, 5))) for _ in range(6)]


def pairs():
    return [tuple(Segment(prompts["full"], r) for r in sides) for prompts, sides in prompts_and_responses()]


def under(contexts):
    """Both responses of each pair, each under every context."""
    return [
        tuple(Segment(prompts[c], response) for c in contexts)
        for prompts, sides in prompts_and_responses()
        for response in sides
    ]


def batch(rule):
    contexts = WEIGHING_RULES[rule].contexts
    auxiliary = AuxiliaryBatch("weigh", under(contexts), 2, len(contexts))
    return fill_rows(ROWS, pairs(), LENGTH, MAX_PAIRS) | auxiliary.fill(ROWS, LENGTH, MAX_PAIRS)


@pytest.mark.parametrize("rule", ONLINE_RULES)
def test_equal_to_the_weighing_pass(rule):
    weights = np.asarray(jax.jit(online_weights(rule, MODEL, COMPUTE))(params(), batch(rule)))
    contexts, examples = WEIGHING_RULES[rule].contexts, under(WEIGHING_RULES[rule].contexts)
    mesh = make_mesh(MeshConfig(1, 1, 1))
    rows = BatchConfig(rows=2, row_length=64)
    wanted, divergences = np.ones(len(examples), bool), WEIGHING_RULES[rule].divergences
    scores = dict(
        pair for part in contrast(params(), examples, wanted, MODEL, COMPUTE, rows, mesh, divergences) for pair in part
    )
    expected = np.zeros_like(weights)
    for b, row in enumerate(ROWS):
        start = 0
        for item in row:
            for side, segment in enumerate(pairs()[item]):
                own = response_scores(scores[2 * item + side], contexts, (CHOSEN, REJECTED)[side])
                first = start + len(segment.prompt) - 1
                expected[b, first : first + len(segment.response)] = WEIGHING_RULES[rule].weigh(own)
                start += len(segment)
    np.testing.assert_allclose(weights, expected, atol=2e-5)
    assert len(np.unique(weights.round(4))) > 10  # and not one number everywhere


@pytest.mark.parametrize("rule", ["calibrated_entropy", "pmi"])
def test_no_gradient_through_the_weights(rule):
    arrays = batch(rule)
    arrays["ref_logprobs"] = np.where(arrays["loss_mask"] > 0, -4.0, 0.0).astype(np.float32)
    weigh = online_weights(rule, MODEL, COMPUTE)
    frozen = arrays | {"weights": weigh(params(), arrays)}

    def gradient(objective, arrays):
        totals = objective.count(arrays)
        loss = jax.jit(jax.value_and_grad(lambda p: objective.loss(p, arrays, totals)[0]))
        return jax.device_get(loss(params()))

    online = gradient(preference_objective(MODEL, COMPUTE, LOSS, weigh), arrays)
    given = gradient(preference_objective(MODEL, COMPUTE, LOSS), frozen)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), online, given)
    ones = gradient(preference_objective(MODEL, COMPUTE, LOSS), arrays | {"weights": arrays["loss_mask"]})
    assert abs(online[0] - ones[0]) > 1e-3


def test_no_dropout_in_the_weights():
    lora = LoraConfig(2, 4.0, "all-linear", False, dropout=0.5)
    adapters = init_adapters(MODEL, lora, make_mesh(MeshConfig(1, 1, 1)), seed=0)
    adapters = jax.tree.map(lambda x: x + 0.3, adapters)
    weigh = jax.jit(online_weights("calibrated_entropy", MODEL, COMPUTE))
    arrays, key = batch("calibrated_entropy"), dropout_key(0, 0, 0)
    dropped = weigh(join(params(), adapters, lora, key), arrays)
    np.testing.assert_array_equal(dropped, weigh(join(params(), adapters, lora), arrays))


def test_what_belongs_together_shares_a_row():
    """Responses whose other prompts are long take the room that those need."""
    examples = [(s, Segment(np.ones(25, np.int32), s.response)) for pair in pairs() for s in pair]
    auxiliary = AuxiliaryBatch("weigh", examples, 2, 2)
    lengths = np.maximum(example_lengths(pairs()), auxiliary.lengths())
    assert (lengths > example_lengths(pairs())).any()
    plan = plan_steps(lengths, 3, 1, seed=0, rows=1, row_length=2 * LENGTH)
    seen = []
    for step, stacks in enumerate(BatchIterator(plan, pairs(), make_mesh(MeshConfig(1, 1, 1)), (), auxiliary)):
        for (_, rows), arrays in zip(plan.steps[step], map(jax.device_get, stacks), strict=True):
            assert arrays["weigh/tokens"].shape[-1] == 2 * arrays["tokens"].shape[-1]
            for m, row in enumerate(rows):
                own = [2 * item + i for item in row for i in range(2)]
                assert [i for i in arrays["weigh/example_ids"][m, 0].tolist() if i >= 0] == own
                responses = arrays["targets"][m, 0][arrays["loss_mask"][m, 0] > 0]
                of_first = (arrays["weigh/segment_ids"][m, 0] % 2 == 1) & (arrays["weigh/loss_mask"][m, 0] > 0)
                np.testing.assert_array_equal(arrays["weigh/targets"][m, 0][of_first], responses)
                seen += row
    assert sorted(seen) == list(range(6))


def test_names():
    assert online_rule("online") == "calibrated_entropy" and online_rule("online:kl") == "kl"
    assert online_rule("store:kl") is None and online_rule("uniform") is None
    for name in ("online", *(f"online:{rule}" for rule in ONLINE_RULES)):
        check_rule(name)
    for name in ("online:shuffled", "online:uniform", "online:"):
        with pytest.raises(Exception, match="unknown rule"):
            check_rule(name)
