"""The settings of `launch.main_rounds`, and what each part of a round makes of them."""

import contextlib
import dataclasses
from collections.abc import Mapping

from lm_jax.config import from_config_dict
from lm_jax.data.columns import Renamed, RowKeys
from lm_jax.data.supervised import ALL
from lm_jax.errors import UserError
from lm_jax.generation.command import GenerateConfig
from lm_jax.generation.rounds import NO_ENDPOINT, naming, round_directory
from main_jax.prompts import PromptConfig
from main_jax.rounds.rows import DIRECTIONS, FORWARD, REVERSE
from main_jax.training.command import MainTrainConfig

BASE, PREVIOUS = STARTS = ("base", "previous")
FULL, ADAPTERS = SHARINGS = ("full", "adapters")
INSTRUCTIONS, RESPONSES = SAMPLED = ("instructions", "responses")
SAMPLER = {INSTRUCTIONS: REVERSE, RESPONSES: FORWARD}  # what is sampled -> the model that writes it
# How a round is computed, not what comes out; more rounds can follow
MAY_CHANGE = (
    "rounds",
    "output",
    "max_dropped_share",
    *(f"{s}.{k}" for s in SAMPLED for k in ("mesh", "compute", "decode.slots", "decode.chunk", "max_failed_share")),
    *(f"{d}.{k}" for d in DIRECTIONS for k in ("mesh", "compute", "checkpoints", "loggers", "profile")),
    *(f"{d}.optim.skip_limit" for d in DIRECTIONS),
)


@dataclasses.dataclass(frozen=True)
class RoundsConfig(RowKeys):
    """`configs/main_rounds.py` says what each key is for.

    `instructions` and `responses` have the keys of GenerateConfig, `forward` and `reverse` those of MainTrainConfig,
    but for those that a round sets itself: where it reads and writes, which model it takes, the seed.
    """

    model: str
    reverse_model: str | None
    seeds: str
    unlabelled: str
    output: str
    chat_template_kwargs: str
    seed: int
    rounds: int
    candidates: int
    learnt_candidates: int | None
    start: str
    sharing: str
    prompts: PromptConfig
    instructions: dict
    responses: dict
    forward: dict
    reverse: dict
    unlabelled_columns: str = ""

    def __post_init__(self):
        super().__post_init__()
        Renamed(self.unlabelled_columns)
        for name, fits, must in (
            ("rounds", self.rounds >= 1, "at least 1"),
            ("candidates", self.candidates >= 1, "at least 1"),
            (
                "learnt_candidates",
                self.learnt_candidates is None or 1 <= self.learnt_candidates <= self.candidates,
                f"between 1 and config.candidates={self.candidates}; leave it out for all of them",
            ),
            ("start", self.start in STARTS, " or ".join(STARTS)),
            ("sharing", self.sharing in SHARINGS, " or ".join(SHARINGS)),
            ("seed", 0 <= self.seed < 2**32 - self.rounds, "between 0 and 2**32 - 1, also in the last round"),
        ):
            if not fits:
                raise UserError(f"config.{name}={getattr(self, name)!r}: must be {must}")
        this = Round(self, 1)
        ranks = {}
        for direction in DIRECTIONS:
            with self.naming(direction):
                ranks[direction] = this.training(direction).lora.rank
        for sampled in SAMPLED:
            with self.naming(sampled):
                this.sampling(sampled, ())
        if self.candidates > 1 and self.instructions.get("temperature") == 0:
            raise UserError(
                f"config.instructions.temperature=0.0: config.candidates={self.candidates} would be the same "
                f"instruction {self.candidates} times; raise the temperature"
            )
        self._check_sharing(ranks)

    def _check_sharing(self, ranks: Mapping[str, int]) -> None:
        for direction, rank in ranks.items():
            if self.sharing == ADAPTERS and not rank:
                raise UserError(
                    f"config.{direction}.lora.rank=0: config.sharing=adapters trains adapters; give a rank, as 16"
                )
            if self.sharing == FULL and rank:
                raise UserError(
                    f"config.{direction}.lora.rank={rank}: config.sharing=full trains every parameter; set "
                    "config.sharing=adapters, or the rank to 0"
                )
        if self.sharing == ADAPTERS and self.start == PREVIOUS:
            raise UserError(
                "config.start='previous': adapters belong to the one frozen base, and going on from a run of adapters "
                "would merge them into another; set config.start=base"
            )
        if self.sharing == ADAPTERS and self.reverse_model is not None:
            raise UserError(
                f"config.reverse_model={self.reverse_model!r}: with config.sharing=adapters both models are adapters "
                "on config.model; leave it out"
            )

    def naming(self, part: str) -> contextlib.AbstractContextManager:
        """Errors of a part name its settings as they are called here."""
        section = getattr(self, part, None)
        return naming(part, section) if isinstance(section, dict) else contextlib.nullcontext()

    def base(self, direction: str) -> str:
        """The model that one of DIRECTIONS goes back to."""
        return self.model if direction == FORWARD or self.reverse_model is None else self.reverse_model


@dataclasses.dataclass(frozen=True)
class Round:
    """One round, from 0: where it lies and the settings of its parts."""

    config: RoundsConfig
    number: int

    @property
    def directory(self) -> str:
        return round_directory(self.config.output, self.number)

    def begins_with(self, direction: str) -> str:
        """Where the training of a model starts."""
        if self.config.start == PREVIOUS and self.number:
            return self._previous(direction)
        return self.config.base(direction)

    def _previous(self, direction: str) -> str:
        return f"{round_directory(self.config.output, self.number - 1)}/{direction}"

    def training(self, direction: str) -> MainTrainConfig:
        return from_config_dict(
            MainTrainConfig,
            {
                **getattr(self.config, direction),
                "model": self.begins_with(direction),
                "input": f"{self.directory}/{direction}.jsonl",
                "eval_input": None,
                "output": f"{self.directory}/{direction}",
                "chat_template_kwargs": self.config.chat_template_kwargs,
                "seed": self._seed,
                "train_on": ALL,
                "response_column": None,
            },
        )

    def sampling(self, sampled: str, stop: tuple[str, ...]) -> GenerateConfig:
        """Of a round from 1: sampling what SAMPLED names, by the models of the round before."""
        return from_config_dict(
            GenerateConfig,
            {
                **getattr(self.config, sampled),
                "model": self._previous(SAMPLER[sampled]),
                "input": f"{self.directory}/{sampled}.prompts.jsonl",
                "output": f"{self.directory}/{sampled}.jsonl",
                "chat_template_kwargs": self.config.chat_template_kwargs,
                "seed": self._seed,
                "num_samples": self.config.candidates if sampled == INSTRUCTIONS else 1,
                "stop": stop,
                "endpoint": NO_ENDPOINT,
            },
        )

    @property
    def _seed(self) -> int:
        return self.config.seed + self.number  # other draws in every round
