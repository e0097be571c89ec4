"""Preference losses and token weights against numbers worked by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.errors import UserError
from musc_jax.training.losses import (
    KINDS,
    LossConfig,
    hinge_loss,
    ipo_loss,
    preference_loss,
    robust_loss,
    segment_sums,
    sigmoid_loss,
    simpo_loss,
)
from musc_jax.weights import rules as token_weights


def loss_config(kind="sigmoid", beta=0.1, label_smoothing=0.0, simpo_gamma=0.0, nll_weight=0.0):
    return LossConfig(kind, beta, label_smoothing, simpo_gamma, nll_weight)


def test_sigmoid():
    # margin 0: -log(1/2) = ln 2. margin 10, beta 0.1: log(1 + e^-1) = log(1.367879) = 0.313262.
    # margin -10: log(1 + e) = log(3.718282) = 1.313262; it is the one before plus beta * 20 / 2.
    np.testing.assert_allclose(
        sigmoid_loss(jnp.array([0.0, 10.0, -10.0]), 0.1), [0.693147, 0.313262, 1.313262], atol=1e-6
    )


def test_sigmoid_with_label_smoothing():
    # 0.9 * 0.313262 + 0.1 * 1.313262 = 0.281936 + 0.131326 = 0.413262; the other way round 1.213262.
    np.testing.assert_allclose(
        sigmoid_loss(jnp.array([0.0, 10.0, -10.0]), 0.1, 0.1), [0.693147, 0.413262, 1.213262], atol=1e-6
    )


def test_robust():
    # (0.9 * 0.313262 - 0.1 * 1.313262) / 0.8 = (0.281936 - 0.131326) / 0.8 = 0.188262;
    # (0.9 * 1.313262 - 0.1 * 0.313262) / 0.8 = (1.181936 - 0.031326) / 0.8 = 1.438262. At 0: 0.8 / 0.8 * ln 2.
    np.testing.assert_allclose(
        robust_loss(jnp.array([0.0, 10.0, -10.0]), 0.1, 0.1), [0.693147, 0.188262, 1.438262], atol=1e-6
    )
    np.testing.assert_allclose(robust_loss(jnp.array([3.0]), 0.5, 0.0), sigmoid_loss(jnp.array([3.0]), 0.5))


def test_ipo():
    # 1 / (2 * 0.25) = 2: (0 - 2)^2 = 4, (2 - 2)^2 = 0, (3.5 - 2)^2 = 2.25, (-1 - 2)^2 = 9.
    np.testing.assert_allclose(ipo_loss(jnp.array([0.0, 2.0, 3.5, -1.0]), 0.25), [4.0, 0.0, 2.25, 9.0])


def test_hinge():
    # 1 - 0.5 * 1 = 0.5; 1 - 0.5 * 2 = 0; beyond that 0; 1 + 0.5 * 3 = 2.5.
    np.testing.assert_allclose(hinge_loss(jnp.array([1.0, 2.0, 7.0, -3.0]), 0.5), [0.5, 0.0, 0.0, 2.5])


def test_simpo():
    # 2 * 0.5 - 1 = 0: ln 2. 2 * 1 - 1 = 1: log(1 + e^-1) = 0.313262. 2 * 0 - 1 = -1: 1.313262.
    np.testing.assert_allclose(
        simpo_loss(jnp.array([0.5, 1.0, 0.0]), 2.0, 1.0), [0.693147, 0.313262, 1.313262], atol=1e-6
    )


def test_no_overflow():
    """Margins that exp would take beyond fp32: the loss is linear there, its gradient finite."""
    for fn in (sigmoid_loss, lambda m, b: robust_loss(m, b, 0.1), lambda m, b: simpo_loss(m, b, 1.0)):
        losses, grads = jax.vmap(jax.value_and_grad(lambda m, fn=fn: fn(m, 1.0)))(jnp.array([1e4, -1e4]))
        assert np.isfinite(losses).all() and np.isfinite(grads).all()
    np.testing.assert_allclose(sigmoid_loss(jnp.array([1e4, -1e4]), 1.0), [0.0, 1e4])


# Two pairs. Log-ratio sums 5 and -5, 2 and 4; log-prob sums -8 and -6, -3 and -10; tokens 4 and 2, 1 and 5.
LOGRATIOS, LOGPROBS, COUNTS = [[5.0, -5.0], [2.0, 4.0]], [[-8.0, -6.0], [-3.0, -10.0]], [[4.0, 2.0], [1.0, 5.0]]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # margins 10 and -2; log(1 + e^-1) and log(1 + e^0.2) = log(2.221403)
        (loss_config("sigmoid", 0.1), [0.313262, 0.798139]),
        # 0.9 * 0.798139 + 0.1 * (0.798139 - 0.2) = 0.778139
        (loss_config("sigmoid", 0.1, label_smoothing=0.1), [0.413262, 0.778139]),
        # (0.9 * 0.798139 - 0.1 * 0.598139) / 0.8 = 0.823139
        (loss_config("robust", 0.1, label_smoothing=0.1), [0.188262, 0.823139]),
        # 1 - 0.1 * 10 = 0; 1 + 0.1 * 2
        (loss_config("hinge", 0.1), [0.0, 1.2]),
        # 5/4 + 5/2 = 3.75 and 2 - 0.8 = 1.2, each less 1 / (2 * 0.25) = 2, squared
        (loss_config("ipo", 0.25), [3.0625, 0.64]),
        # -2 + 3 = 1 and -3 + 2 = -1, times 2, less 0.5: log(1 + e^-1.5) and log(1 + e^2.5)
        (loss_config("simpo", 2.0, simpo_gamma=0.5), [0.201413, 2.578890]),
    ],
    ids=lambda x: x.kind if isinstance(x, LossConfig) else "",
)
def test_preference_loss(config, expected):
    got = preference_loss(config, *(jnp.array(x) for x in (LOGRATIOS, LOGPROBS, COUNTS)))
    np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_that_is_not_there_is_finite(kind):
    """Rows hold fewer pairs than they could: their sums and counts are 0, and 0/0 would spoil the gradient."""
    zeros = jnp.zeros((1, 2))
    loss, grad = jax.value_and_grad(lambda x: preference_loss(loss_config(kind), x, x, zeros).sum())(zeros)
    assert np.isfinite(loss) and np.isfinite(grad).all()


def test_segment_sums():
    # Row 0: pair 0 has segments 1 (1 + 2) and 2 (4), pair 1 segments 3 (8) and 4 (16 + 32). Row 1: pair 0 alone.
    segment_ids = jnp.array([[1, 1, 2, 3, 4, 4, 0], [1, 2, 2, 2, 0, 0, 0]])
    values = jnp.array([[1, 2, 4, 8, 16, 32, 64], [0.5, 1, 1, 1, 9, 9, 9]])
    got = segment_sums(values, segment_ids, 2)
    np.testing.assert_array_equal(got, [[[3, 4], [8, 48]], [[0.5, 3], [0, 0]]])
    assert segment_sums(values.astype(jnp.bfloat16), segment_ids, 2).dtype == jnp.float32


def test_segment_sums_keep_a_bad_value_to_its_segment():
    got = segment_sums(jnp.array([[1.0, jnp.nan, 4.0, jnp.inf]]), jnp.array([[1, 2, 3, 0]]), 2)
    np.testing.assert_array_equal(got, [[[1, np.nan], [4, 0]]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "dpo"}, "config.loss.kind: unknown loss 'dpo'; choose from sigmoid, robust, ipo, hinge, simpo"),
        ({"beta": 0.0}, "config.loss.beta: must be positive, got 0.0"),
        ({"beta": -0.1}, "config.loss.beta: must be positive"),
        ({"label_smoothing": 0.5}, r"config.loss.label_smoothing: must lie in \[0, 0.5\), got 0.5"),
        ({"label_smoothing": -0.1}, r"config.loss.label_smoothing: must lie in \[0, 0.5\)"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "config.loss.label_smoothing: not defined for ipo; set it to 0"),
        ({"kind": "hinge", "label_smoothing": 0.1}, "not defined for hinge"),
        ({"kind": "simpo", "label_smoothing": 0.1}, "not defined for simpo"),
    ],
)
def test_loss_config_errors(fields, message):
    with pytest.raises(UserError, match=message):
        loss_config(**fields)


def test_only_simpo_needs_no_reference():
    assert [kind for kind in KINDS if not loss_config(kind).needs_reference] == ["simpo"]


LOGPS = np.array([-1.0, -2.0, -3.0, -10.0], np.float32)  # mean 4
ENTROPIES = np.array([0.0, 1.0, 2.0, 1.0], np.float32)  # mean 1


def own_scores(logprobs, entropies):
    return token_weights.ResponseScores({"full": logprobs}, {"full": entropies}, None, None, is_chosen=True)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("uniform", [1, 1, 1, 1]),
        ("perplexity", [0.25, 0.5, 0.75, 2.0]),  # the last would be 2.5
        ("entropy", [0, 1, 2, 1]),
    ],
)
def test_token_weights(rule, expected):
    weights = token_weights.RULES[rule].weigh(own_scores(LOGPS, ENTROPIES))
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert weights.dtype == np.float32


def test_token_weights_of_nothing_uncertain():
    """All values 0: 0/0 counts as 1."""
    zeros = np.zeros(3, np.float32)
    for rule in token_weights.RULES.values():
        weights = rule.weigh(own_scores(zeros, zeros))
        np.testing.assert_array_equal(weights, np.ones(3))
        assert weights.dtype == np.float32


def test_scaled():
    rng = np.random.default_rng(0)
    values = rng.exponential(size=50).astype(np.float32)
    scaled = token_weights.scaled(values, np.mean)
    np.testing.assert_allclose(scaled, np.clip(values / values.mean(), 0, 2), rtol=1e-6)
    np.testing.assert_allclose(token_weights.scaled(values * 1000, np.mean), scaled, rtol=1e-6)
    assert math.isclose(token_weights.scaled(np.array([1.0, 1.2, 0.8]), np.mean).mean(), 1.0, rel_tol=1e-6)
    assert np.isnan(token_weights.scaled(np.array([1.0, np.nan]), np.mean)).all()  # and not 1


def test_check_rule():
    for name in ("auto", "uniform", "perplexity", "entropy", "columns"):
        token_weights.check_rule(name)
    with pytest.raises(UserError, match="config.weights: unknown rule 'surprise'; choose from auto, uniform"):
        token_weights.check_rule("surprise")
