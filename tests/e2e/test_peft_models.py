"""A PEFT adapter directory where a command takes a model: generated from, scored, trained on, a reference, exported."""

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

from tests.e2e import common
from tests.e2e.common import SMALL_SCORE, SMALL_TRAIN, arguments, fork
from tests.parity.test_peft_models import save_adapter

ROWS = [{"prompt": f"say {i}", "response": f"{i} cats sat on the mat"} for i in range(3)]


class Place:
    def __init__(self, path: Path):
        self.path = path
        base = common.make_model(path / "base")
        self.adapter = path / "adapter"
        torch_model = save_adapter(base, self.adapter, r=3, lora_alpha=6, target_modules="all-linear")
        # What the commands make of it is compared with the model that PEFT merges
        torch_model.merge_and_unload().save_pretrained(path / "merged")
        transformers.AutoTokenizer.from_pretrained(base).save_pretrained(path / "merged")
        self.base, self.rows = base, common.write_rows(path / "rows.jsonl", ROWS)
        self.pairs = common.make_pairs(path / "pairs.jsonl")

    def score(self, model, name="scored") -> np.ndarray:
        output = self.path / f"{name}.jsonl"
        fork(
            "score", *arguments("score", f"model={model}", f"input={self.rows}", f"output={output}", *SMALL_SCORE)
        ).ok()
        scored = np.concatenate([row["token_logprobs"] for row in common.read_rows(output)])
        output.unlink()
        return scored

    def train(self, name: str, *settings: str) -> list[dict]:
        given = (f"input={self.pairs}", f"output={self.path / name}", "max_steps=2", *SMALL_TRAIN)
        fork("musc_train", *arguments("musc_train", *given, *settings, preset="tiny")).ok()
        return [row for row in common.read_rows(self.path / name / "metrics.jsonl") if "loss" in row]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


def test_scored(place):
    ours = place.score(place.adapter)
    np.testing.assert_allclose(ours, place.score(place.path / "merged"), rtol=0, atol=1e-5)
    assert np.abs(ours - place.score(place.base)).max() > 0.1


def test_generated_from(place):
    texts, prompts = [], common.write_rows(place.path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in ROWS])
    for name in ("adapter", "merged"):
        output = place.path / f"generated-{name}.jsonl"
        given = (f"model={place.path / name}", f"input={prompts}", f"output={output}", "temperature=0.0")
        fork("generate", *arguments("generate", *given, "max_new_tokens=16", "decode.max_length=64")).ok()
        texts.append([row["response"] for row in common.read_rows(output)])
    assert texts[0] == texts[1] and any(texts[0])


def test_trained_on_and_a_reference(place):
    """As the start it is merged; as the reference of a model that starts there, margins are 0."""
    both = (f"model={place.adapter}", f"reference={place.adapter}")
    first = place.train("full", *both, "lora.rank=0")[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    merged = place.train("merged-run", f"model={place.path / 'merged'}", "lora.rank=0")[0]
    assert first["logps/chosen"] == pytest.approx(merged["logps/chosen"], abs=1e-3)
    beside = place.train("beside", f"model={place.base}", f"reference={place.adapter}", "lora.rank=0")[0]
    assert abs(beside["rewards/margins"]) > 1e-3


def test_adapters_on_it_are_exported_with_it(place):
    place.train("lora", f"model={place.adapter}", "lora.rank=2", "lora.alpha=4", "optim.learning_rate=1e-2")
    ours = place.score(place.path / "lora")
    output = place.path / "home"
    fork("export_hf", *arguments("export_hf", f"model={place.path / 'lora'}", f"output={output}", "adapter=True")).ok()
    base = transformers.AutoModelForCausalLM.from_pretrained(place.base, dtype=torch.float32)
    assert peft.PeftConfig.from_pretrained(output).base_model_name_or_path == place.base
    peft.PeftModel.from_pretrained(base, output).merge_and_unload().save_pretrained(place.path / "home-merged")
    transformers.AutoTokenizer.from_pretrained(output).save_pretrained(place.path / "home-merged")
    np.testing.assert_allclose(place.score(place.path / "home-merged"), ours, rtol=0, atol=1e-4)


def test_merged_by_export(place):
    output = place.path / "out"
    given = (f"model={place.adapter}", f"output={output}", "dtype=float32")
    fork("export_hf", *arguments("export_hf", *given)).ok()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place.path / "merged").state_dict()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, x in model.state_dict().items():
        torch.testing.assert_close(x, theirs[name], rtol=0, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(output).eos_token


def test_refused_in_one_line(place):
    flags = arguments("score", f"model={place.path / 'gone'}", f"input={place.rows}", f"output={place.path / 'x'}")
    (place.path / "gone").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (place.path / "gone" / name).write_bytes((place.adapter / name).read_bytes().replace(b"place", b"where"))
    assert "set base_model_name_or_path in adapter_config.json" in fork("score", *flags).error()
