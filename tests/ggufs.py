"""Tiny GGUF files, written with the gguf package as llama.cpp's converter writes them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize
from safetensors.numpy import load_file

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def gguf_name(name: str) -> str:
    stem, _, end = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{end}"
    return f"{NAMES[stem]}.{end}"


def permuted(x: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp lays the rows of q and k out in the llama architecture."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def random_blocks(shape: tuple[int, ...], kind: Kind, rng: np.random.Generator) -> np.ndarray:
    """Bytes of a kind that the package cannot quantise into: any are numbers, but for the scales, which are small."""
    per_block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // per_block, size), dtype=np.uint8)
    # Where the half-precision scales of a block stand
    places = {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}
    for at in places.get(kind, (0,)):
        scales = (0.002 * rng.uniform(0.5, 1, len(blocks))).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(*shape[:-1], -1)


def write_gguf(
    path: Path,
    directory: Path,
    kind: Kind | Callable[[str], Kind] = Kind.F32,
    architecture: str | None = None,
    metadata: Mapping[str, Any] = {},
    tokenizer: bool = True,
    tensors: Mapping[str, np.ndarray] = {},
    remove: tuple[str, ...] = (),
) -> Path:
    """A GGUF file of a tiny model in Hugging Face format.

    Args:
      kind: of matrices, by their GGUF name; vectors are always F32.
      metadata: more keys or others; None leaves one out.
      tokenizer: whether that of the directory, byte-level, is written too.
      tensors: more, by GGUF's names.
      remove: names of tensors that are left out.
    """
    config = json.loads((directory / "config.json").read_text())
    family = config["model_type"]
    architecture = architecture or {"mistral": "llama"}.get(family, family)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    keys = {
        f"{architecture}.{key}": value
        for key, value in {
            "context_length": config["max_position_embeddings"],
            "embedding_length": config["hidden_size"],
            "block_count": config["num_hidden_layers"],
            "feed_forward_length": config["intermediate_size"],
            "attention.head_count": heads,
            "attention.head_count_kv": kv_heads,
            "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
            "rope.freq_base": float(theta),
        }.items()
    }
    if family in ("llama", "mistral"):
        keys |= {f"{architecture}.rope.dimension_count": head_dim, f"{architecture}.vocab_size": config["vocab_size"]}
    if family == "qwen3":
        keys |= {f"{architecture}.attention.{name}_length": head_dim for name in ("key", "value")}
    keys |= byte_level_tokenizer(directory, config["vocab_size"]) if tokenizer else {}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    for key, value in {**keys, **metadata}.items():
        if value is not None:
            add(writer, key, value)
    rng = np.random.default_rng(0)
    for name, x in sorted(load_file(directory / "model.safetensors").items()):
        if (to := gguf_name(name)) in remove:
            continue
        if architecture == "llama" and (".attn_q." in to or ".attn_k." in to):
            x = permuted(x, heads if ".attn_q." in to else kv_heads)
        x = np.ascontiguousarray(x.astype(np.float32))
        as_kind = Kind.F32 if x.ndim == 1 else kind(to) if callable(kind) else kind
        try:
            stored = quantize(x, as_kind)
        except NotImplementedError:
            stored = random_blocks(x.shape, as_kind, rng)
        writer.add_tensor(to, stored, raw_dtype=as_kind)
    for name, x in tensors.items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


def byte_level_tokenizer(directory: Path, vocab_size: int, pre: str = "gpt-2") -> dict[str, Any]:
    """The keys of a byte-level tokenizer.json, filled up with tokens that mean nothing, as llama.cpp does."""
    rules = json.loads((directory / "tokenizer.json").read_text())
    named = json.loads((directory / "tokenizer_config.json").read_text())
    added = {token["content"]: token for token in rules["added_tokens"]}
    ids = rules["model"]["vocab"] | {text: token["id"] for text, token in added.items()}
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for text, i in ids.items():
        tokens[i], kinds[i] = text, NORMAL
        if text in added:
            kinds[i] = CONTROL if added[text]["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in rules["model"]["merges"]]
    template = directory / "chat_template.jinja"
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": ids[named["eos_token"]],
        "tokenizer.ggml.padding_token_id": ids[named["eos_token"]],
        "tokenizer.ggml.add_bos_token": False,
    } | ({"tokenizer.chat_template": template.read_text()} if template.exists() else {})
