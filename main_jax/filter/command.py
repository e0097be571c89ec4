"""`launch.main_filter`: candidate instructions -> the pairs that both models find likely (MAIN, arXiv 2504.12913)."""

import dataclasses
import itertools
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from lm_jax.config import BatchConfig, ComputeConfig, MeshConfig, to_dict
from lm_jax.console import say
from lm_jax.data.columns import RowKeys
from lm_jax.data.faults import write_faults
from lm_jax.data.messages import TEMPLATE_KWARGS
from lm_jax.data.rows import write_jsonl
from lm_jax.data.supervised import SYNTHETIC
from lm_jax.errors import UserError
from lm_jax.models.decoder import check_compute
from lm_jax.sharding import make_mesh
from main_jax.filter.passes import FAULTS, NO_INSTRUCTION, CrossEntropy, FrozenModel, Item, read_pass, run_pass
from main_jax.filter.plots import plot_filter
from main_jax.filter.report import Measured, report_of, table
from main_jax.filter.scores import SCORES, CrossEntropies, best_fraction, best_of_each, check_selection
from main_jax.prompts import PromptConfig, Prompts, open_prompts, supervised_example
from main_jax.rounds.candidates import Candidates
from main_jax.rounds.instructions import copy_rate

# Name of a pass -> who reads, and what
RESPONSE, ALONE, INSTRUCTION = "response", "response_alone", "instruction"
PASSES = {
    RESPONSE: ("forward", "response"),
    ALONE: ("forward", "response alone"),
    INSTRUCTION: ("reverse", "instruction"),
}
# Why a candidate is not kept, besides `FAULTS`
WORSE, OVER_THRESHOLD, BEYOND_FRACTION = "worse_candidate", "over_threshold", "beyond_fraction"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterConfig(RowKeys):
    """`configs/main_filter.py` says what each key is for."""

    forward: str
    reverse: str
    input: str
    output: str
    chat_template_kwargs: str = ""
    scores: str | None = None
    score: str = "mutual_gain"
    fraction: float = 0.5
    threshold: float | None = None
    cluster: str | None = None
    dtype: str = "float32"
    max_length: int = 2048
    prompts: PromptConfig = PromptConfig()
    batch: BatchConfig = BatchConfig()
    mesh: MeshConfig = MeshConfig()
    compute: ComputeConfig = ComputeConfig()

    def __post_init__(self):
        super().__post_init__()
        check_selection(self.score, self.fraction)
        if not 2 <= self.max_length <= self.batch.row_length:
            raise UserError(
                f"config.max_length={self.max_length} must lie between 2 and config.batch.row_length="
                f"{self.batch.row_length}, which holds a prompt and its response; raise the one or lower the other"
            )


@dataclasses.dataclass(frozen=True)
class Selection:
    """What became of N candidates: `reason` [N] int8, -1 where kept, else a number in `REASONS`; `best` [N] bool."""

    reason: np.ndarray
    best: np.ndarray


REASONS = (*FAULTS, WORSE, OVER_THRESHOLD, BEYOND_FRACTION)


def filter_candidates(config: FilterConfig) -> None:
    """Scores every candidate and keeps the best of the best; writes supervised rows to `config.output` (JSONL).

    Beside it: `.candidates.jsonl`, every candidate with its scores and what became of it; `.report.json`, the numbers
    of the table that is printed; `.plots/`; and, unless `config.scores` says where, `.scores/`, what the models said.
    Stopped at any moment and called again, it scores what is missing; with another `score`, `fraction`, `threshold` or
    `cluster`, it scores nothing anew.

    Raises:
      UserError: anything the user can mend, naming file, row or key; nothing is left to keep.
    """
    _check_output(config)
    mesh = make_mesh(config.mesh)
    check_compute(config.compute)
    models = {
        name: FrozenModel(name, path, mesh, config.dtype, config.chat_template_kwargs)
        for name, path in (("forward", config.forward), ("reverse", config.reverse))
    }
    tokenizers = [model.read_with["fingerprint of its tokenizer"] for model in models.values()]
    if tokenizers[0] != tokenizers[1]:
        raise UserError(
            f"config.forward={config.forward} and config.reverse={config.reverse}: their tokenizers or chat templates "
            "differ, so their scores a token cannot be compared; give two models that were trained from one"
        )
    prompts = open_prompts(config.prompts, models["forward"].tokenizer, config.forward)
    candidates = Candidates(config.input, config.cluster, config.columns, config.max_dropped_share)
    dropped = f"{config.output}.dropped.jsonl"
    candidates.faults.say(dropped)
    say(f"{config.input}: {len(candidates)} candidates for {len(candidates.first)} responses")
    for name, (reader, unit) in PASSES.items():
        run_pass(
            _pass_file(config, name),
            _identity(config, prompts, candidates, name),
            models[reader],
            _items(candidates, prompts, name),
            _number(candidates, name),
            config.max_length,
            config.batch,
            config.compute,
            unit,
        )
        if name == ALONE:
            del models["forward"]  # its weights make room for the other's
    if jax.process_index() == 0:
        write_faults(dropped, [candidates.faults])
        _write(config, prompts, candidates)


def _pass_file(config: FilterConfig, name: str) -> str:
    return os.path.join(config.scores or f"{config.output}.scores", f"{name}.jsonl")


def _number(candidates: Candidates, name: str) -> int:
    return len(candidates.first) if name == ALONE else len(candidates)


def _check_output(config: FilterConfig) -> None:
    if not config.output.endswith(".jsonl") or os.path.isdir(config.output):
        raise UserError(f"{config.output}: what is written is JSON Lines; give config.output a name ending in .jsonl")
    if os.path.realpath(config.output) == os.path.realpath(config.input):
        raise UserError(f"config.output={config.output!r}: the input itself; give another file name")


def _identity(config: FilterConfig, prompts: Prompts, candidates: Candidates, name: str) -> dict[str, Any]:
    """What a pass depends on besides its model."""
    return {
        "command": "main_filter",
        "pass": name,
        "config.max_length": config.max_length,
        "config.dtype": config.compute.dtype,
        **{f"config.prompts.{key}": value for key, value in to_dict(prompts.words).items()},
        "format of the prompts": [prompts.format, prompts.system],
        "number of candidates": len(candidates),
        "fingerprint of config.input": candidates.fingerprint,
    }


def _items(candidates: Candidates, prompts: Prompts, name: str) -> Iterator[Item | str]:
    for number, row in enumerate(candidates.rows()):
        where, instruction = candidates.name(number), (row["instruction"] or "").strip()
        kwargs = row.get(TEMPLATE_KWARGS)
        if name == ALONE:
            if candidates.first[candidates.response_of[number]] == number:
                yield Item(prompts.no_instruction(SYNTHETIC, kwargs), row["response"], where)
        elif not instruction:
            yield NO_INSTRUCTION
        elif name == RESPONSE:
            yield Item(prompts.forward(instruction, SYNTHETIC, kwargs), row["response"], where)
        else:
            yield Item(prompts.reverse(row["response"], kwargs), instruction, f"{where} (instruction)")


def select(
    scores: np.ndarray,
    fault: np.ndarray,
    response_of: np.ndarray,
    clusters: np.ndarray,
    fraction: float,
    threshold: float | None,
) -> Selection:
    """Keeps the best candidate of a response where it is in the best fraction of its cluster, and under the threshold.

    Args:
      scores: [N], NaN where `fault` is not -1.
      fault: [N] int8, -1 or a number in `REASONS`.
      response_of, clusters: [N] int64.
      fraction: in (0, 1]; of the responses of a cluster that have a scored candidate.
      threshold: the highest score to keep; None: any.
    """
    best = best_of_each(scores, response_of)
    kept = best_fraction(scores[best], fraction, clusters[best])
    reason = np.where(fault < 0, REASONS.index(WORSE), fault).astype(np.int8)
    reason[best] = np.where(kept, -1, REASONS.index(BEYOND_FRACTION))
    if threshold is not None:
        reason[best[scores[best] > threshold]] = REASONS.index(OVER_THRESHOLD)
    is_best = np.zeros(len(scores), bool)
    is_best[best] = True
    return Selection(reason, is_best)


def _write(config: FilterConfig, prompts: Prompts, candidates: Candidates) -> None:
    response, instruction, alone = (
        read_pass(_pass_file(config, name), _number(candidates, name)) for name in (RESPONSE, INSTRUCTION, ALONE)
    )
    alone = CrossEntropy(*(values[candidates.response_of] for values in alone))
    parts = (response, instruction, alone)
    fault = np.max([part.fault for part in parts], axis=0)
    ce = CrossEntropies(*(np.where(fault < 0, part.values, np.nan) for part in parts))
    scores = {name: score(ce) for name, score in SCORES.items()}
    chosen = select(
        scores[config.score], fault, candidates.response_of, candidates.clusters, config.fraction, config.threshold
    )
    words, copied = np.zeros(len(candidates), np.int32), np.zeros(len(candidates), np.float32)
    rows = _candidate_rows(candidates, scores, ce, chosen, words, copied)
    write_jsonl(f"{config.output}.candidates.jsonl", rows)
    measured = Measured(scores, ce.alone, chosen.best, chosen.reason, REASONS, len(candidates.first), words, copied)
    report = report_of(measured, config.score) | {"output": config.output}
    write_jsonl(f"{config.output}.report.json", [report])
    print(table(report), flush=True)
    if not (chosen.reason < 0).any():
        lost = ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items())
        lowest = "" if fault.min() >= 0 else f" (the lowest {config.score} is {np.nanmin(scores[config.score]):.4f})"
        raise UserError(
            f"{config.input}: all candidates were filtered out: of {len(candidates)} {lost}{lowest}; "
            f"{config.output}.candidates.jsonl says which: give other candidates, or raise "
            f"{'config.threshold' if lowest else 'config.max_length'}"
        )
    write_jsonl(config.output, _kept_rows(prompts, candidates, scores, chosen))
    plot_filter(measured, f"{config.output}.plots", config.score)


def _candidate_rows(
    candidates: Candidates,
    scores: dict[str, np.ndarray],
    ce: CrossEntropies,
    chosen: Selection,
    words: np.ndarray,
    copied: np.ndarray,
) -> Iterator[dict[str, Any]]:
    """Every candidate with its scores; notes the response's words and the copy rate on the way."""
    for number, row in enumerate(candidates.rows()):
        reason = int(chosen.reason[number])
        words[number] = len(row["response"].split())
        copied[number] = copy_rate(row["instruction"] or "", row["response"])
        yield {
            **row,
            "scores": _scores_of(number, scores, ce),
            "kept": reason < 0,
            "reason": None if reason < 0 else REASONS[reason],
        }


def _scores_of(number: int, scores: dict[str, np.ndarray], ce: CrossEntropies) -> dict[str, float] | None:
    if np.isnan(ce.response[number]):
        return None
    found = {name: values[number] for name, values in scores.items()} | {ALONE: ce.alone[number]}
    return {name: round(float(value), 6) for name, value in found.items()}


def _kept_rows(
    prompts: Prompts, candidates: Candidates, scores: dict[str, np.ndarray], chosen: Selection
) -> Iterator[dict[str, Any]]:
    """Supervised rows, their prompts under the synthetic tag."""
    for number, row in itertools.compress(enumerate(candidates.rows()), chosen.reason < 0):
        instruction = row["instruction"].strip()
        prompt = prompts.forward(instruction, SYNTHETIC, row.get(TEMPLATE_KWARGS))
        yield {
            "id": row["id"],
            **supervised_example(prompt, row["response"]),
            "instruction": instruction,
            "weight": 1.0,
            "source": SYNTHETIC,
            "scores": {name: round(float(values[number]), 6) for name, values in scores.items()},
        }
