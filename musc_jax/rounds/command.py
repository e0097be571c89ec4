"""`launch.musc_rounds`: MuSC again and again, each round with the model that the round before trained.

A round makes pairs, weighs their tokens and trains, all three with the model that it begins with; the frozen reference
is that model too, or the seed. Iterated preference training as in Self-Rewarding language models (arXiv 2401.10020,
section 2.4), which takes new instructions for every round.

    output/config.json              the settings
    output/rounds.jsonl             a row for every round that is done, see `summary`
    output/round_1/
      instructions.jsonl            the round's share of the input
      pairs.jsonl ...               what launch.musc_pairs writes
      weighed.jsonl, weighed.weights/   launch.musc_token_weights
      train/                        launch.musc_train: the run directory that the next round begins with
      round.json                    appears last
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lm_jax.config import from_config_dict, to_dict
from lm_jax.console import say
from lm_jax.data.columns import RowKeys
from lm_jax.data.rows import write_jsonl
from lm_jax.distributed.processes import everywhere
from lm_jax.errors import UserError
from lm_jax.generation.requests import Generator
from lm_jax.generation.rounds import (
    NO_ENDPOINT,
    begin_directory,
    do_parts,
    do_rounds,
    made_from,
    naming,
    round_directory,
)
from musc_jax.draws import shuffled
from musc_jax.pairs.command import make_pairs
from musc_jax.pairs.config import PairsConfig
from musc_jax.pairs.methods import MUSC
from musc_jax.pairs.tasks import Task, read_tasks
from musc_jax.rounds.report import rounds_table, summary
from musc_jax.training.command import MuscTrainConfig, train
from musc_jax.weights.command import WeighConfig, weigh_rows
from musc_jax.weights.rules import AUTO, FROM_COLUMNS, FROM_STORE, ONLINE, parse_rules

PREVIOUS, SEED = REFERENCES = ("previous", "seed")
_SECTIONS = ("pairs", "weights", "train")
# How a round is computed, not what comes out; more rounds can follow
_MAY_CHANGE = (
    "rounds",
    "output",
    "max_dropped_share",
    *("pairs.mesh", "pairs.compute", "pairs.decode", "pairs.max_failed_share"),
    *("weights.mesh", "weights.compute", "weights.batch"),
    *("train.mesh", "train.compute", "train.checkpoints", "train.loggers", "train.profile"),
    "train.optim.skip_limit",
)


@dataclasses.dataclass(frozen=True)
class RoundsConfig(RowKeys):
    """`configs/musc_rounds.py` says what each key is for.

    `pairs`, `weights` and `train` have the keys of PairsConfig, WeighConfig and MuscTrainConfig, but for those that a
    round sets itself: where it reads and writes, which model it takes, the seed.
    """

    model: str
    input: str | None
    num_instructions: int | None
    output: str
    chat_template_kwargs: str
    seed: int
    rounds: int
    instructions_per_round: int | None
    reference: str
    pairs: dict
    weights: dict
    train: dict

    def __post_init__(self):
        super().__post_init__()
        for name, fits, must in (
            ("rounds", self.rounds >= 1, "at least 1"),
            ("seed", 0 <= self.seed < 2**32 - self.rounds, "between 0 and 2**32 - 1, also in the last round"),
            ("reference", self.reference in REFERENCES, " or ".join(REFERENCES)),
            ("instructions_per_round", (self.instructions_per_round or 0) >= 0, "at least 1, or 0 for all"),
        ):
            if not fits:
                raise UserError(f"config.{name}={getattr(self, name)!r}: must be {must}")
        if self.input is None and self.instructions_per_round is not None:
            raise UserError(
                "config.instructions_per_round: divides config.input; as many as config.num_instructions says are "
                "invented in every round"
            )
        for section in _SECTIONS:
            with self.naming(section):
                getattr(Round(self, 1), section)()
        self._check_weights()

    def _check_weights(self) -> None:
        """Raises UserError for weights that training would miss only after the first round's pairs."""
        method, source, (where, _, rule) = (
            self.pairs["method"],
            self.train["weights"],
            self.train["weights"].partition(":"),
        )
        if source == FROM_COLUMNS:
            fault = "the rounds' pairs bring no token scores; choose auto, store, online or a rule"
        elif method != MUSC and where in (FROM_STORE, ONLINE):
            fault = f"the pairs of config.pairs.method={method} have no perturbed_prompt; choose auto or uniform"
        elif where == FROM_STORE and rule and rule not in parse_rules(self.weights["rules"]):
            fault = f"config.weights.rules={self.weights['rules']} does not weigh by it; add it there"
        elif (
            Round(self, 1).weighs
            and (lengths := (self.weights["max_length"], self.train["max_length"])) != lengths[::-1]
        ):
            raise UserError(
                f"config.weights.max_length={lengths[0]} and config.train.max_length={lengths[1]}: weights fit only "
                "the tokens that they were made for; make the two alike"
            )
        else:
            return
        raise UserError(f"config.train.weights={source}: {fault}")

    def naming(self, section: str) -> contextlib.AbstractContextManager:
        """Errors of a part name its settings as they are called here."""
        return naming(section, getattr(self, section))


@dataclasses.dataclass(frozen=True)
class Round:
    """One round, from 1: where it lies and the settings of its parts."""

    config: RoundsConfig
    number: int

    @property
    def directory(self) -> str:
        return round_directory(self.config.output, self.number)

    @property
    def model(self) -> str:
        """What it begins with."""
        config = self.config
        return f"{round_directory(config.output, self.number - 1)}/train" if self.number > 1 else config.model

    @property
    def weighs(self) -> bool:
        """Whether training takes its weights from a store; only MuSC's rows have what a store is made of."""
        weights = self.config.train.get("weights", "")
        return self.config.pairs.get("method") == MUSC and (weights == AUTO or weights.startswith(FROM_STORE))

    def pairs(self) -> PairsConfig:
        config = self.config
        return self._settings(
            PairsConfig,
            config.pairs,
            input=None if config.input is None else f"{self.directory}/instructions.jsonl",
            num_instructions=config.num_instructions,
            output=f"{self.directory}/pairs.jsonl",
            endpoint=NO_ENDPOINT,
            columns="",  # of the round's own file
        )

    def weights(self) -> WeighConfig:
        files = {"input": f"{self.directory}/pairs.jsonl", "output": f"{self.directory}/weighed.jsonl", "store": None}
        return self._settings(WeighConfig, self.config.weights, **files)

    def train(self) -> MuscTrainConfig:
        return self._settings(
            MuscTrainConfig,
            self.config.train,
            reference=self.config.model if self.config.reference == SEED and self.number > 1 else None,
            input=f"{self.directory}/{'weighed' if self.weighs else 'pairs'}.jsonl",
            output=f"{self.directory}/train",
            reference_cache=None,
        )

    def _settings(self, cls, section: Mapping[str, Any], **own: Any):
        seed = self.config.seed + self.number - 1  # other draws in every round
        kwargs = self.config.chat_template_kwargs
        return from_config_dict(
            cls, {**section, "model": self.model, "chat_template_kwargs": kwargs, "seed": seed, **own}
        )


def run_rounds(config: RoundsConfig, generator: Generator | None = None) -> None:
    """Does the rounds that are missing, one after the other; called again after an interruption it goes on in the
    part where it was, and a round that is done is not looked at again.

    Args:
      generator: makes the pairs in every round instead of the model.

    Raises:
      UserError: anything the user can mend; the rounds before it stay.
    """
    shares = _shares(config)
    everywhere(lambda: _begin(config, shares))
    numbers = range(1, config.rounds + 1)
    do_rounds(config.output, numbers, lambda number: _do(Round(config, number), shares, generator), rounds_table)


def _do(this: Round, shares: Sequence[Sequence[Task]] | None, generator: Generator | None) -> dict[str, Any]:
    """One round, or what of it is missing; its row in the report."""
    say(f"round {this.number} of {this.config.rounds}: from {this.model}")
    if shares is not None and jax.process_index() == 0:
        write_jsonl(f"{this.directory}/instructions.jsonl", map(dataclasses.asdict, shares[this.number - 1]))
    everywhere(lambda: None)  # all processes wait for the file
    parts = {
        "pairs": lambda: make_pairs(this.pairs(), generator),
        "weights": lambda: weigh_rows(this.weights()) if this.weighs else None,
        "train": lambda: train(this.train()),
    }
    seconds = do_parts(this.number, parts, this.config.naming)
    found = everywhere(lambda: summary(this.directory))
    return {"round": this.number, "model": this.model, **found, "seconds": seconds}


def _shares(config: RoundsConfig) -> list[list[Task]] | None:
    """Each round's instructions, in the order of the input; None where the model invents them.

    The rounds take one block after the other of one random order, which `rounds` does not change: more can follow.
    """
    if config.input is None:
        return None
    tasks, faults = read_tasks(config.input, config.columns, config.max_dropped_share)
    faults.say()
    size = len(tasks) // config.rounds if config.instructions_per_round is None else config.instructions_per_round
    if config.instructions_per_round == 0:
        return [tasks] * config.rounds
    if size == 0 or size * config.rounds > len(tasks):
        raise UserError(
            f"{config.input}: has {len(tasks)} instructions, too few for {config.rounds} rounds of {max(size, 1)}; give"
            " more of them, or config.instructions_per_round=0 to take all of them in every round"
        )
    order = shuffled(range(len(tasks)), config.seed, "rounds")
    return [[tasks[i] for i in sorted(order[n * size : (n + 1) * size])] for n in range(config.rounds)]


def _begin(config: RoundsConfig, shares: Sequence[Sequence[Task]] | None) -> None:
    """Makes the directory, or finds the same rounds in it to continue."""
    rows, derived = {}, {}
    if shares is not None and config.input is not None:
        tasks, _ = read_tasks(config.input, config.columns, config.max_dropped_share)
        rows["input"] = [dataclasses.asdict(task) for task in tasks]
        if config.instructions_per_round is None:
            derived["instructions_per_round"] = len(shares[0])
    contents = made_from({"model": config.model}, rows)  # of other instructions the shares would overlap
    begin_directory(config.output, "musc_rounds", to_dict(config), _MAY_CHANGE, made_from=contents, derived=derived)
