"""`launch.main_controls` from start to end: what each arm learnt, and killed in several stages."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.e2e import common
from tests.e2e.common import Done, Fork, arguments, fork
from tests.e2e.scripted_main_controls import JUDGE
from tests.main_writers import ASK, SAMPLED

ARMS = ("seed_only", "random", "score", "mutual_gain", "shuffled")  # the others' pairs are tested without models
SAME = ("alpha_loss_ratio", "rounds_1")  # as mutual_gain
THINGS = "cat hat dog mat rat bat".split()
SEEDS = [
    {"instruction": f"say that {number} {thing}s sat", "output": f"{number} {thing}s sat"}
    for thing in THINGS
    for number in range(2)
]
RESPONSES = [{"id": f"u{i}", "response": f"the {thing} sat on the mat"} for i, thing in enumerate(THINGS)]


class Controls:
    def __init__(self, directory: Path):
        self.output = directory / "out"
        self.model = common.make_model(directory / "model", max_position_embeddings=512)
        self.seeds = common.write_rows(directory / "seeds.jsonl", SEEDS)
        self.responses = common.write_rows(directory / "responses.jsonl", RESPONSES)

    def flags(self, *settings: str) -> list[str]:
        small = {
            "max_length=96": ("train", "rounds.forward", "rounds.reverse", "filter", "evaluation"),
            "batch.examples=6": ("train", "rounds.forward", "rounds.reverse"),
            "batch.row_length=96": ("filter", "evaluation"),
            "batch.rows=2": ("filter", "evaluation"),
            "compute.scan_unroll=1": ("train", "rounds.forward", "rounds.reverse"),
            "checkpoints.every=1": ("train", "rounds.forward", "rounds.reverse"),
            "optim.learning_rate=1e-2": ("train", "rounds.forward", "rounds.reverse"),
            "max_new_tokens=24": ("judge", "rounds.instructions", "rounds.responses"),
        }
        given = [
            *(f"{name}={getattr(self, name)}" for name in ("model", "seeds", "output")),
            f"unlabelled={self.responses}",
            f"arms={(*ARMS, *SAME)}",
            *(f"{section}.{setting}" for setting, sections in small.items() for section in sections),
            "rounds.rounds=1",
            "rounds.candidates=3",
            "rounds.prompts.seed_system=S",
            "rounds.prompts.synthetic_system=W",
            f"rounds.prompts.reverse_question={ASK}",
            f"judge_question={JUDGE}{{instruction}} {{response}}",
            *settings,
        ]
        # A tuple that is given twice is both together
        last = {setting.partition("=")[0]: setting for setting in given}
        return arguments("main_controls", *last.values(), preset="tiny")

    def run(self, *settings: str) -> Done:
        return Fork("tests.e2e.scripted_main_controls", *self.flags(*settings)).wait()

    def kill_when(self, reached: Callable[[], bool]) -> None:
        """Starts the controls and sends SIGKILL as soon as a state is `reached`."""
        run = Fork("tests.e2e.scripted_main_controls", *self.flags())
        while run.process.is_alive() and not reached():
            time.sleep(0.0005)
        run.process.kill()
        assert run.wait().status == -signal.SIGKILL


def untimed(report: dict) -> dict:
    """The report without seconds and interruptions."""
    if isinstance(report, dict):
        return {k: untimed(v) for k, v in report.items() if k not in ("seconds", "interrupted")}
    return [untimed(v) for v in report] if isinstance(report, list) else report


def learnt(output: Path, arm: str) -> list[tuple[str, str]]:
    """(instruction, response) of an arm's synthetic rows; its seeds are those that were not held out."""
    rows = common.read_rows(output / f"arms/{arm}/rows.jsonl")
    pairs = [tuple(m["content"] for m in row["messages"][1:]) for row in rows]
    tags = [row["messages"][0]["content"] for row in rows]
    assert [tag == "W" for tag in tags] == [row["source"] == "synthetic" for row in rows]
    seeds = [pair for pair, tag in zip(pairs, tags, strict=True) if tag == "S"]
    held = {row["response"] for row in common.read_rows(output / "data/held_out.jsonl")}
    assert len(held) == 2 and len(seeds) == 10 and not held & {response for _, response in seeds}
    assert {(s["instruction"], s["output"]) for s in SEEDS if s["output"] not in held} == {*seeds}
    return [pair for pair, tag in zip(pairs, tags, strict=True) if tag == "W"]


def assert_arms(output: Path, report: dict) -> None:
    candidates = common.read_rows(output / "filter_1/kept.jsonl.candidates.jsonl")
    kept = [(row["instruction"], row["response"]) for row in candidates if row["kept"]]
    names = [row["id"] for row in common.read_rows(output / "filter_1/kept.jsonl")]
    assert names == [row["id"] for row in candidates if row["kept"]]
    every = {(row["instruction"], row["response"]) for row in candidates if row["instruction"]}
    pairs = {arm: learnt(output, arm) for arm in ARMS}
    assert pairs["seed_only"] == [] and pairs["mutual_gain"] == kept and len(kept) > 1
    for arm in ("random", "score"):
        assert len(pairs[arm]) == len(kept) and {*pairs[arm]} <= every
    assert [i for i, _ in pairs["shuffled"]] == [i for i, _ in kept]
    assert sorted(r for _, r in pairs["shuffled"]) == sorted(r for _, r in kept)
    assert not {*pairs["shuffled"]} & every
    # Seeds of round 0 are those of the arms, in the same words; the rounds number their own file
    first, own = (
        [{**row, "id": None} for row in common.read_rows(output / path)]
        for path in ("rounds/round_0/forward.jsonl", "arms/seed_only/rows.jsonl")
    )
    assert first == own
    assert [arm["arm"] for arm in report["arms"]] == [*ARMS, *SAME]
    for arm in report["arms"]:
        assert arm["trained_as"] == ("mutual_gain" if arm["arm"] in SAME else arm["arm"])
        assert arm["pairs"] == len(pairs[arm["trained_as"]])
        rows = common.read_rows(output / f"arms/{arm['trained_as']}/held_out.jsonl")
        tokens = sum(row["num_tokens"] for row in rows)
        assert report["held_out"] == {"rows": 2, "tokens": tokens}
        assert arm["loss"] == pytest.approx(-sum(row["logprob"] for row in rows) / tokens)
        if arm["arm"] != "seed_only":
            base = report["arms"][0]["loss"]
            assert arm["difference"]["value"] == pytest.approx(arm["loss"] - base, abs=1e-9)
    assert sum(report["judge"]["scores"].values()) == report["judge"]["read"] > 0 < report["judge"]["unreadable"]
    drawn = len({row["id"] for row in candidates if row["instruction"]})
    for name, number in (("candidates", drawn), ("held_out", 2)):
        assert {found["pairs"] for found in report["shuffled"][name].values()} == {number}


def assert_costs(output: Path, report: dict) -> None:
    stages = report["stages"]
    parts = {
        *(f"round_{n}/{d}" for n in range(2) for d in ("forward", "reverse")),
        *("round_1/instructions", "round_1/responses", "filter_1", "shuffled_pairs", "judge"),
        *(f"{part}_{arm}" for part in ("train", "evaluate") for arm in ARMS),
    }
    assert stages.keys() == parts
    assert all(cost["tokens"] > 0 and cost["flops"] > 0 and cost["seconds"] >= 0 for cost in stages.values())
    for key in ("tokens", "flops"):
        assert report["total"][key] == pytest.approx(sum(cost[key] for cost in stages.values()))
    needs = {arm["arm"]: arm["needs"] for arm in report["arms"]}
    assert needs["seed_only"] == {k: v for k, v in stages["train_seed_only"].items()}
    assert needs["random"]["tokens"] == sum(
        stages[name]["tokens"]
        for name in ("round_0/forward", "round_0/reverse", "round_1/instructions", "train_random")
    )
    assert needs["score"]["tokens"] - needs["random"]["tokens"] == (
        stages["judge"]["tokens"] + stages["train_score"]["tokens"] - stages["train_random"]["tokens"]
    )
    records = common.read_rows(output / "arms/random/run/metrics.jsonl")
    assert np.all(np.diff([record["num_flops"] for record in records]) > 0)


@pytest.mark.slow
def test_controls_killed_in_several_stages(tmp_path):
    controls = Controls(tmp_path)
    done = controls.run().ok()
    whole = controls.output.rename(tmp_path / "whole")
    report = json.loads((whole / "controls.json").read_text())
    assert_arms(whole, report)
    assert_costs(whole, report)
    text = (whole / "controls.md").read_text()
    assert text in done.stdout and all(f"| {arm} |" in text for arm in (*ARMS, *SAME))
    assert (whole / "controls.png").read_bytes().startswith(b"\x89PNG")

    out = controls.output

    def lines(path: Path) -> int:
        return path.read_bytes().count(b"\n") if path.exists() else 0

    controls.kill_when(lambda: lines(out / "rounds/round_1/instructions.jsonl.partial") > 2)
    controls.kill_when(lambda: lines(out / "judge/verdicts.jsonl.partial") > 2)
    controls.kill_when(lambda: any(p.name.isdigit() for p in (out / "arms/random/run/checkpoints").glob("*")))
    last = controls.run().ok()
    for name in ("rounds_to_1", "filter_1", "judge", "train_seed_only"):
        assert f"{name}: done already" in last.stdout
    assert f"continuing {out}/arms/random/run after step" in last.stderr
    again = json.loads((out / "controls.json").read_text())
    assert untimed(again) == untimed(report)
    assert {name for name, cost in again["stages"].items() if cost["interrupted"]} >= {"judge", "train_random"}
    files = [*whole.glob("arms/*/*.jsonl"), *whole.glob("*/*.jsonl")]
    for file in (file for file in files if file.name != "rounds.jsonl"):  # which has seconds
        assert (out / file.relative_to(whole)).read_bytes() == file.read_bytes(), file
    # Done: nothing runs again, another arm is added to it, other settings are refused
    assert "\n$ " not in f"\n{controls.run().ok().stdout}"
    added = controls.run(f"arms={('seed_only', 'reverse')}").ok()
    assert [line for line in added.stdout.splitlines() if line.startswith("$ ")] == [
        "$ launch.main_train",
        "$ launch.score",
    ]
    assert "config.held_out" in controls.run("held_out=0.5").error()


@pytest.mark.slow
def test_steps_are_commands(tmp_path):
    """As a user runs it: processes of their own, with lines that can be run again; one at a time in a directory."""
    controls = Controls(tmp_path)
    done = fork("main_controls", *controls.flags("arms=('seed_only',)")).ok()
    commands = done.stdout.replace("\\\n    ", "").splitlines()
    assert [line.split()[3] for line in commands if line.startswith("$ ")] == ["launch.main_train", "launch.score"]
    assert f"--config.input={controls.output}/arms/seed_only/rows.jsonl" in done.stdout
    assert "| seed_only | 0 |" in done.stdout and SAMPLED not in done.stdout


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (["arms=('seed_only','best')"], "config.arms: unknown arm 'best'; choose from seed_only"),
        (["arms=('mutual_gain',)"], "config.arms: seed_only lacks"),
        (["held_out=0.0"], "config.held_out=0.0: must lie between 0 and 1"),
        (["held_out=0.95"], "config.held_out=0.95: of 12 seed pairs 11 would be held out"),
        (["judge_question=Score:"], "config.judge_question: has the markers none"),
        (["rounds.forward.epochs=0"], "config.rounds.forward.epochs: must be at least 1"),
        (["filter.fraction=2.0"], "config.filter.fraction=2.0"),
        (["train.alpha.rule=none"], "config.train.alpha.rule: unknown"),
        (["train.max_length=64"], "config.filter.max_length=96: must be config.train.max_length=64"),
        (["seeds=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["unlabelled=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["model=nowhere"], "nowhere"),
    ],
)
def test_bad_inputs(bad, settings, part):
    assert part in fork("main_controls", *bad.flags(*settings)).error()
    assert not bad.output.exists()


def test_no_seeds(bad, tmp_path):
    (tmp_path / "seeds.jsonl").write_text("")
    line = fork("main_controls", *bad.flags(f"seeds={tmp_path}/seeds.jsonl")).error()
    assert "seeds.jsonl: the file is empty" in line and not bad.output.exists()


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Controls:
    return Controls(tmp_path_factory.mktemp("bad"))
