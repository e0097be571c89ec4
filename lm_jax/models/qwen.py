"""Qwen2, Qwen2.5 and Qwen3: config.json <-> ModelConfig.

Qwen2 and 2.5 share one architecture: biases on q, k and v always. Qwen3 has norms on q and k instead, and a head size
of its own. In both a sliding window may hold for some layers only.
"""

from collections.abc import Mapping
from typing import Any

from lm_jax.config import ModelConfig
from lm_jax.errors import UserError
from lm_jax.models.llama import SIZES, decoder_config, decoder_to_hf
from lm_jax.models.weights import decoder_table

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
weight_table = decoder_table
_SHARED = {
    **SIZES,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
DEFAULTS = {"qwen2": _SHARED, "qwen3": {**_SHARED, "head_dim": 128, "attention_bias": False}}


def config_from_hf(hf: Mapping[str, Any], fields: Mapping[str, Any]) -> ModelConfig:
    """The config.json `hf` of Qwen2, Qwen2.5 or Qwen3, as its `model_type` says; its fields read by `read_fields`.

    Raises:
      UserError: layer types that are no list of full and sliding attention for every layer.
    """
    family = hf["model_type"]
    windows = _layer_windows(fields)
    if family == "qwen2":
        return decoder_config(family, hf, fields, qkv_bias=True, layer_windows=windows)
    bias = fields["attention_bias"]
    return decoder_config(family, hf, fields, qkv_bias=bias, o_bias=bias, qk_norm=True, layer_windows=windows)


def _layer_windows(fields: Mapping[str, Any]) -> tuple[int | None, ...]:
    num_layers = fields["num_hidden_layers"]
    window = fields["sliding_window"] if fields["use_sliding_window"] else None
    types = fields["layer_types"]
    if types is None:
        first = fields["max_window_layers"]  # despite its name: the first layer that has a window
        return tuple(window if i >= first else None for i in range(num_layers))
    if len(types) != num_layers:
        raise UserError(f"layer_types: {len(types)} entries for {num_layers} layers; give one a layer")
    if unknown := sorted({str(t) for t in types} - {"full_attention", "sliding_attention"}):
        raise UserError(f"layer_types: {unknown[0]!r} is not supported; use full_attention or sliding_attention")
    if "sliding_attention" in types and window is None:
        raise UserError(
            f"layer_types has sliding_attention, but use_sliding_window={fields['use_sliding_window']} and "
            f"sliding_window={fields['sliding_window']}; set both, or make every layer full_attention"
        )
    return tuple(window if t == "sliding_attention" else None for t in types)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both read as `config`."""
    windows = {window for window in config.layer_windows if window is not None}
    if len(windows) > 1:
        raise UserError(f"layer windows {sorted(windows)}: {config.family} can express only one size; keep one")
    full = [w is None for w in config.layer_windows]
    extra = {
        "use_sliding_window": bool(windows),
        "sliding_window": next(iter(windows), None),
        # Readers that predate layer_types know only how many leading layers are full.
        "max_window_layers": (full + [False]).index(False),
        "layer_types": ["full_attention" if f else "sliding_attention" for f in full],
    }
    if config.family == "qwen3":
        extra["attention_bias"] = config.qkv_bias
    return decoder_to_hf(config, ARCHITECTURES[config.family], extra)
