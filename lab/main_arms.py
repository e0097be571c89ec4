"""MAIN's arms on a world of the lab: which pairs each learns beside the seeds. All get the same seeds and texts."""

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lab import steps as lab_steps
from lab.arms import DEV, TEST, Learnt, Row, learnt_of, write_split
from lab.controls.arms import ARMS, alpha_of, arm_pairs, depth_of, shuffled, trained_as
from lab.steps import TAG, WEB_TAG, Settings
from lab.worlds.answers import truly_answers
from lab.worlds.data import clean_pairs, instructions, unlabelled_responses
from lab.worlds.seed_data import CURRICULUM, PAIRED
from lab.worlds.world import World
from lm_jax.data.rows import read_rows, write_jsonl
from lm_jax.data.supervised import SYNTHETIC
from lm_jax.errors import UserError
from main_jax.filter.auroc import auroc
from main_jax.filter.scores import DEFAULT_SCORE, SCORES
from main_jax.training.weighting import RULES

SEED_ONLY, RANDOM, JUDGED = "seed_only", "random", "score"
ADAPTERS, ORACLE = "adapters", "oracle"  # arms of the lab's own
LEFT_OUT = {JUDGED: "the seed model was never asked for a score from 1 to 5"}
_REAL, _WRONG = "real", "wrong"


@dataclasses.dataclass(frozen=True)
class MainArmsConfig:
    """`configs/lab_ablation.py` says what each key is for."""

    base: str
    pairs: int
    responses: int
    probes: int
    rounds: int
    epochs: int
    rates: tuple[float, ...]
    rounds_rate: float
    adapter_rate: float
    adapter_rank: int

    def __post_init__(self):
        stages = [stage.name for stage in CURRICULUM]
        if self.base not in stages:
            raise UserError(f"config.main.base={self.base!r}: no stage of the seed model; choose {' or '.join(stages)}")
        if not self.rates:
            raise UserError("config.main.rates: give at least one learning rate")
        if not 1 <= self.rounds <= 3:
            raise UserError(f"config.main.rounds={self.rounds}: must lie between 1 and 3")
        if self.probes < 2:
            raise UserError(f"config.main.probes={self.probes}: must be at least 2")


def main_arms(rounds: int) -> dict[str, str]:
    """All arms and what they are, in the order of the table; of those that train alike one."""
    own = {
        arm: about
        for arm, about in ARMS.items()
        if arm not in LEFT_OUT and trained_as(arm, DEFAULT_SCORE, RULES[0], rounds) == arm
    }
    return own | {
        ADAPTERS: "what the filter keeps of two adapters on one base, instead of two models",
        ORACLE: "as many that the verifiers find true: an upper bound",
    }


class MainArms:
    """The arms on one seed model; see `lab_arms.Arms`.

    Args:
      root: directory of the seed; `seed/` below it is what `launch.lab_seed` made.
      names: the arms to run.
    """

    def __init__(self, config: MainArmsConfig, world: World, seed: int, root: Path, names: Collection[str]):
        self._config, self._world, self._seed, self._root = config, world, seed, root / "main"
        self.about = {arm: what for arm, what in main_arms(config.rounds).items() if arm in names}
        self.base = f"{root}/seed/{config.base}"

    def _write_data(self, dev: int, test: int) -> None:
        """Seed pairs, responses, real and shuffled pairs to tell apart, and two held-out splits."""
        world, seed, config = self._world, self._seed, self._config
        pairs = clean_pairs(world, seed, config.pairs + config.probes)
        write_jsonl(self._data("pairs"), pairs[: config.pairs])
        write_jsonl(self._data("responses"), unlabelled_responses(world, seed, config.responses))
        real = [
            {"id": f"{_REAL}-{row['id']}", "instruction": asked["content"], "response": given["content"]}
            for row in pairs[config.pairs :]
            for asked, given in [row["messages"]]
        ]
        wrong = [{**row, "id": f"{_WRONG}-{n}"} for n, row in enumerate(shuffled(real, seed))]
        write_jsonl(self._data("probes"), [*real, *wrong])
        seen = {row["messages"][0]["content"] for row in pairs}
        seen |= {given.text for given in instructions(world, seed, "unlabelled", config.responses, PAIRED)}
        for split, count in ((DEV, dev), (TEST, test)):
            made = instructions(world, seed, f"ablation/main/{split}", count, PAIRED, held_out=True, avoid=seen)
            write_split(world, made, self.asked(split), TAG)
            seen |= {instruction.text for instruction in made}

    def prepare(self, dev: int, test: int) -> None:
        """See `lab_arms.Arms`."""
        self._write_data(dev, test)
        config = self._config
        depths = sorted({config.rounds, *(self._depth(arm) for arm in self.about)})
        common = {"seed": self._seed, **self._both("epochs", config.epochs), **self._both("checkpoints.keep", 1)}
        self._rounds("rounds", config.rounds_rate, common | {"rounds": max(depths)})
        for depth in depths:
            self._filter("rounds", depth)
        if ADAPTERS in self.about:
            adapters = common | {"rounds": config.rounds, "sharing": "adapters"}
            adapters |= self._both("lora.rank", config.adapter_rank)
            self._rounds(ADAPTERS, config.adapter_rate, adapters)
            self._filter(ADAPTERS, config.rounds)
        models = f"{self._root}/rounds/round_{config.rounds}"
        lab_steps.keep(f"{models}/forward", f"{models}/reverse", self._data("probes"), self._probed, {"fraction": 1.0})

    def rates(self, arm: str) -> Sequence[float]:
        """See `lab_arms.Arms`."""
        return self._config.rates

    def train(self, arm: str, rate: float, directory: str) -> str:
        """See `lab_arms.Arms`."""
        rows, run = f"{directory}/rows.jsonl", f"{directory}/run"
        seeds = read_rows(f"{self._root}/rounds/round_0/forward.jsonl")
        write_jsonl(rows, [*seeds, *map(supervised_row, self._pairs(arm))])
        alpha = alpha_of(arm, RULES[0])
        common = {"epochs": self._config.epochs, "seed": self._seed, "checkpoints.keep": 1}
        lab_steps.tune(self.base, rows, run, rate, common | {"alpha.rule": alpha})
        return run

    def asked(self, split: str) -> str:
        """See `lab_arms.Arms`."""
        return self._data(split)

    def learnt(self, arm: str, directory: str) -> Learnt:
        """See `lab_arms.Arms`; of the pairs beside the seeds."""
        return self._learnt(self._pairs(arm))

    def extras(self) -> Row:
        """Of each score how well it tells real pairs from shuffled ones, and the truth of what it keeps.

        `auroc`: score -> area under the ROC curve. `truth`: score, `random` or `all` -> share of candidates, as many of
        each but `all`, that their response truly answers.
        """
        candidates = self._candidates("rounds", self._config.rounds)
        scores: dict[str, list[dict[str, float]]] = {_REAL: [], _WRONG: []}
        for row in read_rows(f"{self._probed}.candidates.jsonl"):
            if row["scores"] is not None:
                scores[row["id"].split("-")[0]].append(row["scores"])
        told_apart = {
            name: auroc(*(np.array([values[name] for values in scores[kind]]) for kind in (_REAL, _WRONG))).value
            for name in SCORES
        }
        written = [row for row in candidates if row["instruction"]]
        truth = {"all": self._learnt(written).truth}
        for arm in (RANDOM, *SCORES):
            truth[arm] = self._learnt(arm_pairs(arm, candidates, DEFAULT_SCORE, self._seed)).truth
        return {"auroc": told_apart, "truth": truth}

    def _pairs(self, arm: str) -> list[Row]:
        if arm == ORACLE:
            return self._true_ones(self._candidates("rounds", self._config.rounds))
        if arm == ADAPTERS:
            return [row for row in self._candidates(ADAPTERS, self._config.rounds) if row["kept"]]
        candidates = self._candidates("rounds", self._depth(arm))
        return arm_pairs(arm, candidates, DEFAULT_SCORE, self._seed)

    def _true_ones(self, candidates: Sequence[Row]) -> list[Row]:
        """One true candidate of a response, as many as the filter keeps."""
        true: dict[Any, Row] = {}
        for row in candidates:
            if row["instruction"] and truly_answers(self._world, row["instruction"], row["response"]):
                true.setdefault(row["id"], row)
        return list(true.values())[: sum(row["kept"] for row in candidates)]

    def _learnt(self, pairs: Sequence[Row]) -> Learnt:
        return learnt_of(self._world, [(row["instruction"].strip(), row["response"]) for row in pairs])

    def _depth(self, arm: str) -> int:
        return depth_of(arm, self._config.rounds)

    def _rounds(self, name: str, rate: float, settings: Settings) -> None:
        output = f"{self._root}/{name}"
        lab_steps.teach_each_other(self.base, self._data("pairs"), self._data("responses"), output, rate, settings)

    def _filter(self, name: str, depth: int) -> None:
        """With the models of a round; those of round 0 judge what they wrote themselves, for round 1."""
        models, written = (f"{self._root}/{name}/round_{n}" for n in (depth, max(depth, 1)))
        candidates = f"{written}/candidates.jsonl"
        lab_steps.keep(f"{models}/forward", f"{models}/reverse", candidates, self._kept(name, depth))

    def _candidates(self, name: str, depth: int) -> list[Row]:
        return read_rows(f"{self._kept(name, depth)}.candidates.jsonl")

    def _kept(self, name: str, depth: int) -> str:
        return f"{self._root}/filter/{name}_{depth}.jsonl"

    @property
    def _probed(self) -> str:
        return f"{self._root}/filter/probes.jsonl"

    def _data(self, name: str) -> str:
        return f"{self._root}/data/{name}.jsonl"

    @staticmethod
    def _both(key: str, value: Any) -> Settings:
        return {f"{side}.{key}": value for side in ("forward", "reverse")}


def supervised_row(pair: Row) -> Row:
    """A candidate as `launch.main_train` reads it, under the tag of written instructions."""
    turns = (("system", WEB_TAG), ("user", pair["instruction"].strip()), ("assistant", pair["response"]))
    messages = [{"role": role, "content": text} for role, text in turns]
    return {"id": pair["id"], "messages": messages, "source": SYNTHETIC, "weight": 1.0}
