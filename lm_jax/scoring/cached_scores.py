"""Scores of a frozen model, computed once and kept on disk: reference log-probs, and what token weights are made of."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from lm_jax.data.packing import Segment, examples_fingerprint
from lm_jax.data.score_store import ScoreStore
from lm_jax.distributed.processes import barrier, everywhere, process_0_first
from lm_jax.scoring.scoring import TokenScores

FIELDS = ("logprobs", "entropies")


def scores_key(segments: Sequence[Segment], model: str, dtype: str) -> dict[str, Any]:
    """What scores depend on: the token ids (in which data, tokenizer, template and length are settled), model, dtype.

    Args:
      model: the model's fingerprint, and how it is loaded.
    """
    tokens = examples_fingerprint([Segment(segment.prompt, segment.response)] for segment in segments)
    return {"tokens": tokens, "model": model, "dtype": dtype}


def cached_scores(
    directory: str,
    key: dict[str, Any],
    segments: Sequence[Segment],
    scorer: Callable[[Sequence[Segment]], Iterable[list[TokenScores]]],
    progress: Callable[[int, int], None],
) -> dict[str, list[np.ndarray]]:
    """Scores of all segments, from the store in `directory` where they are, else computed and kept there as they come.

    Args:
      directory: holds one store a key, so runs on the same data and model may share it.
      key: from `scores_key`.
      scorer: scores the segments it is given; called only when something is missing, so it may load the model then.
      progress: called with (segments done, segments in all).

    Returns:
      {"logprobs", "entropies"}: one [R] float32 array a segment.
    """
    name = hashlib.sha256(repr(sorted(key.items())).encode()).hexdigest()[:16]
    lengths = [len(segment.response) for segment in segments]
    path = f"{directory}/{name}"
    store = process_0_first(lambda: ScoreStore.create_or_open(path, key, lengths, FIELDS), "the store of scores")
    missing = np.array(everywhere(lambda: store.missing().tolist()), np.int64)
    if missing.size:
        done = len(segments) - missing.size
        for batch in scorer([segments[i] for i in missing]):
            if batch and jax.process_index() == 0:
                store.write([int(missing[s.row]) for s in batch], {f: [getattr(s, f) for s in batch] for f in FIELDS})
            done += len(batch)
            progress(done, len(segments))
    barrier("the end of scoring")
    return store.read(np.arange(len(segments)))
