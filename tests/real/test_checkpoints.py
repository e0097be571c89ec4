"""A real checkpoint that was read and written again holds the same bits, and transformers loads it."""

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from lm_jax.checkpoints.hf import export_hf, load_params
from lm_jax.models.registry import read_model_config
from lm_jax.models.weights import flatten


def tensors(directory) -> dict[str, torch.Tensor]:
    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            found |= {name: content.get_tensor(name) for name in content.keys()}
    return found


def test_import_export_import(model, tmp_path):
    config = read_model_config(str(model.directory))
    params = load_params(str(model.directory), config, None)
    output = tmp_path / "exported"
    export_hf(params, config, str(output), dtype="bfloat16", source_dir=str(model.directory))
    before, after = tensors(model.directory), tensors(output)
    assert before.keys() - {"lm_head.weight"} <= after.keys() <= before.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    again = flatten(load_params(str(output), read_model_config(str(output)), None))
    for path, value in flatten(params).items():
        assert np.array_equal(value, again[path]), path
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (output / name).read_bytes() == (model.directory / name).read_bytes()
    loaded, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    original = model.torch("bfloat16")
    ids = torch.tensor([model.chat("Name three rivers.")])
    with torch.inference_mode():
        assert torch.equal(loaded.eval()(ids).logits, original(ids).logits)
