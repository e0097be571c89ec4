"""Model FLOPs by counted tokens, and the peak of the devices they ran on."""

import jax
import numpy as np

from lm_jax.config import ModelConfig

# Dense bf16 peak of one device in FLOP/s, by jax's device_kind (vendors' data sheets).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def forward_flops(config: ModelConfig, lengths: np.ndarray) -> float:
    """FLOPs of one forward pass over sequences of these lengths: 2 per multiply-add, padding not counted.

    Matmuls with every weight matrix (the embedding lookup is none), plus causal attention's scores and values over
    the tokens that each query sees.
    """
    return sum(forward_parts(config, lengths))


def forward_parts(config: ModelConfig, lengths: np.ndarray) -> tuple[float, float]:
    """FLOPs of (matmuls with weights, attention)."""
    attention = config.d_model * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    per_layer = attention + 3 * config.d_model * config.d_ff
    weights = config.num_layers * per_layer + config.d_model * config.vocab_size
    lengths = np.asarray(lengths, np.float64)
    seen = 0.0
    for window in config.layer_windows:
        w = lengths if window is None else np.minimum(lengths, window)
        seen += np.sum(w * (w + 1) / 2 + (lengths - w) * w)
    return 2.0 * weights * lengths.sum(), 4.0 * config.num_heads * config.head_dim * seen


def train_flops(config: ModelConfig, lengths: np.ndarray, frozen: bool = False) -> float:
    """Forward and backward (twice the forward); recomputation is not useful work and is not counted.

    Args:
      frozen: the weights have no gradients of their own, which are half of what a matmul's backward takes; what
        adapters add is not counted.
    """
    matmuls, attention = forward_parts(config, lengths)
    return (2.0 if frozen else 3.0) * matmuls + 3.0 * attention


def peak_flops() -> float | None:
    """Of all devices together; None where the device is not in the table."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return None if peak is None else peak * jax.device_count()
