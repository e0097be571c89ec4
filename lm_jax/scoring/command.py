"""`launch.score`: rows with a prompt and a response -> the same rows with per-token log-probs and entropies."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from lm_jax.checkpoints.runs import open_model
from lm_jax.config import BatchConfig, ComputeConfig, MeshConfig, ModelConfig
from lm_jax.console import Progress
from lm_jax.data.columns import Renamed, RowKeys
from lm_jax.data.faults import Faults
from lm_jax.data.journal import rows_fingerprint
from lm_jax.data.layouts import columns_of, read_prompts
from lm_jax.data.packing import Segment
from lm_jax.data.rows import check_file_output, read_rows, write_jsonl
from lm_jax.data.shares import encode_rows
from lm_jax.data.text import TextEncoder
from lm_jax.data.tokenizers import end_token_ids, load_tokenizer
from lm_jax.errors import UserError
from lm_jax.models.decoder import check_compute
from lm_jax.scoring.scoring import TokenScores, score
from lm_jax.sharding import make_mesh
from lm_jax.strict_json import dumps, finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig(RowKeys):
    """`configs/score.py` says what each key is for."""

    addresses: ClassVar = ("output",)

    model: str
    input: str
    output: str
    chat_template_kwargs: str = ""
    dtype: str = "float32"
    max_length: int = 2048
    batch: BatchConfig = BatchConfig()
    mesh: MeshConfig = MeshConfig()
    compute: ComputeConfig = ComputeConfig()

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.max_length <= self.batch.row_length:
            raise UserError(
                f"config.max_length={self.max_length} must lie between 1 and config.batch.row_length="
                f"{self.batch.row_length}, which holds a prompt and its response; raise the one or lower the other"
            )


_NOTHING = dict.fromkeys(
    ("prompt_token_ids", "token_ids", "logprob", "num_tokens", "token_logprobs", "token_entropies")
)


def score_rows(config: ScoreConfig) -> None:
    """Scores every row's response under its prompt and writes `config.output` (JSONL), whole or not at all.

    Adds `prompt_token_ids`, `token_ids` (the response, its end token included), `logprob` (their sum, nats),
    `num_tokens`, `token_logprobs`, `token_entropies`; other columns stay. Where `response` is a list of texts, as
    `launch.generate` writes several samples, each is a response of its own and what is added are lists.
    A row of that command without an answer, or with an empty one, gets nulls and is counted; so does a faulty row, of
    which there may be few, with its `error`, and a number that is not finite: of a token that the model rules out, or
    one that overflowed.

    Raises:
      UserError: anything the user can mend, naming file or row.
    """
    mesh = make_mesh(config.mesh)
    check_compute(config.compute)
    check_file_output(config.output)
    source = open_model(config.model)
    tokenizer = load_tokenizer(source.directory, source.config.vocab_size, config.chat_template_kwargs)
    encoder = TextEncoder(tokenizer, config.max_length, end_token_ids(source.directory, tokenizer))
    rows = read_rows(config.input, renamed=config.columns)
    where = os.path.basename(config.input.rstrip("/"))
    rows_fingerprint(rows, where)  # finds what JSON cannot hold before the scoring, not after it
    faults = Faults(where, config.max_dropped_share)
    load = lambda: source.load_params(mesh, "float32")  # noqa: E731
    options = encoder, load, source.config, config.compute, config.batch, mesh, tuple(Renamed(config.columns).names)
    rows, counts = scored_rows(rows, faults, *options)
    if jax.process_index() == 0:
        write_jsonl(config.output, rows)
        print(dumps({"rows": len(rows), "faulty": len(faults.rows), **counts, "output": config.output}))


def scored_rows(
    rows: list[dict[str, Any]],
    faults: Faults,
    encoder: TextEncoder,
    load: Callable[[], dict],
    model: ModelConfig,
    compute: ComputeConfig,
    batch: BatchConfig,
    mesh: jax.sharding.Mesh,
    named: tuple[str, ...] = (),
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows with what `score_rows` adds to them, and counts of what stands out.

    Args:
      rows: what is added goes into them.
      faults: those of the input; the rows' own are noted there.
      load: gives the parameters, once the rows are known to be sound.
      named: columns that the user named.

    Raises:
      UserError: rows that cannot be scored, all of them named.
    """
    where = faults.where
    prompts = read_prompts(rows, faults, named)
    several = [_is_several(row, i, faults) for i, row in enumerate(rows)]
    responses: list[tuple[int, Any]] = [
        (i, r) for i, row in enumerate(rows) for r in (row["response"] if several[i] else [row.get("response")])
    ]
    # launch.generate records rows without an answer, and a model may end at once; elsewhere that is a fault of the data
    wanted = [
        j
        for j, (i, r) in enumerate(responses)
        if i not in faults.rows and not (r in (None, "") and "finish_reason" in rows[i])
    ]
    items = [responses[j] for j in wanted]
    encoded = encode_rows(
        encoder,
        [prompts[i] for i, _ in items],
        [response for _, response in items],
        [f"{where} row {i}" for i, _ in items],
    )
    texts = faults.sound([i for i, _ in items], encoded)
    faults.check(len(rows))
    faults.say()
    found = [(j, i, text) for j, (i, _), text in zip(wanted, items, texts, strict=True) if i not in faults.rows]
    whole = [text for *_, text in found if text is not None]
    segments = [Segment(text.prompt_ids, text.response_ids) for text in whole]
    params = load()
    progress = Progress(len(segments), 0, "response")
    done = nonfinite = 0
    columns: list[dict[str, Any]] = [_NOTHING] * len(responses)
    for done_together in score(params, segments, model, compute, batch, mesh):
        for scores in done_together:
            columns[found[scores.row][0]] = _columns(segments[scores.row], scores)
            nonfinite += sum(int((~np.isfinite(x)).sum()) for x in (scores.logprobs, scores.entropies) if x is not None)
        done += len(done_together)
        progress.update(done, {})
    progress.close()
    each = iter(columns)
    for number, (row, is_list) in enumerate(zip(rows, several, strict=True)):
        if is_list:
            own = [next(each) for _ in row["response"]]
            row |= {name: [c[name] for c in own] for name in _NOTHING}
            row["prompt_token_ids"] = next((ids for ids in row["prompt_token_ids"] if ids is not None), None)
        else:
            row |= next(each)
        if number in faults.rows:
            row["error"] = faults.rows[number]
    counts = {"truncated": sum(text.truncated for text in whole)} | ({"num_nonfinite": nonfinite} if nonfinite else {})
    return rows, counts | {"without_response": len(responses) - len(found)}


def _is_several(row: Mapping[str, Any], number: int, faults: Faults) -> bool:
    response, at = row.get("response"), f"{faults.where} row {number}"
    with faults.of(number):
        if response == []:
            raise UserError(f"{at}: response is an empty list; drop the row")
        if response is None and "finish_reason" not in row:
            raise UserError(
                f"{at}: column 'response' is missing ({columns_of(row)}); add it, or name yours: "
                '--config.columns="response=..."'
            )
    return isinstance(response, list) and all(isinstance(item, str) for item in response)


def _columns(segment: Segment, scores: TokenScores) -> dict[str, Any]:
    return {
        "prompt_token_ids": segment.prompt.tolist(),
        "token_ids": segment.response.tolist(),
        "logprob": finite(scores.logprobs.sum(dtype="float64")),
        "num_tokens": len(segment.response),
        "token_logprobs": finite(scores.logprobs.astype("float64").round(6)),
        "token_entropies": [] if scores.entropies is None else finite(scores.entropies.astype("float64").round(6)),
    }
