"""The arms of the lab's ablation without models: what each is given, learns, and runs."""

import dataclasses
import importlib
import json
import sys

import numpy as np
import pytest
from absl.flags import FlagValues
from ml_collections import config_flags

from lab import steps as lab_steps
from lab.arms import DEV, TEST
from lab.main_arms import ADAPTERS, ORACLE, MainArms, MainArmsConfig, main_arms, supervised_row
from lab.musc_arms import MuscArms, MuscArmsConfig, musc_arms, oracle_pairs
from lab.musc_weights import constant_weights
from lab.worlds.compositions import Split, split_of
from lab.worlds.data import instructions
from lab.worlds.grammar import read_instruction
from lab.worlds.lists import LISTS
from lab.worlds.seed_data import PAIRED
from lm_jax.config import from_config_dict
from lm_jax.data.preference import preference_rows
from lm_jax.data.rows import read_rows, write_jsonl
from lm_jax.data.score_store import ScoreStore
from lm_jax.data.supervised import supervised_rows
from main_jax.filter.scores import SCORES
from main_jax.prompts import PromptConfig, Prompts, supervised_example
from musc_jax.weights.rules import DEFAULT_RULE, WEIGHING_RULES, check_rule

MUSC = MuscArmsConfig(60, 2, (1e-4, 3e-4), (1e-3,), 4, 0.7)
MAIN = MainArmsConfig("pretraining", 20, 30, 6, 1, 10, (1e-3,), 2e-3, 5e-3, 16)
RULES = tuple(WEIGHING_RULES)
# So few texts that splits which are drawn by themselves would share some
FEW = ("count", "first", "last", "include", "exclude", "separator", "greeting", "closing")
ONE_WAY = tuple(dataclasses.replace(k, phrasings=k.phrasings[:1]) for k in LISTS.kinds if k.name in FEW)
TINY = dataclasses.replace(LISTS, name="tiny", task=LISTS.task[:1], groups=LISTS.groups[:1], kinds=ONE_WAY)
ASKED = "list tools. use exactly two words. start with saw."


@pytest.fixture
def steps(monkeypatch):
    """What `lab_steps` would run: (command, its settings), in order; `made` is called to leave something behind.

    Every step has settings that its command takes.
    """

    def run_step(module, config, *flags):
        values = FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
        monkeypatch.setattr(sys, "argv", ["test", config, *flags])  # where it looks for the keys that are given
        values(sys.argv)
        from_config_dict(importlib.import_module(module).command()[0], values.config.to_dict())
        settings = dict(flag.removeprefix("--config.").split("=", 1) for flag in flags)
        ran.append((module.removeprefix("launch."), settings))
        ran.made(*ran[-1])

    class Ran(list):
        @staticmethod
        def made(command, settings):
            pass

    ran = Ran()
    monkeypatch.setattr(lab_steps, "run_step", run_step)
    return ran


def user(row):
    return row["prompt"][-1]["content"]


def texts_of(arms):
    return {split: [user(row) for row in read_rows(arms.asked(split))] for split in (DEV, TEST)}


def is_held_out(world, text):
    kinds = [c.kind for c in read_instruction(world, text).constraints]
    return split_of(world, kinds) is Split.HELD_OUT


def test_every_rule_but_uniform_is_an_arm_that_training_knows():
    arms = musc_arms()
    assert list(arms)[:3] == ["seed", "sft", "dpo"]
    assert set(RULES) - {"uniform"} <= set(arms) and "uniform" not in arms
    assert RULES[0] == DEFAULT_RULE  # what rounds, constant and online are made of
    for arm in arms.values():
        if arm.weights is not None:
            check_rule(arm.weights)


def test_musc_splits_share_no_text_and_no_composition_with_what_is_learnt(tmp_path, steps):
    arms = MuscArms(MUSC, TINY, 3, tmp_path, ["seed"])
    arms.prepare(300, 400)
    learnt = [user(row) for row in read_rows(f"{tmp_path}/musc/data/instructions.jsonl")]
    splits = texts_of(arms)
    assert [len(set(texts)) for texts in (learnt, splits[DEV], splits[TEST])] == [60, 300, 400]
    assert not set(splits[DEV]) & set(splits[TEST])
    assert all(is_held_out(TINY, text) for texts in splits.values() for text in texts)
    assert not any(is_held_out(TINY, text) for text in learnt)
    assert steps == []  # the seed alone needs no pairs


def test_musc_arms_differ_in_what_they_say(tmp_path, steps):
    names = ["seed", "dpo", "kl", "dpo_nll", "constant", "online", "sft", "substitute", "rounds_3", "oracle"]
    arms = MuscArms(MUSC, LISTS, 3, tmp_path, names)
    data = f"{tmp_path}/musc/data"

    def leave(command, settings):
        """What a step writes, as far as later ones read it."""
        if command == "musc_token_weights":
            row = {"prompt": [], "chosen": [], "rejected": [], "token_weights": {"row": 0}}
            write_jsonl(settings["output"], [row])
            store = ScoreStore.create_or_open(f"{data}/weighed.weights", {}, [2, 1], list(RULES))
            store.write([0, 1], {rule: [np.array([0.5, 1.0]), np.array([0.6])] for rule in RULES})
        elif command == "generate":
            write_jsonl(settings["output"], [{"id": "a", "prompt": [{"content": ASKED}], "response": ["saw", "x"]}])

    steps.made = leave
    arms.prepare(4, 4)
    by_command = {}
    for command, settings in steps:
        by_command.setdefault(command, []).append(settings)
    drop, substitute = by_command["musc_pairs"]
    assert drop["output"] == f"{data}/pairs_drop.jsonl" and "perturb.drop" not in drop
    assert (substitute["perturb.drop"], substitute["perturb.substitute"]) == ("0.0", "1.0")
    assert [s["rules"] for s in by_command["musc_token_weights"]] == ["all"]
    assert by_command["generate"][0]["num_samples"] == "4"
    assert read_rows(f"{data}/constant.jsonl")[0]["chosen_token_scores"] == [0.7, 0.7]

    def trained(arm):
        del steps[:]
        model = arms.train(arm, 1e-4, f"{tmp_path}/{arm}")
        ((command, settings),) = steps
        assert settings.get("optim.learning_rate", settings.get("train.optim.learning_rate")) == "0.0001"
        return model, command, settings

    for arm, rows, weights in (
        ("dpo", "pairs_drop", "uniform"),
        ("kl", "weighed", "store:kl"),
        ("dpo_nll", "pairs_drop", "uniform"),
        ("constant", "constant", "columns"),
        ("online", "pairs_drop", "online"),
        ("substitute", "pairs_substitute", "uniform"),
        ("oracle", "pairs_oracle", "uniform"),
    ):
        model, command, settings = trained(arm)
        assert (command, settings["input"], settings["weights"]) == ("musc_train", f"{data}/{rows}.jsonl", weights)
        assert settings.get("loss.nll_weight") == ("0.2" if arm == "dpo_nll" else None)
        assert (model, settings["model"], settings["seed"]) == (f"{tmp_path}/{arm}/run", f"{tmp_path}/seed/model", "3")
    _, command, settings = trained("sft")
    assert (command, settings["response_column"], settings["epochs"]) == ("main_train", "chosen", "2")
    model, command, settings = trained("rounds_3")
    assert (command, settings["rounds"], settings["seed"]) == ("musc_rounds", "3", "3")
    assert model == f"{tmp_path}/rounds_3/run/round_3/train"
    assert settings["train.epochs"] == "2" and settings["pairs.num_examples"] == "1"
    assert {arm: arms.rates(arm) for arm in ("seed", "sft", "dpo")} == {
        "seed": (),
        "sft": (1e-3,),
        "dpo": (1e-4, 3e-4),
    }


def test_what_musc_arms_learnt(tmp_path):
    arms = MuscArms(MUSC, LISTS, 0, tmp_path, ["seed", "dpo", "rounds_2"])
    sides = ("saw, axe", "axe, saw")
    good, bad = (
        {"prompt": [{"content": ASKED}], "chosen": [{"content": text}], "rejected": [{"content": "axe"}]}
        for text in sides
    )
    write_jsonl(f"{tmp_path}/musc/data/pairs_drop.jsonl", [good, good, good, bad])
    for number, rows in ((1, [good]), (2, [bad, bad])):
        write_jsonl(f"{tmp_path}/x/run/round_{number}/pairs.jsonl", rows)
    assert arms.learnt("dpo", "unread") == (4, 0.75)
    assert arms.learnt("rounds_2", f"{tmp_path}/x") == (3, pytest.approx(1 / 3))
    assert arms.learnt("seed", "unread") == (0, None)


def test_constant_weights_are_the_mean_over_all_tokens(tmp_path):
    store = ScoreStore.create_or_open(str(tmp_path / "s"), {}, [1, 3, 2, 2], ["a", "b"])
    values = [[2.0], [1.0, 1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]  # 6.0 over 8 tokens; a mean of means would be 0.917
    store.write(range(4), {"a": [np.array(v) for v in values], "b": [np.zeros(len(v)) for v in values]})
    given = [{"id": i, "prompt": "p", "chosen": "c", "rejected": "r", "token_weights": {"row": i}} for i in (1, 0)]
    second, first = constant_weights(given, str(tmp_path / "s"), "a")
    assert first["chosen_token_scores"] == [0.75] and first["rejected_token_scores"] == [0.75] * 3
    assert second["chosen_token_scores"] == second["rejected_token_scores"] == [0.75] * 2
    assert "token_weights" not in first
    assert len(preference_rows([first, second], "rows").rows) == 2


def test_the_oracle_takes_the_best_against_the_worst():
    def row(*texts):
        return {"id": "a", "prompt": [{"role": "user", "content": ASKED}], "response": list(texts)}

    # Two words and a wrong start; right; a right start alone, and twice
    (pair,) = oracle_pairs(LISTS, [row("axe, saw", "saw, axe", "saw saw, axe, drill", "saw, axe")])
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("saw, axe", "saw saw, axe, drill")
    assert oracle_pairs(LISTS, [row("saw, axe", "saw, drill"), row("saw, axe", "saw, axe"), row(" ", "")]) == []
    # What is well formed is better than the same that is not
    (pair,) = oracle_pairs(LISTS, [row("axe axe, saw", "axe, saw")])
    assert pair["chosen"][0]["content"] == "axe, saw"


def test_main_arms_that_train_alike_stand_there_once():
    arms = main_arms(1)
    for arm in ("seed_only", "no_filter", "random", "mutual_gain", "shuffled", "rounds_0", "rounds_2"):
        assert arm in arms
    assert {ADAPTERS, ORACLE} <= set(arms)
    assert not {"rounds_1", "alpha_loss_ratio", "score"} & set(arms)  # the filter's own, twice, and no judge
    assert "rounds_1" in main_arms(2)


def test_main_splits_share_no_text_with_anything(tmp_path, steps):
    arms = MainArms(MAIN, TINY, 0, tmp_path, ["seed_only", "rounds_2", ADAPTERS])
    arms.prepare(30, 40)
    data = {name: read_rows(f"{tmp_path}/main/data/{name}.jsonl") for name in ("pairs", "responses", "probes")}
    splits = texts_of(arms)
    learnt = {row["messages"][0]["content"] for row in data["pairs"]}
    probed = {row["instruction"] for row in data["probes"]}
    assert [len(data[name]) for name in data] == [20, 30, 12]
    assert [len({*texts}) for texts in splits.values()] == [30, 40]
    hidden = {given.text for given in instructions(TINY, 0, "unlabelled", 30, PAIRED)}
    assert not learnt & probed and not (learnt | probed | hidden) & {*splits[DEV], *splits[TEST]}
    assert not {*splits[DEV]} & {*splits[TEST]}
    asked = {text: len(read_instruction(TINY, text).constraints) for texts in splits.values() for text in texts}
    assert set(asked.values()) == {1, 2, 3, 4}
    assert all(is_held_out(TINY, text) for text, number in asked.items() if number > 2)
    assert all(row["prompt"][0] == {"role": "system", "content": lab_steps.TAG} for row in read_rows(arms.asked(DEV)))
    kinds = {"real": 0, "wrong": 0}
    for row in data["probes"]:
        kinds[row["id"].split("-")[0]] += 1
    assert kinds == {"real": 6, "wrong": 6}
    filters = [(s["forward"], s["input"]) for command, s in steps if command == "main_filter"]
    here = f"{tmp_path}/main"
    assert filters == [
        (f"{here}/rounds/round_1/forward", f"{here}/rounds/round_1/candidates.jsonl"),
        (f"{here}/rounds/round_2/forward", f"{here}/rounds/round_2/candidates.jsonl"),
        (f"{here}/adapters/round_1/forward", f"{here}/adapters/round_1/candidates.jsonl"),
        (f"{here}/rounds/round_1/forward", f"{here}/data/probes.jsonl"),
    ]
    rounds = [s for command, s in steps if command == "main_rounds"]
    assert [s["rounds"] for s in rounds] == ["2", "1"]
    assert (rounds[1]["sharing"], rounds[1]["forward.lora.rank"]) == ("adapters", "16")


def candidate(id, instruction, response, score, kept=False):
    scores = None if score is None else dict.fromkeys(SCORES, score)
    return {"id": id, "instruction": instruction, "response": response, "scores": scores, "kept": kept}


def test_main_arms_learn_the_seeds_and_their_pairs(tmp_path, steps):
    names = ["seed_only", "mutual_gain", "alpha_fixed", "rounds_0", ADAPTERS, ORACLE]
    arms = MainArms(MAIN, LISTS, 0, tmp_path, names)
    here = f"{tmp_path}/main"
    seed = {"id": "seed-0", "messages": [{"role": "user", "content": "list tools."}], "source": "seed", "weight": 1.0}
    write_jsonl(f"{here}/rounds/round_0/forward.jsonl", [seed])
    found = [
        candidate("a", ASKED, "axe, saw", 1.0, kept=True),  # not true
        candidate("a", " list tools. ", "axe, saw", 2.0),
        candidate("b", None, "saw, axe", None),
        candidate("b", ASKED, "saw, axe", 3.0),
    ]
    for name in ("rounds_0", "rounds_1", "adapters_1"):
        kept = [{**row, "kept": row["kept"] != (name == "adapters_1")} for row in found]
        write_jsonl(f"{here}/filter/{name}.jsonl.candidates.jsonl", [row for row in kept if row["scores"]])

    def learns(arm):
        del steps[:]
        arms.train(arm, 1e-3, f"{tmp_path}/{arm}")
        rows = read_rows(f"{tmp_path}/{arm}/rows.jsonl")
        ((command, settings),) = steps
        assert (command, settings["model"]) == ("main_train", f"{tmp_path}/seed/pretraining")
        assert rows[0] == seed
        return [row["messages"][1]["content"] for row in rows[1:]], settings["alpha.rule"]

    assert learns("seed_only") == ([], "loss_ratio")
    assert learns("mutual_gain") == learns("rounds_0") == ([ASKED], "loss_ratio")
    assert learns("alpha_fixed") == ([ASKED], "fixed")
    assert learns(ADAPTERS) == (["list tools.", ASKED], "loss_ratio")
    assert learns(ORACLE) == (["list tools."], "loss_ratio")
    assert arms.learnt("mutual_gain", "unread") == (1, 0.0)
    assert arms.learnt(ADAPTERS, "unread") == (2, 1.0)
    assert arms.learnt("seed_only", "unread") == (0, None)
    scored = {"real-x-0": 0.5, "real-x-1": 2.0, "real-2": None, "wrong-0": 1.0, "wrong-1": 3.0}
    probes = [candidate(id, "i", "r", score) for id, score in scored.items()]
    write_jsonl(f"{here}/filter/probes.jsonl.candidates.jsonl", probes)
    extras = json.loads(json.dumps(arms.extras()))
    assert extras["auroc"] == dict.fromkeys(SCORES, 0.75)  # one of four in the wrong order
    assert extras["truth"]["all"] == pytest.approx(2 / 3)
    assert extras["truth"]["mutual_gain"] == 0.0


def test_a_written_pair_is_the_row_that_the_methods_own_code_makes():
    pair = {"id": "a", "instruction": " list tools. ", "response": "saw, axe", "scores": {}}
    frames = ("{response}", "{system}{instruction}", "{system}{response}")
    words = PromptConfig("auto", lab_steps.TAG, lab_steps.WEB_TAG, "", *frames)
    expected = supervised_example(Prompts(words, "messages").forward("list tools.", "synthetic"), "saw, axe")
    row = supervised_row(pair)
    assert row["messages"] == expected["messages"] and row["source"] == "synthetic"
    assert len(supervised_rows([row], "rows").rows) == 1
