"""Responses under several prompts each: every token's distribution under each, and how far two of them lie apart.

Axes: B rows, T tokens of a row, C prompts of a response, S response tokens of a row, D model, V vocabulary.
An example is one response under its C prompts, C segments of one row; so the states that belong to one response token
are on one device, and distributions are compared chunk by chunk without ever being kept.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.config import BatchConfig, ComputeConfig, ModelConfig
from lm_jax.data.batches import BatchIterator
from lm_jax.data.packing import Example, example_lengths
from lm_jax.data.plans import plan_passes
from lm_jax.models.decoder import Decoder, output_embedding
from lm_jax.models.linear import contract_rows, in_compute_dtype
from lm_jax.models.logprobs import without_padding
from lm_jax.scoring.scoring import ARRAYS, scoring_compute
from lm_jax.sharding import batch_divisor, constrain, to_host


class Contrast(NamedTuple):
    """What the model says of one response of R tokens under each of its C prompts. fp32, nats.

    Attributes:
      logprobs: [C, R] log p(token | prompt c, earlier tokens).
      entropies: [C, R] of the distribution that each token was drawn from.
      divergences: [2, R] between the distributions under the first two prompts, KL(0 || 1) and KL(1 || 0), where asked.
    """

    logprobs: np.ndarray
    entropies: np.ndarray
    divergences: np.ndarray | None


def contrast(
    params: dict,
    examples: Sequence[Example],
    wanted: np.ndarray,
    config: ModelConfig,
    compute: ComputeConfig,
    batch: BatchConfig,
    mesh: jax.sharding.Mesh,
    divergences: bool,
) -> Iterator[list[tuple[int, Contrast]]]:
    """Scores responses under all their prompts in one packed pass; yields (example, scores) as each batch finishes.

    Which examples share a batch does not depend on `wanted`, so a pass that goes on after an interruption gives the
    same numbers to the bit.

    Args:
      params: parameters on `mesh`.
      examples: each the same number C of segments, whose responses are equal.
      wanted: [N] bool; batches without a wanted example are left out. Others of a batch are yielded all the same.
      batch: the shape of a pass.
      divergences: whether to compare the first two prompts' distributions.

    Raises:
      UserError: an example longer than a row.
    """
    num_prompts = len(examples[0])
    if any(
        len(example) != num_prompts or any(not np.array_equal(s.response, example[0].response) for s in example)
        for example in examples
    ):
        raise ValueError("every example must be one response under the same number of prompts")
    compute = scoring_compute(compute)
    plan = plan_passes(example_lengths(examples), batch, batch_divisor(mesh)).with_any(wanted)
    iterator = BatchIterator(plan, examples, mesh)
    pending = None
    for step in range(len(plan)):
        (stack,) = next(iterator)
        arrays = {name: stack[name][0] for name in ARRAYS}
        with jax.set_mesh(mesh):
            scores = packed_contrast(params, arrays, config, compute, num_prompts, divergences)
        if pending is not None:
            yield _unpack(*pending, examples)
        pending = plan.steps[step][0][1], scores
    if pending is not None:
        yield _unpack(*pending, examples)


@functools.partial(jax.jit, static_argnames=("config", "compute", "num_prompts", "divergences"))
@in_compute_dtype
def packed_contrast(
    params: dict,
    batch: dict[str, jax.Array],
    config: ModelConfig,
    compute: ComputeConfig,
    num_prompts: int,
    divergences: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """A packed batch of examples of C segments -> log-probs [B, S, C], entropies [B, S, C], divergences [B, S, 2].

    S = T // C; the response tokens of a row's examples come first, one after the other; the rest means nothing.
    """
    hidden: Any = Decoder(config, compute).apply(
        {"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    return contrast_head(
        hidden,
        output_embedding(params, config),
        batch["targets"],
        batch["loss_mask"],
        batch["segment_ids"],
        num_prompts,
        compute.logprob_chunk,
        divergences,
        config.vocab_size,
    )


def contrast_head(
    hidden: jax.Array,
    embedding: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    segment_ids: jax.Array,
    num_prompts: int,
    chunk: int,
    divergences: bool,
    vocab_size: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """See `packed_contrast`. No gradient is meant to go through it.

    Args:
      hidden: [B, T, D] after the final norm.
      embedding: [V, D], the output embedding.
      targets, mask, segment_ids: [B, T] as `fill_rows` makes them; segment s is a response under prompt (s - 1) % C.
      chunk: tokens of a row whose logits exist at one time, all prompts counted.
      vocab_size: as `token_statistics` has it.
    """
    rows, length, width = hidden.shape
    slots = length // num_prompts
    step = min(max(chunk // num_prompts, 1), max(slots, 1))  # response tokens of a row that are worked on together
    num_chunks = -(-slots // step)
    wanted = mask > 0
    # Examples lie in a row one after the other, each with its response once a prompt: so the j-th response position
    # under one prompt and the j-th under another belong to the same token, whatever the prompts' lengths.
    under = [wanted & (segment_ids % num_prompts == (c + 1) % num_prompts) for c in range(num_prompts)]
    at = jnp.stack([jnp.argsort(~u, axis=1, stable=True)[:, :slots] for u in under], axis=2)  # [B, S, C]
    at = jnp.pad(at, [(0, 0), (0, num_chunks * step - slots), (0, 0)]).reshape(rows, num_chunks, -1)
    counts = jnp.sum(under[0], axis=1)
    embedding = constrain(embedding, "vocab", "embed")  # gathered over fsdp once, not per chunk

    def compute(at_chunk):
        states = jnp.take_along_axis(hidden, at_chunk[..., None], axis=1)
        target_chunk = jnp.take_along_axis(targets, at_chunk, axis=1)
        logits = without_padding(contract_rows(states, embedding, jnp.float32), vocab_size or len(embedding))
        return _chunk_contrast(logits, target_chunk, num_prompts, divergences)

    def nothing(_):
        zeros = jnp.zeros((rows, step, num_prompts), jnp.float32)
        return zeros, zeros, zeros[..., :2] if divergences else None

    def body(_, inputs):
        needed, at_chunk = inputs
        return None, jax.lax.cond(needed, compute, nothing, at_chunk)

    needed = jnp.arange(num_chunks) * step < jnp.max(counts)
    _, outputs = jax.lax.scan(body, None, (needed, jnp.moveaxis(at, 1, 0)))

    def in_rows(x):
        return jnp.moveaxis(x, 0, 1).reshape(rows, num_chunks * step, -1)[:, :slots]

    logprobs, entropies, kl = outputs
    return in_rows(logprobs), in_rows(entropies), None if kl is None else in_rows(kl)


def _chunk_contrast(logits, targets, num_prompts, divergences):
    """[B, c * C, V], [B, c * C] -> log-probs, entropies [B, c, C] and divergences [B, c, 2] or None."""
    logits = constrain(logits, "batch", "length", "vocab")
    # Shifted by the largest before anything is summed: the entropy of a token that is all but certain would drown in
    # the rounding of a large normaliser, and a ratio of two such entropies would be noise.
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    logp = logits - jnp.log(jnp.sum(jnp.exp(logits), axis=-1, keepdims=True))
    p = jnp.exp(logp)
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]

    def by_token(x):  # [B, c * C, ...] -> [B, c, C, ...]
        return x.reshape(x.shape[0], -1, num_prompts, *x.shape[2:])

    logprobs = by_token(jnp.sum(jnp.where(is_target, logp, 0.0), axis=-1))
    # Neither can be negative, but rounding can
    entropies = by_token(_at_least_0(-jnp.sum(p * logp, axis=-1)))
    if not divergences:
        return logprobs, entropies, None
    p, logp = by_token(p), by_token(logp)
    difference = logp[:, :, 0] - logp[:, :, 1]
    kl = [jnp.sum(p[:, :, 0] * difference, axis=-1), -jnp.sum(p[:, :, 1] * difference, axis=-1)]
    return logprobs, entropies, _at_least_0(jnp.stack(kl, axis=-1))


def _at_least_0(x):
    return jnp.where(x < 0, 0.0, x)  # and NaN stays NaN


def _unpack(rows, scores, examples) -> list[tuple[int, Contrast]]:
    logprobs, entropies, divergences = to_host(scores)
    out = []
    for b, row in enumerate(rows):
        start = 0
        for item in row:
            here = slice(start, start + len(examples[item][0].response))
            kl = None if divergences is None else divergences[b, here].T.copy()
            out.append((int(item), Contrast(logprobs[b, here].T.copy(), entropies[b, here].T.copy(), kl)))
            start = here.stop
    return out
