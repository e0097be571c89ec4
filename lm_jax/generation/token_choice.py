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
    top_k: bool
    top_p: bool
    min_p: bool
    repetition_penalty: bool


class Strengths(NamedTuple):
    """Scalars of `SamplingConfig`, as arrays."""

    temperature: jax.Array | float
    top_k: jax.Array | int
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
            top_k=not greedy and s.top_k > 0,  # every filter keeps the likeliest token, so greedy needs none
            top_p=not greedy and s.top_p < 1,
            min_p=not greedy and s.min_p > 0,
            repetition_penalty=s.repetition_penalty != 1,
        ),
        Strengths(s.temperature or 1.0, s.top_k, s.top_p, s.min_p, s.repetition_penalty),
    )


def choose_tokens(
    logits: jax.Array,
    seen: jax.Array | None,
    known: jax.Array | None,
    uniform: jax.Array,
    filters: Filters,
    strengths: Strengths,
) -> tuple[jax.Array, jax.Array]:
    """Draws a token for each row by inverting the cumulative distribution.

    Args:
      logits: [B, V] fp32.
      seen: [B, V] bool, tokens in prompt or response so far; None without a repetition penalty.
      known: [V] bool, at least one of them: tokens that may be chosen; None: all.
      uniform: [B] fp32 in [0, 1); not read when greedy.

    Returns:
      (tokens [B] int32, log-probs [B] fp32 in nats under the model itself, before penalty, temperature and filters).
    """
    scores = logits
    if filters.repetition_penalty and seen is not None:
        penalty = strengths.repetition_penalty
        scores = jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)
    if known is not None:
        lowest = jnp.finfo(scores.dtype).min  # in the place of NaN, which would compare with nothing
        scores = jnp.where(known, jnp.where(jnp.isnan(scores), lowest, scores), -jnp.inf)
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
        weights = _largest(weights, lambda kept: kept, strengths.top_k)
    if filters.top_p:  # nucleus sampling (arXiv 1904.09751)
        wanted = strengths.top_p * jnp.sum(weights, axis=-1, keepdims=True)
        weights = _largest(weights, lambda kept, of=weights: jnp.where(kept, of, 0.0), wanted)
    if filters.min_p:
        weights = jnp.where(weights >= strengths.min_p, weights, 0.0)
    return weights


def _largest(weights, counted, wanted):
    """Zeroes all but the fewest largest weights whose `counted` values sum up to `wanted`; ties are kept.

    `counted`: [B, V] bool, which are kept -> what each of them counts.
    The threshold is found by halving the integers that float bits are, which for positive floats have the floats'
    order: exact, local to a shard of the vocabulary, and a tenth of the time of a sort.
    """
    order = jax.lax.bitcast_convert_type(weights, jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low + 1) // 2
        enough = jnp.sum(counted(order >= middle), axis=-1, keepdims=True) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    low = jnp.zeros((weights.shape[0], 1), jnp.int32)
    threshold, _ = jax.lax.fori_loop(0, 31, halve, (low, jnp.max(order, axis=-1, keepdims=True)))
    return jnp.where(order >= threshold, weights, 0.0)


def _draw(weights, uniform):
    """[B]: the first token with a weight at which the running sum of the weights exceeds `uniform` of the whole."""
    rows, vocab = weights.shape
    grouped = jnp.pad(weights, ((0, 0), (0, -vocab % _GROUP))).reshape(rows, -1, _GROUP)
    sums = jnp.sum(grouped, axis=-1)
    running = jnp.cumsum(sums, axis=-1)
    target = uniform * running[:, -1]
    group = _first_above(running, sums, target)
    before = jnp.take_along_axis(running - sums, group[:, None], axis=-1)[:, 0]
    inside = jnp.take_along_axis(grouped, group[:, None, None], axis=1)[:, 0]
    return group * _GROUP + _first_above(jnp.cumsum(inside, axis=-1), inside, target - before)


def _first_above(running, parts, target):
    """[B]: the first part with a weight where `running` exceeds the target; the last one if rounding lets none.

    XLA sums in parallel, so that `running` need not grow: it can exceed the target within parts that add nothing.
    """
    weighty = parts > 0
    last = parts.shape[-1] - 1 - jnp.argmax(weighty[:, ::-1], axis=-1)
    above = weighty & (running > target[:, None])
    return jnp.where(jnp.any(above, axis=-1), jnp.argmax(above, axis=-1), last)
