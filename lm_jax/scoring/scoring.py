"""Many (prompt, response) rows -> per-token log-probs and entropies, in packed teacher-forced passes.

Axes: B rows, T tokens of a row.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from lm_jax.config import BatchConfig, ComputeConfig, ModelConfig
from lm_jax.data.batches import BatchIterator
from lm_jax.data.packing import Segment, example_lengths, response_slice
from lm_jax.data.plans import plan_passes
from lm_jax.models.forward import packed_statistics
from lm_jax.sharding import batch_divisor, to_host

ARRAYS = ("tokens", "positions", "segment_ids", "targets", "loss_mask")  # of a batch, that a pass reads


class TokenScores(NamedTuple):
    """Scores of one response.

    Attributes:
      row: which of the given segments it is.
      logprobs: [R] fp32, log p(token | prompt, earlier tokens) in nats.
      entropies: [R] fp32, entropy in nats of the distribution that each token was drawn from; None where not asked for.
      top1: [R] fp32, 1 where the token was the likeliest one, else 0; None where not asked for.
    """

    row: int
    logprobs: np.ndarray
    entropies: np.ndarray | None
    top1: np.ndarray | None = None


def score(
    params: dict,
    segments: Sequence[Segment],
    config: ModelConfig,
    compute: ComputeConfig,
    batch: BatchConfig,
    mesh: jax.sharding.Mesh,
    with_entropies: bool = True,
    wanted: np.ndarray | None = None,
    with_top1: bool = False,
) -> Iterator[list[TokenScores]]:
    """Scores every response under its prompt; yields a list as each batch finishes, rows in packing order.

    One shape is compiled. The next batch is computed while the caller handles the last one.

    Args:
      params: parameters on `mesh`.
      segments: prompts (at least one token each) and responses.
      batch: the shape of a pass.
      mesh: the mesh that the parameters live on.
      with_entropies: without them there is less to compute.
      wanted: [N] bool; batches without a wanted segment are left out, and so the others come out the same to the bit,
        whatever was done before. None: all.
      with_top1: whether each token was the likeliest one, too.

    Raises:
      UserError: a segment longer than a row.
    """
    compute = scoring_compute(compute)
    names = ("logprobs", *(["entropies"] if with_entropies else []), *(["top1"] if with_top1 else []))
    examples = [(segment,) for segment in segments]
    plan = plan_passes(example_lengths(examples), batch, batch_divisor(mesh))
    if wanted is not None:
        plan = plan.with_any(wanted)
    iterator = BatchIterator(plan, examples, mesh)
    pending = None
    for step in range(len(plan)):
        (stack,) = next(iterator)
        arrays = {name: stack[name][0] for name in ARRAYS}
        with jax.set_mesh(mesh):
            scores = packed_statistics(params, arrays, config, compute, names)
        if pending is not None:
            yield _unpack(*pending, segments)
        pending = plan.steps[step][0][1], scores
    if pending is not None:
        yield _unpack(*pending, segments)


def scoring_compute(compute: ComputeConfig) -> ComputeConfig:
    """How a pass is computed: there are no residuals whose copies unrolling would save."""
    return dataclasses.replace(compute, scan_unroll=1)


def _unpack(rows, scores, segments) -> list[TokenScores]:
    scores = to_host(scores)
    out = []
    for b, row in enumerate(rows):
        start = 0
        for item in row:
            where = response_slice(segments[item], start)
            found = {name: x[b, where].copy() for name, x in scores.items()}
            out.append(TokenScores(int(item), found["logprobs"], found.get("entropies"), found.get("top1")))
            start += len(segments[item])
    return out
