"""Weights saved from within a wrapper are read as the model's own; what is no causal model's is named with its cure."""

import re
import shutil

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from lm_jax.checkpoints.hf import export_hf, load_params
from lm_jax.errors import UserError
from lm_jax.models.registry import read_model_config
from lm_jax.models.weights import flatten
from tests.checkpoints import edit_config, make_checkpoint

FILE = "model.safetensors"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Tiny Llamas, tied and not; not to be written to."""
    root = tmp_path_factory.mktemp("sources")
    for tied in (False, True):
        make_checkpoint(root / str(tied), "llama", tie_word_embeddings=tied)
    return root


@pytest.fixture
def model(sources, tmp_path):
    """(a directory to write into, its tensors), untied."""
    path = shutil.copytree(sources / "False", tmp_path / "model")
    return path, load_file(path / FILE)


def load(path):
    return flatten(load_params(path, read_model_config(path), None))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_array_equal(found[path], x)


def renamed(tensors, change):
    return {change(name): x for name, x in tensors.items()}


def in_layers(part):
    return lambda name: re.sub(r"(layers\.\d+\.)", rf"\1{part}.", name)


WRAPPERS = {
    "torch.compile": lambda n: f"_orig_mod.{n}",
    "torch.compile of each layer": in_layers("_orig_mod"),
    "DistributedDataParallel": lambda n: f"module.{n}",
    "FSDP": in_layers("_fsdp_wrapped_module"),
    "FSDP around all, with activation checkpointing": lambda n: (
        f"_fsdp_wrapped_module.{in_layers('_fsdp_wrapped_module._checkpoint_wrapped_module')(n)}"
    ),
    "DistributedDataParallel of torch.compile": lambda n: f"module._orig_mod.{n}",
    "a PEFT model": lambda n: f"base_model.model.{n.replace('_proj.weight', '_proj.base_layer.weight')}",
    "Lightning": lambda n: f"model.{n}",
    "Lightning of torch.compile": lambda n: f"model._orig_mod.{n}",
    "TRL's value head model": lambda n: f"pretrained_model.{n}",
    "a trainer of another's": lambda n: f"policy.{n}",
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_of_a_wrapper_are_taken_off(wrapper, model, capsys):
    path, tensors = model
    expected = load(path)
    assert capsys.readouterr().err == ""
    save_file(renamed(tensors, WRAPPERS[wrapper]), path / FILE)
    assert_same(load(path), expected)
    (line,) = capsys.readouterr().err.splitlines()
    assert "its tensors have other names" in line


def test_the_names_that_torch_and_peft_make_themselves(model):
    """Oracle: torch.compile, DataParallel and PEFT, whatever they call their parts."""
    path, _ = model
    expected = load(path)
    causal = transformers.AutoModelForCausalLM.from_pretrained(path)
    # Before PEFT, which puts its layers into the model itself
    states = [torch.compile(causal).state_dict(), torch.nn.DataParallel(causal).state_dict()]
    wrapped = peft.get_peft_model(causal, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    states.append({n: x for n, x in wrapped.state_dict().items() if "lora_" not in n})
    for state in states:
        assert QUERY not in state
        save_file({n: x.numpy().copy() for n, x in state.items()}, path / FILE)
        assert_same(load(path), expected)
    save_file({n: x.numpy().copy() for n, x in wrapped.state_dict().items()}, path / FILE)
    with pytest.raises(UserError, match="lora_A.*adapters that are not merged.*merge_and_unload"):
        load(path)


def test_a_base_model_saved_alone(sources, tmp_path):
    """As AutoModel saves it, and as Qwen3-Embedding is published."""
    for tied in (True, False):
        path = tmp_path / str(tied)
        transformers.AutoModel.from_pretrained(sources / str(tied)).save_pretrained(path)
        assert "embed_tokens.weight" in load_file(path / FILE)
        if not tied:
            with pytest.raises(UserError, match="lm_head.weight missing.*AutoModelForCausalLM"):
                load(path)
            continue
        assert_same(load(path), load(sources / "True"))
        export_hf(
            load_params(path, read_model_config(path), None), read_model_config(path), tmp_path / "out", path, "float32"
        )
        again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys")) and again.config.architectures == [
            "LlamaForCausalLM"
        ]


@pytest.mark.parametrize("architecture", ["LlamaModel", "FSDPLlamaForCausalLM", None])
def test_architectures_that_are_the_same_model(architecture, model):
    path, _ = model
    expected = load(path)
    edit_config(path, architectures=None if architecture is None else [architecture])
    assert_same(load(path), expected)


HEADS = {
    "v_head.summary.weight": (1, 32),
    "v_head.summary.bias": (1,),
    "score.weight": (1, 32),
    "value_head.weight": (1, 32),
    "reward_head.weight": (1, 32),
}


def test_other_heads_are_left_out_with_a_line(model, capsys):
    path, tensors = model
    expected = load(path)
    for prefix in ("", "module."):
        heads = {name: np.ones(shape, np.float32) for name, shape in HEADS.items()}
        save_file(renamed(tensors | heads, lambda n, p=prefix: p + n), path / FILE)
        assert_same(load(path), expected)
        assert "v_head.summary" in capsys.readouterr().err


def test_tables_that_follow_from_the_config_are_left_out(model, capsys):
    path, tensors = model
    expected = load(path)
    names = ["model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"]
    names += [f"model.layers.1.self_attn.rotary_emb.{table}" for table in ("inv_freq", "cos_cached", "sin_cached")]
    save_file(tensors | {name: np.ones(4, np.float32) for name in names}, path / FILE)
    assert_same(load(path), expected)
    assert capsys.readouterr().err == ""


def drop(pattern):
    return lambda tensors: {n: x for n, x in tensors.items() if not re.search(pattern, n)}


def add(*names):
    return lambda tensors: tensors | {name: np.ones((2, 2), np.float32) for name in names}


REFUSED = {
    "adapters beside": (add(QUERY.replace("weight", "lora_A.default.weight")), "not merged.*merge_and_unload"),
    "modules to save": (add("lm_head.modules_to_save.default.weight"), "not merged"),
    "GPTQ": (add(QUERY.replace("weight", "qweight")), "quantised weights.*unquantised"),
    "bitsandbytes": (add(f"{QUERY}.absmax"), "quantised"),
    "FP8": (add(f"{QUERY}_scale_inv"), "quantised"),
    "fused": (lambda t: drop("[qkv]_proj")(t) | add("model.layers.0.self_attn.qkv_proj.weight")({}), "fused"),
    "Meta": (lambda t: add("tok_embeddings.weight", "layers.0.attention.wq.weight")({}), "Meta's or Mistral's own"),
    "experts": (add("model.layers.0.mlp.experts.0.gate_proj.weight"), "mixture of experts"),
    "FSDP's flat": (add("_flat_param"), "FSDP's flat.*FULL_STATE_DICT"),
    "two models": (lambda t: t | renamed(t, lambda n: f"reference.{n}"), r"2 models.*reference\.model\."),
    "the same twice": (lambda t: t | {f"module.{QUERY}": t[QUERY]}, f"{QUERY} stands there twice"),
    "too few layers": (drop(r"layers\.1\."), "1 layers, config.json says 2"),
    "one missing": (drop("layers.0.mlp.up"), r"up_proj.weight missing.*all of their files"),
    "no output embedding": (drop("lm_head"), "lm_head.weight missing.*AutoModelForCausalLM.*tie_word_embeddings"),
    "ZeRO-3": (lambda t: t | {QUERY: np.zeros(0, np.float32)}, "q_proj.weight without elements.*ZeRO-3"),
    "unknown": (add("model.layers.0.self_attn.k_proj.offset"), "k_proj.offset unknown for this config.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_causal_model_is_named_with_its_cure(case, model):
    path, tensors = model
    change, message = REFUSED[case]
    save_file(change(tensors), path / FILE)
    with pytest.raises(UserError, match=message) as error:
        load(path)
    line = str(error.value)
    assert str(path) in line and "\n" not in line and "download" not in line
