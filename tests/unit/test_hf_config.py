"""config.json of published checkpoints is read right, in both rope spellings; what is not understood is an error."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import transformers

from lm_jax.config import ModelConfig, RopeConfig
from lm_jax.errors import UserError
from lm_jax.models.llama import known_to_transformers, unread_keys
from lm_jax.models.registry import FIELDS, config_from_hf, config_to_hf, read_model_config, weight_table

LLAMA_2_7B = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_3_1_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_3_1_8B = LLAMA_3_8B | {
    "eos_token_id": [128001, 128008, 128009],
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "rope_scaling": LLAMA_3_1_SCALING,
    "transformers_version": "4.43.0.dev0",
}
LLAMA_3_2_1B = LLAMA_3_1_8B | {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": LLAMA_3_1_SCALING | {"factor": 32.0},
    "tie_word_embeddings": True,
}
MISTRAL_V01 = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
MISTRAL_V03 = MISTRAL_V01 | {
    "attention_dropout": 0.0,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32768,
}
QWEN2_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.37.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN2_5_7B = QWEN2_7B | {"transformers_version": "4.40.1", "use_mrope": False}
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# Keys that older transformers wrote into every config.json.
LEGACY = {
    "return_dict": True,
    "output_hidden_states": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "temperature": 1.0,
    "top_p": 1.0,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "sep_token_id": None,
    "torchscript": False,
}


def sizes(vocab, layers, d_model, d_ff, heads, kv_heads, head_dim, max_position, eps):
    return dict(
        vocab_size=vocab, num_layers=layers, d_model=d_model, d_ff=d_ff, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=head_dim, max_position=max_position, norm_eps=eps,
    )  # fmt: skip


LLAMA3_ROPE = RopeConfig(500_000.0, "llama3", factor=8.0, original_max_position=8192)
PUBLISHED = {
    "llama-2-7b": (
        LLAMA_2_7B,
        ModelConfig("llama", rope=RopeConfig(10_000.0), **sizes(32000, 32, 4096, 11008, 32, 32, 128, 4096, 1e-5)),
        6_738_415_616,
    ),
    "llama-3-8b": (
        LLAMA_3_8B,
        ModelConfig("llama", rope=RopeConfig(500_000.0), **sizes(128256, 32, 4096, 14336, 32, 8, 128, 8192, 1e-5)),
        8_030_261_248,
    ),
    "llama-3.1-8b": (
        LLAMA_3_1_8B,
        ModelConfig("llama", rope=LLAMA3_ROPE, **sizes(128256, 32, 4096, 14336, 32, 8, 128, 131072, 1e-5)),
        8_030_261_248,
    ),
    "llama-3.2-1b": (
        LLAMA_3_2_1B,
        ModelConfig(
            "llama",
            rope=dataclasses.replace(LLAMA3_ROPE, factor=32.0),
            tie_embeddings=True,
            **sizes(128256, 16, 2048, 8192, 32, 8, 64, 131072, 1e-5),
        ),
        1_235_814_400,
    ),
    "mistral-7b-v0.1": (
        MISTRAL_V01,
        ModelConfig(
            "mistral",
            rope=RopeConfig(10_000.0),
            layer_windows=(4096,) * 32,
            **sizes(32000, 32, 4096, 14336, 32, 8, 128, 32768, 1e-5),
        ),
        7_241_732_096,
    ),
    "mistral-7b-v0.3": (
        MISTRAL_V03,
        ModelConfig("mistral", rope=RopeConfig(1e6), **sizes(32768, 32, 4096, 14336, 32, 8, 128, 32768, 1e-5)),
        7_248_023_552,
    ),
    "qwen2-7b": (
        QWEN2_7B,
        ModelConfig(
            "qwen2", rope=RopeConfig(1e6), qkv_bias=True, **sizes(152064, 28, 3584, 18944, 28, 4, 128, 131072, 1e-6)
        ),
        7_615_616_512,
    ),
    "qwen2.5-7b": (
        QWEN2_5_7B,
        ModelConfig(
            "qwen2", rope=RopeConfig(1e6), qkv_bias=True, **sizes(152064, 28, 3584, 18944, 28, 4, 128, 131072, 1e-6)
        ),
        7_615_616_512,
    ),
    "qwen3-8b": (
        QWEN3_8B,
        ModelConfig(
            "qwen3", rope=RopeConfig(1e6), qk_norm=True, **sizes(151936, 36, 4096, 12288, 32, 8, 128, 40960, 1e-6)
        ),
        8_190_735_360,
    ),
}


def in_new_spelling(hf):
    """What transformers 5 writes when it saves this config."""
    return json.loads(transformers.AutoConfig.for_model(**hf).to_json_string(use_diff=False))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name):
    hf, expected, num_parameters = PUBLISHED[name]
    assert config_from_hf(hf) == expected
    assert config_from_hf(hf | LEGACY) == expected
    new = in_new_spelling(hf)
    assert "rope_parameters" in new and "rope_theta" not in new
    assert config_from_hf(new) == expected
    count = 0
    for spec in weight_table(expected):
        size = 1
        for axis in spec.shape(expected):
            size *= axis
        count += size
    assert count == num_parameters  # as published


@pytest.mark.parametrize("name", PUBLISHED)
def test_written_config_is_read_as_the_same_by_transformers_and_by_us(name):
    hf, expected, _ = PUBLISHED[name]
    written = config_to_hf(expected)
    assert config_from_hf(json.loads(json.dumps(written))) == expected
    old_only = {k: v for k, v in written.items() if k != "rope_parameters"}
    assert config_from_hf(old_only) == expected
    theirs, source = (transformers.AutoConfig.for_model(**c) for c in (written, hf))
    for field in in_new_spelling(hf).keys() & set(written) - {"max_window_layers"}:
        assert getattr(theirs, field) == getattr(source, field), field
    for reader in (old_only, {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling")}):
        assert transformers.AutoConfig.for_model(**reader).rope_parameters == theirs.rope_parameters


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_absent_fields_take_the_defaults_of_transformers(family):
    theirs = json.loads(transformers.AutoConfig.for_model(family).to_json_string(use_diff=False))
    assert config_from_hf({"model_type": family}) == config_from_hf(theirs)


def test_windows():
    window = {"use_sliding_window": True, "sliding_window": 16, "num_hidden_layers": 3, "max_window_layers": 1}
    config = config_from_hf(QWEN2_7B | window)
    assert config.layer_windows == (None, 16, 16)
    assert config_from_hf(config_to_hf(config)) == config
    mixed = window | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    config = config_from_hf(QWEN3_8B | mixed)
    assert config.layer_windows == (16, None, 16)
    assert config_from_hf(config_to_hf(config)) == config
    with pytest.raises(UserError, match="only one size"):
        config_to_hf(dataclasses.replace(config, layer_windows=(16, 8, None)))
    with pytest.raises(UserError, match="cannot express"):
        config_to_hf(dataclasses.replace(config, family="llama"))


@pytest.mark.parametrize(
    "base, change, message",
    [
        (LLAMA_3_8B, {"per_layer_config": {"0": {}}}, "per_layer_config={'0': {}}: not supported"),
        (LLAMA_3_8B, {"is_heterogeneous": True, "is_causal": False}, "is_heterogeneous.*is_causal"),
        (LLAMA_3_8B, {"is_encoder_decoder": True}, "is_encoder_decoder=True: not supported"),
        (LLAMA_3_8B, {"sliding_window": 4096}, "sliding_window=4096: not supported"),
        (LLAMA_3_8B, {"attention_chunk_size": 8192}, "attention_chunk_size=8192: not supported"),
        (LLAMA_3_8B, {"text_config": {"hidden_size": 8}}, "text_config=.*not supported"),
        (LLAMA_3_8B, {"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'.*supported: silu"),
        (LLAMA_3_8B, {"hidden_size": "4096"}, "hidden_size='4096': expected int"),
        (LLAMA_3_8B, {"vocab_size": True}, "vocab_size=True: expected int"),
        (LLAMA_3_8B, {"num_hidden_layers": 0}, "num_hidden_layers=0: expected a positive number"),
        (LLAMA_3_8B, {"rms_norm_eps": None}, "rms_norm_eps=None: expected float"),
        (LLAMA_3_8B, {"head_dim": 127}, "head_dim=127.*even"),
        (LLAMA_3_8B, {"num_key_value_heads": 7}, "no multiple"),
        (LLAMA_3_8B, {"quantization_config": {"bits": 4}}, "quantization_config.*unquantised"),
        (LLAMA_3_8B, {"auto_map": {"AutoModel": "x.Y"}}, "auto_map.*remote code"),
        (LLAMA_3_8B, {"rope_scaling": {"type": "longrope"}}, "'longrope'.*not supported"),
        (LLAMA_3_8B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA_3_8B, {"is_causal": False}, "is_causal=False"),
        (LLAMA_3_8B, {"architectures": ["LlamaForSequenceClassification"]}, "supported: LlamaForCausalLM, MistralFor"),
        (LLAMA_3_8B, {"model_type": "gemma"}, "'gemma'.*is not supported; supported: LlamaForCausalLM"),
        (MISTRAL_V01, {"layer_types": ["full_attention"]}, "layer_types.*not supported"),
        (QWEN2_5_7B, {"layer_types": ["full_attention"]}, "1 entries for 28 layers"),
        (QWEN2_5_7B, {"layer_types": ["sliding_attention"] * 28}, "set both"),
        (QWEN2_5_7B, {"layer_types": ["chunked_attention"] * 28}, "'chunked_attention' is not supported"),
        (QWEN3_8B, {"head_dim": None}, "head_dim=None"),
    ],
)
def test_what_is_not_understood_raises(base, change, message):
    with pytest.raises(UserError, match=message):
        config_from_hf(base | change)


def scaled(kind, **fields):
    return {"rope_scaling": {"rope_type": kind, "factor": 4.0, **fields}}


@pytest.mark.parametrize(
    "change, message",
    [
        (scaled("yarn", attn_factor=0.8782488562869419), "attn_factor.*write attention_factor.*multiply.*: 1$"),
        (scaled("yarn", extrapolation_factor=2), "extrapolation_factor=2.*only 1"),
        (scaled("linear", attention_factor=1.2), "attention_factor=1.2: not understood for 'linear'"),
        (scaled("default"), "factor=4.0: not understood for 'default'.*set its rope_type"),
        ({"rope_scaling": {"factor": 4.0}}, "factor=4.0: not understood for 'default'"),
        (scaled("linear", mrope_section=[16, 24, 24]), "mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention.*each type of layer"),
        (
            scaled("yarn", original_max_position_embeddings=4096) | {"original_max_position_embeddings": 2048},
            "stands beside and in rope_scaling, and differs",
        ),
    ],
)
def test_rotary_fields_that_are_not_read_as_meant_raise(change, message):
    with pytest.raises(UserError, match=message):
        config_from_hf(LLAMA_3_8B | change)


UNKNOWN = {
    "_model_name_or_path": "Smollm2 135M", "unk_token_id": 0, "transformers.js_config": {"dtype": {"q4": "float16"}},
    "dual_chunk_attention_config": {"chunk_size": 262144}, "use_mrope": True, "logit_scale": 0.5, "temperature": 0.7,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "finetuned": True, "attn_factor": 1, "short_factor": None},
}  # fmt: skip


@pytest.mark.parametrize("base", [LLAMA_3_8B, MISTRAL_V01, QWEN2_7B, QWEN3_8B], ids=lambda base: base["model_type"])
def test_what_transformers_does_not_know_is_ignored_and_named_once(base, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(base | UNKNOWN))
    known = base | {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    for _ in range(2):
        assert read_model_config(tmp_path) == config_from_hf(known)
    names = [*(UNKNOWN.keys() - {"rope_scaling"}), "rope_scaling.finetuned", "rope_scaling.attn_factor"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}/config.json: ignored") and all(name in line for name in names)
    (tmp_path / "config.json").write_text(json.dumps(base))
    assert read_model_config(tmp_path) == config_from_hf(base)
    assert not capsys.readouterr().err


# Looked up too, but by what changes no forward pass of these families: initialising, loading, compiling, other layers
OF_OTHERS = set(
    "init_std initializer_factor gradient_checkpointing distributed_config fusion_config compile_config sep_token_id "
    "number_of_conv_states _rope_type_labels".split()
)


@pytest.mark.parametrize("family", FIELDS)
def test_whatever_else_transformers_looks_up_is_known_here(family):
    """A key that its class lacks can still be read, with a default, by the code of masks, caches and embeddings."""
    folder = Path(transformers.__file__).parent
    files = f"modeling_rope_utils models/{family}/modeling_{family} masking_utils cache_utils modeling_utils"
    rope, *others = ((folder / f"{name}.py").read_text() for name in files.split())
    looked_up = {*re.findall(r"(?:get|has)attr\((?:self|config), \"(\w+)\"", rope)}
    looked_up |= {*re.findall(r"(?:get|has)attr\([\w.]*config, \"(\w+)\"", "".join(others))}
    assert {"head_dim", "sliding_window", "is_causal", "original_max_position_embeddings"} <= looked_up
    ours = set(unread_keys(dict.fromkeys(looked_up), FIELDS[family])) - known_to_transformers(family) - OF_OTHERS
    assert not ours, "transformers reads these; so must we"


def test_errors_name_the_file(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        read_model_config(tmp_path)
    file = tmp_path / "config.json"
    for content, message in [("{", "not readable as JSON"), ("[]", "expected a JSON object")]:
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            read_model_config(tmp_path)
    file.write_text(json.dumps(LLAMA_3_8B | {"is_causal": False}))
    with pytest.raises(UserError, match=f"{file}: is_causal=False"):
        read_model_config(tmp_path)
    file.write_text(json.dumps(LLAMA_3_8B))
    assert read_model_config(tmp_path) == PUBLISHED["llama-3-8b"][1]
