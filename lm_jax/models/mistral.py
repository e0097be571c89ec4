"""Mistral's config.json <-> ModelConfig: Llama without biases, and one sliding window for every layer."""

from collections.abc import Mapping
from typing import Any

from lm_jax.config import ModelConfig
from lm_jax.models.llama import SIZES, decoder_config, decoder_to_hf
from lm_jax.models.weights import decoder_table

ARCHITECTURE = "MistralForCausalLM"
weight_table = decoder_table
DEFAULTS = {
    **SIZES,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,  # null, not absence, means full attention
}


def config_from_hf(hf: Mapping[str, Any], fields: Mapping[str, Any]) -> ModelConfig:
    """Mistral's config.json `hf`, its fields read by `read_fields`."""
    windows = (fields["sliding_window"],) * fields["num_hidden_layers"]
    return decoder_config("mistral", hf, fields, layer_windows=windows)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both read as `config`."""
    return decoder_to_hf(config, ARCHITECTURE, {"sliding_window": config.layer_windows[0]})
