"""Which model families exist, and the way from a config.json to the family that reads it."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_jax.config import ModelConfig
from lm_jax.console import say
from lm_jax.errors import UserError
from lm_jax.models import llama, mistral, qwen
from lm_jax.models.llama import read_fields, unread_keys
from lm_jax.models.rope import unread_rope_keys
from lm_jax.models.weights import WeightSpec
from lm_jax.strict_json import read_json_object

FAMILIES = {"llama": llama, "mistral": mistral, "qwen2": qwen, "qwen3": qwen}
FIELDS: dict[str, Mapping[str, Any]] = {"llama": llama.DEFAULTS, "mistral": mistral.DEFAULTS, **qwen.DEFAULTS}
ARCHITECTURES = {"llama": llama.ARCHITECTURE, "mistral": mistral.ARCHITECTURE, **qwen.ARCHITECTURES}


def read_model_config(model_dir: str | Path) -> ModelConfig:
    """Reads `model_dir`/config.json; says once which of its keys change nothing, as transformers knows no such keys.

    Raises:
      UserError: no or broken config.json, an architecture that is not supported, a field that is not understood.
    """
    path = Path(model_dir) / "config.json"
    hf = read_json_object(path)
    try:
        config = config_from_hf(hf)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if ignored := [*unread_keys(hf, FIELDS[config.family]), *unread_rope_keys(hf)]:
        _say_once(f"{path}: ignored, as transformers' {config.family} does: {', '.join(ignored)}")
    return config


_say_once = functools.cache(say)


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a parsed config.json, by its model_type and architectures.

    Raises:
      UserError: an architecture that is not supported, a field that is not understood.
    """
    family, architectures = hf.get("model_type"), hf.get("architectures")
    known = ARCHITECTURES.get(family) if isinstance(family, str) else None
    # As saved from within FSDP, or without its output embedding, are the same model
    same = [] if known is None else [[known], [f"FSDP{known}"], [known.replace("ForCausalLM", "Model")]]
    if known is None or not isinstance(family, str) or (architectures and architectures not in same):
        raise UserError(
            f"model_type {family!r} with architectures {architectures!r} is not supported; "
            f"supported: {', '.join(ARCHITECTURES.values())}"
        )
    return FAMILIES[family].config_from_hf(hf, read_fields(hf, FIELDS[family]))


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json of `config`: what transformers 4 and 5, and `config_from_hf`, read as the same model.

    Raises:
      UserError: the family has no field for something in `config`.
    """
    hf = FAMILIES[config.family].config_to_hf(config)
    if config_from_hf(hf) != config:
        raise UserError(f"model config: {config.family} cannot express it in a config.json; choose another family")
    return hf


def weight_table(config: ModelConfig) -> tuple[WeightSpec, ...]:
    """Every parameter of the model, each once, with its path here and its name in a Hugging Face checkpoint."""
    return FAMILIES[config.family].weight_table(config)
