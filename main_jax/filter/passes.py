"""Teacher-forced passes over many texts, kept as they come: cross-entropies a token, without holding the tokens."""

import functools
import itertools
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lm_jax.checkpoints.runs import open_model, param_specs
from lm_jax.config import BatchConfig, ComputeConfig
from lm_jax.console import Progress, say
from lm_jax.data.journal import Journal
from lm_jax.data.messages import Text
from lm_jax.data.packing import Segment
from lm_jax.data.rows import stream_rows
from lm_jax.data.shares import encode_rows
from lm_jax.data.text import TextEncoder, checked
from lm_jax.data.tokenizers import end_token_ids, load_tokenizer, tokenizer_fingerprint
from lm_jax.errors import UserError
from lm_jax.generation.answers import missing_rows
from lm_jax.scoring.scoring import TokenScores, score

NO_INSTRUCTION, TOO_LONG, REFUSED = "no_instruction", "too_long", "refused"
FAULTS = (NO_INSTRUCTION, TOO_LONG, REFUSED)  # why a text has no cross-entropy
BLOCK = 4096  # texts that are tokenised and packed together
_NO_LIMIT = 2**31 - 1  # a text that is too long is left out, not cut: half a response has another likelihood


class Item(NamedTuple):
    """What is scored: `response` under `prompt`; `where` names it in errors."""

    prompt: Text
    response: str
    where: str


class FrozenModel:
    """A model on disk with its tokenizer; the weights are read when they are first needed.

    Args:
      name: what it is called in errors.
      path: run directory, Hugging Face directory or hub id.
      mesh: where its parameters will lie.
      dtype: of the parameters.
      chat_template_kwargs: of `load_tokenizer`.

    Raises:
      UserError: no such model, or one that does not fit the mesh.
    """

    def __init__(self, name: str, path: str, mesh: jax.sharding.Mesh, dtype: str, chat_template_kwargs: str):
        self.name, self.path, self.mesh = name, path, mesh
        self._dtype = dtype
        self.source = open_model(path)
        param_specs(self.source.config, mesh)
        self.tokenizer = load_tokenizer(self.source.directory, self.source.config.vocab_size, chat_template_kwargs)
        end_ids = end_token_ids(self.source.directory, self.tokenizer)
        self.encoder = TextEncoder(self.tokenizer, _NO_LIMIT, end_ids)
        self.read_with = {"fingerprint of its tokenizer": tokenizer_fingerprint(self.tokenizer), "end tokens": end_ids}

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What its numbers depend on."""
        return {"fingerprint of its weights": self.source.fingerprint, **self.read_with}

    @functools.cached_property
    def params(self) -> dict:
        return self.source.load_params(self.mesh, self._dtype)


class CrossEntropy(NamedTuple):
    """Of N texts: `values` [N] float64, nats a token, NaN where `fault` [N] is not -1 but a number in `FAULTS`."""

    values: np.ndarray
    fault: np.ndarray


def run_pass(
    output: str,
    identity: Mapping[str, Any],
    model: FrozenModel,
    items: Iterable[Item | str],
    number: int,
    max_length: int,
    batch: BatchConfig,
    compute: ComputeConfig,
    unit: str,
) -> None:
    """Scores what is missing of `number` items; `output` (JSONL) appears when all are done.

    Texts are packed in fixed blocks, so that a run which was stopped gives the same bits as one which was not.

    Args:
      identity: what the numbers depend on besides the model.
      items: in the order of their numbers; a name from `FAULTS` in place of an item that there is none of.
      max_length: tokens of prompt and response together; what is longer is `TOO_LONG`.
      unit: what progress counts.

    Raises:
      UserError: `output` was begun with other settings; a text that cannot be encoded; NaN.
    """
    journal = None if jax.process_index() else Journal(output, {**identity, **model.identity}, number)
    try:
        if journal is not None and journal.damaged:
            say(f"{output}.partial: {journal.damaged} damaged lines; their texts are scored anew")
        missing = np.zeros(number, bool)
        missing[missing_rows(journal)] = True
        if missing.any():
            done, begin, tokens = number - int(missing.sum()), time.monotonic(), 0
            progress = Progress(number, done, unit)
            items = iter(items)
            for start in range(0, number, BLOCK):
                block = list(itertools.islice(items, BLOCK))
                wanted = missing[start : start + len(block)]
                if not wanted.any():
                    continue
                for values, count in _score_block(model, block, wanted, max_length, batch, compute):
                    if journal is not None and values:
                        journal.append((start + i, value) for i, value in values.items())
                    done, tokens = done + len(values), tokens + count
                    progress.update(done, {"tok/s": f"{tokens / max(time.monotonic() - begin, 1e-9):.0f}"})
            progress.close()
        if journal is not None and not journal.finished:
            journal.finish(journal.value(i) for i in range(number))
    finally:
        if journal is not None:
            journal.close()


def read_pass(output: str, number: int) -> CrossEntropy:
    """What `run_pass` wrote.

    Raises:
      UserError: the file is not whole.
    """
    values, fault = np.full(number, np.nan), np.full(number, -1, np.int8)
    found = 0
    for found, row in enumerate(stream_rows(output), 1):
        if found > number or not (row.keys() == {"logprob", "tokens"} or row.get("fault") in FAULTS):
            found = -1
            break
        if "fault" in row:
            fault[found - 1] = FAULTS.index(row["fault"])
        else:
            values[found - 1] = -row["logprob"] / row["tokens"]
    if found != number:
        raise UserError(f"{output}: no longer has the rows that it was written with; delete it to score them anew")
    return CrossEntropy(values, fault)


def _score_block(model, block, wanted, max_length, batch, compute):
    """({number in the block: value} of wanted items, tokens computed), batch by batch."""
    values = {i: {"fault": item} for i, item in enumerate(block) if isinstance(item, str)}
    texts = [i for i in range(len(block)) if i not in values]
    prompts, responses, wheres = ([block[i][part] for i in texts] for part in range(3))
    encoded = encode_rows(model.encoder, prompts, responses, wheres)
    if texts and all(isinstance(e, UserError) for e in encoded):
        checked(encoded)  # no fault of a row
    segments, numbers = [], []
    for i, e in zip(texts, encoded, strict=True):
        if isinstance(e, UserError):  # by the tokenizer, or by the chat template
            say(str(e))
            values[i] = {"fault": REFUSED}
        elif len(e.prompt_ids) + len(e.response_ids) > max_length:
            values[i] = {"fault": TOO_LONG}
        else:
            segments.append(Segment(e.prompt_ids, e.response_ids))
            numbers.append(i)
    del encoded
    yield {i: value for i, value in values.items() if wanted[i]}, 0
    to_score = wanted[np.array(numbers, np.int64)]
    if not to_score.any():
        return
    passes = score(
        model.params,
        segments,
        model.source.config,
        compute,
        batch,
        model.mesh,
        with_entropies=False,
        wanted=to_score,
    )
    for group in passes:
        found = {numbers[s.row]: _value(s, block[numbers[s.row]].where, model.name) for s in group}
        yield {i: v for i, v in found.items() if wanted[i]}, sum(len(segments[s.row]) for s in group)


def _value(scores: TokenScores, where: str, model: str) -> dict[str, Any]:
    if not (finite := np.isfinite(scores.logprobs)).all():
        at = int(np.argmin(finite))
        raise UserError(
            f"{where}: the log-prob of token {at} by the {model} model is {scores.logprobs[at]}; look at the row, "
            "compute in float32 if the model overflows, and check the model's weights if every row does"
        )
    return {"logprob": float(scores.logprobs.sum(dtype=np.float64)), "tokens": len(scores.logprobs)}
