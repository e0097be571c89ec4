"""Alpha and the mixed loss, worked by hand: every rule, and steps and data that lack a source."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.errors import UserError
from main_jax.training.losses import mixed_coefficients, plain_coefficients
from main_jax.training.weighting import AlphaConfig, alpha_state

CONFIG = AlphaConfig("loss_ratio", value=0.25, start=0.0, end=0.5, decay=0.5)


def run(config, *steps):
    """[(alpha, loss)] of steps that are each rows (source, weight, the tokens' -log p)."""
    kept_state = alpha_state(config)
    carried, found = kept_state.initial, []
    for number, rows in enumerate(steps):
        nll = jnp.array([x for _, _, tokens in rows for x in tokens])
        by_source = {
            name: jnp.array([weight * (source == name) for source, weight, tokens in rows for _ in tokens])
            for name in ("seed", "synthetic")
        }
        known = kept_state.read(carried, number / max(len(steps) - 1, 1))
        totals = {name: jnp.sum(weights) for name, weights in by_source.items()} | known
        coefficients = mixed_coefficients(by_source["seed"], by_source["synthetic"], totals)
        metrics = {name: jnp.sum(c * nll) for name, c in coefficients.items()}
        carried = kept_state.update(carried, totals, metrics)
        found.append((float(known["alpha"]), float(metrics["loss"])))
    return found


# CE_seed = (1 + 3 + 2 * 2) / 4 = 2 (a row of two tokens, and one of weight 2), CE_synthetic = 6
BOTH = [("seed", 1.0, [1.0, 3.0]), ("synthetic", 1.0, [4.0, 8.0]), ("seed", 2.0, [2.0])]
SEEDS = [("seed", 0.5, [4.0, 4.0])]
SYNTHETIC = [("synthetic", 3.0, [2.0])]
SEEDS_KNOWN = [("seed", 1.0, [0.0]), ("synthetic", 1.0, [2.0])]
ALL_KNOWN = [("seed", 1.0, [0.0]), ("synthetic", 1.0, [0.0])]


@pytest.mark.parametrize(
    ("rule", "steps", "expected"),
    [
        # The first step knows no loss: 1/2. Then 2 / (2 + 6): 1/4 * 6 + 3/4 * 2 = 3.
        ("loss_ratio", (BOTH, BOTH), [(0.5, 4.0), (0.25, 3.0)]),
        ("inverse_ratio", (BOTH, BOTH), [(0.5, 4.0), (0.75, 5.0)]),
        ("fixed", (BOTH, BOTH), [(0.25, 3.0), (0.25, 3.0)]),
        ("schedule", (BOTH, BOTH, BOTH), [(0.0, 2.0), (0.25, 3.0), (0.5, 4.0)]),
        ("schedule", (BOTH,), [(0.0, 2.0)]),
        # Averages with a decay of 1/2, corrected for the few steps: seed (2 * 1/4 + 4 * 1/2) / (3/4) = 10/3; the
        # synthetic side was not seen in the second step and stays at 6: alpha 10/28.
        ("loss_ratio", (BOTH, SEEDS, BOTH), [(0.5, 4.0), (0.25, 3.0), (10 / 28, 10 / 28 * 6 + 18 / 28 * 2)]),
        ("inverse_ratio", (BOTH, SEEDS, BOTH), [(0.5, 4.0), (0.75, 1.0), (18 / 28, 18 / 28 * 6 + 10 / 28 * 2)]),
        # synthetic (6 * 1/4 + 2 * 1/2) / (3/4) = 10/3: 2 / (16/3)
        ("loss_ratio", (BOTH, SYNTHETIC, BOTH), [(0.5, 4.0), (0.25, 0.5), (0.375, 0.375 * 6 + 0.625 * 2)]),
        # A step that lacks a source has that term alone: alpha weighs the rows that are there as elsewhere
        ("fixed", (SEEDS, SYNTHETIC), [(0.25, 3.0), (0.25, 0.5)]),
        ("schedule", (SEEDS, SYNTHETIC), [(0.0, 4.0), (0.5, 1.0)]),
        # Until both have been seen no ratio is known
        ("loss_ratio", (SEEDS, SEEDS, SYNTHETIC, BOTH), [(0.5, 2.0), (0.5, 2.0), (0.5, 1.0), (4 / 6, 4 + 2 / 3)]),
        ("inverse_ratio", (SYNTHETIC, SEEDS, BOTH), [(0.5, 1.0), (0.5, 2.0), (2 / 6, 2 + 4 / 3)]),
        # A loss of 0, and two
        ("loss_ratio", (SEEDS_KNOWN, BOTH), [(0.5, 1.0), (0.0, 2.0)]),
        ("inverse_ratio", (SEEDS_KNOWN, BOTH), [(0.5, 1.0), (1.0, 6.0)]),
        ("loss_ratio", (ALL_KNOWN, BOTH), [(0.5, 0.0), (0.5, 4.0)]),
        ("inverse_ratio", (ALL_KNOWN, BOTH), [(0.5, 0.0), (0.5, 4.0)]),
        ("fixed", (ALL_KNOWN, BOTH), [(0.25, 0.0), (0.25, 3.0)]),
        ("schedule", (ALL_KNOWN, BOTH), [(0.0, 0.0), (0.5, 4.0)]),
        ("loss_ratio", ([], BOTH), [(0.5, 0.0), (0.5, 4.0)]),
    ],
)
def test_worked_by_hand(rule, steps, expected):
    np.testing.assert_allclose(run(dataclasses.replace(CONFIG, rule=rule), *steps), expected, rtol=1e-6)


def test_the_plain_mean_is_over_tokens_whatever_their_source():
    seed, synthetic, nll = jnp.array([1.0, 1, 2, 0]), jnp.array([0.0, 0, 0, 4]), jnp.array([1.0, 3, 2, 6])
    totals = {"seed": jnp.sum(seed), "synthetic": jnp.sum(synthetic)}
    found = {name: float(jnp.sum(c * nll)) for name, c in plain_coefficients(seed, synthetic, totals).items()}
    assert found == {"loss": 4.0, "loss/seed": 2.0, "loss/synthetic": 6.0}
    alone = plain_coefficients(seed, 0 * seed, totals | {"synthetic": jnp.zeros(())})
    assert float(jnp.sum(alone["loss"] * nll)) == 2.0
    assert np.isnan(jnp.sum(alone["loss/synthetic"] * nll))  # not defined, and so left out of the metrics


def test_a_source_that_is_not_there_leaves_no_nan_in_the_gradient():
    def loss(nll):
        totals = {"seed": jnp.sum(ones), "synthetic": jnp.zeros(()), "alpha": jnp.float32(0.25)}
        return jnp.sum(mixed_coefficients(ones, 0 * ones, totals)["loss"] * nll)

    ones = jnp.ones(3)
    np.testing.assert_allclose(jax.grad(loss)(ones), np.full(3, 0.25))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("rule", "paper", "config.alpha.rule: unknown 'paper'; choose from loss_ratio, inverse_ratio, fixed, schedule"),
        ("value", 1.5, "config.alpha.value: must lie in"),
        ("start", -0.1, "config.alpha.start: must lie in"),
        ("end", float("nan"), "config.alpha.end: must lie in"),
        ("decay", 1.0, "config.alpha.decay: must lie in"),
    ],
)
def test_settings_are_checked(name, value, says):
    with pytest.raises(UserError, match=says.replace("[", r"\[")):
        dataclasses.replace(CONFIG, **{name: value})
