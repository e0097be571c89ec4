"""Weights for the tokens of a response (MuSC, arXiv 2502.11541, section 3.3), from the frozen seed model's scores.

A weight is one function of (token, context), the same for chosen and rejected responses: weights that differ for the
same token in the two would push shared tokens up or down on balance. Axes: R tokens of a response.
"""

from collections.abc import Callable

import numpy as np

from lm_jax.errors import UserError

MAX_WEIGHT = 2.0


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


def scaled(values: np.ndarray) -> np.ndarray:
    """values / mean, clipped to [0, 2]; all ones where the mean is 0 (0/0 counts as ratio 1). [R] -> [R] float32."""
    mean = values.mean(dtype=np.float64)
    if mean == 0:
        return np.ones_like(values, dtype=np.float32)
    return np.clip(values / mean, 0.0, MAX_WEIGHT).astype(np.float32)


# Rules that need only the response under its own full prompt.
RULES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "uniform": uniform,
    "perplexity": perplexity,
    "entropy": entropy,
}
RULES_ON_SCORES = tuple(name for name in RULES if name != "uniform")  # those that read the model's scores
FROM_COLUMNS = "columns"  # not a rule: the rows bring `chosen_token_scores` and `rejected_token_scores`
AUTO = "auto"  # columns where the rows bring them, else uniform


def check_rule(name: str) -> None:
    """Raises UserError for a name that is neither a rule nor `columns` nor `auto`."""
    names = (AUTO, *RULES, FROM_COLUMNS)
    if name not in names:
        raise UserError(f"config.weights: unknown rule {name!r}; choose from {', '.join(names)}")
