"""`launch.evaluate`: models on lm-eval's tasks, responses in a file on IFEval, or judged by a model."""

import dataclasses
import functools
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from lm_jax.checkpoints.runs import ModelSource, open_model
from lm_jax.config import BatchConfig, ComputeConfig, DecodeConfig, MeshConfig, split_names
from lm_jax.console import say
from lm_jax.data.rows import check_not_input, write_jsonl, write_text
from lm_jax.data.tokenizers import load_tokenizer, tokenizer_fingerprint
from lm_jax.distributed.processes import everywhere
from lm_jax.errors import UserError
from lm_jax.evaluation.ifeval import read_prompts, score_responses
from lm_jax.evaluation.judged_command import JudgedConfig, evaluate_judged
from lm_jax.evaluation.lm_eval_setup import require_lm_eval
from lm_jax.evaluation.responses import answers_of, read_responses
from lm_jax.evaluation.tasks import Tasks, markdown, table, task_fingerprint
from lm_jax.models.decoder import check_compute
from lm_jax.sharding import make_mesh
from lm_jax.strict_json import dumps


@dataclasses.dataclass(frozen=True)
class HarnessConfig:
    """`configs/evaluate.py` says what each key is for."""

    models: str
    tasks: str
    include_path: str | None
    output: str
    limit: int | None
    num_fewshot: int | None
    apply_chat_template: bool
    chat_template_kwargs: str
    think_end_token: str
    seed: int
    dtype: str
    max_length: int
    batch: BatchConfig
    decode: DecodeConfig
    mesh: MeshConfig
    compute: ComputeConfig

    def __post_init__(self):
        for name in ("models", "tasks"):
            given = split_names(getattr(self, name))
            if not given:
                raise UserError(f"config.{name}: empty; give one, or several with commas between")
            if twice := [n for n in given if given.count(n) > 1]:
                raise UserError(f"config.{name}: {twice[0]} is given twice; leave one out")
        for name in ("limit", "max_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"config.{name}={getattr(self, name)}: must be at least 1")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UserError(f"config.num_fewshot={self.num_fewshot}: must be 0 or more")
        if self.batch.row_length <= self.max_length:
            raise UserError(
                f"config.batch.row_length={self.batch.row_length} must be more than config.max_length="
                f"{self.max_length}: it also holds the token that they predict; raise the one or lower the other"
            )
        if self.decode.max_length < self.max_length:
            raise UserError(
                f"config.decode.max_length={self.decode.max_length} must be at least config.max_length="
                f"{self.max_length}; raise it"
            )


@dataclasses.dataclass(frozen=True)
class IfevalConfig:
    """The preset `ifeval_files` of `configs/evaluate.py`, which says what each key is for."""

    prompts: str
    responses: str
    output: str
    allow_missing: bool
    think_end_token: str


def evaluate(config: HarnessConfig | IfevalConfig | JudgedConfig) -> None:
    """Runs what the preset names.

    Raises:
      UserError: anything the user can mend, naming file, row, task or key.
    """
    if isinstance(config, IfevalConfig):
        evaluate_ifeval(config)
    elif isinstance(config, JudgedConfig):
        evaluate_judged(config)
    else:
        evaluate_tasks(config)


def evaluate_ifeval(config: IfevalConfig) -> None:
    """Scores the responses of a file and writes `config.output` (JSON), whole or not at all; see `score_responses`."""
    for key in ("prompts", "responses"):
        check_not_input(config.output, getattr(config, key), f"config.{key}")
    if Path(config.output).is_dir():
        raise UserError(f"{config.output}: is a directory; give config.output a file name")
    prompts = read_prompts(config.prompts)
    responses = read_responses(config.responses, prompts, config.allow_missing)
    answers = answers_of(responses.texts, config.think_end_token)
    scores = score_responses(prompts, answers.texts)
    if responses.edited:
        rows = ", ".join(map(str, responses.edited[:5])) + (", ..." if len(responses.edited) > 5 else "")
        say(
            f"{config.responses}: {len(responses.edited)} responses are to prompts that differ a little from those of "
            f"config.prompts (rows {rows}); scored by the instructions of config.prompts"
        )
    if scores["num_missing"]:
        say(f"{scores['num_missing']} prompts have no response and are left out")
    if scores["sentence_splitter"] != "punkt":
        say(
            "NLTK's sentence model punkt_tab is not here and could not be downloaded: sentences are counted with a "
            "short list of abbreviations instead"
        )
    scores |= {"num_edited": len(responses.edited), "num_thinking": answers.thinking, "num_unended": answers.unended}
    _write(Path(config.output), dumps(scores, indent=2) + "\n")
    if jax.process_index() == 0:
        print(dumps({k: round(v, 4) for k, v in scores.items() if k.endswith("_acc")} | {"output": config.output}))


def evaluate_tasks(config: HarnessConfig) -> None:
    """Runs every task with every model and writes tables of the results into the directory `config.output`.

    A (model, task) that is done, with these settings, is not run again.
    """
    mesh = make_mesh(config.mesh)
    check_compute(config.compute)
    models = split_names(config.models)
    sources = {name: open_model(name) for name in models}
    require_lm_eval()
    results: list[dict[str, Mapping[str, Any]]] = []
    known = everywhere(lambda: {name: _identity(source) for name, source in sources.items()})
    missing = everywhere(
        lambda: {
            name: [task for task in split_names(config.tasks) if _read(config, name, task, known[name]) is None]
            for name in sources
        }
    )
    wanted = dict.fromkeys(task for own in missing.values() for task in own)
    tasks = Tasks(list(wanted), config.include_path) if wanted else None
    for name, source in sources.items():
        if missing[name] and tasks is not None:
            _run(config, name, source, known[name], missing[name], tasks, mesh)
        results.append(everywhere(functools.partial(_results, config, name, known[name])))
    rows = table(models, results)
    text = markdown(models, rows)
    output = Path(config.output)
    _write(output / "table.json", dumps({"models": models, "rows": rows}, indent=2) + "\n")
    _write(output / "table.md", text)
    if jax.process_index() == 0:
        print(text, end="")


def _run(
    config: HarnessConfig,
    name: str,
    source: ModelSource,
    identity: Mapping[str, str],
    missing: list[str],
    tasks: Tasks,
    mesh: jax.sharding.Mesh,
) -> None:
    """Runs the tasks that are missing of one model, whose weights are in memory no longer than that."""
    from lm_jax.evaluation.harness import JaxLM

    lm = JaxLM(
        source,
        name,
        mesh,
        config.dtype,
        config.max_length,
        config.compute,
        config.batch,
        config.decode,
        config.seed,
        config.chat_template_kwargs,
        config.think_end_token,
    )
    for task in missing:
        say(f"{name}: {task}")
        before = lm.truncated
        found = tasks.run(task, lm, config.num_fewshot, config.limit, config.apply_chat_template)
        truncated = lm.truncated - before
        if truncated:
            say(f"{name}: {task}: {truncated} requests lost their beginning (config.max_length={lm.max_length})")
        path = _path(config, name, task)
        samples = found.pop("samples")
        if jax.process_index() == 0:
            rows = [{"task": key, **row} for key, own in samples.items() for row in own]
            write_jsonl(str(path.with_suffix(".samples.jsonl")), rows)
        settings = _settings(config, task, identity)
        _write(path, dumps({"settings": settings, "truncated": truncated, **found}, indent=2) + "\n")


def _results(config: HarnessConfig, name: str, identity: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """Task -> "metric,filter" -> value, of all that a model has done."""
    found = [_read(config, name, task, identity) for task in split_names(config.tasks)]
    return {task: values for one in found if one is not None for task, values in one["results"].items()}


def _identity(source: ModelSource) -> dict[str, str]:
    tokenizer = load_tokenizer(source.directory, source.config.vocab_size)
    return {
        "fingerprint of the model": source.fingerprint,
        "fingerprint of its tokenizer": tokenizer_fingerprint(tokenizer),
    }


def _settings(config: HarnessConfig, task: str, identity: Mapping[str, str]) -> dict[str, Any]:
    """What a result depends on. Devices, batches and where files lie may change."""
    names = ("limit", "num_fewshot", "apply_chat_template", "chat_template_kwargs", "think_end_token", "seed")
    return {
        **{f"config.{name}": getattr(config, name) for name in (*names, "dtype", "max_length")},
        "config.compute.dtype": config.compute.dtype,
        "version of lm-eval": importlib.metadata.version("lm_eval"),
        **identity,
        "fingerprint of the task's files": task_fingerprint(task, config.include_path),
    }


def _read(config: HarnessConfig, name: str, task: str, identity: Mapping[str, str]) -> dict[str, Any] | None:
    """The result of a task that is done, or None."""
    path = _path(config, name, task)
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        before = found["settings"]
        _ = found["results"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no result of this command; remove it or give another config.output") from error
    now = _settings(config, task, identity)
    if differing := [key for key in now if before.get(key) != now[key]]:
        key = differing[0]
        raise UserError(
            f"{path}: made with {key}={before.get(key)!r}, now {now[key]!r}; go on with the same settings, remove the "
            "file, or give another config.output"
        )
    return found


def _path(config: HarnessConfig, name: str, task: str) -> Path:
    return Path(config.output) / _file_name(name) / f"{_file_name(task)}.json"


def _file_name(given: str) -> str:
    """A model's or task's name, which may be a path, as one part of a path that leads nowhere else."""
    return (given if given.strip("./") else str(Path(given).absolute())).strip("/").replace("/", "__")


def _write(path: Path, text: str) -> None:
    if jax.process_index() == 0:
        write_text(str(path), text)
