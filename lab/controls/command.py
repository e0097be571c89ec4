"""`launch.main_controls`: MAIN's final training beside what it is compared with, each stage by the command of its own.

output/config.json          the settings
output/data/                seeds.jsonl, what may be learnt of them; held_out.jsonl, what is measured on
output/rounds/              of launch.main_rounds
output/filter_N/            of launch.main_filter, on the candidates of N rounds
output/shuffled/, judge/    what the filter says of shuffled pairs, the model of all candidates
output/arms/ARM/            rows.jsonl, run/, held_out.jsonl with the log-probs
output/stages/              a file a stage that is done, with its cost
output/controls.md, controls.json, controls.png
"""

import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lab.commands import alone_in, run_step
from lab.controls import arms as controls
from lab.controls import costs
from lab.controls.arms import JUDGED, KINDS, NO_FILTER, SEED_ONLY, SHUFFLED
from lab.controls.config import MAY_CHANGE, ControlsConfig
from lab.controls.report import Measured, markdown, report_of
from lm_jax.checkpoints.runs import open_model
from lm_jax.config import to_dict
from lm_jax.data.rows import read_rows, write_jsonl, write_text
from lm_jax.data.text import TextEncoder
from lm_jax.data.tokenizers import end_token_ids, load_tokenizer
from lm_jax.errors import UserError
from lm_jax.generation.rounds import begin_directory, made_from
from main_jax.filter.plots import plot_controls
from main_jax.filter.scores import SCORES
from main_jax.prompts import fill, open_prompts
from main_jax.rounds.config import SAMPLER
from main_jax.rounds.inputs import given_rows, read_seeds, read_unlabelled
from main_jax.rounds.report import training_summary
from main_jax.rounds.rows import (
    DIRECTIONS,
    FORWARD,
    NO_LIMIT,
    REVERSE,
    fitting,
    forward_rows,
    room_to_answer,
    seed_rows,
    supervised_row,
)

Row = dict[str, Any]
Costs = dict[str, Row]  # name -> `tokens`, `flops`, and `seconds` where a part was timed by itself
_PAIRS = ("candidates", "held_out")  # which real pairs are mixed with shuffled ones


def run_controls(config: ControlsConfig) -> None:
    """Does the stages that are missing, one process after the other, and writes the tables.

    Raises:
      UserError: anything the user can mend; what is done stays.
    """
    run = _Controls(config)
    run.begin()
    with alone_in(Path(config.output)):
        run.do()


class _Controls:
    """What is read before anything runs, and the stages."""

    def __init__(self, config: ControlsConfig):
        self._config, self._root = config, Path(config.output)
        seeds, faults = read_seeds(config.seeds, config.columns, config.max_dropped_share)
        faults.say()
        unlabelled, _ = read_unlabelled(config.unlabelled, config.unlabelled_columns, config.max_dropped_share)
        self._given = given_rows(seeds, unlabelled)
        out = controls.held_out([seed.row for seed in seeds], config.held_out, config.seed)
        source = open_model(config.model)
        reverse = open_model(config.rounds["reverse_model"] or config.model)
        self._models = {FORWARD: source.config, REVERSE: reverse.config}
        self._judge = open_model(config.judge_model or config.model).config
        self._tokenizer = load_tokenizer(source.directory, source.config.vocab_size, config.chat_template_kwargs)
        self._encoder = TextEncoder(self._tokenizer, NO_LIMIT, end_token_ids(source.directory, self._tokenizer))
        self._prompts = open_prompts(config.prompts, self._tokenizer, config.model)
        held = [seed for seed in seeds if seed.row in out]
        asked = {seed.instruction for seed in held}  # the same pair may stand there twice
        self._seeds = [seed for seed in seeds if seed.row not in out and seed.instruction not in asked]
        longest = config.train["max_length"]
        rows = {seed.row: row for seed, row in zip(seeds, seed_rows(FORWARD, seeds, self._prompts), strict=True)}
        self._learnt = fitting([rows[seed.row] for seed in self._seeds], self._encoder, longest)
        measured = fitting([rows[seed.row] for seed in held], self._encoder, longest)
        ids = {row["id"] for row in measured}
        self._held = [seed for seed in held if rows[seed.row]["id"] in ids]
        self._measured = [{name: row[name] for name in ("id", "prompt", "response")} for row in measured]
        if not self._learnt or len(measured) < 2:
            raise UserError(
                f"{config.seeds}: {len(self._learnt)} of {len(self._seeds)} pairs to learn and {len(measured)} of "
                f"{len(held)} held-out ones have at most config.train.max_length={longest} tokens; raise it"
            )
        self._costs: Costs = {}

    def begin(self) -> None:
        """Makes the directory, or finds the same controls in it to continue."""
        config = self._config
        models = {"model": config.model, "judge_model": config.judge_model}
        models["rounds.reverse_model"] = config.rounds["reverse_model"]
        contents = made_from(models, self._given)
        begin_directory(config.output, "main_controls", to_dict(config), MAY_CHANGE, made_from=contents)

    def do(self) -> None:
        """All stages, then the report."""
        config = self._config
        given = ({"prompt": s.instruction, "response": s.response, "weight": s.weight} for s in self._seeds)
        write_jsonl(self._path("data/seeds.jsonl"), given)
        write_jsonl(self._path("data/held_out.jsonl"), self._measured)
        if config.depths:
            self._stage(f"rounds_to_{config.deepest}", self._do_rounds)
        for depth in config.depths:
            self._stage(f"filter_{depth}", functools.partial(self._filter, depth))
        if SHUFFLED in config.arms:
            self._stage("shuffled_pairs", self._score_shuffled)
        if JUDGED in config.arms:
            self._stage("judge", self._ask_judge)
        pairs = {}
        for arm in config.arms:
            pairs[arm] = self._pairs(arm)
            if arm == self._trained_as(arm) or self._trained_as(arm) not in config.arms:
                self._fit(self._trained_as(arm), pairs[arm])
        self._write_report({arm: len(found) for arm, found in pairs.items()})

    def _stage(self, name: str, do: Callable[[], Costs]) -> None:
        """Calls `do` unless it was done before; notes how long it took and what it cost."""
        done, begun = (self._root / "stages" / f"{name}.{kind}" for kind in ("json", "begun"))
        if done.exists():
            print(f"{name}: done already", flush=True)
        else:
            done.parent.mkdir(exist_ok=True)
            interrupted, start = begun.exists(), time.monotonic()
            begun.touch()
            found = do()
            seconds = round(time.monotonic() - start, 1)
            found = {part: {"seconds": seconds, **cost, "interrupted": interrupted} for part, cost in found.items()}
            write_jsonl(str(done), [found])
        self._costs |= json.loads(done.read_text())

    def _step(self, section: str, **own: Any) -> None:
        run_step(*self._config.flags(section, **own))

    def _do_rounds(self) -> Costs:
        self._step("rounds", seeds=self._path("data/seeds.jsonl"), output=self._path("rounds"))
        found = {}
        for number in range(self._config.deepest + 1):
            directory = self._path(f"rounds/round_{number}")
            report = json.loads(Path(f"{directory}/round.json").read_text())
            for sampled, writer in SAMPLER.items() if number else ():
                asked, answers = (read_rows(f"{directory}/{sampled}{end}.jsonl") for end in (".prompts", ""))
                found[f"round_{number}/{sampled}"] = costs.sampling_cost(
                    self._models[writer], self._encoder, self._tokenizer, asked, answers
                )
            for direction in DIRECTIONS:
                found[f"round_{number}/{direction}"] = costs.training_cost(f"{directory}/{direction}")
            for part, seconds in report["seconds"].items():
                if part != "rows":
                    found[f"round_{number}/{part}"]["seconds"] = seconds
        return found

    def _filter(self, depth: int) -> Costs:
        models = self._path(f"rounds/round_{depth}")
        self._step(
            "filter",
            **{direction: f"{models}/{direction}" for direction in DIRECTIONS},
            input=self._path(f"rounds/round_{max(depth, 1)}/candidates.jsonl"),
            output=self._path(f"filter_{depth}/kept.jsonl"),
        )
        return {f"filter_{depth}": self._filter_cost(self._candidates(depth))}

    def _filter_cost(self, candidates: Sequence[Row]) -> Row:
        return costs.filter_cost(self._models, self._encoder, self._prompts, candidates)

    def _candidates(self, depth: int) -> list[Row]:
        return read_rows(self._path(f"filter_{depth}/kept.jsonl.candidates.jsonl"))

    def _score_shuffled(self) -> Costs:
        """Scores real pairs and the same ones shuffled: drawn candidates, and held-out seeds."""
        config, models = self._config, self._path(f"rounds/round_{self._config.depth}")
        drawn = controls.arm_pairs(NO_FILTER, self._candidates(config.depth), config.filter["score"], config.seed)
        seeds = [{"response": seed.response, "instruction": seed.instruction} for seed in self._held]
        rows = []
        for name, real in zip(_PAIRS, (drawn, seeds), strict=True):
            for kind, pairs in zip(KINDS, (real, controls.shuffled(real, config.seed)), strict=True):
                for number, pair in enumerate(pairs):
                    texts = {column: pair[column] for column in ("response", "instruction")}
                    rows.append({"id": f"{name}-{kind}-{number}", **texts, "pairs": name, "kind": kind})
        write_jsonl(self._path("shuffled/pairs.jsonl"), rows)
        self._step(
            "filter",
            **{direction: f"{models}/{direction}" for direction in DIRECTIONS},
            input=self._path("shuffled/pairs.jsonl"),
            output=self._path("shuffled/kept.jsonl"),
            fraction=1.0,
            threshold=None,
            cluster=None,
        )
        return {"shuffled_pairs": self._filter_cost(read_rows(self._path("shuffled/kept.jsonl.candidates.jsonl")))}

    def _ask_judge(self) -> Costs:
        settings, candidates = self._config.judge, self._candidates(self._config.depth)
        asked: list[Row] = []
        for number, row in enumerate(candidates):
            if row["scores"] is not None:
                texts = {name: row[name] for name in ("instruction", "response")}
                question = fill(self._config.judge_question, **texts)
                prompt = question if self._prompts.format == "text" else [{"role": "user", "content": question}]
                asked.append({"id": number, "prompt": prompt})
        room = min(settings["decode"]["max_length"], self._judge.max_position) - settings["max_new_tokens"]
        fits = room_to_answer([row["prompt"] for row in asked], self._encoder, room)
        asked = [row for row, fit in zip(asked, fits, strict=True) if fit]
        if not asked:
            raise UserError(
                f"config.judge_question: no pair leaves room for it in {room} tokens (config.judge.decode.max_length "
                "and the model's context less config.judge.max_new_tokens); raise those, or leave the arm score out"
            )
        write_jsonl(self._path("judge/prompts.jsonl"), asked)
        self._step("judge", input=self._path("judge/prompts.jsonl"), output=self._path("judge/verdicts.jsonl"))
        answers = read_rows(self._path("judge/verdicts.jsonl"))
        return {"judge": costs.sampling_cost(self._judge, self._encoder, self._tokenizer, asked, answers)}

    def _verdicts(self, number: int) -> list[int | None]:
        """Of each candidate."""
        verdicts: list[int | None] = [None] * number
        for row in read_rows(self._path("judge/verdicts.jsonl")):
            verdicts[row["id"]] = controls.read_verdict(row["response"])
        return verdicts

    def _trained_as(self, arm: str) -> str:
        config = self._config
        return controls.trained_as(arm, config.filter["score"], config.train["alpha"]["rule"], config.depth)

    def _pairs(self, arm: str) -> list[Row]:
        config = self._config
        if arm == SEED_ONLY:
            return []
        candidates = self._candidates(controls.depth_of(arm, config.depth))
        verdicts = self._verdicts(len(candidates)) if arm == JUDGED else ()
        score, cluster = config.filter["score"], config.filter["cluster"]
        return controls.arm_pairs(arm, candidates, score, config.seed, cluster, verdicts)

    def _fit(self, arm: str, pairs: Sequence[Row]) -> None:
        if not pairs and arm != SEED_ONLY:
            return
        here = self._path(f"arms/{arm}")

        def train() -> Costs:
            rows = [*self._learnt, *forward_rows(pairs, self._prompts)]
            write_jsonl(f"{here}/rows.jsonl", map(supervised_row, rows))
            settings = self._config.train
            alpha = {**settings["alpha"], "rule": controls.alpha_of(arm, settings["alpha"]["rule"])}
            self._step("train", input=f"{here}/rows.jsonl", output=f"{here}/run", alpha=alpha)
            return {f"train_{arm}": costs.training_cost(f"{here}/run")}

        def evaluate() -> Costs:
            output = f"{here}/held_out.jsonl"
            self._step("evaluation", model=f"{here}/run", input=self._path("data/held_out.jsonl"), output=output)
            lengths = (len(row["prompt_token_ids"]) + row["num_tokens"] for row in read_rows(output))
            return {f"evaluate_{arm}": costs.forward_cost(self._models[FORWARD], lengths)}

        self._stage(f"train_{arm}", train)
        self._stage(f"evaluate_{arm}", evaluate)

    def _path(self, name: str) -> str:
        return f"{self._config.output}/{name}"

    def _write_report(self, pairs: Mapping[str, int]) -> None:
        measured: dict[str, Measured] = {}
        for arm in self._config.arms:
            trained = self._trained_as(arm)
            if f"evaluate_{trained}" in self._costs and trained not in measured:
                rows = read_rows(self._path(f"arms/{trained}/held_out.jsonl"))
                steps = training_summary(self._path(f"arms/{trained}/run"), self._config.train["epochs"])["steps"]
                nll, tokens = (np.array([row[name] for row in rows], np.float64) for name in ("logprob", "num_tokens"))
                measured[trained] = Measured(-nll, tokens, steps)
        as_what = {arm: self._trained_as(arm) for arm in self._config.arms}
        report = report_of(pairs, as_what, self._config.depth, measured, self._costs)
        report |= {"judge": self._judged(), "shuffled": self._told_apart()}
        write_jsonl(self._path("controls.json"), [report])
        text = markdown(report)
        write_text(self._path("controls.md"), text)
        plot_controls(report["arms"], self._path("controls.png"))
        print(text, flush=True)

    def _judged(self) -> Row | None:
        if JUDGED not in self._config.arms:
            return None
        candidates = self._candidates(self._config.depth)
        asked = len(read_rows(self._path("judge/prompts.jsonl")))
        found = Counter(verdict for verdict in self._verdicts(len(candidates)) if verdict is not None)
        return {
            "candidates": len(candidates),
            "not_asked": len(candidates) - asked,
            "read": found.total(),
            "unreadable": asked - found.total(),
            "scores": {str(score): found[score] for score in sorted(found)},
        }

    def _told_apart(self) -> dict[str, dict[str, Row | None]]:
        """Which real pairs -> score -> how well it rejects the shuffled ones."""
        if SHUFFLED not in self._config.arms:
            return {}
        rows = read_rows(self._path("shuffled/kept.jsonl.candidates.jsonl"))

        def values(name: str, kind: str, score: str) -> np.ndarray:
            of = [row["scores"] for row in rows if (row["pairs"], row["kind"]) == (name, kind)]
            return np.array([np.nan if scores is None else scores[score] for scores in of])

        return {
            name: {score: controls.told_apart(*(values(name, kind, score) for kind in KINDS)) for score in SCORES}
            for name in _PAIRS
        }
