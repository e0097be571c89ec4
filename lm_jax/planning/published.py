"""The shapes of published models, from their config.json: planning for them needs no download."""

from pathlib import Path
from typing import Any

from lm_jax.checkpoints.runs import open_model
from lm_jax.config import ModelConfig
from lm_jax.errors import UserError
from lm_jax.models.registry import config_from_hf


def _decoder(family: str, layers: int, width: int, inner: int, heads: int, kv_heads: int, vocab: int, **others: Any):
    """The fields of config.json that every family has, and `others`."""
    return {
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    } | others


_LLAMA3 = {"rope_theta": 500000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
_SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA31: dict[str, Any] = _LLAMA3 | {
    "max_position_embeddings": 131072,
    "rope_scaling": _SCALED | {"original_max_position_embeddings": 8192},
}
_LLAMA32 = _LLAMA31 | {"rope_scaling": _LLAMA31["rope_scaling"] | {"factor": 32.0}, "tie_word_embeddings": True}
_QWEN25 = {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}

# Hub id (a suffix such as -Instruct aside) -> config.json
_CONFIGS = {
    "meta-llama/Llama-2-7b": _decoder("llama", 32, 4096, 11008, 32, 32, 32000, max_position_embeddings=4096),
    "meta-llama/Llama-2-13b": _decoder("llama", 40, 5120, 13824, 40, 40, 32000, max_position_embeddings=4096),
    "meta-llama/Meta-Llama-3-8B": _decoder("llama", 32, 4096, 14336, 32, 8, 128256, **_LLAMA3),
    "meta-llama/Meta-Llama-3-70B": _decoder("llama", 80, 8192, 28672, 64, 8, 128256, **_LLAMA3),
    "meta-llama/Llama-3.1-8B": _decoder("llama", 32, 4096, 14336, 32, 8, 128256, **_LLAMA31),
    "meta-llama/Llama-3.1-70B": _decoder("llama", 80, 8192, 28672, 64, 8, 128256, **_LLAMA31),
    "meta-llama/Llama-3.2-1B": _decoder("llama", 16, 2048, 8192, 32, 8, 128256, head_dim=64, **_LLAMA32),
    "meta-llama/Llama-3.2-3B": _decoder("llama", 28, 3072, 8192, 24, 8, 128256, head_dim=128, **_LLAMA32),
    "mistralai/Mistral-7B-v0.3": _decoder(
        "mistral", 32, 4096, 14336, 32, 8, 32768, rope_theta=1e6, sliding_window=None, max_position_embeddings=32768
    ),
    "Qwen/Qwen2.5-7B": _decoder("qwen2", 28, 3584, 18944, 28, 4, 152064, **_QWEN25),
    "Qwen/Qwen2.5-14B": _decoder("qwen2", 48, 5120, 13824, 40, 8, 152064, **_QWEN25),
    "Qwen/Qwen2.5-32B": _decoder("qwen2", 64, 5120, 27648, 40, 8, 152064, **_QWEN25),
    "Qwen/Qwen2.5-72B": _decoder("qwen2", 80, 8192, 29568, 64, 8, 152064, **_QWEN25),
}
_SUFFIXES = ("-Instruct", "-chat-hf", "-hf", "-chat")


def model_shape(model: str) -> ModelConfig:
    """The config of a model: of a directory with config.json (weights are not looked for), a run, or a published one.

    Raises:
      UserError: none of them; nothing is downloaded.
    """
    if Path(model).is_dir():
        return open_model(model).config
    name = next((model.removesuffix(s) for s in _SUFFIXES if model.endswith(s)), model)
    if name not in _CONFIGS:
        raise UserError(
            f"model {model!r}: no such directory, and nothing is downloaded for a plan; give a directory with the "
            f"model's config.json, or one of {', '.join(_CONFIGS)}"
        )
    return config_from_hf(_CONFIGS[name])
