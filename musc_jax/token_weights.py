"""Weights for the tokens of a response (MuSC, arXiv 2502.11541, section 3.3), from the frozen seed model's scores.

A weight is one function of (token, context), the same for chosen and rejected responses: weights that differ for the
same token in the two would push shared tokens up or down on balance. `other_over_own` is the exception.

Axes: R tokens of a response. Contexts of a response, always teacher-forced: the full instruction, the perturbed one
(from which constraints were dropped or altered), and none.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from lm_jax.errors import UserError
from musc_jax import draws

MAX_WEIGHT = 2.0
SCALE = 1.2  # of the ratios of entropies: what the authors' released scores have (clip(1.2 * ratio, 0, 2))
ROUNDING = 1e-6  # nats; what fp32 leaves of an entropy that is 0
FULL, PERTURBED, NONE = "full", "perturbed", "none"
CONTEXTS = (FULL, PERTURBED, NONE)
CHOSEN, REJECTED = "chosen", "rejected"


@dataclasses.dataclass(frozen=True)
class ResponseScores:
    """What the seed model says of one response.

    Attributes:
      logprobs: context -> [R], log p(token | context, earlier tokens), nats.
      entropies: context -> [R], of the distribution that each token was drawn from.
      kl: [R] KL(full || perturbed) between the distributions; None where no rule asked.
      reverse_kl: [R] KL(perturbed || full).
      side: `chosen` or `rejected`.
      draw: what random choices depend on, as (seed, row id).
    """

    logprobs: dict[str, np.ndarray]
    entropies: dict[str, np.ndarray]
    kl: np.ndarray | None
    reverse_kl: np.ndarray | None
    side: str
    draw: tuple[int | str, ...] = ()


def uniform(logprobs: np.ndarray, entropies: np.ndarray) -> np.ndarray:
    """All ones: plain DPO. [R] -> [R]."""
    return np.ones_like(logprobs)


def perplexity(logprobs: np.ndarray, entropies: np.ndarray) -> np.ndarray:
    """The token's share of the response's log-perplexity: -log p(token) scaled to mean 1, clipped to [0, 2].

    The logarithm, since the perplexity 1/p of one rare token would leave all others with weight 0.
    """
    return scaled(-logprobs)


def entropy(logprobs: np.ndarray, entropies: np.ndarray) -> np.ndarray:
    """Entropy of the distribution that the token was drawn from, scaled to mean 1, clipped to [0, 2]."""
    return scaled(entropies)


def calibrated_entropy(scores: ResponseScores) -> np.ndarray:
    """clip(1.2 * H_full / H_perturbed, 0, 2), on both sides alike."""
    return entropy_ratio(scores.entropies[FULL], scores.entropies[PERTURBED])


def other_over_own(scores: ResponseScores) -> np.ndarray:
    """clip(1.2 * H_other / H_own, 0, 2): own is the instruction that the response was written to."""
    own, other = (FULL, PERTURBED) if scores.side == CHOSEN else (PERTURBED, FULL)
    return entropy_ratio(scores.entropies[other], scores.entropies[own])


def kl(scores: ResponseScores) -> np.ndarray:
    """KL(full || perturbed) of the next-token distributions, scaled to mean 1, clipped to [0, 2]."""
    return scaled(scores.kl)


def symmetric_kl(scores: ResponseScores) -> np.ndarray:
    """KL(full || perturbed) + KL(perturbed || full), scaled to mean 1, clipped to [0, 2]."""
    return scaled(scores.kl + scores.reverse_kl)


def pmi(scores: ResponseScores) -> np.ndarray:
    """log p(token | full instruction) - log p(token | none), scaled to mean 1, clipped to [0, 2].

    Tokens that the instruction makes less likely count as 0 before scaling: a mean of mixed signs may be near 0 or
    below it, and dividing by it would blow weights up or turn their order around.
    """
    return scaled(np.maximum(scores.logprobs[FULL] - scores.logprobs[NONE], 0.0))


def shuffled(scores: ResponseScores) -> np.ndarray:
    """The default rule's weights in an order that depends on (seed, row id, side): a control without their meaning."""
    weights = calibrated_entropy(scores)
    return weights[draws.shuffled(range(len(weights)), *scores.draw, scores.side, "weights")]


def entropy_ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """clip(1.2 * above / below, 0, 2); 0/0 counts as ratio 1. [R] -> [R] float32.

    Entropies under `ROUNDING` count as that: what lies below it is noise, and so would their ratio be.
    """
    ratio = np.maximum(above, ROUNDING).astype(np.float64) / np.maximum(below, ROUNDING)
    return np.clip(SCALE * ratio, 0.0, MAX_WEIGHT).astype(np.float32)


def scaled(values: np.ndarray) -> np.ndarray:
    """values / mean, clipped to [0, 2]; all ones where the mean is 0 (0/0 counts as ratio 1). [R] -> [R] float32."""
    mean = values.mean(dtype=np.float64)
    if abs(mean) <= ROUNDING:
        return np.ones_like(values, dtype=np.float32)
    return np.clip(values / mean, 0.0, MAX_WEIGHT).astype(np.float32)


# Rules that need only the response under its own full prompt: training applies them to the reference's scores.
RULES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "uniform": uniform,
    "perplexity": perplexity,
    "entropy": entropy,
}
RULES_ON_SCORES = tuple(name for name in RULES if name != "uniform")  # those that read the model's scores


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule of the weighing pass.

    Attributes:
      weigh: scores of a response -> [R] weights in [0, 2], float32.
      contexts: which it reads.
      divergences: whether it reads `kl` and `reverse_kl`.
    """

    weigh: Callable[[ResponseScores], np.ndarray]
    contexts: tuple[str, ...]
    divergences: bool = False


def _under_full(name: str) -> Rule:
    return Rule(lambda scores: RULES[name](scores.logprobs[FULL], scores.entropies[FULL]), (FULL,))


DEFAULT_RULE = "calibrated_entropy"
WEIGHING_RULES: dict[str, Rule] = {
    DEFAULT_RULE: Rule(calibrated_entropy, (FULL, PERTURBED)),
    "other_over_own": Rule(other_over_own, (FULL, PERTURBED)),
    **{name: _under_full(name) for name in RULES},
    "kl": Rule(kl, (FULL, PERTURBED), divergences=True),
    "symmetric_kl": Rule(symmetric_kl, (FULL, PERTURBED), divergences=True),
    "pmi": Rule(pmi, (FULL, NONE)),
    "shuffled": Rule(shuffled, (FULL, PERTURBED)),
}

FROM_COLUMNS = "columns"  # not a rule: the rows bring `chosen_token_scores` and `rejected_token_scores`
FROM_STORE = "store"  # not a rule: the rows point at a store of weights; `store:RULE` takes that rule's from it
AUTO = "auto"  # what the rows bring: a store, columns, else uniform


def check_rule(name: str) -> None:
    """Raises UserError for a name that is neither a rule of training nor says where the rows' own weights are."""
    names = (AUTO, *RULES, FROM_COLUMNS, FROM_STORE, *(f"{FROM_STORE}:{rule}" for rule in WEIGHING_RULES))
    if name in names:
        return
    hint = f"; {name} has to be weighed first, then choose {FROM_STORE}:{name}" if name in WEIGHING_RULES else ""
    raise UserError(f"config.weights: unknown rule {name!r}; choose from {', '.join(names)}{hint}")


def parse_rules(text: str) -> tuple[str, ...]:
    """`kl,pmi` -> their names; `all` -> every rule.

    Raises:
      UserError: none, an unknown one, or one twice.
    """
    if text == "all":
        return tuple(WEIGHING_RULES)
    names = [name.strip() for name in text.split(",") if name.strip()]
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
