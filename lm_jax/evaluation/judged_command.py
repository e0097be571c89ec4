"""`launch.evaluate` with a judge: responses from a file or a model, questions to the judge, scores and tables.

The directory `config.output` gets

    prompts.jsonl, responses.jsonl    where a model here or behind an endpoint writes the responses
    judge_prompts.jsonl               what the judge is asked
    judge_answers.jsonl               what it said, kept as it comes; killed and started again, the rest is asked
    verdicts.jsonl                    what was read from that, or decided by a rule
    scores.json, scores.md            the scores
    outputs.json                      with the preset pairwise: the responses as AlpacaEval reads them
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lm_jax.config import ComputeConfig, DecodeConfig, MeshConfig
from lm_jax.console import say
from lm_jax.data.rows import read_rows, write_jsonl, write_text
from lm_jax.distributed.processes import everywhere
from lm_jax.errors import UserError
from lm_jax.evaluation.cfbench import CFBench
from lm_jax.evaluation.complexbench import ComplexBench
from lm_jax.evaluation.followbench import FollowBench
from lm_jax.evaluation.judged import Benchmark, Question, Verdict, markdown, read_verdict
from lm_jax.evaluation.pairwise import Pairwise
from lm_jax.evaluation.responses import answers_of, read_responses
from lm_jax.generation.command import GenerateConfig, generate_rows
from lm_jax.generation.generator import EndpointConfig, check_one_model, local_mesh, open_endpoint, open_local
from lm_jax.strict_json import dumps

BENCHMARKS: dict[str, Callable[["JudgedConfig"], Benchmark]] = {
    "cfbench": lambda config: CFBench(config.input, config.limit),
    "followbench": lambda config: FollowBench(config.input, config.limit),
    "complexbench": lambda config: ComplexBench(config.input, config.limit),
    "pairwise": lambda config: Pairwise(config.input, config.limit, config.think_end_token),
}
_SHOWN = 5  # rows named in a line
# Keys of the judge, as commands name them that know but one model
_JUDGE_KEY = re.compile(
    r"\bconfig\.(?=(?:model|endpoint|chat_template_kwargs|dtype|max_new_tokens|temperature|decode|mesh|compute)\b)"
)


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Who judges, and what it costs; `configs/evaluate.py` says what each key is for."""

    model: str | None
    endpoint: EndpointConfig
    max_new_tokens: int
    temperature: float
    chat_template_kwargs: str
    prompt_price: float
    answer_price: float
    dtype: str
    decode: DecodeConfig
    mesh: MeshConfig
    compute: ComputeConfig

    def __post_init__(self):
        for name in ("prompt_price", "answer_price"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"config.judge.{name}={getattr(self, name)}: must be 0 (unknown) or more")


@dataclasses.dataclass(frozen=True)
class JudgedConfig:
    """The presets of `configs/evaluate.py` that need a judge; it says what each key is for."""

    benchmark: str
    input: str
    responses: str | None
    output: str
    name: str
    limit: int | None
    allow_missing: bool
    cost_only: bool
    seed: int
    max_failed_share: float
    model: str | None
    endpoint: EndpointConfig
    apply_chat_template: bool
    chat_template_kwargs: str
    think_end_token: str
    max_new_tokens: int
    temperature: float
    judge: JudgeConfig
    dtype: str
    decode: DecodeConfig
    mesh: MeshConfig
    compute: ComputeConfig

    def __post_init__(self):
        if self.benchmark not in BENCHMARKS:
            raise UserError(f"config.benchmark={self.benchmark!r}: unknown; choose from {', '.join(BENCHMARKS)}")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"config.limit={self.limit}: must be at least 1")
        writer = self.model or self.endpoint.url
        if not self.responses and not writer:
            raise UserError(
                "config.responses: not set; give a file with responses, or who writes them: config.model or "
                "config.endpoint.url"
            )
        if self.responses and writer:
            raise UserError(
                f"config.responses={self.responses!r} and {writer!r}: responses come from a file or from a model; "
                "leave one of the two out"
            )
        check_one_model(self)
        _generation(self, self, "prompts.jsonl", "responses.jsonl")  # raises what is wrong with its keys
        _with_judge_keys(lambda: _generation(self, self.judge, "judge_prompts.jsonl", "judge_answers.jsonl"))


def evaluate_judged(config: JudgedConfig) -> None:
    """Has responses to a benchmark judged and writes the scores; see above for the files.

    Raises:
      UserError: anything the user can mend, naming file, row or key.
    """
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise UserError(f"{config.output}: is a file; give config.output a directory")
    benchmark = BENCHMARKS[config.benchmark](config)
    if not config.cost_only and benchmark.questions([""] * len(benchmark.items)):
        _with_judge_keys(lambda: _check_judge(config.judge))  # before responses are written for it
    answers = answers_of(_responses(config, benchmark), config.think_end_token)
    responses = answers.texts
    questions = benchmark.questions(responses)
    cost = _cost(config.judge, questions)
    say(_told(cost, len(benchmark.items)))
    if config.cost_only:
        return
    said = _ask(config, questions) if questions else {}
    verdicts = {q.id: read_verdict(q, *said[q.id]) for q in questions}
    scores, counts = benchmark.score(responses, verdicts)
    unreadable = {q.id: verdicts[q.id].fault for q in questions if verdicts[q.id].fault}
    rows = sorted({q.item for q in questions if q.id in unreadable})
    if rows:
        say(
            f"{len(unreadable)} of {len(questions)} verdicts could not be read and are left out of the scores: "
            f"{_listed([benchmark.items[row].where for row in rows])}; see {output / 'verdicts.jsonl'}"
        )
    report = {
        "benchmark": config.benchmark,
        "name": config.name,
        "judge": config.judge.endpoint.model if config.judge.endpoint.url else config.judge.model,
        "num_instructions": len(benchmark.items),
        "num_missing": sum(response is None for response in responses),
        "num_thinking": answers.thinking,
        "num_unended": answers.unended,
        "num_judge_calls": len(questions),
        "num_unreadable_verdicts": len(unreadable),
        "unreadable_by_fault": dict(collections.Counter(unreadable.values())),
        "unreadable_instructions": [{"number": row, "where": benchmark.items[row].where} for row in rows],
        **counts,
        "cost": cost,
        "scores": {g: {m: dataclasses.asdict(e) for m, e in metrics.items()} for g, metrics in scores.items()},
    }
    counted = [f"{name}: {value:g}\n" for name, value in report.items() if isinstance(value, int | float)]
    table = f"{markdown(config.name, scores)}\n{''.join(counted)}"
    if jax.process_index() == 0:
        write_jsonl(str(output / "verdicts.jsonl"), _verdict_rows(benchmark, responses, questions, verdicts, said))
        if isinstance(benchmark, Pairwise):
            write_text(f"{output}/outputs.json", dumps(benchmark.outputs(responses, config.name), indent=2) + "\n")
        write_text(f"{output}/scores.json", dumps(report, indent=2, ensure_ascii=False) + "\n")
        write_text(f"{output}/scores.md", table)
        print(table, end="")


def _check_judge(judge: JudgeConfig) -> None:
    """Raises UserError for what is wrong with the judge without asking it or reading weights."""
    if judge.endpoint.url:
        open_endpoint(judge.endpoint, judge.chat_template_kwargs)
    else:
        open_local(judge, local_mesh(judge))


def _responses(config: JudgedConfig, benchmark: Benchmark) -> Sequence[str | None]:
    """To each item; written by the model first, where no file has them."""
    path = config.responses
    if not path:
        prompts = [
            {
                "id": str(number),
                "prompt": [{"role": "user", "content": item.text}] if config.apply_chat_template else item.text,
            }
            for number, item in enumerate(benchmark.items)
        ]
        settings = _generation(config, config, "prompts.jsonl", "responses.jsonl")
        rows = _generate(settings, prompts)
        lacking = [number for number, row in enumerate(rows) if row["response"] is None]
        if lacking and not config.allow_missing:
            raise UserError(
                f"{settings.output}: {len(lacking)} responses are missing, of instructions {_listed(lacking)}; "
                f"delete it and {settings.output}.run.json to try again, or leave them out of the scores with "
                "--config.allow_missing=true"
            )
        return [row["response"] for row in rows]
    found = read_responses(path, benchmark.items, config.allow_missing, allow_others=True)
    if found.others:
        say(f"{path}: {len(found.others)} rows answer other prompts than those of config.input and are not used")
    if found.edited:
        say(f"{path}: rows {_listed(found.edited)} answer prompts that differ a little from those of config.input")
    if missing := sum(text is None for text in found.texts):
        say(f"{missing} instructions have no response and are left out")
    return found.texts


def _ask(config: JudgedConfig, questions: Sequence[Question]) -> dict[str, tuple[str | None, str]]:
    """Question id -> the judge's answer, None where it gave none, and why it ended."""
    settings = _generation(config, config.judge, "judge_prompts.jsonl", "judge_answers.jsonl")
    prompts = [{"id": q.id, "prompt": [{"role": "user", "content": q.prompt}]} for q in questions]
    rows = _with_judge_keys(lambda: _generate(settings, prompts))
    return {row["id"]: (row["response"], row["finish_reason"]) for row in rows}


def _generate(settings: GenerateConfig, prompts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    everywhere(lambda: write_jsonl(settings.input, prompts))
    generate_rows(settings)
    return everywhere(lambda: read_rows(settings.output))


def _generation(
    config: JudgedConfig, asked: "JudgedConfig | JudgeConfig", prompts: str, answers: str
) -> GenerateConfig:
    output = Path(config.output)
    return GenerateConfig(
        model=asked.model,
        input=str(output / prompts),
        output=str(output / answers),
        chat_template_kwargs=asked.chat_template_kwargs,
        seed=config.seed,
        dtype=asked.dtype,
        max_new_tokens=asked.max_new_tokens,
        temperature=asked.temperature,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        num_samples=1,
        stop=(),
        max_failed_share=config.max_failed_share,
        decode=asked.decode,
        endpoint=asked.endpoint,
        mesh=asked.mesh,
        compute=asked.compute,
    )


def _with_judge_keys(call):
    """What `call` returns; in a UserError of its, the keys of the model that it knows are called the judge's."""
    try:
        return call()
    except UserError as error:
        told = _JUDGE_KEY.sub("config.judge.", str(error)).replace("fingerprint of config.input", "other questions")
        raise UserError(told) from error


def _cost(judge: JudgeConfig, questions: Sequence[Question]) -> dict[str, Any]:
    """What the judge will read and may write at most; prices are per million tokens."""
    prompt_tokens = sum(_estimated_tokens(q.prompt) for q in questions)
    answer_tokens = len(questions) * judge.max_new_tokens
    cost: dict[str, float] = {
        "num_calls": len(questions),
        "estimated_prompt_tokens": prompt_tokens,
        "most_answer_tokens": answer_tokens,
    }
    if judge.prompt_price or judge.answer_price:
        cost["most_money"] = (prompt_tokens * judge.prompt_price + answer_tokens * judge.answer_price) / 1e6
    return cost


def _estimated_tokens(text: str) -> int:
    """Without the judge's tokenizer: four ASCII characters a token, one of any other."""
    ascii_characters = sum(character.isascii() for character in text)
    return -(-ascii_characters // 4) + len(text) - ascii_characters


def _told(cost: Mapping[str, Any], instructions: int) -> str:
    money = f"; at your prices at most about {cost['most_money']:.2f}" if "most_money" in cost else ""
    return (
        f"judge: {cost['num_calls']} calls for {instructions} instructions, prompts of about "
        f"{cost['estimated_prompt_tokens']:,} tokens, answers of at most {cost['most_answer_tokens']:,}{money}"
    )


def _verdict_rows(
    benchmark: Benchmark,
    responses: Sequence[str | None],
    questions: Sequence[Question],
    verdicts: Mapping[str, Verdict],
    answers: Mapping[str, tuple[str | None, str]],
) -> list[dict[str, Any]]:
    """A row for each verdict, by item."""
    rows = [
        {"id": q.id, "number": q.item, "by": "judge", **_verdict(verdicts[q.id]), "judge_answer": answers[q.id][0]}
        for q in questions
    ]
    rows += [
        {"id": str(number), "number": number, "by": "rule", **_verdict(verdict), "judge_answer": None}
        for number, verdict in benchmark.ruled(responses).items()
    ]
    shown = [
        row | {"where": benchmark.items[row["number"]].where, "response": responses[row["number"]]} for row in rows
    ]
    return sorted(shown, key=lambda row: row["number"])


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "verdict": list(verdict.value) if isinstance(verdict.value, tuple) else verdict.value,
        "fault": verdict.fault,
    }


def _listed(places: Sequence[int | str]) -> str:
    return ", ".join(map(str, places[:_SHOWN])) + (", ..." if len(places) > _SHOWN else "")
