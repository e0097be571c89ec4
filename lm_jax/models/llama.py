"""Llama's config.json <-> ModelConfig, and the strict reading of config.json that the other families share.

A field of config.json is known to the family, or known to change nothing, or an error: a checkpoint is never run with
maths that differ from its own.
"""

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

# Fields that change nothing in the maths of a forward pass, whatever their value.
NEUTRAL = frozenset(
    """
    model_type architectures transformers_version _name_or_path name_or_path _commit_hash tokenizer_class
    dtype torch_dtype use_bfloat16 torchscript tf_legacy_loss use_cache initializer_range
    attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    _flash_attn_2_enabled pretraining_tp attention_dropout chunk_size_feed_forward max_sequence_length is_llama_config
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id suppress_tokens begin_suppress_tokens bad_words_ids
    return_dict return_dict_in_generate output_hidden_states output_attentions output_scores is_decoder
    id2label label2id num_labels problem_type finetuning_task task_specific_params prefix remove_invalid_values
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences
    exponential_decay_length_penalty unsloth_version unsloth_fixed
    """.split()
)

# Fields that are harmless only with these values (a family that knows the field reads it instead).
ONLY: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "sliding_window": (None,),
    "use_mrope": (False, None),
    "rope_interleaved": (False, None),
    "is_causal": (True, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "auto_map": (None, {}),
}
CURES = {
    "quantization_config": "quantised checkpoints are not read; use the unquantised one",
    "auto_map": "remote code is never run; use a checkpoint of a built-in architecture without it",
}
ROPE_FIELDS = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"})


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Reads Llama's config.json.

    Raises:
      UserError: on a field that is not understood, with its name, value and cure.
    """
    fields = read_fields(hf, DEFAULTS)
    bias = fields["attention_bias"]
    return decoder_config("llama", hf, fields, qkv_bias=bias, o_bias=bias, mlp_bias=fields["mlp_bias"])


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both read as `config`."""
    extra = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return decoder_to_hf(config, ARCHITECTURE, extra)


def read_fields(hf: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The family's fields with absent ones at their defaults, types checked.

    Raises:
      UserError: on a field outside `defaults`, the rotary fields and the lists of harmless ones; on a wrong type.
    """
    for key, value in hf.items():
        if key in defaults or key in ROPE_FIELDS or key in NEUTRAL:
            continue
        cure = CURES.get(key, "delete it if it changes nothing in the forward pass, else this model is not supported")
        if key not in ONLY:
            raise UserError(f"{key}={value!r}: not understood for model_type {hf.get('model_type')!r}; {cure}")
        if value not in ONLY[key]:
            raise UserError(f"{key}={value!r}: not supported for model_type {hf.get('model_type')!r}; {cure}")
    for key in defaults.keys() & hf.keys():
        _check_type(key, hf[key], defaults[key])
    return {key: hf.get(key, default) for key, default in defaults.items()}


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
