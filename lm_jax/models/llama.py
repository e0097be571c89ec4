"""Llama's config.json <-> ModelConfig, and the strict reading of config.json that the other families share.

A field of config.json is read here, changes nothing, or is an error: a checkpoint is never run with maths that differ
from what transformers computes. What transformers' own config class does not know changes nothing.
"""

import functools
import reprlib
from collections.abc import Mapping
from typing import Any

from lm_jax.config import ModelConfig
from lm_jax.errors import UserError
from lm_jax.models.rope import rope_from_hf, rope_to_hf
from lm_jax.models.weights import decoder_table

ARCHITECTURE = "LlamaForCausalLM"
weight_table = decoder_table

# What transformers assumes where config.json is silent; its keys are the fields of the family.
SIZES = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
DEFAULTS = {**SIZES, "attention_bias": False, "mlp_bias": False}

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
HF_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}

# What transformers' config classes know and no forward pass of ours depends on, whatever its value.
NEUTRAL = frozenset(
    """
    model_type architectures transformers_version _name_or_path name_or_path _attn_implementation
    _attn_implementation_internal dtype torch_dtype use_cache initializer_range pretraining_tp attention_dropout
    chunk_size_feed_forward bos_token_id eos_token_id pad_token_id return_dict use_return_dict output_hidden_states
    output_attentions id2label label2id num_labels problem_type
    """.split()
)
# What transformers reads although no class of the families knows it (masks, caches, loading): harmless with these
# values alone. A family that knows the field reads it instead.
ONLY: dict[str, tuple[Any, ...]] = {
    "is_causal": (True, None),
    "is_encoder_decoder": (False, None),
    "quantization_config": (None,),
    "auto_map": (None, {}),
} | dict.fromkeys(
    "sliding_window attention_chunk_size layer_types kv_sharing_modes text_config decoder generator text_encoder "
    "transformers_weights".split(),
    (None,),
)
CURES = {
    "quantization_config": "quantised checkpoints are not read; use the unquantised one",
    "auto_map": "remote code is never run; use a checkpoint of a built-in architecture without it",
}
ROPE_FIELDS = frozenset(
    {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings"}
)


def config_from_hf(hf: Mapping[str, Any], fields: Mapping[str, Any]) -> ModelConfig:
    """Llama's config.json `hf`, its fields read by `read_fields`."""
    bias = fields["attention_bias"]
    return decoder_config("llama", hf, fields, qkv_bias=bias, o_bias=bias, mlp_bias=fields["mlp_bias"])


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both read as `config`."""
    extra = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return decoder_to_hf(config, ARCHITECTURE, extra)


def read_fields(hf: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The family's fields with absent ones at their defaults, types checked.

    Raises:
      UserError: on fields that transformers' class of this model_type knows, or its other code reads, and we do not,
        all named at once; on a wrong type.
    """
    wrong = []
    unread = unread_keys(hf, defaults)
    known = known_to_transformers(hf["model_type"]) if unread else frozenset()
    for key in [k for k in unread if k in known] + [k for k in ONLY if k not in defaults and k in hf]:
        if hf[key] not in ONLY.get(key, (None,)):
            cure = CURES.get(key, "it changes what transformers computes; use a model without it")
            wrong.append(f"{key}={reprlib.repr(hf[key])}: not supported for model_type {hf['model_type']!r}; {cure}")
    if wrong:
        raise UserError(". ".join(wrong))
    for key in defaults.keys() & hf.keys():
        _check_type(key, hf[key], defaults[key])
    return {key: hf.get(key, default) for key, default in defaults.items()}


def unread_keys(hf: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Keys of config.json that nothing here looks at."""
    return [key for key in hf if key not in (defaults.keys() | ROPE_FIELDS | NEUTRAL | ONLY.keys())]


@functools.cache
def known_to_transformers(model_type: str) -> frozenset[str]:
    """Fields, attributes and properties of its config class, which sets other keys too, but does not read them."""
    import transformers  # slow, and needed only for a file with other keys than the usual ones

    cls = transformers.CONFIG_MAPPING[model_type]
    return frozenset({*dir(cls()), *cls.attribute_map})


_NULLABLE = ("num_key_value_heads", "sliding_window")
# Above these a number is damage or malice, and would be met as an overflow or as terabytes
_LARGEST, _MOST = 2**31 - 1, {"num_hidden_layers": 10_000}
_TYPES_OF_NONE: dict[str, type] = {"layer_types": list}  # every other field whose default is null is a size


def _check_type(key: str, value: Any, default: Any) -> None:
    if value is None and (default is None or key in _NULLABLE):
        return
    expected: type = _TYPES_OF_NONE.get(key, int) if default is None else type(default)
    accepted = (int, float) if expected is float else expected
    if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
        raise UserError(f"{key}={value!r}: expected {expected.__name__}; correct config.json")
    if expected is bool or key == "max_window_layers" or not isinstance(value, (int, float)):
        return
    most = _MOST.get(key, _LARGEST)
    if not 0 < value <= most:
        raise UserError(f"{key}={value!r}: expected a positive number, at most {most}; correct config.json")


def decoder_config(family: str, hf: Mapping[str, Any], fields: Mapping[str, Any], **flags: Any) -> ModelConfig:
    """ModelConfig from the fields that all families share; `flags` are the ones that differ."""
    heads = fields["num_attention_heads"]
    head_dim = fields["head_dim"] or fields["hidden_size"] // heads
    if head_dim % 2:
        raise UserError(f"head_dim={head_dim}: rotary embedding needs an even size; correct config.json")
    if fields["hidden_act"] not in ACTIVATIONS:
        raise UserError(f"hidden_act={fields['hidden_act']!r}: not supported; supported: {', '.join(ACTIVATIONS)}")
    return ModelConfig(
        family=family,
        vocab_size=fields["vocab_size"],
        num_layers=fields["num_hidden_layers"],
        d_model=fields["hidden_size"],
        d_ff=fields["intermediate_size"],
        num_heads=heads,
        num_kv_heads=fields["num_key_value_heads"] or heads,
        head_dim=head_dim,
        rope=rope_from_hf(hf, fields["max_position_embeddings"]),
        norm_eps=float(fields["rms_norm_eps"]),
        max_position=fields["max_position_embeddings"],
        activation=ACTIVATIONS[fields["hidden_act"]],
        tie_embeddings=fields["tie_word_embeddings"],
        **flags,
    )


def decoder_to_hf(config: ModelConfig, architecture: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """config.json from the fields that all families share and the family's `extra` ones."""
    return {
        "architectures": [architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": HF_ACTIVATIONS[config.activation],
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **rope_to_hf(config.rope),
        **extra,
    }
