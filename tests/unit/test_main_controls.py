"""MAIN's controls without models: which pairs an arm learns, what it costs, and the numbers of the report."""

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from configs.main_controls import get_config
from lab.commands import alone_in, changed_flags
from lab.controls import costs
from lab.controls.arms import (
    ARMS,
    arm_pairs,
    check_arms,
    depth_of,
    held_out,
    read_verdict,
    shuffled,
    told_apart,
    trained_as,
)
from lab.controls.config import ControlsConfig
from lab.controls.report import Measured, markdown, paired_difference, report_of, stages_of
from lm_jax.config import from_config_dict
from lm_jax.errors import UserError
from main_jax.filter.plots import plot_controls
from main_jax.filter.scores import SCORES
from main_jax.rounds.config import RoundsConfig
from tests.main_writers import ASK

NAMES = [*SCORES]
# Of each candidate: its response's id, cluster, the scores in the order of SCORES (None: not scored), kept
TABLE = [
    ("a", "x", (5.0, 1.0, 6.0, 0.1, 9.0), False),
    ("a", "x", (4.0, 2.0, 6.5, 0.2, 1.0), True),
    ("b", "x", (3.0, 9.0, 1.0, 0.9, 8.0), False),
    ("c", "y", None, False),
    ("c", "y", (1.0, 8.0, 9.0, 0.8, 7.0), False),
    ("d", "y", (2.0, 3.0, 5.0, -1.0, 2.0), True),
    ("e", "y", None, False),
]


def candidates() -> list[dict]:
    return [
        {
            "id": name,
            "response": f"response {name}",
            "instruction": f"instruction {number}" if scores else None,
            "group": group,
            "scores": scores and dict(zip(NAMES, scores, strict=True)),
            "kept": kept,
        }
        for number, (name, group, scores, kept) in enumerate(TABLE)
    ]


def chosen(arm: str, **settings) -> list[int]:
    """The numbers of the candidates that an arm learns."""
    rows = candidates()
    found = arm_pairs(arm, rows, "mutual_gain", **{"seed": 0, **settings})
    return [rows.index(row) for row in found]


def test_what_the_filter_keeps():
    assert chosen("seed_only") == []
    for arm in ("mutual_gain", "alpha_fixed", "alpha_schedule", "rounds_0", "rounds_3"):
        assert chosen(arm) == [1, 5]


@pytest.mark.parametrize(
    ("score", "expected"),
    # Best of each response first, then the lowest two
    [("forward", [4, 5]), ("reverse", [0, 5]), ("mutual", [2, 5]), ("forward_gain", [0, 5])],
)
def test_another_score_keeps_as_many(score, expected):
    assert chosen(score) == expected


def test_as_many_of_each_cluster():
    assert chosen("forward", cluster="group") == [2, 4]  # one of x, one of y


def test_what_is_drawn():
    drawn = [chosen("no_filter", seed=seed) for seed in range(200)]
    every = {(first, 2, 4, 5) for first in (0, 1)}
    assert {*map(tuple, drawn)} == every  # one of each response that has a score, never one without
    assert 60 < sum(rows[0] == 0 for rows in drawn) < 140
    parts = [chosen("random", seed=seed) for seed in range(200)]
    assert all(len(part) == 2 and {*part} <= {*whole} for part, whole in zip(parts, drawn, strict=True))
    counts = [sum(number in part for part in parts) for number in (2, 4, 5)]
    assert all(60 < count < 140 for count in counts)  # a response of two candidates is no likelier: half of all
    assert 60 < sum(0 in part or 1 in part for part in parts) < 140


def test_the_score_that_was_written():
    verdicts = [2, 3, 5, None, 1, 4, 5]
    assert chosen("score", verdicts=verdicts) == [2, 5]  # that of a candidate without scores is not read
    assert chosen("score", verdicts=[None, 1, *[None] * 5]) == [1]
    assert chosen("score", verdicts=[None] * 7) == []
    equals = {tuple(chosen("score", seed=seed, verdicts=[3] * 7)) for seed in range(60)}
    assert {number for pair in equals for number in pair} == {0, 1, 2, 4, 5} and all(len(p) == 2 for p in equals)


def test_shuffled():
    pairs = [{"instruction": n, "response": f"r{n}"} for n in range(7)]
    for seed in range(20):
        found = shuffled(pairs, seed)
        assert [pair["instruction"] for pair in found] == [*range(7)]
        assert sorted(pair["response"] for pair in found) == [f"r{n}" for n in range(7)]
        assert all(pair["response"] != f"r{pair['instruction']}" for pair in found)
    assert shuffled(pairs[:1], 0) == [] and shuffled(pairs[:2], 0)[0]["response"] == "r1"
    (first, second) = arm_pairs("shuffled", candidates(), "mutual_gain", 0)
    assert [(p["instruction"], p["response"]) for p in (first, second)] == [
        ("instruction 1", "response d"),
        ("instruction 5", "response a"),
    ]


def test_held_out():
    found = held_out(range(10), 0.25, 0)
    assert len(found) == 2 and found == held_out(range(9, -1, -1), 0.25, 0) != held_out(range(10), 0.25, 1)
    counts = np.sum([[n in held_out(range(10), 0.3, seed) for n in range(10)] for seed in range(300)], axis=0)
    assert counts.sum() == 900 and counts.min() > 60 and counts.max() < 120
    for share, total in ((0.1, 10), (0.9, 10), (0.5, 3)):
        with pytest.raises(UserError, match=rf"^config.held_out={share}: of {total} seed pairs"):
            held_out(range(total), share, 0)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("4", 4),
        ("Score: 3/5", 3),
        ("\n\n**5**\nIt is good.", 5),
        ("<think>2?</think>1", 1),
        ("```\n2\n```", 2),
        ("It is good.\n4", None),
        ("4 or 5", None),
        ("6", None),
        ("3.5", None),
        ("<think>4", None),
        ("", None),
        (" \n", None),
        (None, None),
    ],
)
def test_verdicts(answer, score):
    assert read_verdict(answer) == score


def test_told_apart():
    found = told_apart(np.array([1.0, 2.0, 6.0]), np.array([3.0, 5.0, 4.0]))
    assert (found["pairs"], found["kept_shuffled"]) == (3, pytest.approx(1 / 3)) and found["auroc"] == pytest.approx(
        6 / 9
    )
    assert told_apart(np.zeros(5), np.ones(5))["kept_shuffled"] == 0
    assert told_apart(np.ones(5), np.zeros(5))["kept_shuffled"] == 1
    assert told_apart(np.ones(4), np.ones(4))["kept_shuffled"] == 0.5  # does not look
    missing = told_apart(np.array([1.0, np.nan, 2.0]), np.array([3.0, 0.0, 4.0]))
    assert (missing["pairs"], missing["auroc"]) == (2, 1.0)
    assert told_apart(np.array([1.0, np.nan]), np.array([1.0, 2.0])) is None


def test_arms():
    check_arms([*ARMS])
    for arms, part in (
        (["seed_only", "best"], "unknown arm 'best'"),
        (["seed_only", "random", "random"], "random stands there twice"),
        (["random"], "seed_only lacks"),
        ([], "seed_only lacks"),
    ):
        with pytest.raises(UserError, match=f"^config.arms: {part}"):
            check_arms(arms)
    assert (depth_of("rounds_0", 2), depth_of("random", 2)) == (0, 2)
    same = [arm for arm in ARMS if trained_as(arm, "reverse", "fixed", 3) != arm]
    assert same == ["alpha_fixed", "rounds_3"] and trained_as("rounds_3", "reverse", "fixed", 3) == "reverse"
    with pytest.raises(ValueError, match="unknown arm 'best'"):
        arm_pairs("best", candidates(), "mutual_gain", 0)


def test_the_interval_covers():
    """Against what the same rows give when they are drawn again, and against the truth."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 60, 80)
    than = rng.gamma(2, 2, 80) * tokens
    nll = than + rng.normal(-0.1, 0.3, 80) * tokens
    found = paired_difference(nll, than, tokens)
    assert found.value == pytest.approx(nll.sum() / tokens.sum() - than.sum() / tokens.sum())
    again = rng.integers(0, 80, (4000, 80))
    ratios = (nll - than)[again].sum(1) / tokens[again].sum(1)
    assert [found.low, found.high] == pytest.approx(np.percentile(ratios, [2.5, 97.5]), abs=0.01)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * ratios.std(), rel=0.05)
    alike = paired_difference(nll, nll, tokens)
    assert alike == (0, 0, 0)
    assert paired_difference(np.array([1.0, 3.0]), np.array([0.0, 0.0]), np.array([1.0, 1.0])) == pytest.approx(
        (2, 2 - 1.959964 * math.sqrt(2 * 2) / 2, 2 + 1.959964 * math.sqrt(2 * 2) / 2)
    )


def test_what_an_arm_needs():
    zero = ["round_0/forward", "round_0/reverse"]
    asked = [f"round_1/{part}" for part in ("instructions", "responses", "forward", "reverse")]
    assert stages_of("seed_only", 2) == []
    assert stages_of("rounds_0", 0) == [*zero, "round_1/instructions", "filter_0"]
    assert stages_of("rounds_1", 1) == [*zero, *asked, "filter_1"]
    assert stages_of("random", 2) == [*zero, *asked, "round_2/instructions"]
    assert stages_of("score", 1) == [*zero, "round_1/instructions", "judge"]
    assert len(stages_of("shuffled", 3)) == len({*stages_of("shuffled", 3)}) == 2 + 3 * 4 + 1


def test_the_report(tmp_path):
    rng = np.random.default_rng(0)
    tokens = np.array([10.0, 20.0, 30.0])
    stages = {
        name: {"tokens": 10 * n, "flops": 1e9 * n, "seconds": float(n), "interrupted": name == "judge"}
        for n, name in enumerate([*stages_of("score", 1), *stages_of("mutual_gain", 1)[2:], "train_seed_only"], 1)
        if name != "round_1/instructions" or n == 3
    }
    stages |= {f"train_{arm}": {"tokens": 7, "flops": 1e6, "seconds": 2.0, "interrupted": False} for arm in NAMES}
    pairs = {"seed_only": 0, "mutual_gain": 4, "score": 0, "rounds_1": 4}
    measured = {arm: Measured(rng.random(3) * tokens, tokens, 5) for arm in ("seed_only", "mutual_gain")}
    as_what = {arm: trained_as(arm, "mutual_gain", "loss_ratio", 1) for arm in pairs}
    report = report_of(pairs, as_what, 1, measured, stages)
    report |= {"judge": {"candidates": 9, "not_asked": 1, "read": 2, "unreadable": 6, "scores": {"3": 2}}}
    report |= {"shuffled": {"held_out": {"forward": told_apart(np.zeros(3), np.ones(3)), "reverse": None}}}
    rows = {row["arm"]: row for row in json.loads(json.dumps(report))["arms"]}
    assert rows["seed_only"]["difference"] is None and rows["score"]["loss"] is None
    assert rows["rounds_1"] == {**rows["mutual_gain"], "arm": "rounds_1"}
    needed = [*stages_of("mutual_gain", 1), "train_mutual_gain"]
    assert rows["mutual_gain"]["needs"]["flops"] == sum(stages[name]["flops"] for name in needed)
    text = markdown(report)
    assert (
        f"| mutual_gain | 4 | {rows['mutual_gain']['loss']:.4f} | {rows['mutual_gain']['difference']['value']:+.4f}"
        in text
    )
    for part in ("| score | 0 | - |", "(which is `mutual_gain`)", "nothing was trained", "2 of 9 candidates", "| 4+ |"):
        assert part in text
    assert "| held_out | forward | 3 | 0.00 | 1.000 | 1.000 to 1.000 |" in text
    plot_controls(report["arms"], f"{tmp_path}/controls.png")
    assert (tmp_path / "controls.png").stat().st_size > 1000


def config(**settings) -> ControlsConfig:
    found = get_config("tiny")
    found.update({"model": "M", "seeds": "S", "unlabelled": "U", "output": "O", **settings})
    return from_config_dict(ControlsConfig, found.to_dict())


def test_the_flags_of_a_step_are_what_differs():
    module, file, *flags = config(rounds={"prompts": {"reverse_question": ASK}}).flags(
        "filter", forward="F", reverse="R", input="I", output="O"
    )
    assert (module, file) == ("launch.main_filter", "--config=configs/main_filter.py")
    assert dict(flag.split("=", 1) for flag in flags) == {
        **{
            f"--config.{name}": value
            for name, value in zip(("forward", "reverse", "input", "output"), "FRIO", strict=True)
        },
        "--config.max_length": "1024",
        "--config.batch.rows": "4",
        "--config.batch.row_length": "1024",
        "--config.prompts.reverse_question": ASK,
    }
    judge = config(judge={"stop": ("\n", 3)}, judge_model="J", seed=4).flags("judge", input="I", output="O")
    assert {"--config.stop=('\\n', 3)", "--config.model=J", "--config.seed=4", "--config.temperature=0.0"} <= {*judge}


def test_what_the_rounds_are_asked_for():
    given = config(arms=("seed_only", "rounds_3", "rounds_0"), rounds={"rounds": 2})
    assert given.depths == [0, 3] and "--config.rounds=3" in given.flags("rounds", seeds="S", output="O")
    assert config(arms=("seed_only",)).depths == [] and config(arms=("seed_only", "random")).depths == [2]
    with pytest.raises(UserError, match="config.rounds.rounds=0: must be at least 1"):
        config(rounds={"rounds": 0})


def test_the_settings_are_those_of_the_neighbours():
    from configs import generate, main_filter, main_rounds, main_train, score

    own = get_config("tiny").to_dict()
    for section, whole in (
        ("rounds", main_rounds.get_config("tiny")),
        ("filter", main_filter.get_config("tiny")),
        ("train", main_train.get_config("tiny")),
        ("evaluation", score.get_config()),
        ("judge", generate.get_config()),
    ):
        whole = whole.to_dict()
        if section == "train":
            del whole["checkpoints"]["remote"]  # a part of many runs has no copy of its own
        changed = {k for k in own[section] if own[section][k] != whole[k]}
        assert own[section].keys() < whole.keys()
        assert changed == {"evaluation": {"max_length", "batch"}, "judge": {"max_new_tokens", "temperature"}}.get(
            section, set()
        )
    given = {"model": "M", "seeds": "S", "unlabelled": "U", "output": "O", "chat_template_kwargs": "", "seed": 0}
    assert {*ARMS} == {*get_config().arms} and from_config_dict(RoundsConfig, {**own["rounds"], **given})


def test_a_directory_is_one_commands(tmp_path):
    """Also while a step of a command that was killed is still at work."""
    step = "import sys; print('at work', flush=True); sys.stdin.read()"
    code = f"""
from pathlib import Path
from lab.commands import alone_in, run_step
with alone_in(Path({str(tmp_path)!r})):
    run_step("timeit", "-n1", "-r1", {step!r})
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as command:
        while command.stdout.readline() not in ("at work\n", ""):
            pass
        with pytest.raises(UserError, match="another process is at work there"), alone_in(tmp_path):
            pass
        command.kill()
        command.wait()
        with pytest.raises(UserError, match="or a step that outlived its command"), alone_in(tmp_path):
            pass
        command.stdin.close()  # the step ends
        command.stdout.read()
    with alone_in(tmp_path):
        pass


def test_the_cost_of_sampling_and_scoring():
    """Counted by hand: every prompt once, every sampled token once, with what stands before it."""
    from lm_jax.config import ModelConfig, RopeConfig
    from lm_jax.training.flops import forward_flops

    sizes = dict(vocab_size=50, num_layers=2, d_model=8, d_ff=16, num_heads=2, num_kv_heads=1, head_dim=4)
    model = ModelConfig(family="llama", rope=RopeConfig(10000.0), norm_eps=1e-5, max_position=64, **sizes)

    class Encoder:
        def encode_prompts(self, prompts, names):
            return [np.arange(len(prompt.split())) for prompt in prompts]

    def tokenizer(text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": text.split()}

    asked = [{"prompt": "p " * 5}, {"prompt": "p " * 3}]
    answers = [
        {"response": ["a b", "a b c"], "finish_reason": ["stop", "length"]},
        {"response": None, "finish_reason": "error"},
    ]
    found = costs.sampling_cost(model, Encoder(), tokenizer, asked, answers)
    assert found["tokens"] == 5 + 3 + 3 + 3  # the end token is sampled too, but where the answer was cut
    by_token = sum(
        forward_flops(model, np.array([end])) - forward_flops(model, np.array([end - 1]))
        for first, end in ((5, 8), (5, 8))
        for end in range(first + 1, end + 1)
    )
    assert found["flops"] == pytest.approx(by_token + forward_flops(model, np.array([5, 3])))
    assert costs.total([{"tokens": 1, "flops": 2.0}, {"tokens": 3, "flops": 4.0}]) == {"tokens": 4, "flops": 6.0}
    assert [*itertools.islice(changed_flags("configs/score.py", {"batch": {"rows": 8}}), 9)] == [
        "--config=configs/score.py"
    ]
