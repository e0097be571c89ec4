"""MuSC's arms on a world of the lab: which pairs each learns, and how. Every arm is given the same instructions."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lab import steps as lab_steps
from lab.arms import DEV, TEST, Learnt, Row, learnt_of, write_split
from lab.musc_weights import constant_weights, mean_weights, placed_weights
from lab.steps import Settings
from lab.worlds.answers import verdict
from lab.worlds.data import instructions
from lab.worlds.world import World
from lm_jax.data.rows import read_rows, write_jsonl
from lm_jax.errors import UserError
from musc_jax.weights.rules import DEFAULT_RULE, WEIGHING_RULES

SEED, SFT, DPO, CONSTANT, ORACLE = "seed", "sft", "dpo", "constant", "oracle"
UNIFORM, COLUMNS = "uniform", "columns"
_RULES = (DEFAULT_RULE, *(rule for rule in WEIGHING_RULES if rule != DEFAULT_RULE))
# Arm -> weight of tokens that a dropped constraint decides, and of others: what a rule could gain that knew which
PLACED = {"governed": (2.0, 0.5), "ungoverned": (0.5, 2.0)}
DROPPED, SAMPLED = "drop", "oracle"  # pairs of the default recipe, and of the oracle
RECIPES: Mapping[str, Settings] = {
    DROPPED: {},
    "substitute": {"perturb.drop": 0.0, "perturb.substitute": 1.0},
    "drop_and_substitute": {"perturb.drop": 0.5, "perturb.substitute": 0.5},
    "ratio_0.6": {"perturb.ratio": 0.6},
    "ratio_1.0": {"perturb.ratio": 1.0},
}
ANCHORED: Settings = {"loss.nll_weight": 0.2}  # without it high rates leave answers that are no longer well formed
# A seed model has never met these questions, and what it answers them would be no measurement of the method
LEFT_OUT = {
    "negate": "the seed model was never asked to contradict a constraint",
    "self_reward": "the seed model was never asked to judge a response",
    "branch_solve_merge": "the same",
    "self_correct": "the seed model was never asked to criticise or revise a response",
}


@dataclasses.dataclass(frozen=True)
class MuscArmsConfig:
    """`configs/lab_ablation.py` says what each key is for."""

    instructions: int
    epochs: int
    rates: tuple[float, ...]
    tuning_rates: tuple[float, ...]
    oracle_samples: int
    oracle_temperature: float

    def __post_init__(self):
        if not self.rates or not self.tuning_rates:
            raise UserError("config.musc.rates and config.musc.tuning_rates: give at least one learning rate each")
        if self.oracle_samples < 2:
            raise UserError(f"config.musc.oracle_samples={self.oracle_samples}: must be at least 2")


@dataclasses.dataclass(frozen=True)
class MuscArm:
    """One arm.

    Attributes:
      about: for the table.
      pairs: one of RECIPES, or SAMPLED; empty: it learns none.
      weights: of `launch.musc_train`; None: the chosen responses are tuned on instead.
      rounds: how many; above 1 each makes pairs anew of its share of the instructions.
      settings: further keys of `launch.musc_train`, of one round of preference training.
    """

    about: str
    pairs: str = DROPPED
    weights: str | None = UNIFORM
    rounds: int = 1
    settings: Settings = dataclasses.field(default_factory=dict)


def musc_arms() -> dict[str, MuscArm]:
    """All arms, in the order of the table."""
    default, weighed = DEFAULT_RULE, [rule for rule in _RULES if rule != UNIFORM]
    return {
        SEED: MuscArm("the seed model, not trained", pairs=""),
        SFT: MuscArm("supervised tuning on the chosen responses", weights=None),
        DPO: MuscArm("plain DPO: all weights 1"),
        **{rule: MuscArm(f"weights by {rule}", weights=f"store:{rule}") for rule in weighed},
        **{
            f"{name}_nll": MuscArm(f"{about}, and {_shown(ANCHORED)}", weights=weights, settings=ANCHORED)
            for name, about, weights in (
                (DPO, "plain DPO", UNIFORM),
                (default, f"weights by {default}", f"store:{default}"),
            )
        },
        CONSTANT: MuscArm(f"all weights the mean of {default}", weights=COLUMNS),
        **{
            name: MuscArm(f"weights {inside:g} where a dropped constraint decides, else {outside:g}", weights=COLUMNS)
            for name, (inside, outside) in PLACED.items()
        },
        "online": MuscArm(f"{default} of the policy, anew in every step", weights="online"),
        "rounds_2": MuscArm(f"{default} in two rounds", pairs="", rounds=2),
        "rounds_3": MuscArm(f"{default} in three rounds", pairs="", rounds=3),
        **{name: MuscArm(f"plain DPO, {_shown(RECIPES[name])}", pairs=name) for name in RECIPES if name != DROPPED},
        ORACLE: MuscArm("plain DPO, best against worst sample by the verifiers: an upper bound", pairs=SAMPLED),
    }


def _shown(settings: Settings) -> str:
    return ", ".join(f"{key}={value:g}" for key, value in settings.items())


class MuscArms:
    """The arms on one seed model; see `lab_arms.Arms`.

    Args:
      root: directory of the seed; `seed/` below it is what `launch.lab_seed` made.
      names: the arms to run.
    """

    def __init__(self, config: MuscArmsConfig, world: World, seed: int, root: Path, names: Collection[str]):
        self._config, self._world, self._seed, self._root = config, world, seed, root / "musc"
        self._arms = {name: arm for name, arm in musc_arms().items() if name in names}
        self.about = {name: arm.about for name, arm in self._arms.items()}
        self.base = f"{root}/seed/model"
        self._examples = f"{root}/seed/data/examples.jsonl"

    def _write_data(self, dev: int, test: int) -> None:
        """The instructions: those that are learnt from, and two held-out splits."""
        world, seed = self._world, self._seed
        write_split(world, instructions(world, seed, "ablation/musc", self._config.instructions), self._given)
        choosing = instructions(world, seed, "ablation/musc/dev", dev, held_out=True)
        write_split(world, choosing, self.asked(DEV))
        seen = {instruction.text for instruction in choosing}
        final = instructions(world, seed, "ablation/musc/test", test, held_out=True, avoid=seen)
        write_split(world, final, self.asked(TEST))

    def prepare(self, dev: int, test: int) -> None:
        """See `lab_arms.Arms`."""
        self._write_data(dev, test)
        used = {arm.pairs for arm in self._arms.values()}
        for recipe, settings in RECIPES.items():
            if recipe in used:
                settings = {"seed": self._seed, **settings}
                lab_steps.make_pairs(self.base, self._given, self._examples, self._pairs(recipe), settings)
        if any(_is_stored(arm) for arm in self._arms.values()):
            lab_steps.weigh(self.base, self._pairs(DROPPED), self._weighed, rules="all")
        if CONSTANT in self._arms:
            rows = constant_weights(read_rows(self._weighed), self._store, DEFAULT_RULE)
            write_jsonl(self._columns(CONSTANT), rows)
        for name in PLACED.keys() & self._arms.keys():
            rows = placed_weights(self._world, read_rows(self._weighed), self._store, *PLACED[name])
            write_jsonl(self._columns(name), rows)
        if SAMPLED in used:
            config, samples = self._config, f"{self._root}/data/samples.jsonl"
            rows = lab_steps.answer(
                self.base, self._given, samples, config.oracle_temperature, self._seed, config.oracle_samples
            )
            write_jsonl(self._pairs(SAMPLED), oracle_pairs(self._world, rows))

    def rates(self, arm: str) -> Sequence[float]:
        """See `lab_arms.Arms`."""
        if arm == SEED:
            return ()
        return self._config.tuning_rates if self._arms[arm].weights is None else self._config.rates

    def train(self, arm: str, rate: float, directory: str) -> str:
        """See `lab_arms.Arms`."""
        given, run = self._arms[arm], f"{directory}/run"
        common = {"epochs": self._config.epochs, "seed": self._seed, "checkpoints.keep": 1}
        if given.rounds > 1:
            settings: dict[str, Any] = {f"train.{key}": value for key, value in common.items() if key != "seed"}
            settings |= {"seed": self._seed, "rounds": given.rounds}
            lab_steps.iterate(self.base, self._given, self._examples, run, rate, settings)
            return f"{run}/round_{given.rounds}/train"
        if given.weights is None:
            lab_steps.tune(self.base, self._pairs(given.pairs), run, rate, common | {"response_column": "chosen"})
        else:
            settings = common | {"weights": given.weights} | given.settings
            lab_steps.prefer(self.base, self._input(arm), run, rate, settings)
        return run

    def asked(self, split: str) -> str:
        """See `lab_arms.Arms`."""
        return f"{self._root}/data/{split}.jsonl"

    def learnt(self, arm: str, directory: str) -> Learnt:
        """See `lab_arms.Arms`; of what is chosen."""
        given = self._arms[arm]
        files = [self._pairs(given.pairs)] if given.pairs else []
        if given.rounds > 1:
            files = [f"{directory}/run/round_{n}/pairs.jsonl" for n in range(1, given.rounds + 1)]
        rows = [row for file in files for row in read_rows(file)]
        return learnt_of(self._world, [(row["prompt"][-1]["content"], row["chosen"][-1]["content"]) for row in rows])

    def extras(self) -> Row:
        """Of the responses of each side how much each rule weighs tokens that a dropped constraint decides, and others.

        `weights_SIDE_LABEL`: rule -> mean weight, of labels that occur; none where no arm asked for stored weights.
        """
        if not Path(self._store).exists():
            return {}
        return mean_weights(self._world, read_rows(self._weighed), self._store, _RULES)

    def _pairs(self, recipe: str) -> str:
        return f"{self._root}/data/pairs_{recipe}.jsonl"

    def _input(self, name: str) -> str:
        """Of all arms whose pairs are the same the rows are too, in the same order."""
        arm = self._arms[name]
        if arm.weights == COLUMNS:
            return self._columns(name)
        return self._weighed if _is_stored(arm) else self._pairs(arm.pairs)

    @property
    def _given(self) -> str:
        return f"{self._root}/data/instructions.jsonl"

    @property
    def _weighed(self) -> str:
        return f"{self._root}/data/weighed.jsonl"

    @property
    def _store(self) -> str:
        return f"{self._root}/data/weighed.weights"

    def _columns(self, name: str) -> str:
        return f"{self._root}/data/{name}.jsonl"


def _is_stored(arm: MuscArm) -> bool:
    """Whether its weights come from the store, be it their number or mean alone."""
    return arm.weights == COLUMNS or (arm.weights or "").startswith("store")


def oracle_pairs(world: World, rows: Sequence[Row]) -> list[Row]:
    """Of each row's sampled responses the best against the worst by the verifiers, where they differ.

    Best is what meets everything, then most constraints, a right form counting as one more; of equals the first.
    """
    made = []
    for row in rows:
        texts = [text for text in dict.fromkeys(row["response"]) if text.strip()]
        if not texts:
            continue
        worth = [_worth(world, row["prompt"][-1]["content"], text) for text in texts]
        best, worst = max(worth), min(worth)
        if best > worst:
            sides = {"chosen": texts[worth.index(best)], "rejected": texts[worth.index(worst)]}
            messages = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
            made.append({"id": row["id"], "prompt": row["prompt"], **messages})
    return made


def _worth(world: World, instruction: str, text: str) -> tuple[bool, int]:
    found = verdict(world, instruction, text)
    return found.all_met, sum(found.met) + found.well_formed
