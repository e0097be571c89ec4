"""`launch.musc_pairs`: instructions -> preference pairs that the model makes by itself (MuSC, arXiv 2502.11541)."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lm_jax.commands.generator import (
    EndpointConfig,
    Local,
    check_one_model,
    load_local,
    local_mesh,
    model_identity,
    open_endpoint,
    open_local,
)
from lm_jax.config import ComputeConfig, DecodeConfig, MeshConfig, to_dict
from lm_jax.data.journal import Journal, check_output, rows_fingerprint
from lm_jax.data.rows import write_jsonl
from lm_jax.data.text import Text
from lm_jax.errors import UserError
from lm_jax.inference.requests import Generator, Request, SamplingConfig
from lm_jax.training.metrics import say
from musc_jax.construction import FULL, PERTURBED, Construction, Row, left
from musc_jax.demonstrations import Demonstration, own_demonstrations, pick, read_demonstrations
from musc_jax.perturb import PerturbConfig
from musc_jax.prompts import STOP, Prompt
from musc_jax.stages import Stages, everywhere
from musc_jax.tally import summed, table, tally
from musc_jax.tasks import Task, read_tasks

STAGES = ("self_instruct", "decompose", "negate", "recombine", "check", "respond")
_MARKER = "{instruction}"
_BLOCK = 1000  # rows that are kept at once at the end
# Which settings decide a stage's answers, besides how it samples and those of the stages before it
_BASE = ("seed", "num_examples", "format", "system", "near_duplicate", "num_instructions")
_DEPENDS = {
    "negate": ("perturb",),
    "recombine": ("full_instruction",),
    "check": ("verify",),
    "respond": ("text_template",),
}


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """How one stage samples."""

    temperature: float
    max_new_tokens: int


@dataclasses.dataclass(frozen=True)
class PairsConfig:
    """`configs/musc_pairs.py` says what each key is for and why it has its value."""

    model: str | None
    input: str | None
    num_instructions: int | None
    output: str
    seed: int
    dtype: str
    examples: str
    num_examples: int
    format: str
    system: bool
    text_template: str
    full_instruction: str
    near_duplicate: float
    verify: bool
    max_failed_share: float
    perturb: PerturbConfig
    self_instruct: StageConfig
    decompose: StageConfig
    negate: StageConfig
    recombine: StageConfig
    check: StageConfig
    respond: StageConfig
    decode: DecodeConfig
    endpoint: EndpointConfig
    mesh: MeshConfig
    compute: ComputeConfig

    def __post_init__(self):
        for name, fits, must in (
            ("seed", 0 <= self.seed < 2**32, "between 0 and 2**32 - 1"),
            ("num_examples", self.num_examples >= 1 + self.verify, "at least 1, and 2 with config.verify"),
            ("num_instructions", self.num_instructions is None or self.num_instructions >= 1, "at least 1"),
            ("format", self.format in ("auto", "messages", "text"), "auto, messages or text"),
            ("full_instruction", self.full_instruction in ("recombined", "original"), "recombined or original"),
            ("text_template", self.text_template.count(_MARKER) == 1, f"a text with {_MARKER} in it, once"),
            ("near_duplicate", 0 <= self.near_duplicate <= 1, "between 0 (off) and 1"),
            ("max_failed_share", 0 <= self.max_failed_share <= 1, "between 0 and 1"),
        ):
            if not fits:
                raise UserError(f"config.{name}={getattr(self, name)!r}: must be {must}")
        for stage in STAGES:
            self.sampling(stage, "messages")
        if (self.input is None) == (self.num_instructions is None):
            raise UserError(
                f"config.input={self.input!r} and config.num_instructions={self.num_instructions!r}: instructions come "
                "from a file or are invented, as many as config.num_instructions says; give one of the two"
            )
        check_one_model(self)

    def sampling(self, stage: str, format: str) -> SamplingConfig:
        """How a stage samples. Raw text stops where the model would go on with a further example."""
        keys: StageConfig = getattr(self, stage)
        stop = ()
        if format == "text":
            labels = self.text_template.split(_MARKER)[0].split("\n")
            label = next((line for line in reversed(labels) if line.strip()), "").strip()
            stop = (*STOP, f"\n{label}") if stage == "respond" and label else STOP
        try:
            return SamplingConfig(keys.max_new_tokens, temperature=keys.temperature, stop=stop, seed=self.seed)
        except UserError as error:
            raise UserError(str(error).replace("config.", f"config.{stage}.", 1)) from error


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """All that is read before the weights. `tasks` None: the model invents them. `format` is messages or text."""

    tasks: list[Task] | None
    demonstrations: list[Demonstration]
    local: Local | None
    format: str
    system: bool

    def number(self, config: PairsConfig) -> int:
        return config.num_instructions if self.tasks is None else len(self.tasks)


def make_pairs(config: PairsConfig, generator: Generator | None = None) -> None:
    """Makes pairs; `config.output` (JSONL) appears when all are done, in the order of the input.

    Beside it: `.counts.json`, how many rows were dropped where and why; `.dropped.jsonl`, those rows; `.stages/`, the
    model's answers, kept as they come. Stopped at any moment and called again, it does what is missing.

    Args:
      generator: answers instead of config's model.

    Raises:
      UserError: anything the user can mend, naming file, row or key; no pair is left.
    """
    check_output(config.output)
    for name in ("input", "examples"):
        given = getattr(config, name)
        if given and os.path.realpath(config.output) == os.path.realpath(given):
            raise UserError(f"config.output={config.output!r}: config.{name} itself; give another file name")
    if generator is None and config.endpoint.url:
        generator = open_endpoint(config.endpoint)
    mesh = local_mesh(config) if generator is None else None
    inputs = _read(config, mesh)
    identity = _identity(config, inputs)
    journal = None if jax.process_index() else Journal(config.output, identity, inputs.number(config))
    try:
        if everywhere(lambda: journal.finished):
            say(f"{config.output}: finished already, with these settings")
            path = Path(f"{config.output}.counts.json")
            counts = json.loads(path.read_text()) if journal is not None and path.exists() else None
        else:
            stages = Stages(
                f"{config.output}.stages",
                lambda: generator or load_local(config, inputs.local),
                config.max_failed_share,
            )
            counts = _write(config, inputs, _construct(config, inputs, stages, identity), journal)
        if counts is not None:
            print(table(counts), flush=True)
    finally:
        if journal is not None:
            journal.close()


def _read(config: PairsConfig, mesh: jax.sharding.Mesh | None) -> _Inputs:
    tasks = None if config.input is None else read_tasks(config.input)
    demonstrations = read_demonstrations(config.examples) if config.examples else own_demonstrations()
    try:
        pick(demonstrations, config.num_examples, config.seed)
    except UserError as error:
        raise UserError(f"config.num_examples: {error}") from error
    local = None if mesh is None else open_local(config, mesh)
    template = local is None or bool(local.tokenizer.chat_template)
    if config.format == "messages" and not template:
        raise UserError(
            f"config.format='messages': the tokenizer of {config.model} has no chat template; set config.format=text, "
            "or chat_template in tokenizer_config.json"
        )
    format = ("messages" if template else "text") if config.format == "auto" else config.format
    system = config.system and (local is None or format == "text" or _takes_system(local.tokenizer))
    return _Inputs(tasks, demonstrations, local, format, system)


def _takes_system(tokenizer: Any) -> bool:
    """Whether the chat template shows a system message; some refuse it, some leave it out."""
    task = "The task."
    try:
        shown = tokenizer.apply_chat_template(
            [{"role": "system", "content": task}, {"role": "user", "content": "A question."}], tokenize=False
        )
    except Exception:  # a template can raise anything
        return False
    return task in shown


def _identity(config: PairsConfig, inputs: _Inputs) -> dict[str, Any]:
    """What the pairs depend on, by the name of the setting."""
    keys = (*_BASE, *STAGES, *(key for names in _DEPENDS.values() for key in names))
    examples = [dataclasses.asdict(d) for d in inputs.demonstrations]
    tasks = [dataclasses.asdict(task) for task in inputs.tasks or ()]
    return {
        "command": "musc_pairs",
        **_settings(config, keys),
        **model_identity(config, inputs.local),
        "fingerprint of config.examples": rows_fingerprint(examples, "config.examples"),
        "fingerprint of config.input": rows_fingerprint(tasks, "config.input"),
    }


def _stage_identity(stage: str, whole: Mapping[str, Any]) -> dict[str, Any]:
    """What of that a stage's answers depend on: not what only later stages read, so that it may still change."""
    later = STAGES[STAGES.index(stage) + 1 :]
    keys = {*later, *(key for name in later for key in _DEPENDS.get(name, ()))}
    return {name: value for name, value in whole.items() if not keys & {*name.split(".")[1:2]}}


def _settings(config: PairsConfig, keys: Sequence[str]) -> dict[str, Any]:
    """Setting -> value, of the given keys, by their dotted names."""
    values, found = to_dict(config), {}
    for key in keys:
        nested = values[key] if isinstance(values[key], dict) else {"": values[key]}
        nested.pop("seed", None)  # the perturbation's, which is the run's
        found |= {f"config.{key}{name and '.'}{name}": value for name, value in nested.items()}
    return found


def _construct(config: PairsConfig, inputs: _Inputs, stages: Stages, identity: Mapping[str, Any]) -> list[Row]:
    def ask(stage: str, questions: Mapping[tuple[str, str], Prompt | str]) -> dict[tuple[str, str], Any]:
        # The part makes the random draws of a row's requests differ
        requests = [
            Request("/".join(filter(None, (row, stage, part))), _text(config, inputs, question))
            for (row, part), question in questions.items()
        ]
        sampling = config.sampling(stage, inputs.format)
        return dict(
            zip(questions, stages.ask(stage, requests, sampling, _stage_identity(stage, identity)), strict=True)
        )

    construction = Construction(
        ask,
        inputs.demonstrations,
        config.num_examples,
        dataclasses.replace(config.perturb, seed=config.seed),
        original=config.full_instruction == "original",
        verify=config.verify,
        near_duplicate=config.near_duplicate,
    )
    if inputs.tasks is None:
        return construction.from_nothing(config.num_instructions)
    return construction.from_tasks(inputs.tasks)


def _text(config: PairsConfig, inputs: _Inputs, question: Prompt | str) -> Text:
    """A question as the model is given it: what the stages ask, or an instruction that it shall follow."""
    if isinstance(question, str):
        return _prompt(config, inputs.format, question)
    return question.text() if inputs.format == "text" else question.messages(inputs.system)


def _prompt(config: PairsConfig, format: str, instruction: str) -> Text:
    if format == "text":
        return config.text_template.replace(_MARKER, instruction, 1)
    return [{"role": "user", "content": instruction}]


def _write(config: PairsConfig, inputs: _Inputs, rows: list[Row], journal: Journal | None) -> dict[str, Any] | None:
    """Writes what came out; the counts, of process 0."""
    counts, kept = tally(rows), left(rows)
    if journal is not None:
        write_jsonl(f"{config.output}.dropped.jsonl", (_dropped(row) for row in rows if row.dropped))
        write_jsonl(f"{config.output}.counts.json", [counts])
    if not kept:
        if journal is not None:
            print(table(counts), flush=True)
        raise UserError(
            f"no pair left: {summed(counts)}; the rows and the model's answers are in {config.output}.dropped.jsonl"
        )
    if journal is None:
        return None
    missing = journal.missing().tolist()
    for at in range(0, len(missing), _BLOCK):
        journal.append((number, {"kept": rows[number].dropped is None}) for number in missing[at : at + _BLOCK])
    journal.finish(_pairs(config, inputs, kept))
    return counts


def _pairs(config: PairsConfig, inputs: _Inputs, rows: list[Row]) -> Iterator[dict[str, Any]]:
    for row in rows:
        chosen, rejected = row.responses[FULL], row.responses[PERTURBED]
        if inputs.format == "messages":
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
        yield {
            "id": row.task.id,
            "prompt": _prompt(config, inputs.format, row.instructions[FULL]),
            "chosen": chosen,
            "rejected": rejected,
            **_provenance(row),
            "perturbed_prompt": _prompt(config, inputs.format, row.instructions[PERTURBED]),
        }


def _provenance(row: Row) -> dict[str, Any]:
    """What the pair was made from; of a dropped row as far as it came."""
    made, perturbation = row.decomposition, row.perturbation
    return {
        "constraints": list(made.constraints) if made else None,
        "perturbed_constraints": list(perturbation.constraints) if perturbation else None,
        "perturbations": perturbation.rows() if perturbation else None,
        "original_instruction": row.task.text,
        "input": row.input,
    }


def _dropped(row: Row) -> dict[str, Any]:
    """A dropped row; its instructions and responses as plain texts, None where they were not reached."""
    texts = {
        "prompt": row.instructions.get(FULL),
        "chosen": row.responses.get(FULL),
        "rejected": row.responses.get(PERTURBED),
        "perturbed_prompt": row.instructions.get(PERTURBED),
    }
    why = dataclasses.asdict(row.dropped)
    return {"id": row.task.id, **why, **{name: text or None for name, text in texts.items()}, **_provenance(row)}
