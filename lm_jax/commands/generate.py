"""`launch.generate`: rows with a prompt -> the same rows with responses, kept as they finish."""

import collections
import dataclasses
import json
import os
import re
import sys
import time
from typing import Any

import jax
import numpy as np

from lm_jax.config import ComputeConfig, DecodeConfig, MeshConfig
from lm_jax.data.journal import Journal, check_output, rows_fingerprint
from lm_jax.data.rows import read_rows
from lm_jax.data.text import end_token_ids, load_tokenizer, tokenizer_fingerprint
from lm_jax.errors import UserError
from lm_jax.inference.requests import Completion, Generator, Request, SamplingConfig
from lm_jax.inference.sampling import LocalGenerator
from lm_jax.inference.stopping import resolve_stops
from lm_jax.models.decoder import check_compute
from lm_jax.sharding import make_mesh
from lm_jax.training.metrics import Progress
from lm_jax.training.runs import ModelSource, open_model

_SAMPLING = tuple(f.name for f in dataclasses.fields(SamplingConfig))
_ADDED = ("response", "finish_reason", "error")
_SHOWN = 300  # characters of a row's error in the run's


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
    """An OpenAI-compatible server; no `url`: the model runs here."""

    url: str
    model: str
    concurrency: int
    timeout: float  # seconds


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """`configs/generate.py` says what each key is for."""

    model: str | None
    input: str
    output: str
    seed: int
    dtype: str
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    num_samples: int
    stop: tuple[str | int, ...]
    max_failed_share: float
    decode: DecodeConfig
    endpoint: EndpointConfig
    mesh: MeshConfig
    compute: ComputeConfig

    def __post_init__(self):
        _ = self.sampling  # raises what is wrong with its keys
        if not 0 <= self.max_failed_share <= 1:
            raise UserError(f"config.max_failed_share={self.max_failed_share}: must lie between 0 and 1")
        if self.endpoint.url and self.model is not None:
            raise UserError(
                f"config.model={self.model!r} and config.endpoint.url={self.endpoint.url!r}: the model runs either "
                "here or behind the endpoint, under the name config.endpoint.model; leave one of the two out"
            )

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(**{name: getattr(self, name) for name in _SAMPLING})


@dataclasses.dataclass(frozen=True)
class _Local:
    """What of a model on disk is read before its weights."""

    source: ModelSource
    tokenizer: Any
    end_ids: tuple[int, ...]
    mesh: jax.sharding.Mesh


def generate_rows(config: GenerateConfig, generator: Generator | None = None) -> None:
    """Answers every row's prompt; `config.output` (JSONL) appears when all are done, and their order is the input's.

    Adds `id` (the row's number) where a row has none, `response` and `finish_reason` (lists of them where
    `num_samples` > 1); to a row without an answer `response` None, `finish_reason` "error" and `error`.
    Stopped at any moment and called again, it does the rows that are missing or had no answer; once it has finished,
    nothing more.

    Args:
      generator: answers instead of config's model.

    Raises:
      UserError: anything the user can mend, naming file, row or key; more rows than `max_failed_share` without answer.
    """
    begin = time.monotonic()
    check_output(config.output)
    if os.path.realpath(config.output) == os.path.realpath(config.input):
        raise UserError(f"config.output={config.output!r}: the input itself; give another file name")
    if generator is None and config.endpoint.url:
        generator = _endpoint(config.endpoint)
    mesh = _check_local(config) if generator is None else None
    rows = _read(config)
    local = None if mesh is None else _open_local(config, mesh)
    journal = _open_journal(config, rows, local)
    try:
        if journal is not None and journal.finished:
            failed = sum("error" in row for row in read_rows(config.output))
            without = f"; {failed} rows have no answer: to try again, delete it and its .run.json" if failed else ""
            print(f"{config.output}: finished already, with these settings{without}", file=sys.stderr)
            _report(config, len(rows), failed, 0, begin)
            return
        missing, failed, tokens = _missing(journal, len(rows)), 0, 0
        if missing:
            failed, tokens = _answer(config, generator or _load(config, local), rows, missing, journal)
        if journal is not None:
            journal.finish({**row, **journal.value(number)} for number, row in enumerate(rows))
            _report(config, len(rows), failed, tokens, begin)
    finally:
        if journal is not None:
            journal.close()


def _report(config: GenerateConfig, rows: int, failed: int, tokens: int, begin: float) -> None:
    seconds = round(time.monotonic() - begin, 1)
    print(json.dumps({"rows": rows, "failed": failed, "tokens": tokens, "seconds": seconds, "output": config.output}))


def _check_local(config: GenerateConfig) -> jax.sharding.Mesh:
    if not config.model:
        raise UserError("config.model: not set; give --config.model=VALUE, or --config.endpoint.url for a server")
    check_compute(config.compute)
    return make_mesh(config.mesh)


def _open_local(config: GenerateConfig, mesh: jax.sharding.Mesh) -> _Local:
    source = open_model(config.model)
    tokenizer = load_tokenizer(source.directory, source.config.vocab_size)
    end_ids = end_token_ids(source.directory, tokenizer)
    resolve_stops(config.stop, tokenizer, end_ids)  # raises while nothing slow has begun
    return _Local(source, tokenizer, end_ids, mesh)


def _load(config: GenerateConfig, local: _Local) -> Generator:
    params = local.source.load_params(local.mesh, config.dtype)
    return LocalGenerator(
        params, local.source.config, local.tokenizer, local.end_ids, config.compute, config.decode, local.mesh
    )


def _endpoint(config: EndpointConfig) -> Generator:
    from lm_jax.inference.endpoints import EndpointGenerator

    try:
        # Which share may fail is decided here, over all rows: of a restart's few rows more may fail
        return EndpointGenerator(
            config.url, config.model, concurrency=config.concurrency, timeout=config.timeout, max_failed_share=1.0
        )
    except UserError as error:
        raise UserError(f"config.endpoint.{error}") from error


def _read(config: GenerateConfig) -> list[dict[str, Any]]:
    """The rows, each with its id."""
    where = os.path.basename(config.input.rstrip("/"))
    rows = read_rows(config.input, ("prompt",))
    first: dict[str, int] = {}
    for number, row in enumerate(rows):
        at = f"{where} row {number}"
        if taken := [name for name in _ADDED if name in row]:
            raise UserError(f"{at}: has a column {taken[0]!r} already, which would be overwritten; rename it")
        if row.get("id") is None:
            row["id"] = number
        if type(row["id"]) not in (int, str) or row["id"] == "":
            raise UserError(f"{at}: id must be a string or a whole number, got {row['id']!r}; mend it or leave it out")
        before = first.setdefault(str(row["id"]), number)
        if before != number:
            raise UserError(
                f"{at}: has the same id {row['id']!r} as row {before} (a row without one is called by its number); "
                "ids decide the random draws and must differ"
            )
        limit = row.get("max_new_tokens")
        if limit is not None and (type(limit) is not int or not 1 <= limit <= config.max_new_tokens):
            raise UserError(
                f"{at}: max_new_tokens must be a whole number from 1 to config.max_new_tokens={config.max_new_tokens}, "
                f"got {limit!r}; mend it, or raise config.max_new_tokens"
            )
    return rows


def _open_journal(config: GenerateConfig, rows: list[dict[str, Any]], local: _Local | None) -> Journal | None:
    """Of process 0; the others write nothing."""
    if jax.process_index():
        return None
    journal = Journal(config.output, _identity(config, rows, local), len(rows), lambda value: "error" in value)
    if journal.damaged:
        print(f"{config.output}.partial: {journal.damaged} damaged lines; their rows are done anew", file=sys.stderr)
    return journal


def _identity(config: GenerateConfig, rows: list[dict[str, Any]], local: _Local | None) -> dict[str, Any]:
    """What the output depends on. Where it is computed, in which batches and on what devices may change."""
    where = os.path.basename(config.input.rstrip("/"))
    settings = {f"config.{name}": getattr(config, name) for name in _SAMPLING}
    if local is None:
        settings |= {"config.endpoint.model": config.endpoint.model}
    else:
        settings |= {
            "config.dtype": config.dtype,
            "config.decode.max_length": config.decode.max_length,
            "config.compute.dtype": config.compute.dtype,
            "fingerprint of config.model": local.source.fingerprint(),
            "fingerprint of its tokenizer": tokenizer_fingerprint(local.tokenizer),
            "end tokens": local.end_ids,
        }
    return {
        "command": "generate",
        "model": "endpoint" if local is None else "here",
        **settings,
        "number of rows": len(rows),
        "fingerprint of config.input": rows_fingerprint(rows, where),
    }


def _answer(
    config: GenerateConfig,
    generator: Generator,
    rows: list[dict[str, Any]],
    missing: list[int],
    journal: Journal | None,
) -> tuple[int, int]:
    """Answers the missing rows: (rows without answer, tokens generated)."""
    by_id = {str(rows[number]["id"]): number for number in missing}
    requests = [Request(i, rows[n]["prompt"], rows[n].get("max_new_tokens")) for i, n in by_id.items()]
    done, tokens, reasons = len(rows) - len(missing), 0, collections.Counter()
    progress, begin = Progress(len(rows), done, "row"), time.monotonic()
    first: dict[str, str] = {}
    answers = generator.generate(requests, config.sampling)
    try:
        for completions in answers:
            values = [(by_id[c.id], _columns(c, config.num_samples)) for c in completions]
            if journal is not None:
                journal.append(values)
            for completion, (_, value) in zip(completions, values, strict=True):
                if "error" in value:
                    alike = rf"(?<!\w){re.escape(completion.id)}(?!\w)|\d+"  # but for its row's name and numbers
                    reasons[reason := re.sub(alike, "#", value["error"])] += 1
                    first.setdefault(reason, value["error"])
            done += len(values)
            tokens += sum(sample.num_tokens or 0 for c in completions for sample in c.samples)
            progress.update(done, {"tok/s": f"{tokens / max(time.monotonic() - begin, 1e-9):.0f}"})
            if reasons.total() > config.max_failed_share * len(rows):
                _raise_failed(config, reasons, first, len(rows))
    finally:
        if hasattr(answers, "close"):
            answers.close()  # else requests under way would go on
        progress.close()
    return reasons.total(), tokens


def _missing(journal: Journal | None, num_rows: int) -> list[int]:
    mask = np.zeros(num_rows, np.int32)
    if journal is not None:
        mask[journal.missing()] = 1
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        mask = multihost_utils.broadcast_one_to_all(mask)
    return np.flatnonzero(mask).tolist()


def _columns(completion: Completion, num_samples: int) -> dict[str, Any]:
    if completion.error is not None:
        return _without_answer(completion.error)
    if len(completion.samples) != num_samples:
        raise ValueError(f"row {completion.id}: {len(completion.samples)} samples, {num_samples} were asked for")
    texts = [sample.text for sample in completion.samples]
    reasons = [sample.finish_reason for sample in completion.samples]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:  # what a server sends may hold it
        return _without_answer("the response has half a surrogate pair, which no file can hold")
    return {
        "response": texts if num_samples > 1 else texts[0],
        "finish_reason": reasons if num_samples > 1 else reasons[0],
    }


def _without_answer(error: str) -> dict[str, Any]:
    return {"response": None, "finish_reason": "error", "error": " ".join(error.split())}


def _raise_failed(config: GenerateConfig, reasons: collections.Counter, first: dict[str, str], num_rows: int) -> None:
    (reason, count), failed = reasons.most_common(1)[0], reasons.total()
    raise UserError(
        f"{failed} of {num_rows} rows could not be answered ({failed / num_rows:.1%}, more than "
        f"config.max_failed_share={config.max_failed_share}), {count} of them like this: {first[reason][:_SHOWN]}; "
        "mend the cause, or raise config.max_failed_share, and run the command again: "
        f"the rows in {config.output}.partial stay"
    )
