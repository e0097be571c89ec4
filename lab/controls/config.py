"""The settings of `launch.main_controls`, and the flags of the commands that it runs with them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lab.commands import changed_flags
from lab.controls.arms import SEED_ONLY, check_arms, check_held_out, depth_of
from lm_jax.config import from_config_dict
from lm_jax.data.columns import Renamed, RowKeys
from lm_jax.data.supervised import ALL
from lm_jax.errors import UserError
from lm_jax.generation.command import GenerateConfig
from lm_jax.generation.rounds import NO_ENDPOINT, naming
from lm_jax.scoring.command import ScoreConfig
from main_jax.filter.command import FilterConfig
from main_jax.prompts import PromptConfig, check_markers
from main_jax.rounds.config import SAMPLED, RoundsConfig
from main_jax.rounds.rows import DIRECTIONS
from main_jax.training.command import MainTrainConfig

# Section -> the command whose settings it has, and their class
COMMANDS = {
    "rounds": ("main_rounds", RoundsConfig),
    "filter": ("main_filter", FilterConfig),
    "train": ("main_train", MainTrainConfig),
    "evaluation": ("score", ScoreConfig),
    "judge": ("generate", GenerateConfig),
}
# How things are computed and which are compared, not what comes out of one of them
_PLACES = (*(s for s in COMMANDS if s != "rounds"), *(f"rounds.{part}" for part in (*SAMPLED, *DIRECTIONS)))
_HOW = ("mesh", *(f"compute.{key}" for key in ("remat", "attention", "logprob_chunk", "scan_unroll")))
_TRAINED = ("train", *(f"rounds.{direction}" for direction in DIRECTIONS))
MAY_CHANGE = (
    *("output", "arms"),
    *(f"{place}.{key}" for place in _PLACES for key in _HOW),
    *(f"{place}.optim.skip_limit" for place in _TRAINED),
)


@dataclasses.dataclass(frozen=True)
class ControlsConfig(RowKeys):
    """`configs/main_controls.py` says what each key is for.

    `rounds`, `filter`, `train`, `evaluation` and `judge` have the keys of the commands in COMMANDS, but for those that
    the controls set themselves.
    """

    model: str
    seeds: str
    unlabelled: str
    output: str
    chat_template_kwargs: str
    seed: int
    held_out: float
    arms: tuple[str, ...]
    rounds: dict
    filter: dict
    train: dict
    evaluation: dict
    judge_model: str | None
    judge_question: str
    judge: dict
    unlabelled_columns: str = ""

    def __post_init__(self):
        super().__post_init__()
        Renamed(self.unlabelled_columns)
        check_arms(self.arms)
        check_held_out(self.held_out)
        if not 0 <= self.seed < 2**31:
            raise UserError(f"config.seed={self.seed}: must lie between 0 and 2**31 - 1")
        check_markers("config.judge_question", self.judge_question, ("instruction", "response"))
        for section in COMMANDS:
            self._check(section)
        if self.depth < 1:
            raise UserError(f"config.rounds.rounds={self.depth}: must be at least 1; for none name the arm rounds_0")
        longest = self.train["max_length"]
        for section in ("filter", "evaluation"):
            if getattr(self, section)["max_length"] != longest:
                raise UserError(
                    f"config.{section}.max_length={getattr(self, section)['max_length']}: must be config.train."
                    f"max_length={longest}, so that no arm learns or is measured on cut texts; set all three alike"
                )

    def _check(self, section: str) -> None:
        with naming(section, getattr(self, section)):
            from_config_dict(COMMANDS[section][1], self._settings(section, {}))

    def flags(self, section: str, **own: Any) -> list[str]:
        """Module and flags that run the section's command; `own` are the settings of this one run of it."""
        command, _ = COMMANDS[section]
        return [f"launch.{command}", *changed_flags(f"configs/{command}.py", self._settings(section, own))]

    @property
    def prompts(self) -> PromptConfig:
        return from_config_dict(PromptConfig, self.rounds["prompts"])

    @property
    def depth(self) -> int:
        """Rounds that arms come from which name none."""
        return self.rounds["rounds"]

    @property
    def depths(self) -> list[int]:
        """Rounds that some arm's pairs come from, ascending; none where no arm has pairs."""
        return sorted({depth_of(arm, self.depth) for arm in self.arms if arm != SEED_ONLY})

    @property
    def deepest(self) -> int:
        """The rounds that are run."""
        return max((self.depth, *self.depths))

    def _settings(self, section: str, own: Mapping[str, Any]) -> dict[str, Any]:
        unset = {name: "" for name in ("input", "output") if section != "rounds"}
        given = {
            "rounds": {
                **{name: getattr(self, name) for name in ("model", "unlabelled", "unlabelled_columns", "seed")},
                "max_dropped_share": self.max_dropped_share,
                "seeds": "",
                "output": "",
                "rounds": self.deepest,
            },
            "filter": {"forward": "", "reverse": "", "scores": None, "prompts": self.rounds["prompts"]},
            "train": {
                **{name: getattr(self, name) for name in ("model", "seed")},
                "eval_input": None,
                "train_on": ALL,
                "response_column": None,
            },
            "evaluation": {"model": ""},
            "judge": {
                "model": self.judge_model or self.model,
                "seed": self.seed,
                "num_samples": 1,
                "endpoint": NO_ENDPOINT,
            },
        }[section]
        kwargs = {"chat_template_kwargs": self.chat_template_kwargs}
        return {**getattr(self, section), **unset, **kwargs, **given, **own}
