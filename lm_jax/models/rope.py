"""Rotary position embedding, its context-length scalings, and the two ways in which config.json spells them.

Letters: B rows, T tokens, H heads, R = head_dim / 2 rotation pairs. Every head rotates the pair (x[r], x[r + R]) by
position * frequency[r]; the scalings only change the frequencies, and yarn also the size of cos and sin.
Sources: RoFormer (arXiv 2104.09864), yarn (arXiv 2309.00071), and for the rest transformers' `modeling_rope_utils`.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.config import RopeConfig
from lm_jax.errors import UserError

DEFAULT_THETA = 10_000.0
_LARGEST = 1e30  # of any number here: fp32 holds its square root times any position

# Fields of each kind in config.json, besides rope_theta and rope_type: our name, required.
_FIELDS = {
    "default": {},
    "linear": {"factor": ("factor", True)},
    "dynamic": {"factor": ("factor", True)},
    "llama3": {
        "factor": ("factor", True),
        "low_freq_factor": ("low_freq_factor", True),
        "high_freq_factor": ("high_freq_factor", True),
        "original_max_position_embeddings": ("original_max_position", False),
    },
    "yarn": {
        "factor": ("factor", True),
        "original_max_position_embeddings": ("original_max_position", False),
        "attention_factor": ("attention_factor", False),
        "beta_fast": ("beta_fast", False),
        "beta_slow": ("beta_slow", False),
        "mscale": ("mscale", False),
        "mscale_all_dim": ("mscale_all_dim", False),
        "truncate": ("truncate", False),  # the one boolean
    },
}
_ALL_FIELDS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"}.union(*_FIELDS.values()))


def rope_cos_sin(
    rope: RopeConfig, head_dim: int, max_position: int, positions: jax.Array, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every token's rotation angles, the attention factor multiplied in.

    Args:
      rope: the kind of scaling and its numbers.
      head_dim: even.
      max_position: context length of the checkpoint; used where `rope.original_max_position` is None.
      positions: [B, T] int32, restarting at each segment.
      segment_ids: [B, T] int32, contiguous segments; None: each row is one segment. Only `dynamic` looks at them: its
        frequencies depend on the length of a sequence, so that a packed sequence gets what it would get alone.

    Returns:
      (cos, sin), each [B, T, R] fp32.
    """
    if rope.kind == "dynamic":
        lengths = _sequence_lengths(positions, segment_ids)
        frequencies, scale = _dynamic_frequencies(rope, head_dim, max_position, lengths), 1.0
    else:
        fixed, scale = rope_frequencies(rope, head_dim, max_position)
        frequencies = jnp.asarray(fixed)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B, T, H, head_dim] by cos, sin [B, T, R]; computed in fp32, returned in x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rope_frequencies(rope: RopeConfig, head_dim: int, max_position: int) -> tuple[np.ndarray, float]:
    """Radians a position of each pair, [R] fp32, and the factor on cos and sin, for kinds that ignore the length."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = 1.0 / np.float32(rope.theta) ** exponents  # fp32 throughout, as the checkpoints were trained
    original = rope.original_max_position or max_position
    if rope.kind == "default":
        return plain, 1.0
    if rope.kind == "linear":
        return plain / np.float32(rope.factor), 1.0
    if rope.kind == "llama3":
        rotations = original * plain / (2 * math.pi)  # full turns within the original context
        kept = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        return _blend(plain, rope.factor, np.clip(kept, 0, 1)), 1.0
    if rope.kind == "yarn":
        return _blend(plain, rope.factor, _yarn_kept(rope, head_dim, original)), _yarn_attention_factor(rope)
    raise UserError(f"rope kind {rope.kind!r}: not supported; supported: {', '.join(_FIELDS)}")


def _blend(plain: np.ndarray, factor: float, kept: np.ndarray) -> np.ndarray:
    """Between plain / factor (kept 0) and plain (kept 1)."""
    return (plain / factor * (1 - kept) + plain * kept).astype(np.float32)


def _yarn_kept(rope: RopeConfig, head_dim: int, original: int) -> np.ndarray:
    """Share of the unscaled frequency in each pair (one minus the ramp of yarn, section 3.2)."""

    def pair_that_turns(rotations: float) -> float:  # within the original context
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the ramp is a step then, and must not divide by zero
    return 1 - np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def _dynamic_frequencies(rope: RopeConfig, head_dim: int, max_position: int, lengths: jax.Array) -> jax.Array:
    """[B, T, R]: the base grows with the length of the token's sequence beyond the original context."""
    original = rope.original_max_position or max_position
    stretch = rope.factor * jnp.maximum(lengths, original).astype(jnp.float32) / original - (rope.factor - 1)
    base = rope.theta * stretch ** (head_dim / (head_dim - 2))
    return 1.0 / base[..., None] ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)


def _sequence_lengths(positions: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """[B, T] int32: for each token the length of its segment, as its largest position plus one."""
    if segment_ids is None:
        return jnp.broadcast_to(jnp.max(positions, axis=1, keepdims=True) + 1, positions.shape)
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    runs = jnp.pad(jnp.cumsum(starts, axis=1), ((0, 0), (1, 0)))  # [B, T], below T whatever the ids are

    def row(position, run):
        return jax.ops.segment_max(position, run, num_segments=position.shape[0])[run] + 1

    return jax.vmap(row)(positions, runs)


def rope_from_hf(hf: Mapping[str, Any], max_position: int) -> RopeConfig:
    """Reads `rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5) of a config.json.

    Raises:
      UserError: on a kind or field that is not understood, or two spellings that contradict each other.
    """
    if hf.get("partial_rotary_factor") not in (None, 1):
        raise UserError(f"partial_rotary_factor={hf['partial_rotary_factor']}: only 1 (every dimension) is supported")
    spellings = {key: hf[key] for key in ("rope_scaling", "rope_parameters") if hf.get(key)}
    top_theta, original = hf.get("rope_theta"), hf.get("original_max_position_embeddings")
    read = {key: _read_spelling(value, key, top_theta, original, max_position) for key, value in spellings.items()}
    if not read:
        return RopeConfig(theta=_number(DEFAULT_THETA if top_theta is None else top_theta, "rope_theta"))
    if len(set(read.values())) > 1:
        raise UserError("rope_scaling and rope_parameters contradict each other; delete the one that is wrong")
    return next(iter(read.values()))


def unread_rope_keys(hf: Mapping[str, Any]) -> list[str]:
    """Keys of its rotary fields that transformers does not know in any kind: they change nothing."""
    spellings = {where: fields for where in ("rope_scaling", "rope_parameters") if (fields := hf.get(where))}
    return [f"{where}.{key}" for where, fields in spellings.items() for key in fields if _unknown(key)]


def _unknown(key: str) -> bool:
    if key in _ALL_FIELDS:
        return False
    from transformers.modeling_rope_utils import RopeParameters  # slow: for a file with other keys than the usual ones

    return key not in RopeParameters.__annotations__


def _read_spelling(
    fields: Any, where: str, top_theta: float | None, top_original: Any, max_position: int
) -> RopeConfig:
    if not isinstance(fields, Mapping):
        raise UserError(f"{where}={fields!r}: expected an object with a rope_type")
    kinds = {str(fields[key]) for key in ("rope_type", "type") if fields.get(key) is not None} or {"default"}
    kind = kinds.pop()
    if kinds or kind not in _FIELDS:
        given = {key: fields[key] for key in ("rope_type", "type") if key in fields}
        raise UserError(f"{where}: {given} is not supported; supported rope_type: {', '.join(_FIELDS)}")
    theta = fields.get("rope_theta")
    if None not in (theta, top_theta) and theta != top_theta:
        raise UserError(f"rope_theta={top_theta} and {where}.rope_theta={theta} contradict; delete the wrong one")
    theta = next((t for t in (theta, top_theta) if t is not None), DEFAULT_THETA)
    known = _FIELDS[kind]
    values: dict[str, Any] = {}
    if kind in ("dynamic", "llama3", "yarn"):
        values["original_max_position"] = max_position
    if top_original is not None and kind in ("llama3", "yarn"):  # transformers prefers it there
        if fields.get("original_max_position_embeddings") not in (None, top_original):
            raise UserError(f"original_max_position_embeddings stands beside and in {where}, and differs; delete one")
        fields = {**fields, "original_max_position_embeddings": top_original}
    for key, value in fields.items():
        if key in ("rope_type", "type", "rope_theta") or (key == "partial_rotary_factor" and value in (None, 1)):
            continue
        if kind == "dynamic" and key == "original_max_position_embeddings" and value in (None, max_position):
            continue
        if key not in known and value is not None:
            _check_harmless(key, value, where, kind, fields.get("factor"))
            continue
        if isinstance(value, bool) and key == "truncate":
            values[key] = value
        elif key in known and (value is not None or key == "truncate"):
            values[known[key][0]] = _number(value, f"{where}.{key}")
    if kind == "yarn" and "factor" in fields and fields["factor"] is None:
        values["factor"] = max_position / values["original_max_position"]
    if missing := [key for key, (name, required) in known.items() if required and name not in values]:
        raise UserError(f"{where}: rope_type {kind!r} needs {', '.join(missing)}; add it")
    if "original_max_position" in values:
        values["original_max_position"] = int(values["original_max_position"])
    if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise UserError(f"{where}: high_freq_factor must be larger than low_freq_factor")
    return RopeConfig(theta=_number(theta, "rope_theta"), kind=kind, **values)


def _check_harmless(key: str, value: Any, where: str, kind: str, factor: Any) -> None:
    """Raises UserError for a field that is not of this `kind`, unless transformers knows it in none."""
    name = f"{where}.{key}={value!r}"
    if key == "attn_factor" and value != 1:
        number = isinstance(value, (int, float)) and isinstance(factor, (int, float)) and factor > 1
        both = f": {value * (0.1 * math.log(factor) + 1):.6g}" if number else ""
        raise UserError(
            f"{name}: transformers does not read it; write attention_factor, which stands for the whole factor on cos "
            f"and sin. vLLM and llama.cpp multiply attn_factor by 0.1 ln(factor) + 1{both}"
        )
    if key == "extrapolation_factor" and value != 1:
        raise UserError(f"{name}: only 1, which transformers assumes, is supported; use a model without it")
    if isinstance(value, Mapping):
        raise UserError(f"{name}: rotary fields for each type of layer are not supported; use a model without them")
    if not _unknown(key):
        takes = ", ".join(_FIELDS[kind]) or "no fields"
        raise UserError(f"{name}: not understood for {kind!r}, which takes {takes}; set its rope_type, or delete it")


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _LARGEST:
        raise UserError(f"{where}={value!r}: expected a positive number")
    return float(value)


def rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """All three keys, so that transformers 4 and 5 both read the same embedding."""
    scaling = {"rope_type": rope.kind}
    for key, (name, _) in _FIELDS[rope.kind].items():
        if (value := getattr(rope, name)) is not None:
            scaling[key] = value
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else scaling,
        "rope_parameters": {"rope_theta": rope.theta, **scaling},
    }
