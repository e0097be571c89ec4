"""What the frozen reference says of every response, and the examples that training packs."""

import functools
import sys
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from lm_jax.checkpoints.runs import ModelSource
from lm_jax.config import BatchConfig, ComputeConfig
from lm_jax.console import Progress
from lm_jax.data.packing import Segment
from lm_jax.distributed.processes import everywhere
from lm_jax.scoring.cached_scores import FIELDS, cached_scores, scores_key
from lm_jax.scoring.scoring import score
from musc_jax.weights.rules import FULL, RULES, ResponseScores

Scores = Mapping[str, Sequence[np.ndarray]]  # "logprobs", "entropies": [R] float32 for each segment


def reference_scores(
    segments: Sequence[Segment],
    reference: ModelSource,
    cache: str,
    compute: ComputeConfig,
    batch: BatchConfig,
    mesh: jax.sharding.Mesh,
) -> Scores:
    """Scores of every response, computed at most once: what `cache` lacks is added to it as it comes."""
    progress: list[Progress] = []
    seen: list[tuple[float, int]] = []  # when how many responses were done

    @functools.cache
    def params():  # only where something is missing
        return reference.load_params(mesh, "float32")

    def scorer(missing):
        progress.append(Progress(len(segments), len(segments) - len(missing), "reference"))
        model = params()
        seen.append((time.perf_counter(), len(segments) - len(missing)))
        return score(model, missing, reference.config, compute, batch, mesh)

    def show(done, total):
        seen.append((time.perf_counter(), done))
        progress[0].update(done, {})

    model = everywhere(lambda: f"{reference.fingerprint} {reference.precision}", "the reference's fingerprint")
    scores = cached_scores(cache, scores_key(segments, model, compute.dtype), segments, scorer, show)
    if seen and jax.process_index() == 0:
        progress[0].close()
        seconds, first = seen[-1][0] - seen[0][0], seen[min(1, len(seen) - 1)][0] - seen[0][0]
        print(
            f"reference log-probs of {seen[-1][1] - seen[0][1]} responses in {seconds:.1f} s "
            f"(first batch, with its compilation, {first:.1f} s); kept in {cache}",
            file=sys.stderr,
            flush=True,
        )
    return scores


def no_scores(segments: Sequence[Segment]) -> Scores:
    """Zeros, for a loss without a reference."""
    return {name: [np.zeros(len(s.response), np.float32) for s in segments] for name in FIELDS}


def weighted_pairs(segments: Sequence[Segment], scores: Scores, rule: str) -> list[tuple[Segment, Segment]]:
    """(chosen, rejected) with the values `weights` and `ref_logprobs` for every response token.

    Args:
      segments: 2 a pair; unless the rule is a key of RULES they bring their `weights`, if any.
      rule: a key of RULES, or where the weights are from.
    """
    weighted = []
    for i, segment in enumerate(segments):
        logprobs, entropies = scores["logprobs"][i], scores["entropies"][i]
        values = {**segment.values, "ref_logprobs": logprobs}
        if rule in RULES:
            own = ResponseScores({FULL: logprobs}, {FULL: entropies}, None, None, is_chosen=i % 2 == 0)
            values["weights"] = RULES[rule].weigh(own)
        weighted.append(Segment(segment.prompt, segment.response, values))
    return list(zip(weighted[::2], weighted[1::2], strict=True))
