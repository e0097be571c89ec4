"""Per-token log-probs equal transformers' torch model in fp32, for every family and every config field."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lm_jax.checkpoints.hf import load_params
from lm_jax.config import ComputeConfig, RopeConfig
from lm_jax.models.decoder import Decoder, output_embedding
from lm_jax.models.registry import read_model_config
from tests.checkpoints import make_checkpoint

TOKENS = 40
TOLERANCE = 1e-4  # nats
MATTERS = 1e-3  # nats


def rope(kind="default", theta=10_000.0, **fields):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


PLAIN_ROPE = {"rope": RopeConfig(theta=10_000.0)}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"factor": 8.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PLAIN_YARN = {"rope": RopeConfig(theta=10_000.0, kind="yarn", factor=4.0, original_max_position=16)}
FULL = {"layer_windows": ()}
SLIDING = {"use_sliding_window": True, "sliding_window": 6}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

# name: family, config.json fields, the ModelConfig fields that undo them (None: undoing changes a parameter's shape)
CASES = {
    "llama": ("llama", {}, None),
    "llama-theta": ("llama", rope(theta=300.0), PLAIN_ROPE),
    "llama-linear": ("llama", rope("linear", factor=4.0), PLAIN_ROPE),
    "llama-dynamic-beyond": ("llama", {**rope("dynamic", factor=2.0), "max_position_embeddings": 16}, PLAIN_ROPE),
    "llama-dynamic-within": ("llama", rope("dynamic", factor=2.0), None),
    "llama-llama3": ("llama", rope("llama3", **LLAMA3), PLAIN_ROPE),
    "llama-yarn": ("llama", rope("yarn", **YARN), PLAIN_ROPE),
    "llama-yarn-attention-factor": ("llama", rope("yarn", **YARN, attention_factor=1.7), PLAIN_YARN),
    "llama-yarn-mscale": ("llama", rope("yarn", **YARN, mscale=2.0, mscale_all_dim=0.5), PLAIN_YARN),
    "llama-yarn-mscale-alone": ("llama", rope("yarn", **YARN, mscale=2.0), None),
    "llama-yarn-beta": ("llama", rope("yarn", **YARN, beta_fast=4, beta_slow=0.25), PLAIN_YARN),
    "llama-yarn-no-truncate": (
        "llama",
        {**rope("yarn", 50.0, **YARN, beta_fast=1.5, beta_slow=0.5, truncate=False), "head_dim": 16},
        {"rope": RopeConfig(50.0, "yarn", factor=4.0, original_max_position=16, beta_fast=1.5, beta_slow=0.5)},
    ),
    "llama-attention-bias": ("llama", {"attention_bias": True}, {"o_bias": False}),
    "llama-attention-bias-qkv": ("llama", {"attention_bias": True}, {"qkv_bias": False}),
    "llama-mlp-bias": ("llama", {"mlp_bias": True}, {"mlp_bias": False}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, None),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}, None),
    "llama-all-kv-heads": ("llama", {"num_key_value_heads": 4}, None),
    "llama-head-dim": ("llama", {"head_dim": 16}, None),
    "llama-norm-eps": ("llama", {"rms_norm_eps": 0.3}, {"norm_eps": 1e-6}),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}, {"activation": "silu"}),
    "llama-gelu-new": ("llama", {"hidden_act": "gelu_new"}, {"activation": "gelu"}),
    "llama-gelu-tanh": ("llama", {"hidden_act": "gelu_pytorch_tanh"}, {"activation": "gelu"}),
    "llama-relu": ("llama", {"hidden_act": "relu"}, {"activation": "silu"}),
    "mistral": ("mistral", {}, None),
    "mistral-window": ("mistral", {"sliding_window": 6}, FULL),
    "mistral-window-of-one": ("mistral", {"sliding_window": 1}, FULL),
    "mistral-long-window": ("mistral", {"sliding_window": 4096}, None),
    "mistral-theta": ("mistral", rope(theta=300.0), PLAIN_ROPE),
    "mistral-yarn": ("mistral", rope("yarn", **YARN), PLAIN_ROPE),
    "mistral-head-dim": ("mistral", {"head_dim": 16}, None),
    "mistral-tied": ("mistral", {"tie_word_embeddings": True}, None),
    "mistral-norm-eps": ("mistral", {"rms_norm_eps": 0.3}, {"norm_eps": 1e-6}),
    "qwen2": ("qwen2", {}, {"qkv_bias": False}),
    "qwen2-theta": ("qwen2", rope(theta=300.0), PLAIN_ROPE),
    "qwen2-yarn": ("qwen2", rope("yarn", **YARN), PLAIN_ROPE),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}, None),
    "qwen2-window-unused": ("qwen2", {"sliding_window": 6}, None),
    "qwen2-max-window-layers": ("qwen2", {**SLIDING, "max_window_layers": 1}, FULL),
    "qwen2-layer-types": ("qwen2", {**SLIDING, "num_hidden_layers": 3, "layer_types": MIXED}, FULL),
    "qwen2-layer-types-moved": (
        "qwen2",
        {**SLIDING, "num_hidden_layers": 3, "layer_types": MIXED},
        {"layer_windows": (6, 6, None)},
    ),
    "qwen2-norm-eps": ("qwen2", {"rms_norm_eps": 0.3}, {"norm_eps": 1e-6}),
    "qwen3": ("qwen3", {}, {"qk_norm": False}),
    "qwen3-head-dim": ("qwen3", {"head_dim": 16}, None),
    "qwen3-attention-bias": ("qwen3", {"attention_bias": True}, {"qkv_bias": False}),
    "qwen3-attention-bias-o": ("qwen3", {"attention_bias": True}, {"o_bias": False}),
    "qwen3-theta": ("qwen3", rope(theta=300.0), PLAIN_ROPE),
    "qwen3-yarn": ("qwen3", rope("yarn", **YARN), PLAIN_ROPE),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}, None),
    "qwen3-one-kv-head": ("qwen3", {"num_key_value_heads": 1}, None),
    "qwen3-max-window-layers": ("qwen3", {**SLIDING, "max_window_layers": 1}, FULL),
    "qwen3-layer-types": ("qwen3", {**SLIDING, "num_hidden_layers": 3, "layer_types": MIXED}, FULL),
    "qwen3-norm-eps": ("qwen3", {"rms_norm_eps": 0.3}, {"norm_eps": 1e-6}),
    "qwen3-relu": ("qwen3", {"hidden_act": "relu"}, {"activation": "silu"}),
}


def our_logprobs(params, config, tokens):
    """tokens [B, T] -> log-probs of every next token, [B, T, V]."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    model = Decoder(config, ComputeConfig(dtype="float32"))
    hidden = model.apply({"params": params}, jnp.asarray(tokens), jnp.asarray(positions), jnp.ones_like(tokens))
    return np.asarray(jax.nn.log_softmax(hidden @ output_embedding(params, config).T, axis=-1))


@pytest.mark.parametrize("name", CASES)
def test_logprobs_equal_transformers(name, tmp_path):
    family, fields, undo = CASES[name]
    model = make_checkpoint(tmp_path, family, **fields)
    tokens = np.random.default_rng(0).integers(0, 320, (2, TOKENS), dtype=np.int32)
    with torch.no_grad():
        theirs = torch.log_softmax(model(torch.tensor(tokens, dtype=torch.long)).logits, dim=-1).numpy()
    assert theirs.std() > 1, "flat logits would hide differences"

    config = read_model_config(tmp_path)
    params = load_params(tmp_path, config, None)
    np.testing.assert_allclose(our_logprobs(params, config, tokens), theirs, rtol=0, atol=TOLERANCE)
    if undo is not None:
        undone = dataclasses.replace(config, **undo)
        assert np.abs(our_logprobs(params, undone, tokens) - theirs).max() > MATTERS, "the field has no effect here"
