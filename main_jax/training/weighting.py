"""How much synthetic pairs weigh against seed pairs: alpha in [0, 1], by a rule (MAIN, arXiv 2504.12913).

The paper weighs the two dynamically; its exact rule could not be read, so none of these is called the paper's.
A rule that looks at losses looks at moving averages up to the step before: alpha is then known before the step, and is
the same however the step is cut over microbatches and devices. No gradient goes through it.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lm_jax.data.supervised import SOURCES
from lm_jax.errors import UserError
from lm_jax.training.objective import ObjectiveState, Sums

RULES = ("loss_ratio", "inverse_ratio", "fixed", "schedule")
NEUTRAL = 0.5  # of the ratios, while a loss is not known yet and where both are 0


@dataclasses.dataclass(frozen=True)
class AlphaConfig:
    rule: str = "loss_ratio"  # one of RULES
    value: float = 0.5  # alpha of `fixed`
    start: float = 0.0  # `schedule` goes from here in the first step
    end: float = 0.5  # to here in the last, in a straight line
    decay: float = 0.9  # of the ratios' moving averages: the share of the old average; 0: the last step's losses alone

    def __post_init__(self):
        if self.rule not in RULES:
            raise UserError(f"config.alpha.rule: unknown {self.rule!r}; choose from {', '.join(RULES)}")
        for name in ("value", "start", "end"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"config.alpha.{name}: must lie in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.decay < 1:
            raise UserError(f"config.alpha.decay: must lie in [0, 1), got {self.decay}")


Averages = Mapping[
    str, Mapping[str, jax.Array | float]
]  # source -> decayed sum of its losses, and of the weights in it


def alpha_state(config: AlphaConfig) -> ObjectiveState:
    """What carries alpha from step to step: it reads `alpha`; a loss `loss/SOURCE` of the step updates it."""
    if config.rule == "fixed":
        return ObjectiveState(read=lambda kept, progress: {"alpha": jnp.float32(config.value)})
    if config.rule == "schedule":
        span = config.end - config.start
        return ObjectiveState(read=lambda kept, progress: {"alpha": jnp.float32(config.start + span * progress)})
    return ObjectiveState(
        initial={source: {"sum": 0.0, "weight": 0.0} for source in SOURCES},
        read=lambda kept, progress: {"alpha": ratio_alpha(config.rule, kept)},
        update=lambda kept, totals, metrics: update_averages(kept, totals, metrics, config.decay),
    )


def ratio_alpha(rule: str, averages: Averages) -> jax.Array:
    """`loss_ratio`: CE_seed / (CE_seed + CE_synthetic), more for synthetic pairs that are easier; `inverse_ratio`: the
    converse. NEUTRAL until both sources have been seen, so in the first step, and where both losses are 0.

    Args:
      averages: of `update_averages`.

    >>> seen = {"seed": {"sum": 3.0, "weight": 1.0}, "synthetic": {"sum": 0.5, "weight": 0.5}}
    >>> float(ratio_alpha("loss_ratio", seen))
    0.75
    """
    seed, synthetic = (averages[source] for source in SOURCES)
    # s / w over s / w + s' / w', without a division by a weight of 0
    seed_share, synthetic_share = seed["sum"] * synthetic["weight"], synthetic["sum"] * seed["weight"]
    both = seed_share + synthetic_share
    known = (jnp.asarray(seed["weight"] * synthetic["weight"]) > 0) & (jnp.asarray(both) > 0)
    upper = seed_share if rule == "loss_ratio" else synthetic_share
    return jnp.where(known, upper / jnp.where(known, both, 1), NEUTRAL).astype(jnp.float32)


def update_averages(averages: Averages, totals: Sums, metrics: Sums, decay: float) -> Averages:
    """The averages after a step with the losses `loss/SOURCE`; a source that the step lacks keeps its own.

    Sums and weights decay together, so that a mean of few steps is not drawn to 0 (as Adam corrects its moments).
    """
    updated = {}
    for source in SOURCES:
        old, seen = averages[source], totals[source] > 0
        new = {
            "sum": decay * old["sum"] + (1 - decay) * metrics[f"loss/{source}"],
            "weight": decay * old["weight"] + (1 - decay),
        }
        updated[source] = {name: jnp.where(seen, new[name], old[name]) for name in new}
    return updated
