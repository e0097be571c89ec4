"""`launch.generate`: rows with a prompt -> the same rows with responses, kept as they finish."""

import dataclasses
import os
import sys
import time
from typing import Any

import jax

from lm_jax.config import ComputeConfig, DecodeConfig, MeshConfig
from lm_jax.data.columns import Renamed, RowKeys
from lm_jax.data.faults import Faults, RowIds
from lm_jax.data.journal import Journal, check_output, rows_fingerprint
from lm_jax.data.layouts import read_prompts
from lm_jax.data.rows import read_rows
from lm_jax.data.text import Text
from lm_jax.distributed.processes import everywhere
from lm_jax.errors import UserError
from lm_jax.generation.answers import answer_requests, missing_rows, without_answer
from lm_jax.generation.generator import (
    EndpointConfig,
    Local,
    check_one_model,
    load_local,
    local_mesh,
    model_identity,
    open_endpoint,
    open_local,
)
from lm_jax.generation.requests import Generator, Request, SamplingConfig
from lm_jax.strict_json import dumps

_SAMPLING = tuple(f.name for f in dataclasses.fields(SamplingConfig))
_ADDED = ("response", "finish_reason", "error")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig(RowKeys, SamplingConfig):
    """`configs/generate.py` says what each key is for."""

    model: str | None = None
    input: str
    output: str
    chat_template_kwargs: str = ""
    dtype: str = "float32"
    max_new_tokens: int = 512
    temperature: float = 0.7
    max_failed_share: float = 0.05
    decode: DecodeConfig = DecodeConfig()
    endpoint: EndpointConfig = EndpointConfig()
    mesh: MeshConfig = MeshConfig(fsdp=1, tensor=-1)
    compute: ComputeConfig = ComputeConfig()

    def __post_init__(self):
        RowKeys.__post_init__(self)
        SamplingConfig.__post_init__(self)
        if not 0 <= self.max_failed_share <= 1:
            raise UserError(f"config.max_failed_share={self.max_failed_share}: must lie between 0 and 1")
        check_one_model(self)

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(**{name: getattr(self, name) for name in _SAMPLING})


def generate_rows(config: GenerateConfig, generator: Generator | None = None) -> None:
    """Answers every row's prompt; `config.output` (JSONL) appears when all are done, and their order is the input's.

    Adds `id` (the row's number) where a row has none, `response` and `finish_reason` (lists of them where
    `num_samples` > 1); to a row without an answer `response` None, `finish_reason` "error" and `error`. Faulty rows, of
    which there may be few, are not asked and have none either.
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
        generator = open_endpoint(config.endpoint, config.chat_template_kwargs)
    mesh = local_mesh(config) if generator is None else None
    rows, prompts, faults = _read(config)
    local = None if mesh is None else open_local(config, mesh, config.stop)
    journal = _open_journal(config, rows, local)
    try:
        if everywhere(lambda: journal is not None and journal.finished):
            if journal is None:
                return
            failed = sum("error" in row for row in read_rows(config.output))
            without = f"; {failed} rows have no answer: to try again, delete it and its .run.json" if failed else ""
            print(f"{config.output}: finished already, with these settings{without}", file=sys.stderr)
            _report(config, len(rows), failed, 0, begin)
            return
        missing, failed, tokens = missing_rows(journal), 0, 0
        if missing:
            if journal is not None:
                journal.append((n, without_answer(faults.rows[n])) for n in missing if n in faults.rows)
            asked = {n: _request(rows[n], prompts[n]) for n in missing if n not in faults.rows}
            if asked:
                failed, tokens = answer_requests(
                    generator or load_local(config, local),
                    asked,
                    config.sampling,
                    journal,
                    len(rows),
                    config.max_failed_share,
                )
            failed += len(faults.rows)
        if journal is not None:
            journal.finish({**row, **journal.value(number)} for number, row in enumerate(rows))
            _report(config, len(rows), failed, tokens, begin)
    finally:
        if journal is not None:
            journal.close()


def _report(config: GenerateConfig, rows: int, failed: int, tokens: int, begin: float) -> None:
    seconds = round(time.monotonic() - begin, 1)
    print(dumps({"rows": rows, "failed": failed, "tokens": tokens, "seconds": seconds, "output": config.output}))


def _request(row: dict[str, Any], prompt: Text) -> Request:
    return Request(str(row["id"]), prompt, row.get("max_new_tokens"))


def _read(config: GenerateConfig) -> tuple[list[dict[str, Any]], dict[int, Text], Faults]:
    """The rows, each with its id; the prompts of those that have no fault; the others' faults."""
    where = os.path.basename(config.input.rstrip("/"))
    rows = read_rows(config.input, renamed=config.columns)
    faults = Faults(where, config.max_dropped_share)
    prompts = read_prompts(rows, faults, tuple(Renamed(config.columns).names))
    ids = RowIds(faults)
    for number, row in enumerate(rows):
        at = f"{where} row {number}"
        if taken := [name for name in _ADDED if name in row]:
            raise UserError(f"{at}: has a column {taken[0]!r} already, which would be overwritten; rename it")
        row["id"] = ids.of(number, row.get("id"))
        with faults.of(number):
            limit = row.get("max_new_tokens")
            if limit is not None and (type(limit) is not int or not 1 <= limit <= config.max_new_tokens):
                raise UserError(
                    f"{at}: max_new_tokens must be a whole number from 1 to config.max_new_tokens="
                    f"{config.max_new_tokens}, got {limit!r}; mend it, or raise config.max_new_tokens"
                )
    faults.check(len(rows))
    faults.say()
    return rows, prompts, faults


def _open_journal(config: GenerateConfig, rows: list[dict[str, Any]], local: Local | None) -> Journal | None:
    """Of process 0; the others write nothing."""
    if jax.process_index():
        return None
    journal = Journal(config.output, _identity(config, rows, local), len(rows), lambda value: "error" in value)
    if journal.damaged:
        print(f"{config.output}.partial: {journal.damaged} damaged lines; their rows are done anew", file=sys.stderr)
    return journal


def _identity(config: GenerateConfig, rows: list[dict[str, Any]], local: Local | None) -> dict[str, Any]:
    """What the output depends on. Where it is computed, in which batches and on what devices may change."""
    where = os.path.basename(config.input.rstrip("/"))
    return {
        "command": "generate",
        **{f"config.{name}": getattr(config, name) for name in _SAMPLING},
        **model_identity(config, local),
        "number of rows": len(rows),
        "fingerprint of config.input": rows_fingerprint(rows, where),
    }
