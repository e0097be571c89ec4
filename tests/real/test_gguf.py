"""A real GGUF file as `model`: the numbers of the directory that transformers makes of it; what is exported loads."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.real.common import Model, launch, read, write

ROWS = 8
TOLERANCE = 1e-5  # nats


@pytest.fixture(scope="module")
def file(model):
    found = model.directory.with_suffix(model.directory.suffix + ".gguf")
    return found if found.exists() else pytest.skip(f"no {found.name} beside the directory")


@pytest.fixture(scope="module")
def directory(model, file, tmp_path_factory):
    """The file as transformers reads it, in fp32, with the tokenizer of the model's own directory."""
    output = tmp_path_factory.mktemp("gguf") / "theirs"
    network = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    if hasattr(network.config, "quantization_config"):  # what was read is not quantised any more
        del network.config.quantization_config
    network.save_pretrained(output)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (output / name).write_bytes((model.directory / name).read_bytes())
    return output


@pytest.fixture(scope="module")
def rows(shared_data, tmp_path_factory):
    found = [row for row in read(shared_data / "ifeval_responses_gpt4.jsonl") if len(row["response"].split()) < 256]
    rows = [
        {"prompt": [{"role": "user", "content": row["prompt"]}], "response": row["response"]}
        for row in found[:: len(found) // ROWS][:ROWS]
    ]
    return write(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)


def scored(model, rows, output):
    launch("score", f"model={model}", f"input={rows}", f"output={output}", "dtype=float32", "batch.rows=1")
    return read(output)


def test_log_probs_are_those_of_the_directory(file, directory, rows, tmp_path):
    ours, theirs = scored(file, rows, tmp_path / "a.jsonl"), scored(directory, rows, tmp_path / "b.jsonl")
    for a, b in zip(ours, theirs, strict=True):  # the tokenizer and the template too
        assert (a["prompt_token_ids"], a["token_ids"]) == (b["prompt_token_ids"], b["token_ids"])
    scores = [np.concatenate([row["token_logprobs"] for row in rows]) for rows in (ours, theirs)]
    worst = np.abs(scores[0] - scores[1]).max()
    print(f"log-probs {worst:.2e}")
    assert worst <= TOLERANCE


def test_what_is_exported_loads(file, directory, tmp_path):
    launch("export_hf", f"model={file}", f"output={tmp_path / 'out'}", "dtype=float32")
    exported, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    original = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.tensor([Model(tmp_path / "out").chat("Name three rivers.")])
    assert ids.tolist() == [Model(directory).chat("Name three rivers.")]
    with torch.inference_mode():
        assert torch.allclose(exported.eval()(ids).logits, original.eval()(ids).logits, rtol=0, atol=1e-4)
