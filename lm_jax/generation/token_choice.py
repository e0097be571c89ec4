"""Logits -> the next token of every row, with one uniform number a row and without sorting the vocabulary.

Axes: B rows, V vocabulary, W tokens of a group of the vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm_jax.generation.requests import SamplingConfig

_GROUP = 128  # W: the draw first finds the group of tokens, then the token in it


class Filters(NamedTuple):
    """What is compiled. Other numbers are in `Strengths`, so that they compile nothing anew."""

    greedy: bool
    temperature: bool  # other than 1
    top_k: int  # 0: off
    top_p: bool
    min_p: bool
    repetition_penalty: bool


class Strengths(NamedTuple):
    """Scalars of `SamplingConfig`, as arrays."""

    temperature: jax.Array | float
    top_p: jax.Array | float
    min_p: jax.Array | float
    repetition_penalty: jax.Array | float


def filters_of(sampling: SamplingConfig) -> tuple[Filters, Strengths]:
    """What of `sampling` decides the choice of a token."""
    s = sampling
    greedy = s.temperature == 0
    return (
        Filters(
            greedy=greedy,
            temperature=not greedy and s.temperature != 1,
            top_k=0 if greedy else s.top_k,  # every filter keeps the likeliest token, so greedy needs none
            top_p=not greedy and s.top_p < 1,
            min_p=not greedy and s.min_p > 0,
            repetition_penalty=s.repetition_penalty != 1,
        ),
        Strengths(s.temperature or 1.0, s.top_p, s.min_p, s.repetition_penalty),
    )


def choose_tokens(
    logits: jax.Array, seen: jax.Array | None, uniform: jax.Array, filters: Filters, strengths: Strengths
) -> tuple[jax.Array, jax.Array]:
    """Draws a token for each row by inverting the cumulative distribution.

    Args:
      logits: [B, V] fp32.
      seen: [B, V] bool, tokens in prompt or response so far; None without a repetition penalty.
      uniform: [B] fp32 in [0, 1); not read when greedy.

    Returns:
      (tokens [B] int32, log-probs [B] fp32 in nats under the model itself, before penalty, temperature and filters).
    """
    scores = logits
    if filters.repetition_penalty and seen is not None:
        penalty = strengths.repetition_penalty
        scores = jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)
    if filters.greedy:
        tokens = _first_largest(scores)
    else:
        tokens = _draw(_weights(scores, filters, strengths), uniform)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    top = jnp.max(logits, axis=-1)
    # Written as `_weights` has it, so that without a filter the compiler finds one pass of exponentials, not two
    total = jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)
    return tokens.astype(jnp.int32), chosen - top - jnp.log(total)


def _first_largest(scores):
    """[B]: `jnp.argmax`, whose own reduction XLA on CPU does not vectorise; the last token in a row that has NaN."""
    top = jnp.max(scores, axis=-1, keepdims=True)
    ids = jnp.arange(scores.shape[-1])
    return jnp.min(jnp.where(scores == top, ids, ids[-1]), axis=-1)


def _weights(scores, filters: Filters, strengths: Strengths) -> jax.Array:
    """[B, V] unnormalised probabilities, 0 for what the filters leave out; the likeliest token has 1."""
    scores = scores - jnp.max(scores, axis=-1, keepdims=True)
    if filters.temperature:
        scores = scores / strengths.temperature  # after the subtraction: a large logit over a small one is infinite
    weights = jnp.exp(scores)
    if filters.top_k:
        least = jax.lax.top_k(weights, min(filters.top_k, weights.shape[-1]))[0][:, -1:]
        weights = jnp.where(weights >= least, weights, 0.0)
    if filters.top_p:
        weights = _nucleus(weights, strengths.top_p)
    if filters.min_p:
        weights = jnp.where(weights >= strengths.min_p, weights, 0.0)
    return weights


def _nucleus(weights, top_p):
    """Zeroes all but the largest weights that together reach `top_p` of the sum; ties are kept (arXiv 1904.09751).

    The threshold is found by halving the integers that float bits are, which for positive floats have the floats'
    order: exact, local to a shard of the vocabulary, and a tenth of the time of a sort.
    """
    order = jax.lax.bitcast_convert_type(weights, jnp.int32)
    wanted = top_p * jnp.sum(weights, axis=-1, keepdims=True)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low + 1) // 2
        enough = jnp.sum(jnp.where(order >= middle, weights, 0.0), axis=-1, keepdims=True) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    low = jnp.zeros((weights.shape[0], 1), jnp.int32)
    threshold, _ = jax.lax.fori_loop(0, 31, halve, (low, jnp.max(order, axis=-1, keepdims=True)))
    return jnp.where(order >= threshold, weights, 0.0)


def _draw(weights, uniform):
    """[B]: the first token at which the running sum of the weights exceeds `uniform` of the whole."""
    rows, vocab = weights.shape
    grouped = jnp.pad(weights, ((0, 0), (0, -vocab % _GROUP))).reshape(rows, -1, _GROUP)
    sums = jnp.sum(grouped, axis=-1)
    running = jnp.cumsum(sums, axis=-1)
    target = uniform * running[:, -1]
    group = _first_above(running, sums, target)
    before = jnp.take_along_axis(running - sums, group[:, None], axis=-1)[:, 0]
    inside = jnp.take_along_axis(grouped, group[:, None, None], axis=1)[:, 0]
    # Rounding can take the difference below 0, which would draw the group's first token even where its weight is 0
    return group * _GROUP + _first_above(jnp.cumsum(inside, axis=-1), inside, jnp.maximum(target - before, 0.0))


def _first_above(running, parts, target):
    """[B]: where `running` first exceeds the target; the last part that is not empty where rounding lets none do so."""
    last = parts.shape[-1] - 1 - jnp.argmax((parts > 0)[:, ::-1], axis=-1)
    return jnp.minimum(jnp.sum(running <= target[:, None], axis=-1), last)
