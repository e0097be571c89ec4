"""A vocabulary that the mesh does not divide, as 32,001 words on two devices: as on one device, and cut off again."""

import json

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from tests.e2e import common
from tests.e2e.common import SMALL_SCORE, SMALL_TRAIN, TIMING, arguments, fork

ON_TWO = ("mesh.data=1", "mesh.tensor=2")
WORDS = 321


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("place")
    common.make_model(path / "model", vocab_size=WORDS)
    common.make_pairs(path / "pairs.jsonl")
    return path


def train(place, name, *settings, devices=1):
    given = (f"model={place / 'model'}", f"input={place / 'pairs.jsonl'}", f"output={place / name}", "max_steps=3")
    flags = arguments("musc_train", *given, *SMALL_TRAIN, "optim.learning_rate=1e-3", *settings, preset="tiny")
    fork("musc_train", *flags, devices=devices).ok()
    rows = [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
    near_0 = {"rewards/accuracies"}  # of margins that rounding can turn
    return [{k: v for k, v in row.items() if k not in TIMING | near_0} for row in rows]


def test_a_run_on_two_devices_is_that_of_one(place):
    two, one = train(place, "two", *ON_TWO, devices=2), train(place, "one")
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    # Opened on one device and on two, with as many words as the model has
    exported = []
    for name, settings, devices in (("a", (), 1), ("b", ON_TWO, 2)):
        given = (f"model={place / 'two'}", f"output={place / name}", "dtype=float32", *settings)
        fork("export_hf", *arguments("export_hf", *given), devices=devices).ok()
        exported.append(load_file(place / name / "model.safetensors"))
        model, info = transformers.AutoModelForCausalLM.from_pretrained(place / name, output_loading_info=True)
        assert model.get_output_embeddings().weight.shape[0] == WORDS and not info["mismatched_keys"]
    for name, x in exported[0].items():
        np.testing.assert_array_equal(x, exported[1][name])
    before = load_file(place / "model" / "model.safetensors")
    assert max(np.abs(x - before[name]).max() for name, x in exported[0].items()) > 1e-4


def test_scored_and_generated_from_on_two_devices(place):
    rows = common.write_rows(place / "rows.jsonl", [{"prompt": f"say {i}", "response": "the cat"} for i in range(4)])
    prompts = common.write_rows(place / "prompts.jsonl", [{"prompt": f"say {i}"} for i in range(8)])
    found = []
    for name, settings, devices in (("1", (), 1), ("2", ON_TWO, 2)):
        given = (f"model={place / 'model'}", f"input={rows}", f"output={place / f'scored-{name}.jsonl'}", *settings)
        fork("score", *arguments("score", *given, *SMALL_SCORE), devices=devices).ok()
        scored = common.read_rows(place / f"scored-{name}.jsonl")
        given = (f"model={place / 'model'}", f"input={prompts}", f"output={place / f'made-{name}.jsonl'}", *settings)
        sampling = ("temperature=1.5", "repetition_penalty=1.2", "max_new_tokens=24", "decode.max_length=64")
        fork("generate", *arguments("generate", *given, *sampling), devices=devices).ok()
        texts = [row["response"] for row in common.read_rows(place / f"made-{name}.jsonl")]
        found.append((np.concatenate([row["token_logprobs"] for row in scored]), texts))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=0, atol=1e-5)
    assert found[0][1] == found[1][1] and any(found[0][1])
