"""GGUF files, llama.cpp's format: their header, their tensors under Hugging Face's names, and the model's config.json.

Nothing is read before it is looked at: a tensor is dequantised by the `gguf` package whenever it is asked for. The
header is read here, since that package's reader takes many seconds for the vocabulary of a current model.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm_jax.checkpoints.weight_files import STORED_DTYPES, Checkpoint, Tensor, listed
from lm_jax.config import RopeConfig
from lm_jax.errors import UserError
from lm_jax.models.registry import ARCHITECTURES
from lm_jax.models.rope import rope_frequencies, rope_to_hf

# As GGUF calls an architecture: the family here. Mistral's models are of the first one there.
_FAMILIES = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}
_PERMUTED = ("llama", "mistral")  # llama.cpp turns pairs that lie apart into neighbours, for q and k
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ROWS = 4096  # that are dequantised at a time: numpy's temporaries are several times as large

_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS, _LLAMA3_CONTEXT = "rope_freqs.weight", 8192  # tokens that every Llama 3 had before it was stretched

_FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OTHER_FIELDS = frozenset(
    """
    attention.head_count_kv attention.key_length attention.value_length attention.sliding_window rope.dimension_count
    rope.freq_base rope.scaling.type rope.scaling.factor rope.scaling.original_context_length rope.scale_linear
    rope.scaling.attn_factor rope.scaling.finetuned rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow
    vocab_size tensor_data_layout pooling_type
    """.split()
)
_ONLY: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
}


class GgufTensor(NamedTuple):
    """One tensor in a mapped file.

    Attributes:
      kind: of its numbers, as GGUF calls it.
      shape: as Hugging Face has it.
      data: its bytes.
      heads: of a projection whose rows were permuted, in how many heads; else 0.
    """

    kind: str
    shape: tuple[int, ...]
    data: np.ndarray
    heads: int = 0

    @property
    def dtype(self) -> str:
        """Of `array`, as safetensors calls it."""
        return self.kind if self.kind in STORED_DTYPES else "F32"

    @property
    def array(self) -> np.ndarray:
        """The tensor: in the file where it is stored plainly, else made from it, fp32."""
        if self.kind in STORED_DTYPES:
            x = self.data.view(STORED_DTYPES[self.kind]).reshape(self.shape)
        else:
            x = np.empty(self.shape, np.float32)
            rows, stored = x.reshape(-1, self.shape[-1]), self.data.reshape(math.prod(self.shape[:-1]), -1)
            for start in range(0, len(rows), _ROWS):
                rows[start : start + _ROWS] = _dequantize(stored[start : start + _ROWS], self.kind)
        if self.heads:
            x = x.reshape(self.heads, -1, 2, *self.shape[1:]).swapaxes(1, 2).reshape(self.shape)
        return x


class GgufHeader(NamedTuple):
    """What a file says of itself, and where its tensors lie.

    Attributes:
      metadata: by key; arrays as lists.
      tensors: by GGUF's names.
      maps: the files.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    maps: list[mmap.mmap]


def _dequantize(data: np.ndarray, kind: str) -> np.ndarray:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return dequantize(data, GGMLQuantizationType[kind])


def read_gguf(path: Path) -> GgufHeader:
    """The header of a GGUF file; of one of several that a model is split into, of them all.

    Raises:
      UserError: no GGUF file, one that is truncated, a part that is missing, numbers of a kind that cannot be read.
    """
    split = _SPLIT.fullmatch(path.name)
    count = int(split[3]) if split else 1
    parts = [path.with_name(f"{split[1]}-{i:05}-of-{split[3]}.gguf") for i in range(1, count + 1)] if split else [path]
    if lost := [part.name for part in parts if not part.is_file()]:
        raise UserError(f"{path}: one of {count} parts, of which {listed(lost)} is missing; put it there")
    headers = []
    for part in parts:
        try:
            headers.append(_read_file(part))
        except (ValueError, KeyError, IndexError, struct.error, UnicodeDecodeError, OverflowError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{part}: truncated or no GGUF file ({said}); download it again") from error
    metadata, tensors = headers[0].metadata, {name: x for header in headers for name, x in header.tensors.items()}
    if metadata.get("split.count", 1) > len(parts):
        raise UserError(f"{path}: one of {metadata['split.count']} parts; name them as llama.cpp does, -00001-of-0000N")
    return GgufHeader(metadata, tensors, [mapped for header in headers for mapped in header.maps])


class _Reader:
    """Numbers and strings one after the other."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(code)
        return value

    def string(self) -> str:
        size = self.number("Q")
        if size > len(self.data) - self.at:
            raise ValueError("a string that goes on behind its end")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            # A float of few digits, as 1e-05 is, was one before it became fp32
            value = self.number(_FIXED[kind])
            return float(str(np.float32(value))) if _FIXED[kind] == "f" else value
        item, count = self.number("I"), self.number("Q")
        if item not in _FIXED:
            if count > len(self.data) - self.at:
                raise ValueError("an array that goes on behind its end")
            return [self.value(item) for _ in range(count)]
        size = struct.calcsize(_FIXED[item])
        if count * size > len(self.data) - self.at:
            raise ValueError("an array that goes on behind its end")
        values = np.frombuffer(self.data, np.dtype(_FIXED[item]).newbyteorder("<"), count, self.at).tolist()
        self.at += count * size
        return values


def _read_file(path: Path) -> GgufHeader:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    reader = _Reader(mapped)
    magic, version = mapped[:4], reader.number("I") and reader.number("I")
    if magic != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if version not in (2, 3):
        raise ValueError(f"version {version}, read are 2 and 3, little-endian")
    num_tensors, num_values = reader.number("Q"), reader.number("Q")
    metadata = {}
    for _ in range(num_values):
        key = reader.string()
        metadata[key] = reader.value(reader.number("I"))
    entries = []
    for _ in range(num_tensors):
        name = reader.string()
        shape = tuple(reversed([reader.number("Q") for _ in range(reader.number("I"))]))
        entries.append((name, shape, GGMLQuantizationType(reader.number("I")), reader.number("Q")))
    alignment = metadata.get("general.alignment", 32)
    whole, start = np.frombuffer(mapped, np.uint8), -(-reader.at // alignment) * alignment
    found: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in entries:
        per_block, block_bytes = GGML_QUANT_SIZES[kind]
        data = whole[start + offset : start + offset + math.prod(shape) // per_block * block_bytes]
        if (
            name in found
            or not shape
            or shape[-1] % per_block
            or data.size * per_block != math.prod(shape) * block_bytes
        ):
            raise ValueError(f"tensor {name} of shape {shape} lies outside the file, or stands twice")
        found[name] = GgufTensor(kind.name, shape, data)
    for kind in {kind for *_, kind, _ in entries if kind.name not in STORED_DTYPES}:
        try:
            _dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind.name)
        except NotImplementedError:
            raise UserError(
                f"{path}: tensors of the kind {kind.name}, which is not read; use a file of another kind"
            ) from None
    return GgufHeader(metadata, found, [mapped])


def open_gguf(path: Path) -> Checkpoint:
    """The tensors of a GGUF file under Hugging Face's names; what has none there keeps its own.

    Raises:
      UserError: as `read_gguf`.
    """
    header = read_gguf(path)
    metadata, architecture = header.metadata, header.metadata.get("general.architecture")
    heads = {"attn_q": "head_count", "attn_k": "head_count_kv"} if architecture in _PERMUTED else {}
    found: dict[str, Tensor] = {}
    for name, tensor in header.tensors.items():
        if name == _ROPE_FACTORS or re.fullmatch(r"blk\.\d+\.attn_rot_embd\.\w+", name):
            continue  # what is in config.json
        *layer, part, end = name.rsplit(".", 2)
        hf = f"model.layers.{layer[0].removeprefix('blk.')}.{_LAYER.get(part)}" if layer else _TENSORS.get(part)
        if part in heads:
            counts = (metadata.get(f"{architecture}.attention.{key}") for key in (heads[part], "head_count"))
            tensor = tensor._replace(heads=next(filter(None, counts), 0))
        found[f"{hf}.{end}" if part in _LAYER | _TENSORS else name] = tensor
    return Checkpoint(found, header.maps)


def gguf_config(path: Path, header: GgufHeader) -> dict[str, Any]:
    """The config.json of the model in a GGUF file.

    Raises:
      UserError: an architecture that is not supported, a key that is missing or not understood, by its name.
    """
    metadata, tensors = header.metadata, header.tensors
    architecture = metadata.get("general.architecture")
    if architecture not in _FAMILIES or "token_embd.weight" not in tensors:
        raise UserError(
            f"{path}: general.architecture={architecture!r} is not supported; supported: {', '.join(_FAMILIES)}, each "
            "with its token_embd.weight"
        )
    own = {k.removeprefix(f"{architecture}."): v for k, v in metadata.items() if k.startswith(f"{architecture}.")}
    for key, value in own.items():
        if key in _ONLY and value not in _ONLY[key] or key not in _ONLY and key not in _OTHER_FIELDS | _FIELDS.keys():
            raise UserError(f"{path}: {architecture}.{key}={value!r} is not supported; use another checkpoint")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UserError(f"{path}: {architecture}.{key} differs between layers, which is not supported")
            own[key] = value[0]
    if missing := [key for key in _FIELDS if key not in own]:
        raise UserError(
            f"{path}: {listed([f'{architecture}.{key}' for key in missing])} missing; convert the model anew"
        )
    family, fields = _FAMILIES[architecture], {hf: own[key] for key, hf in _FIELDS.items()}
    heads, window = fields["num_attention_heads"], own.get("attention.sliding_window") or None
    usual = fields["hidden_size"] // heads
    head_dim = own.get("attention.key_length") or own.get("rope.dimension_count") or usual
    if {own.get("attention.value_length", head_dim), own.get("rope.dimension_count", head_dim)} != {head_dim}:
        raise UserError(f"{path}: heads of {head_dim} whose values or rotations have other sizes are not supported")
    if window is not None and family.startswith("qwen"):
        raise UserError(f"{path}: {architecture}.attention.sliding_window={window} is not supported")
    if family == "llama" and window is not None:
        family = "mistral"
    fields |= {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_theta": own.get("rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(path, own, tensors, head_dim),
    }
    if head_dim != usual or family == "qwen3":
        fields["head_dim"] = head_dim
    if family == "mistral":
        fields["sliding_window"] = window
    biases = {"attention_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    return fields | {key: True for key, name in biases.items() if name in tensors}


def _rope_scaling(
    path: Path, own: Mapping[str, Any], tensors: Mapping[str, GgufTensor], head_dim: int
) -> dict[str, Any] | None:
    """As config.json has it. llama.cpp keeps what Llama 3 does to each frequency as a tensor of factors."""
    kind, factor = own.get("rope.scaling.type", "none"), own.get("rope.scaling.factor") or own.get("rope.scale_linear")
    original = own.get("rope.scaling.original_context_length")
    factors = tensors[_ROPE_FACTORS].array.astype(np.float32) if _ROPE_FACTORS in tensors else np.ones(1)
    if (factors != 1).any():
        rope = RopeConfig(own.get("rope.freq_base", 10_000.0), "llama3", float(factors.max()), _LLAMA3_CONTEXT)
        plain = rope_frequencies(RopeConfig(rope.theta), head_dim, _LLAMA3_CONTEXT)[0]
        made = plain / rope_frequencies(rope, head_dim, _LLAMA3_CONTEXT)[0]
        if made.shape != factors.shape or not np.allclose(made, factors, rtol=1e-3) or (factor or 1) != 1:
            raise UserError(f"{path}: {_ROPE_FACTORS} has other factors than Llama 3's, which is not supported")
        return rope_to_hf(rope)["rope_scaling"]
    if kind == "none" or (kind == "linear" and (factor or 1) == 1):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn" or not factor:
        raise UserError(f"{path}: rope.scaling.type={kind!r} with factor {factor} is not supported")
    scaling = {"rope_type": "yarn", "factor": factor}
    given = {"original_max_position_embeddings": original, "beta_fast": own.get("rope.scaling.yarn_beta_fast"),
             "beta_slow": own.get("rope.scaling.yarn_beta_slow")}  # fmt: skip
    if (attention := own.get("rope.scaling.attn_factor")) is not None:  # llama.cpp multiplies it with the usual one
        given["attention_factor"] = attention * (0.1 * math.log(factor) + 1)
    return scaling | {key: value for key, value in given.items() if value is not None}
