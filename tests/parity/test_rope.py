"""Rotary tables equal transformers' for every kind; packed rows get what each sequence gets alone."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from lm_jax.config import RopeConfig
from lm_jax.errors import UserError
from lm_jax.models.rope import apply_rope, rope_cos_sin, rope_from_hf, rope_to_hf

LLAMA3 = {"factor": 8.0, "original_max_position_embeddings": 256, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"factor": 4.0, "original_max_position_embeddings": 512}
KINDS = {
    "default": {"rope_type": "default", "rope_theta": 500_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 500_000.0, **LLAMA3},
    "yarn": {"rope_type": "yarn", "rope_theta": 1_000_000.0, **YARN},
    "yarn-mscale": {"rope_type": "yarn", "rope_theta": 1e4, **YARN, "mscale": 0.7, "mscale_all_dim": 1.0},
    "yarn-factor": {"rope_type": "yarn", "rope_theta": 1e4, **YARN, "attention_factor": 1.3},
    "yarn-step": {"rope_type": "yarn", "rope_theta": 1e4, **YARN, "beta_fast": 1, "beta_slow": 1, "truncate": False},
    "yarn-betas": {"rope_type": "yarn", "rope_theta": 1e4, **YARN, "beta_fast": 8, "beta_slow": 2, "truncate": False},
    "yarn-null-factor": {"rope_type": "yarn", "rope_theta": 1e4, **YARN, "factor": None},
}


@pytest.mark.parametrize("length", [100, 2048, 3000])
@pytest.mark.parametrize("name", KINDS)
def test_tables_equal_transformers(name, length):
    fields = {"max_position_embeddings": 2048, "rope_parameters": KINDS[name]}
    config = transformers.LlamaConfig(hidden_size=256, num_attention_heads=4, **fields)
    positions = np.arange(length, dtype=np.int32)[None]
    their_cos, their_sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions, dtype=torch.long))
    cos, sin = rope_cos_sin(rope_from_hf(fields, 2048), 64, 2048, positions, None)
    assert cos.dtype == sin.dtype == jnp.float32
    # Rounding of a frequency in fp32 grows with the position: 3000 * 2 ** -23 is 4e-4.
    np.testing.assert_allclose(cos, their_cos[..., :32].numpy(), atol=5e-4)
    np.testing.assert_allclose(sin, their_sin[..., :32].numpy(), atol=5e-4)


@pytest.mark.parametrize("kind", ["yarn", "llama3", "linear", "default"])
def test_original_context_beside_the_rotary_fields_equals_transformers(kind):
    """Phi-3's place for it, which transformers looks at in every family."""
    rope = {key: value for key, value in KINDS[kind].items() if key != "original_max_position_embeddings"}
    fields = {"max_position_embeddings": 2048, "original_max_position_embeddings": 128, "rope_parameters": rope}
    config = transformers.LlamaConfig(hidden_size=256, num_attention_heads=4, **copy.deepcopy(fields))
    positions = np.arange(100, dtype=np.int32)[None]
    their_cos, _ = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions, dtype=torch.long))
    cos, _ = rope_cos_sin(rope_from_hf(fields, 2048), 64, 2048, positions, None)
    np.testing.assert_allclose(cos, their_cos[..., :32].numpy(), atol=2e-5)


def test_rotation_equals_transformers():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 2, 7, 3, 8)).astype(np.float32)
    cos, sin = rng.normal(size=(2, 2, 7, 4)).astype(np.float32)
    doubled = [torch.tensor(np.concatenate([x, x], -1)) for x in (cos, sin)]
    theirs = apply_rotary_pos_emb(torch.tensor(q), torch.tensor(k), *doubled, unsqueeze_dim=2)
    for ours, expected in zip((apply_rope(q, cos, sin), apply_rope(k, cos, sin)), theirs, strict=True):
        np.testing.assert_allclose(ours, expected.numpy(), atol=1e-6)
    assert apply_rope(jnp.asarray(q, jnp.bfloat16), cos, sin).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", KINDS)
def test_packed_equals_one_at_a_time(name):
    rope = rope_from_hf({"rope_parameters": KINDS[name]}, 8)
    lengths, padding = (5, 20, 11), 4  # shorter and longer than the original context of 8
    positions = np.concatenate([*map(np.arange, lengths), np.zeros(padding)]).astype(np.int32)[None]
    segment_ids = np.repeat([7, 2, 9, 0], [*lengths, padding]).astype(np.int32)[None]
    table = jax.jit(lambda p, s: rope_cos_sin(rope, 16, 8, p, s))
    cos, sin = table(np.repeat(positions, 2, 0), np.repeat(segment_ids, 2, 0))
    start = 0
    for length in lengths:
        alone = rope_cos_sin(rope, 16, 8, np.arange(length, dtype=np.int32)[None], None)
        for packed, expected in zip((cos, sin), alone, strict=True):
            np.testing.assert_allclose(packed[1, start : start + length], expected[0], atol=1e-6)
        start += length


@pytest.mark.parametrize("name", KINDS)
def test_both_spellings_round_trip(name):
    rope = rope_from_hf({"rope_parameters": KINDS[name]}, 2048)
    written = rope_to_hf(rope)
    assert rope_from_hf(written, 2048) == rope
    assert rope_from_hf({k: v for k, v in written.items() if k != "rope_parameters"}, 2048) == rope
    assert rope_from_hf({"rope_parameters": written["rope_parameters"]}, 2048) == rope


@pytest.mark.parametrize(
    "hf, message",
    [
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "'longrope'.*not supported"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2}}, "type"),
        ({"rope_scaling": {"type": "linear"}}, "needs factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2': expected a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 1}}, "beta_fast=1: not understood"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2, "original_max_position_embeddings": 3}}, "original"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, "larger than low_freq_factor"),
        ({"rope_scaling": {"rope_type": "yarn", **YARN, "truncate": None}}, "truncate"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "contradict"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}},
            "contradict",
        ),
        ({"rope_theta": -1}, "rope_theta=-1"),
        ({"rope_scaling": [1]}, "expected an object"),
    ],
)
def test_what_is_not_understood_raises(hf, message):
    with pytest.raises(UserError, match=message):
        rope_from_hf(hf, 2048)


def test_original_context_defaults_to_the_configured_one():
    yarn = rope_from_hf({"rope_scaling": {"type": "yarn", "factor": 2.0}}, 2048)
    assert yarn == RopeConfig(10_000.0, "yarn", factor=2.0, original_max_position=2048)
