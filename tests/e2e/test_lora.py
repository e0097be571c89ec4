"""Training adapters as a user does it: trained, killed and continued, scored, taken home for PEFT and merged."""

import json
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from huggingface_hub import ModelCard

from lm_jax.checkpoints.orbax import Checkpoints
from tests.e2e import common
from tests.e2e.common import SMALL_SCORE, SMALL_TRAIN, TIMING, Fork, arguments, fork

ADAPTERS = ("lora.rank=3", "lora.alpha=6", "lora.dropout=0.2")
LORA = (*ADAPTERS, "optim.learning_rate=1e-2", "epochs=4", "checkpoints.every=4")
ROWS = [{"prompt": f"say {i}", "response": f"{i} cats sat on the mat"} for i in range(3)]


class Place:
    def __init__(self, path: Path):
        self.path = path
        self.model = common.make_model(path / "model")
        self.pairs = common.make_pairs(path / "pairs.jsonl")

    def flags(self, name: str, *settings: str) -> list[str]:
        given = (f"model={self.model}", f"input={self.pairs}", f"eval_input={self.pairs}", "eval_every=5")
        return arguments(
            "musc_train", *given, f"output={self.path / name}", *SMALL_TRAIN, *LORA, *settings, preset="tiny"
        )

    def train(self, name: str, *settings: str, devices: int = 1) -> list[dict]:
        fork("musc_train", *self.flags(name, *settings), devices=devices).ok()
        return common.read_rows(self.path / name / "metrics.jsonl")

    def export(self, name: str, *settings: str) -> Path:
        output = self.path / f"{name}-hf"
        shutil.rmtree(output, ignore_errors=True)
        given = (f"model={self.path / name}", f"output={output}", "dtype=float32")
        fork("export_hf", *arguments("export_hf", *given, *settings)).ok()
        return output

    def score(self, model: Path | str, rows: list[dict] = ROWS) -> np.ndarray:
        rows, output = common.write_rows(self.path / "rows.jsonl", rows), self.path / "scored.jsonl"
        fork("score", *arguments("score", f"model={model}", f"input={rows}", f"output={output}", *SMALL_SCORE)).ok()
        return np.concatenate([row["token_logprobs"] for row in common.read_rows(output)])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def trained(place) -> list[dict]:
    return place.train("run")


def untimed(metrics):
    return [{k: v for k, v in r.items() if k not in TIMING} for r in metrics]


def test_adapters_learn_and_the_reference_is_the_base(trained):
    steps = [r for r in trained if "loss" in r]
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert steps[-1]["loss"] < 0.5 and steps[-1]["num_compiles"] == 1
    evaluated = [r for r in trained if "eval_loss" in r]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"] < np.log(2)


@pytest.mark.slow
def test_two_devices_are_one(place, trained):
    sharded = place.train("sharded", "mesh.fsdp=2", devices=2)
    for ours, theirs in zip(untimed(sharded), untimed(trained), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_evaluation_has_no_dropout(place, trained):
    rows = [{"prompt": r["prompt"], "response": r["chosen"]} for r in common.read_rows(Path(place.pairs))]
    scored = place.score(place.path / "run", rows)
    evaluated = [r for r in trained if "eval_loss" in r][-1]
    assert evaluated["eval_logps/chosen"] == pytest.approx(scored.sum() / len(rows), abs=1e-3)
    assert abs(evaluated["eval_logps/chosen"] - [r for r in trained if "loss" in r][-1]["logps/chosen"]) > 1e-2


def torch_logprobs(model, tokenizer):
    found = []
    for row in ROWS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(row["prompt"] + row["response"] + tokenizer.eos_token)["input_ids"]
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([whole])).logits[0, :-1], -1)
        ids = torch.tensor(whole[1:])[:, None]
        found.append(logp.gather(1, ids)[len(prompt) - 1 :, 0].numpy())
    return np.concatenate(found)


def test_what_is_taken_home_is_what_was_trained(place, trained):
    ours, untrained = place.score(place.path / "run"), place.score(place.model)
    assert np.abs(ours - untrained).max() > 0.1
    base = transformers.AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32)
    adapter = place.export("run", "adapter=True")
    assert not list(adapter.glob("model*.safetensors"))
    card = ModelCard.load(adapter / "README.md")
    assert card.data.library_name == "peft" and "lora" in card.data.tags and "lora.dropout = 0.2" in card.text
    assert json.loads((adapter / "adapter_config.json").read_text())["lora_dropout"] == 0.2
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
    joined = peft.PeftModel.from_pretrained(base, adapter)
    np.testing.assert_allclose(torch_logprobs(joined, tokenizer), ours, rtol=0, atol=1e-4)
    merged = transformers.AutoModelForCausalLM.from_pretrained(place.export("run"), dtype=torch.float32)
    np.testing.assert_allclose(torch_logprobs(merged, tokenizer), ours, rtol=0, atol=1e-4)


def test_a_run_goes_on_from_adapters(place, trained):
    """They are merged, and are part of the reference."""
    first = place.train("second", f"model={place.path / 'run'}", "lora.rank=0", "optim.learning_rate=1e-4")[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    last = [r for r in trained if "loss" in r][-1]
    assert first["logps/chosen"] != pytest.approx(last["logps/chosen"], rel=1e-4)  # the last step moved it


def test_adapters_on_adapters_are_taken_home_as_one(place, trained, tmp_path):
    """Trained one on the other with other ranks, scales and targets; PEFT loads one adapter, on the model below all."""
    place.train("stacked", f"model={place.path / 'run'}", "lora.rank=2", "lora.targets=q_proj,down_proj", "max_steps=8")
    ours = place.score(place.path / "stacked")
    assert np.abs(ours - place.score(place.path / "run")).max() > 1e-2
    adapter = place.export("stacked", "adapter=True")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == place.model and settings["r"] == 5
    base = transformers.AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32)
    joined = peft.PeftModel.from_pretrained(base, adapter)
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
    np.testing.assert_allclose(torch_logprobs(joined, tokenizer), ours, rtol=0, atol=1e-4)
    np.testing.assert_allclose(place.score(adapter), ours, rtol=0, atol=1e-4)  # and here
    # On a run that has trained every parameter there is no model that PEFT could load
    place.train("whole", f"model={place.path / 'run'}", "lora.rank=0", "max_steps=1")
    place.train("above", f"model={place.path / 'whole'}", "max_steps=1")
    flags = arguments("export_hf", f"model={place.path / 'above'}", f"output={tmp_path / 'no'}", "adapter=True")
    line = refused("export_hf", *flags)
    assert f"its adapters belong to the run {place.path / 'whole'}, which PEFT cannot load; leave" in line


@pytest.mark.slow
def test_killed_and_continued(place, trained):
    flags = place.flags("killed")
    run, saved = Fork("musc_train", *flags), place.path / "killed/checkpoints/4"
    while not saved.exists():
        assert run.process.is_alive(), run.wait().stderr[-2000:]
        time.sleep(0.001)
    run.process.kill()
    assert run.wait().status == -signal.SIGKILL
    fork("musc_train", *flags).ok()
    assert untimed(common.read_rows(place.path / "killed/metrics.jsonl")) == untimed(trained)
    states = []
    for name in ("run", "killed"):
        with Checkpoints(str(place.path / name / "checkpoints"), keep=None) as checkpoints:
            states.append(checkpoints.restore({"params": None, "optimizer": None}))
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert sum(x.size for x in jax.tree.leaves(states[0]["params"])) < 10_000  # adapters alone


def refused(name, *flags) -> str:
    done = fork(name, *flags)
    assert done.status == 1 and done.stderr.splitlines()[-1].startswith("error: ")
    return done.stderr.splitlines()[-1]


def test_refused(place, trained, tmp_path):
    assert "no module" in refused("musc_train", *place.flags("no", "lora.targets=w_proj"))
    assert not (place.path / "no").exists()
    full = arguments("export_hf", f"model={place.model}", f"output={tmp_path / 'a'}", "adapter=True")
    assert "no run that trained adapters" in refused("export_hf", *full)
    # Other weights in the base's place
    model = tmp_path / "model"
    shutil.copytree(place.model, model)
    fork("musc_train", *place.flags("moved", f"model={model}", "max_steps=1")).ok()
    common.make_model(model, seed=1)
    score = arguments("score", f"model={place.path / 'moved'}", f"input={place.pairs}", f"output={tmp_path / 'b'}")
    assert "its adapters belong to other weights" in refused("score", *score)
    assert "begun on other weights" in refused("musc_train", *place.flags("moved", f"model={model}", "max_steps=1"))
    shutil.rmtree(model)
    assert "its adapters need the model that they were trained on" in refused("score", *score)
