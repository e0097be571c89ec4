"""`launch.musc_pairs`: instructions -> preference pairs that the model makes by itself (MuSC, arXiv 2502.11541)."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lm_jax.config import to_dict
from lm_jax.console import say
from lm_jax.data.faults import Faults, fault_rows
from lm_jax.data.journal import Journal, check_output, rows_fingerprint
from lm_jax.data.messages import TEMPLATE_KWARGS, Text, with_arguments
from lm_jax.data.rows import check_not_input, write_jsonl
from lm_jax.data.tokenizers import opens_thoughts, takes_system
from lm_jax.distributed.processes import everywhere
from lm_jax.errors import UserError
from lm_jax.generation.generator import Local, load_local, local_mesh, model_identity, open_endpoint, open_local
from lm_jax.generation.requests import Generator, Request
from musc_jax.pairs.baselines.branch_solve_merge import branch_solve_merge
from musc_jax.pairs.baselines.self_correct import SelfCorrect
from musc_jax.pairs.baselines.self_reward import self_reward
from musc_jax.pairs.config import MARKER, PairsConfig
from musc_jax.pairs.construction import Construction
from musc_jax.pairs.demonstrations import Demonstration, own_demonstrations, pick, read_demonstrations
from musc_jax.pairs.methods import BEST_OF, PLANS, Method, Plan
from musc_jax.pairs.prompts import Prompt
from musc_jax.pairs.row import FULL, PERTURBED, Row, left
from musc_jax.pairs.sources import Source
from musc_jax.pairs.stages import Stages
from musc_jax.pairs.tally import summed, table, tally
from musc_jax.pairs.tasks import Task, read_tasks

_BLOCK = 1000  # rows that are kept at once at the end
# Which settings decide every stage's answers, besides how it samples and what `methods.PLANS` says
_BASE = ("method", "seed", "num_examples", "format", "system", "near_duplicate", "num_instructions")


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """All that is read before the weights. `tasks` None: the model invents them. `format` is messages or text."""

    tasks: list[Task] | None
    faults: Faults
    demonstrations: list[Demonstration]
    local: Local | None
    format: str
    system: bool

    def number(self, config: PairsConfig) -> int:
        return (config.num_instructions or 0) if self.tasks is None else len(self.tasks)


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
        check_not_input(config.output, getattr(config, name), f"config.{name}")
    if generator is None and config.endpoint.url:
        generator = open_endpoint(config.endpoint, config.chat_template_kwargs)
    mesh = local_mesh(config) if generator is None else None
    inputs = _read(config, mesh)
    identity = _identity(config, inputs)
    journal = None if jax.process_index() else Journal(config.output, identity, inputs.number(config))
    try:
        if everywhere(lambda: journal is not None and journal.finished):
            say(f"{config.output}: finished already, with these settings")
            path = Path(f"{config.output}.counts.json")
            counts = json.loads(path.read_text()) if journal is not None and path.exists() else None
        else:
            stages = Stages(
                f"{config.output}.stages",
                lambda: generator or load_local(config, inputs.local),
                config.max_failed_share,
            )
            counts = _write(config, inputs, *_rows(config, inputs, stages, identity), journal)
        if counts is not None:
            print(table(counts), flush=True)
    finally:
        if journal is not None:
            journal.close()


def _read(config: PairsConfig, mesh: jax.sharding.Mesh | None) -> _Inputs:
    tasks, faults = None, Faults("")
    if config.input is not None:
        tasks, faults = read_tasks(config.input, config.columns, config.max_dropped_share)
        faults.say(f"{config.output}.dropped.jsonl")
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
    system = config.system and (local is None or format == "text" or takes_system(local.tokenizer))
    return _Inputs(tasks, faults, demonstrations, local, format, system)


def _identity(config: PairsConfig, inputs: _Inputs) -> dict[str, Any]:
    """What the pairs depend on, by the name of the setting."""
    plan = PLANS[config.method]
    keys = (*_BASE, *plan.stages, *(key for names in plan.reads.values() for key in names))
    examples = [dataclasses.asdict(d) for d in inputs.demonstrations]
    tasks = [dataclasses.asdict(task) for task in inputs.tasks or ()]
    return {
        "command": "musc_pairs",
        **_settings(config, keys),
        **model_identity(config, inputs.local),
        "fingerprint of config.examples": rows_fingerprint(examples, "config.examples"),
        "fingerprint of config.input": rows_fingerprint(tasks, "config.input"),
    }


def _stage_identity(plan: Plan, stage: str, whole: Mapping[str, Any]) -> dict[str, Any]:
    """What of that a stage's answers depend on: not what only later stages read, so that it may still change."""
    later = plan.stages[plan.stages.index(stage) + 1 :]
    keys = {*later, *(key for name in later for key in plan.reads.get(name, ()))}
    return {name: value for name, value in whole.items() if not keys & {*name.split(".")[1:2]}}


def _settings(config: PairsConfig, keys: Sequence[str]) -> dict[str, Any]:
    """Setting -> value, of the given keys, by their dotted names."""
    values = to_dict(config)
    found: dict[str, Any] = {}
    for key in keys:
        nested = values[key] if isinstance(values[key], dict) else {"": values[key]}
        nested.pop("seed", None)  # the perturbation's, which is the run's
        found |= {f"config.{key}{name and '.'}{name}": value for name, value in nested.items()}
    return found


def _rows(
    config: PairsConfig, inputs: _Inputs, stages: Stages, identity: Mapping[str, Any]
) -> tuple[list[Row], Method]:
    """Every row, either with all of a pair or dropped, and what made them."""
    plan = PLANS[config.method]
    kwargs = {str(task.id): task.chat_template_kwargs for task in inputs.tasks or ()}

    def ask(stage: str, questions: Mapping[tuple[str, str], Prompt | str]) -> dict[tuple[str, str], Any]:
        # The part makes the random draws of a row's requests differ
        requests = [
            Request("/".join(filter(None, (row, stage, part))), _text(config, inputs, question, kwargs.get(row, {})))
            for (row, part), question in questions.items()
        ]
        sampling = config.sampling(stage, inputs.format)
        answers = stages.ask(stage, requests, sampling, _stage_identity(plan, stage, identity))
        return {
            (row, part): dataclasses.replace(answer, text=_opened(inputs, kwargs.get(row, {})) + answer.text)
            for (row, part), answer in zip(questions, answers, strict=True)
        }

    source = Source(ask, inputs.demonstrations, config.num_examples, config.seed, config.near_duplicate)
    method = _method(config, source)
    rows = source.from_nothing(inputs.number(config)) if inputs.tasks is None else source.from_tasks(inputs.tasks)
    method.pairs(rows)
    return rows, method


def _method(config: PairsConfig, source: Source) -> Method:
    if config.method == "self_correct":
        return SelfCorrect(source)
    if config.method in BEST_OF:
        make = self_reward if config.method == "self_reward" else branch_solve_merge
        return make(source, config.num_samples, config.judge_samples)
    return Construction(
        source,
        dataclasses.replace(config.perturb, seed=config.seed),
        original=config.full_instruction == "original",
        verify=config.verify,
    )


def _text(config: PairsConfig, inputs: _Inputs, question: Prompt | str, kwargs: Mapping[str, Any]) -> Text:
    """A question as the model is given it: what the stages ask, or an instruction that it shall follow."""
    if isinstance(question, str):
        text = _prompt(config, inputs.format, question)
    else:
        text = question.text() if inputs.format == "text" else question.messages(inputs.system)
    return text if isinstance(text, str) else with_arguments(text, kwargs)


def _opened(inputs: _Inputs, kwargs: Mapping[str, Any]) -> str:
    """What the prompts open and the answers go on with: thoughts that end nowhere must be known as such."""
    here = inputs.local is not None and inputs.format == "messages"
    return opens_thoughts(inputs.local.tokenizer, kwargs) if here and inputs.local else ""


def _prompt(config: PairsConfig, format: str, instruction: str) -> Text:
    if format == "text":
        return config.text_template.replace(MARKER, instruction, 1)
    return [{"role": "user", "content": instruction}]


def _write(
    config: PairsConfig, inputs: _Inputs, rows: list[Row], method: Method, journal: Journal | None
) -> dict[str, Any] | None:
    """Writes what came out; the counts, of process 0."""
    counts, kept = tally(rows), left(rows)
    if journal is not None:
        dropped = [_dropped(row, method) for row in rows if row.dropped]
        write_jsonl(f"{config.output}.dropped.jsonl", [*fault_rows([inputs.faults]), *dropped])
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
    journal.finish(_pairs(config, inputs, kept, method))
    return counts


def _pairs(config: PairsConfig, inputs: _Inputs, rows: list[Row], method: Method) -> Iterator[dict[str, Any]]:
    for row in rows:
        chosen: Text = row.chosen
        rejected: Text = row.rejected
        if inputs.format == "messages":
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
        prompts = {side: _prompt(config, inputs.format, text) for side, text in row.instructions.items()}
        yield {
            "id": row.task.id,
            "prompt": prompts[FULL],
            "chosen": chosen,
            "rejected": rejected,
            **_provenance(row, method),
            **({"perturbed_prompt": prompts[PERTURBED]} if PERTURBED in prompts else {}),
        }


def _provenance(row: Row, method: Method) -> dict[str, Any]:
    own = {TEMPLATE_KWARGS: row.task.chat_template_kwargs} if row.task.chat_template_kwargs else {}
    return {**method.provenance(row), "original_instruction": row.task.text, "input": row.input, **own}


def _dropped(row: Row, method: Method) -> dict[str, Any]:
    """A dropped row; its instructions and responses as plain texts, None where they were not reached."""
    texts = {
        "prompt": row.instructions.get(FULL),
        "chosen": row.chosen,
        "rejected": row.rejected,
        "perturbed_prompt": row.instructions.get(PERTURBED),
    }
    why = dataclasses.asdict(row.dropped) if row.dropped else {}
    return {
        "id": row.task.id,
        **why,
        **{name: text or None for name, text in texts.items()},
        **_provenance(row, method),
    }
