"""Weights for the tokens of a response (MuSC, arXiv 2502.11541, section 3.3), from the frozen seed model's scores.

A weight is one function of (token, context), the same for chosen and rejected responses: weights that differ for the
same token in the two would push shared tokens up or down on balance. `other_over_own` is the exception.

Axes: R tokens of a response, or packed, B rows of S tokens. Contexts of a response, always teacher-forced: the full
instruction, the perturbed one (from which constraints were dropped or altered), and none.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lm_jax.config import split_names
from lm_jax.errors import UserError
from musc_jax import draws

Array = Any  # np.ndarray | jax.Array: what the array API has, both do

MAX_WEIGHT = 2.0
SCALE = 1.2  # of the ratios of entropies: what the authors' released scores have (clip(1.2 * ratio, 0, 2))
ROUNDING = 1e-6  # nats; what fp32 leaves of an entropy that is 0
FULL, PERTURBED, NONE = "full", "perturbed", "none"
CONTEXTS = (FULL, PERTURBED, NONE)
CHOSEN, REJECTED = "chosen", "rejected"


@dataclasses.dataclass(frozen=True)
class ResponseScores:
    """What the model says of responses: of one (numpy, [R]), or of those packed into rows ([B, S], under jit too).

    Attributes:
      logprobs: context -> [R], log p(token | context, earlier tokens), nats.
      entropies: context -> [R], of the distribution that each token was drawn from.
      kl: [R] KL(full || perturbed) between the distributions; None where no rule asked.
      reverse_kl: [R] KL(perturbed || full).
      is_chosen: whether the token is the chosen response's; one bool, or [B, S].
      mean: of a value over its own response, in a shape that divides it.
      draw: what random choices depend on, as (seed, row id); of one response.
    """

    logprobs: dict[str, Array]
    entropies: dict[str, Array]
    kl: Array | None
    reverse_kl: Array | None
    is_chosen: bool | Array
    mean: Callable[[Array], Array] = np.mean
    draw: tuple[int | str, ...] = ()


def uniform(scores: ResponseScores) -> Array:
    """All ones: plain DPO."""
    return scores.logprobs[FULL].__array_namespace__().ones_like(scores.logprobs[FULL])


def perplexity(scores: ResponseScores) -> Array:
    """The token's share of the response's log-perplexity: -log p(token) scaled to mean 1, clipped to [0, 2].

    The logarithm, since the perplexity 1/p of one rare token would leave all others with weight 0.
    """
    return scaled(-scores.logprobs[FULL], scores.mean)


def entropy(scores: ResponseScores) -> Array:
    """Entropy of the distribution that the token was drawn from, scaled to mean 1, clipped to [0, 2]."""
    return scaled(scores.entropies[FULL], scores.mean)


def calibrated_entropy(scores: ResponseScores) -> Array:
    """clip(1.2 * H_full / H_perturbed, 0, 2), on both sides alike."""
    return entropy_ratio(scores.entropies[FULL], scores.entropies[PERTURBED])


def other_over_own(scores: ResponseScores) -> Array:
    """clip(1.2 * H_other / H_own, 0, 2): own is the instruction that the response was written to."""
    full, perturbed = scores.entropies[FULL], scores.entropies[PERTURBED]
    xp = full.__array_namespace__()
    own, other = xp.where(scores.is_chosen, full, perturbed), xp.where(scores.is_chosen, perturbed, full)
    return entropy_ratio(other, own)


def kl(scores: ResponseScores) -> Array:
    """KL(full || perturbed) of the next-token distributions, scaled to mean 1, clipped to [0, 2]."""
    return scaled(_asked(scores.kl), scores.mean)


def symmetric_kl(scores: ResponseScores) -> Array:
    """KL(full || perturbed) + KL(perturbed || full), scaled to mean 1, clipped to [0, 2]."""
    return scaled(_asked(scores.kl) + _asked(scores.reverse_kl), scores.mean)


def _asked(divergence: Array | None) -> Array:
    if divergence is None:
        raise ValueError("a rule reads divergences that it did not ask for (Rule.divergences)")
    return divergence


def pmi(scores: ResponseScores) -> Array:
    """log p(token | full instruction) - log p(token | none), scaled to mean 1, clipped to [0, 2].

    Tokens that the instruction makes less likely count as 0 before scaling: a mean of mixed signs may be near 0 or
    below it, and dividing by it would blow weights up or turn their order around.
    """
    gain = scores.logprobs[FULL] - scores.logprobs[NONE]
    return scaled(gain.__array_namespace__().maximum(gain, 0.0), scores.mean)


def shuffled(scores: ResponseScores) -> np.ndarray:
    """The default rule's weights in an order that depends on (seed, row id, side): a control without their meaning."""
    weights = calibrated_entropy(scores)
    side = CHOSEN if scores.is_chosen else REJECTED
    return weights[draws.shuffled(range(len(weights)), *scores.draw, side, "weights")]


def entropy_ratio(above: Array, below: Array) -> Array:
    """clip(1.2 * above / below, 0, 2); 0/0 counts as ratio 1.

    Entropies under `ROUNDING` count as that: what lies below it is noise, and so would their ratio be.
    """
    xp = above.__array_namespace__()
    return xp.clip(SCALE * (xp.maximum(above, ROUNDING) / xp.maximum(below, ROUNDING)), 0.0, MAX_WEIGHT)


def scaled(values: Array, mean: Callable[[Array], Array]) -> Array:
    """values / mean, clipped to [0, 2]; all ones where the mean is 0 (0/0 counts as ratio 1)."""
    xp, means = values.__array_namespace__(), mean(values)
    is_0 = abs(means) <= ROUNDING
    return xp.clip(xp.where(is_0, 1.0, values / xp.where(is_0, 1.0, means)), 0.0, MAX_WEIGHT)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule of weighing.

    Attributes:
      weigh: scores -> weights in [0, 2], of their shape, float32.
      contexts: which it reads.
      divergences: whether it reads `kl` and `reverse_kl`.
    """

    weigh: Callable[[ResponseScores], Array]
    contexts: tuple[str, ...]
    divergences: bool = False


DEFAULT_RULE = "calibrated_entropy"
WEIGHING_RULES: dict[str, Rule] = {
    DEFAULT_RULE: Rule(calibrated_entropy, (FULL, PERTURBED)),
    "other_over_own": Rule(other_over_own, (FULL, PERTURBED)),
    "uniform": Rule(uniform, (FULL,)),
    "perplexity": Rule(perplexity, (FULL,)),
    "entropy": Rule(entropy, (FULL,)),
    "kl": Rule(kl, (FULL, PERTURBED), divergences=True),
    "symmetric_kl": Rule(symmetric_kl, (FULL, PERTURBED), divergences=True),
    "pmi": Rule(pmi, (FULL, NONE)),
    "shuffled": Rule(shuffled, (FULL, PERTURBED)),
}
# Rules that need only the response under its own full prompt: training applies them to the reference's scores.
RULES = {name: rule for name, rule in WEIGHING_RULES.items() if rule.contexts == (FULL,)}
RULES_ON_SCORES = tuple(name for name in RULES if name != "uniform")  # those that read the model's scores
# Rules that can be computed within a training step
ONLINE_RULES = tuple(name for name in WEIGHING_RULES if name not in ("uniform", "shuffled"))

FROM_COLUMNS = "columns"  # not a rule: the rows bring `chosen_token_scores` and `rejected_token_scores`
FROM_STORE = "store"  # not a rule: the rows point at a store of weights; `store:RULE` takes that rule's from it
AUTO = "auto"  # what the rows bring: a store, columns, else uniform
ONLINE = "online"  # not a rule: the policy weighs in every step, by the default rule; `online:RULE` by that one


def check_rule(name: str) -> None:
    """Raises UserError for a name that is neither a rule of training nor says where the rows' own weights are."""
    stored = (FROM_STORE, *(f"{FROM_STORE}:{rule}" for rule in WEIGHING_RULES))
    names = (AUTO, *RULES, FROM_COLUMNS, *stored, ONLINE, *(f"{ONLINE}:{rule}" for rule in ONLINE_RULES))
    if name in names:
        return
    hint = f"; {name} has to be weighed first, then choose {FROM_STORE}:{name}" if name in WEIGHING_RULES else ""
    raise UserError(f"config.weights: unknown rule {name!r}; choose from {', '.join(names)}{hint}")


def online_rule(name: str) -> str | None:
    """`online:kl` -> `kl`, `online` -> the default rule, anything else -> None."""
    head, _, rule = name.partition(":")
    return (rule or DEFAULT_RULE) if head == ONLINE else None


def parse_rules(text: str) -> tuple[str, ...]:
    """`kl,pmi` -> their names; `all` -> every rule.

    Raises:
      UserError: none, an unknown one, or one twice.
    """
    if text == "all":
        return tuple(WEIGHING_RULES)
    names = split_names(text)
    if not names:
        raise UserError(f"config.rules: no rule in {text!r}; choose from all, {', '.join(WEIGHING_RULES)}")
    if unknown := [name for name in names if name not in WEIGHING_RULES]:
        raise UserError(f"config.rules: unknown rule {unknown[0]!r}; choose from all, {', '.join(WEIGHING_RULES)}")
    if len(set(names)) < len(names):
        raise UserError(f"config.rules: a rule stands twice in {text!r}; name each once")
    return tuple(names)


def contexts_of(rules: Sequence[str]) -> tuple[str, ...]:
    """The contexts that the rules read, the full instruction first."""
    return tuple(c for c in CONTEXTS if any(c in WEIGHING_RULES[rule].contexts for rule in rules))
