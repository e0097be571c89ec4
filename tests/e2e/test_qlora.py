"""Adapters on a base in nf4 as a user trains them: from ln 2, stopped and continued, scored, merged and taken home."""

import shutil

import jax
import numpy as np
import pytest

from lm_jax.checkpoints.orbax import Checkpoints
from tests.e2e import common
from tests.e2e.common import SMALL_SCORE, SMALL_TRAIN, TIMING, arguments, fork

SETTINGS = ("lora.rank=3", "lora.alpha=6", "optim.learning_rate=1e-2", "checkpoints.every=2", "epochs=4", "max_steps=4")


class Place:
    def __init__(self, path):
        self.path = path
        self.model = common.make_model(path / "model", hidden_size=64, intermediate_size=64)
        self.pairs = common.make_pairs(path / "pairs.jsonl", 6)

    def train(self, name, *settings):
        """(metrics, stderr)"""
        given = (f"model={self.model}", f"input={self.pairs}", f"eval_input={self.pairs}", "eval_every=4")
        output = (f"output={self.path / name}", f"reference_cache={self.path / 'reference'}")
        flags = arguments("musc_train", *given, *output, *SMALL_TRAIN, *SETTINGS, *settings, preset="tiny")
        stderr = fork("musc_train", *flags).ok().stderr
        return common.read_rows(self.path / name / "metrics.jsonl"), stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def trained(place):
    return place.train("run", "lora.base=nf4")[0]


@pytest.mark.slow
def test_the_reference_is_the_same_quantised_base(place, trained):
    full = place.train("full", "max_steps=1")[0]
    for metrics in (trained, full):  # with one cache: scores of the one base are not taken for those of the other
        assert metrics[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
        assert metrics[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert abs(trained[0]["logps/chosen"] - full[0]["logps/chosen"]) > 1e-2
    named, stderr = place.train("named", "lora.base=nf4", f"reference={place.model}", "max_steps=1")
    assert named[0]["loss"] == trained[0]["loss"] and "reference log-probs" not in stderr  # all of them were there
    assert [r for r in trained if "eval_loss" in r][-1]["eval_loss"] < np.log(2)


def test_stopped_and_continued(place, trained):
    shutil.copytree(place.path / "run", place.path / "stopped")
    shutil.rmtree(place.path / "stopped/checkpoints/4")
    metrics, stderr = place.train("stopped", "lora.base=nf4")
    assert "after step 2" in stderr
    ours, theirs = ([{k: v for k, v in r.items() if k not in TIMING} for r in m] for m in (metrics, trained))
    assert ours == theirs
    states = []
    for name in ("run", "stopped"):
        with Checkpoints(str(place.path / name / "checkpoints"), keep=None) as checkpoints:
            states.append(checkpoints.restore({"params": None, "optimizer": None}))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_merged_into_the_full_base(place, trained):
    """A line says so; the merged model is another one than evaluation saw, and PEFT's files are as ever."""
    rows = [{"prompt": r["prompt"], "response": r["chosen"]} for r in common.read_rows(place.pairs)]
    given = (f"input={common.write_rows(place.path / 'rows.jsonl', rows)}", f"output={place.path / 'scored.jsonl'}")
    done = fork("score", *arguments("score", f"model={place.path / 'run'}", *given, *SMALL_SCORE)).ok()
    assert "not exactly what was trained" in done.stderr
    merged = np.mean([row["logprob"] for row in common.read_rows(place.path / "scored.jsonl")])
    evaluated = [r for r in trained if "eval_loss" in r][-1]["eval_logps/chosen"]
    print(f"log-probability of a chosen response: {evaluated:.4f} as trained, {merged:.4f} merged")
    assert 1e-2 < abs(merged - evaluated) < 0.2 * abs(evaluated)
    flags = (f"model={place.path / 'run'}", f"output={place.path / 'peft'}", "adapter=True")
    assert "merged" not in fork("export_hf", *arguments("export_hf", *flags)).ok().stderr
    assert (place.path / "peft/adapter_model.safetensors").exists()
