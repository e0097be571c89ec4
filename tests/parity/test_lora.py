"""Adapters equal those of PEFT: log-probs joined and merged, gradients, and the exported directory."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from lm_jax.checkpoints.hf import load_params
from lm_jax.checkpoints.peft import export_peft, peft_tensors
from lm_jax.config import ComputeConfig, LoraConfig, MeshConfig
from lm_jax.data.packing import Segment, fill_rows
from lm_jax.errors import UserError
from lm_jax.models.forward import packed_logprobs
from lm_jax.models.lora import adapter_table, dropout_key, init_adapters, join, merge
from lm_jax.models.registry import read_model_config
from lm_jax.models.weights import flatten, nest
from lm_jax.sharding import make_mesh
from tests.checkpoints import make_checkpoint, make_tokenizer

COMPUTE = ComputeConfig("float32", remat="full", attention="reference", logprob_chunk=8)
TOLERANCE = 1e-4  # nats
CASES = {
    "llama": ("llama", LoraConfig(3, 7.0, "all-linear", False)),
    "qwen2-some": ("qwen2", LoraConfig(2, 4.0, "q_proj, *_proj", False)),
    "qwen3-rslora": ("qwen3", LoraConfig(4, 3.0, "o_proj,down_proj,k_proj", True)),
}


def batch():
    rng = np.random.default_rng(0)
    segments = [Segment(*(rng.integers(1, 300, n).astype(np.int32) for n in (4, size))) for size in (5, 9)]
    return segments, fill_rows([[0, 1]], [(s,) for s in segments], 24, 2)


def drawn(config, lora):
    """Adapters of which neither factor is zero."""
    adapters = init_adapters(config, lora, make_mesh(MeshConfig(1, 1, 1)), seed=0)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + jnp.float32(0.2 * rng.standard_normal(x.shape)), adapters)


def our_logprobs(params, config):
    logprobs = packed_logprobs(params, batch()[1], config, COMPUTE)
    return logprobs[np.asarray(batch()[1]["loss_mask"]) > 0]


def their_logprobs(model):
    return torch.cat([logprobs_of(model, segment) for segment in batch()[0]])


def logprobs_of(model, segment):
    ids = torch.tensor(np.concatenate([segment.prompt, segment.response]), dtype=torch.long)[None]
    logp = torch.log_softmax(model(ids).logits[0, :-1], -1)
    return logp.gather(1, ids[0, 1:, None])[len(segment.prompt) - 1 :, 0]


@pytest.mark.parametrize("name", CASES)
def test_equal_to_peft(name, tmp_path):
    family, lora = CASES[name]
    base = make_checkpoint(tmp_path / "base", family)
    config = read_model_config(tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    params, adapters = load_params(tmp_path / "base", config, None), drawn(config, lora)
    export_peft(adapters, config, lora, tmp_path / "adapter", tmp_path / "base", str(tmp_path / "base"))
    with torch.no_grad():
        plain = their_logprobs(base).numpy()
    assert isinstance(transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter").eos_token, str)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    theirs = their_logprobs(model)

    def total(adapters):
        logprobs = our_logprobs(join(params, adapters, lora), config)
        return jnp.sum(logprobs), logprobs

    (_, joined), grads = jax.value_and_grad(total, has_aux=True)(adapters)
    np.testing.assert_allclose(joined, theirs.detach().numpy(), rtol=0, atol=TOLERANCE)
    assert np.abs(joined - plain).max() > 0.1  # the adapters matter

    theirs.sum().backward()
    found = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    ours = peft_names(grads, config, lora)
    assert len(ours) == len(found) == 2 * config.num_layers * len(adapter_table(config, lora))
    for name, gradient in found.items():
        mine = ours[name.replace(".default", "")]
        np.testing.assert_allclose(mine, gradient, rtol=1e-3, atol=1e-4 * np.abs(gradient).max())

    merged = our_logprobs(merge(jax.tree.map(jnp.copy, params), adapters, lora), config)
    np.testing.assert_allclose(merged, joined, rtol=0, atol=TOLERANCE)


def peft_names(adapters, config, lora):
    return peft_tensors(jax.device_get(adapters), config, lora)


class FixedMask(torch.nn.Module):
    """In the place of PEFT's dropout: ours, [B, T, ...] of one sequence."""

    def __init__(self, mask):
        super().__init__()
        self.mask = torch.tensor(np.asarray(mask, np.float32).reshape(*mask.shape[:2], -1))

    def forward(self, x):
        return x * self.mask[:, : x.shape[1]]


def test_dropout_where_peft_has_it(tmp_path):
    """With our masks in the place of its own, PEFT's log-probs and gradients are ours."""
    family, lora = "qwen2", LoraConfig(3, 7.0, "all-linear", False, dropout=0.4)
    base = make_checkpoint(tmp_path / "base", family)
    config = read_model_config(tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    params, adapters = load_params(tmp_path / "base", config, None), drawn(config, lora)
    export_peft(adapters, config, lora, tmp_path / "adapter", tmp_path / "base", str(tmp_path / "base"))
    assert peft.LoraConfig.from_pretrained(tmp_path / "adapter").lora_dropout == 0.4
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    segment = batch()[0][1]
    row, key = fill_rows([[0]], [(segment,)], 24, 1), dropout_key(0, 3, 1)
    leaves, modules = flatten(join(params, adapters, lora, key)), dict(model.named_modules())
    for spec in adapter_table(config, lora):
        parent = spec.kernel.path.rpartition("/")[0]
        shape = (1, 24, *leaves[f"{parent}/lora_a"].shape[1:-1])
        for layer, name in enumerate(spec.kernel.hf_names(config)):
            kept = jax.random.bernoulli(leaves[f"{parent}/lora_key"][layer], 0.6, shape)
            module = modules[f"base_model.model.{name.removesuffix('.weight')}"]
            assert module.lora_dropout["default"].p == 0.4
            module.lora_dropout["default"] = FixedMask(kept / 0.6)
    theirs = logprobs_of(model, segment)

    def total(adapters, remat="full", key=key):
        compute = dataclasses.replace(COMPUTE, remat=remat)
        logprobs = packed_logprobs(join(params, adapters, lora, key), row, config, compute)
        logprobs = logprobs[np.asarray(row["loss_mask"]) > 0]
        return jnp.sum(logprobs), logprobs

    (_, ours), grads = jax.value_and_grad(total, has_aux=True)(adapters)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=TOLERANCE)
    assert np.abs(ours - total(adapters, key=None)[1]).max() > 0.1  # the masks matter
    theirs.sum().backward()
    found = {n.replace(".default", ""): p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    for name, gradient in peft_names(grads, config, lora).items():
        np.testing.assert_allclose(gradient, found[name], rtol=1e-3, atol=1e-4 * np.abs(found[name]).max())
    # What the backward pass computes again has the same masks
    kept = jax.grad(lambda a: total(a, "none")[0])(adapters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max()), grads, kept)


def test_adapters_begin_as_nothing(tmp_path):
    make_checkpoint(tmp_path, "llama")
    config, lora = read_model_config(tmp_path), CASES["llama"][1]
    params, mesh = load_params(tmp_path, config, None), make_mesh(MeshConfig(1, 1, 1))
    adapters = init_adapters(config, lora, mesh, seed=0)
    np.testing.assert_array_equal(our_logprobs(join(params, adapters, lora), config), our_logprobs(params, config))
    flat = flatten(adapters)
    for path, x in flat.items():
        if path.endswith("lora_a"):  # as torch's kaiming_uniform_ with a = sqrt(5) has it
            bound = np.prod(x.shape[1:-1]) ** -0.5
            assert np.abs(x).max() <= bound and np.std(x) == pytest.approx(bound / 3**0.5, rel=0.2)
    other = flatten(init_adapters(config, dataclasses.replace(lora, targets="q_proj"), mesh, seed=0))
    np.testing.assert_array_equal(other["layers/attn/q/lora_a"], flat["layers/attn/q/lora_a"])
    assert nest(flat).keys() == {"layers"}


def test_the_exported_settings(tmp_path):
    make_checkpoint(tmp_path / "base", "qwen3")
    config, lora = read_model_config(tmp_path / "base"), CASES["qwen3-rslora"][1]
    export_peft(drawn(config, lora), config, lora, tmp_path / "adapter", tmp_path / "base", "org/name")
    settings = peft.LoraConfig.from_pretrained(tmp_path / "adapter")
    assert (settings.r, settings.lora_alpha, settings.use_rslora) == (4, 3.0, True)
    assert settings.target_modules == {"o_proj", "down_proj", "k_proj"} and settings.lora_dropout == 0
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "org/name"
    with pytest.raises(UserError, match="exists and is not empty"):
        export_peft(drawn(config, lora), config, lora, tmp_path / "adapter", tmp_path / "base", "org/name")


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"targets": "q_proj,w_proj"}, "config.lora.targets='q_proj,w_proj': 'w_proj' matches no module; choose all-l"),
        ({"targets": ""}, "matches no module"),
        ({"rank": -1}, "config.lora.rank: must be at least 1"),
        ({"alpha": 0.0}, "config.lora.alpha: must be positive"),
        ({"dropout": 1.0}, "config.lora.dropout: must lie in"),
    ],
)
def test_errors(lora, says, tmp_path):
    make_checkpoint(tmp_path, "llama")
    with pytest.raises(UserError, match=says):
        adapter_table(read_model_config(tmp_path), dataclasses.replace(CASES["llama"][1], **lora))
