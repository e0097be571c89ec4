"""Supervised tuning as a user runs it: rows in, a run directory out; killed and resumed to the same bits."""

import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lm_jax.checkpoints.orbax import Checkpoints
from tests.e2e import common
from tests.e2e.common import SMALL_TUNE, TIMING, Fork, arguments, fork

STEPS = 120
SETTINGS = (
    *SMALL_TUNE,
    "compute.attention=reference",
    "epochs=100",
    f"max_steps={STEPS}",
    "checkpoints.every=40",
    f"eval_every={STEPS}",
    "seed=7",
)


def make_rows(path: Path, number: int = 40) -> str:
    """Seed rows among synthetic ones, the latter with a longer text and another weight."""
    rows = [
        {
            "prompt": f"say that {i} cats sat",
            "response": f"{i} cats sat on the hat and the mat"[: 12 + i % 20],
            **({"source": "synthetic", "weight": 0.5} if i % 3 else {}),
        }
        for i in range(number)
    ]
    return common.write_rows(path, rows)


class Place:
    def __init__(self, path: Path):
        self.path = path
        self.model = common.make_model(path / "model")
        self.rows = make_rows(path / "rows.jsonl")

    def flags(self, name: str, *settings: str) -> list[str]:
        given = (f"model={self.model}", f"input={self.rows}", f"output={self.path / name}")
        return arguments("main_train", *given, *SETTINGS, *settings, preset="tiny")

    def train(self, name: str, *settings: str) -> Path:
        fork("main_train", *self.flags(name, *settings)).ok()
        return self.path / name


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def undisturbed(place) -> Path:
    held_out = common.write_rows(place.path / "held.jsonl", [{"prompt": "say", "response": "9 cats sat"}])
    return place.train("undisturbed", f"eval_input={held_out}")


def metrics(output: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in TIMING} for r in common.read_rows(output / "metrics.jsonl")]


def logged(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saved_steps(output: Path) -> list[int]:
    return sorted(int(p.name) for p in (output / "checkpoints").glob("*") if p.name.isdigit())


def contents(output: Path) -> dict:
    with Checkpoints(f"{output}/checkpoints", keep=None) as checkpoints:
        return checkpoints.restore({"params": None, "optimizer": None, "objective": None, "progress": None}, STEPS)


def test_metrics(undisturbed):
    records = metrics(undisturbed)
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == [*range(1, STEPS + 1)]
    names = {"loss", "alpha", "mean_token_accuracy", "loss/seed", "loss/synthetic", "grad_norm", "num_tokens"}
    assert names - set().union(*steps) == set()
    for r in steps:  # the formula, from what was logged; a source that a step lacks is left out
        sides = [r["alpha"] * r.get("loss/synthetic", 0.0), (1 - r["alpha"]) * r.get("loss/seed", 0.0)]
        assert r["loss"] == pytest.approx(sum(sides), rel=1e-5)
        assert np.isfinite(list(r.values())).all()
    first = next(i for i, r in enumerate(steps) if r["alpha"] != 0.5)
    seen = steps[first - 1]
    if first == 1:
        both = seen["loss/seed"] + seen["loss/synthetic"]
        assert steps[1]["alpha"] == pytest.approx(seen["loss/seed"] / both, rel=1e-5)
    assert len({r["alpha"] for r in steps}) > STEPS / 2
    (held_out,) = (r for r in records if "eval_loss" in r)
    assert held_out["eval_loss"] < steps[0]["loss"] and steps[-1]["loss"] < steps[0]["loss"]
    assert held_out["eval_loss/seed"] == held_out["eval_loss"] and "eval_loss/synthetic" not in held_out
    assert (undisturbed / "checkpoints" / str(STEPS) / "objective").is_dir()
    assert "eval_alpha" not in held_out  # evaluations under different alphas are alike


def test_killed_and_resumed(place, undisturbed):
    """Between two saves: the bits of a run that never stopped, alpha's averages too. test_resume has other moments."""
    output, held_out = place.path / "killed", f"eval_input={place.path / 'held.jsonl'}"
    killed = Fork("main_train", *place.flags("killed", held_out))
    while logged(output) <= 50 or not saved_steps(output):
        assert killed.process.is_alive(), killed.wait().stderr[-2000:]
        time.sleep(0.0005)
    killed.process.kill()
    assert killed.wait().status == -signal.SIGKILL
    assert saved_steps(output) == [40]
    place.train("killed", held_out)
    ours, theirs = contents(output), contents(undisturbed)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    leaves = zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True)
    assert [] == [path for (path, a), b in leaves if not np.array_equal(np.asarray(a), np.asarray(b))]
    assert ours["objective"]["seed"]["sum"] > 0
    assert metrics(output) == metrics(undisturbed)


def test_one_source_alone_is_plain_tuning(place):
    """Synthetic rows alone, whatever alpha, and preference rows with a response column: the same cross-entropy."""
    rows = [{"prompt": r["prompt"], "response": r["response"]} for r in common.read_rows(place.rows)]
    synthetic = [r | {"source": "synthetic"} for r in rows]
    pairs = [{"prompt": r["prompt"], "chosen": r["response"], "rejected": "no"} for r in rows]
    runs = {
        "synthetic": (synthetic, "alpha.rule=fixed", "alpha.value=0.9"),
        "chosen": (pairs, "response_column=chosen"),
    }
    outputs = [
        place.train(name, f"input={common.write_rows(place.path / f'{name}.jsonl', given)}", "max_steps=3", *settings)
        for name, (given, *settings) in runs.items()
    ]
    first, second = map(metrics, outputs)
    assert first == second and len(first) == 3
    assert not {"alpha", "loss/seed", "loss/synthetic"} & set().union(*first)
    assert not (outputs[0] / "checkpoints" / "3" / "objective").exists()  # as in every run that carries nothing


GOOD = {"prompt": "say", "response": "yes"}


@pytest.mark.parametrize(
    ("rows", "settings", "parts"),
    [
        ([GOOD], ["train_on=first"], ["config.train_on", "first", "all, last"]),
        ([GOOD], ["alpha.rule=paper"], ["config.alpha.rule", "paper", "loss_ratio"]),
        ([GOOD], ["alpha.decay=1.0"], ["config.alpha.decay", "[0, 1)"]),
        ([GOOD], ["batch.examples=0"], ["config.batch.examples", "at least 1"]),
        ([GOOD, {"prompt": "say"}], [], ["rows.jsonl row 1", "'response' is missing", "config.columns"]),
        ([GOOD, GOOD | {"weight": -2}], [], ["rows.jsonl row 1", "weight is -2", "mend"]),
        ([GOOD, GOOD | {"response": ""}], [], ["rows.jsonl row 1", "response is empty", "drop the row"]),
        ([GOOD | {"weight": 0}], [], ["rows.jsonl", "no rows left", "1 of weight 0"]),
    ],
)
def test_bad_inputs(place, tmp_path, rows, settings, parts):
    path = common.write_rows(tmp_path / "rows.jsonl", rows)
    line = fork("main_train", *place.flags("bad", f"input={path}", *settings)).error()
    assert [] == [part for part in parts if part not in line], line
    assert not (place.path / "bad").exists()
