"""A PEFT adapter as the model: its base is found and its log-probs are PEFT's; what computes otherwise is refused."""

import json
import shutil

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

from lm_jax.checkpoints.peft import export_peft
from lm_jax.checkpoints.runs import open_model
from lm_jax.config import MeshConfig
from lm_jax.data.tokenizers import load_tokenizer
from lm_jax.errors import UserError
from lm_jax.models.registry import read_model_config
from lm_jax.sharding import make_mesh
from tests.checkpoints import make_checkpoint, make_tokenizer
from tests.parity.test_lora import TOLERANCE, our_logprobs, their_logprobs

FAMILIES = ("llama", "qwen2", "qwen3")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PLAIN = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
KINDS = {
    "all-linear": ("llama", {**PLAIN, "lora_dropout": 0.3}),
    "rslora": ("qwen3", {"r": 5, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}),
    "patterns": (
        "qwen2",
        {
            "r": 4,
            "target_modules": ATTENTION,
            "rank_pattern": {"q_proj": 2, r"model\.layers\.1\.self_attn\.v_proj": 7},
            "alpha_pattern": {r"layers\.0\.self_attn\..*": 9, "o_proj": 1},
        },
    ),
    "some layers": ("llama", {**PLAIN, "target_modules": ["up_proj", "v_proj"], "layers_to_transform": [1]}),
    "a pattern of modules": ("qwen2", {**PLAIN, "target_modules": r".*\.(0\.self_attn\.q|1\.mlp\.down)_proj"}),
    "left out": ("llama", {**PLAIN, "target_modules": ATTENTION, "exclude_modules": r".*layers\.0\..*"}),
    "gaussian": ("llama", {**PLAIN, "init_lora_weights": "gaussian"}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    for family in FAMILIES:
        make_checkpoint(root / family, family)
        make_tokenizer(root / family)
    return root


def save_adapter(base, path, dtype=torch.float32, **settings):
    """As PEFT saves it after training, and the torch model that it belongs to."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
                parameter.data = parameter.data.to(dtype).to(torch.float32)
    model.save_pretrained(path)
    if dtype != torch.float32:
        tensors = peft.utils.load_peft_weights(str(path), device="cpu")
        from safetensors.torch import save_file

        save_file({n: x.to(dtype) for n, x in tensors.items()}, path / "adapter_model.safetensors")
    return model


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(1, 1, 1))


def edit(path, **settings):
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def assert_like(model, source, mesh):
    with torch.no_grad():
        theirs = their_logprobs(model).numpy()
    ours = np.asarray(our_logprobs(source.load_params(mesh, "float32"), source.config))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    with torch.no_grad(), model.disable_adapter():
        assert np.abs(ours - their_logprobs(model).numpy()).max() > 0.1  # the adapters matter


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_are_pefts(kind, bases, mesh, tmp_path):
    family, settings = KINDS[kind]
    model = save_adapter(bases / family, tmp_path / "adapter", **settings)
    source = open_model(str(tmp_path / "adapter"))
    assert source.base is not None and source.base.name == str(bases / family)
    assert_like(model, source, mesh)
    # What PEFT makes of what is read: all of it in a single rank and scale
    adapters, lora, base = source.stacked_adapters(mesh)
    export_peft(adapters, source.config, lora, tmp_path / "again", source.directory, base)
    plain = transformers.AutoModelForCausalLM.from_pretrained(bases / family, attn_implementation="eager")
    assert_like(peft.PeftModel.from_pretrained(plain, tmp_path / "again").eval(), source, mesh)


def test_half_precision_and_names_of_older_versions(bases, mesh, tmp_path):
    path = tmp_path / "adapter"
    model = save_adapter(bases / "llama", path, torch.bfloat16, **PLAIN)
    assert_like(model, open_model(str(path)), mesh)
    from safetensors.numpy import load_file, save_file

    weights = path / "adapter_model.safetensors"
    tensors = load_file(weights)
    for change in (
        lambda n: n.replace("lora_A.", "lora_A.default."),
        lambda n: n.replace("model.model", "model._orig_mod.model"),
    ):
        save_file({change(n): x for n, x in tensors.items()}, weights)
        assert_like(model, open_model(str(path)), mesh)


def test_the_base_is_found_beside_the_adapter_and_from_here(bases, mesh, tmp_path, monkeypatch):
    shutil.copytree(bases / "llama", tmp_path / "base")
    model = save_adapter(tmp_path / "base", tmp_path / "adapter", **PLAIN)
    edit(tmp_path / "adapter", base_model_name_or_path="../base")
    assert_like(model, open_model(str(tmp_path / "adapter")), mesh)
    monkeypatch.chdir(tmp_path)
    edit(tmp_path / "adapter", base_model_name_or_path="base")
    assert_like(model, open_model("adapter"), mesh)
    assert open_model("adapter").name == str(tmp_path / "adapter")


def test_an_adapter_on_an_adapter(bases, mesh, tmp_path):
    """PEFT cannot load one; here the base is whatever opens as a model."""
    first = save_adapter(bases / "llama", tmp_path / "first", **PLAIN)
    merged = first.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    second = save_adapter(tmp_path / "merged", tmp_path / "second", r=2, target_modules=["o_proj", "q_proj"])
    edit(tmp_path / "second", base_model_name_or_path=str(tmp_path / "first"))
    source = open_model(str(tmp_path / "second"))
    assert_like(second, source, mesh)
    # As one adapter, which PEFT loads
    adapters, lora, base = source.stacked_adapters(mesh)
    assert (lora.rank, lora.scale, base) == (6, 1.0, str(bases / "llama"))
    export_peft(adapters, source.config, lora, tmp_path / "one", source.directory, base)
    plain = transformers.AutoModelForCausalLM.from_pretrained(bases / "llama", attn_implementation="eager")
    assert_like(peft.PeftModel.from_pretrained(plain, tmp_path / "one").eval(), source, mesh)


def test_the_adapters_own_tokenizer_comes_first(bases, tmp_path):
    save_adapter(bases / "llama", tmp_path / "adapter", **PLAIN)
    assert open_model(str(tmp_path / "adapter")).directory == str(bases / "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bases / "llama")
    tokenizer.chat_template = "mine"
    tokenizer.save_pretrained(tmp_path / "adapter")
    source = open_model(str(tmp_path / "adapter"))
    assert load_tokenizer(source.directory).chat_template == "mine"
    assert read_model_config(source.directory) == source.config


def test_the_fingerprint_is_of_all_that_counts(bases, tmp_path):
    for number, family in enumerate(("llama", "llama", "qwen2")):
        save_adapter(bases / family, tmp_path / str(number), **PLAIN)

    def fingerprint(name):
        return open_model(str(tmp_path / name)).fingerprint

    assert fingerprint("0") == fingerprint("1") != fingerprint("2")
    edit(tmp_path / "1", lora_alpha=7)
    assert fingerprint("1") != fingerprint("0")
    edit(tmp_path / "1", lora_alpha=PLAIN["lora_alpha"], lora_dropout=0.5)
    tensors = tmp_path / "1" / "adapter_model.safetensors"
    assert fingerprint("1") == fingerprint("0")
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x01")
    assert fingerprint("1") != fingerprint("0")


UNREAD = {
    "use_dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "bias": {"bias": "lora_only"},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "lora_bias": {"lora_bias": True},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
}


@pytest.mark.parametrize("key", UNREAD)
def test_settings_that_compute_otherwise_are_refused_by_name(key, bases, tmp_path):
    save_adapter(bases / "llama", tmp_path / "adapter", **PLAIN | UNREAD[key])
    with pytest.raises(UserError, match=rf"adapter_config.json: {key}=.*merge_and_unload"):
        open_model(str(tmp_path / "adapter"))


@pytest.mark.parametrize("kind", ["IA3Config", "PromptTuningConfig", "LoHaConfig"])
def test_other_kinds_are_refused_by_name(kind, bases, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(bases / "llama")
    more = {"num_virtual_tokens": 2} if "Prompt" in kind else {"target_modules": ["q_proj"]}
    if kind == "IA3Config":
        more["feedforward_modules"] = []
    peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **more)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="peft_type='[A-Z0-9_]+' is not read"):
        open_model(str(tmp_path / "adapter"))


def test_embeddings_are_named(bases, tmp_path):
    save_adapter(bases / "llama", tmp_path / "adapter", r=2, target_modules=["q_proj", "embed_tokens", "lm_head"])
    with pytest.raises(UserError, match=r"(embed_tokens|lm_head).*only LoRA on the projections.*merge_and_unload"):
        open_model(str(tmp_path / "adapter"))


def test_refused(bases, tmp_path):
    path = tmp_path / "adapter"
    save_adapter(bases / "llama", path, **PLAIN)
    weights = (path / "adapter_model.safetensors").read_bytes()

    def refused(message):
        with pytest.raises(UserError, match=message) as error:
            open_model(str(path))
        assert "\n" not in str(error.value)

    with monkeypatched(path, base_model_name_or_path="/nowhere/base"):
        refused("an adapter of /nowhere/base.*no such directory.*set base_model_name_or_path")
    with monkeypatched(path, base_model_name_or_path=None):
        refused("names no base model; set base_model_name_or_path")
    with monkeypatched(path, base_model_name_or_path="."):
        refused("an adapter of itself")
    make_checkpoint(tmp_path / "wide", "llama", intermediate_size=64)
    with monkeypatched(path, base_model_name_or_path=str(tmp_path / "wide")):
        refused(r"mlp.* expected, found.*is it an adapter of another model")
    with monkeypatched(path, revision="v2"):
        refused("revision='v2'")
    with monkeypatched(path, target_modules=["q_proj"], something_new={"x": 1}):
        refused("something_new=")
    with monkeypatched(path, target_modules=["q_proj", "v_proj"], layers_to_transform=None):
        open_model(str(path))  # more than named is harmless
    shutil.copy(bases / "llama" / "model.safetensors", path)
    refused("holds a model and an adapter")
    (path / "model.safetensors").unlink()
    (path / "adapter_model.safetensors").write_bytes(weights[:-10])
    refused("adapter_model.safetensors: truncated")
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    refused("is no safetensors file; in PEFT load it")
    (path / "adapter_model.bin").unlink()
    refused("adapter_model.safetensors: this weight file is missing")


class monkeypatched:
    """Settings of an adapter for a while."""

    def __init__(self, path, **settings):
        self._path, self._settings = path, settings

    def __enter__(self):
        self._before = (self._path / "adapter_config.json").read_text()
        edit(self._path, **self._settings)

    def __exit__(self, *_):
        (self._path / "adapter_config.json").write_text(self._before)


def test_an_adapter_that_was_not_copied_whole(bases, tmp_path):
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "adapter"
    save_adapter(bases / "llama", path, r=2, target_modules=["q_proj", "v_proj"])
    tensors = load_file(path / "adapter_model.safetensors")
    save_file({n: x for n, x in tensors.items() if "layers.1.self_attn.v" not in n}, path / "adapter_model.safetensors")
    with pytest.raises(
        UserError, match=r"layers.1.self_attn.v_proj without the adapter that adapter_config.json names"
    ):
        open_model(str(path))
    save_file({n: x for n, x in tensors.items() if "lora_A" in n}, path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"lora_A \[r, 32\] and lora_B \[32, r\] expected"):
        open_model(str(path))
    assert jax.device_count() == 1
