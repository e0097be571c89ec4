"""One table a model carries each parameter once; import, export, sharding and adapter targets all read it.

Parameters are a plain nested dict with layers stacked on a leading axis; `/` joins the keys of a path. Hugging Face
checkpoints hold one tensor a layer, with fused axes: '(heads head_dim) embed' is a matrix whose rows are heads times
head_dim. The names, not the numbers, of axes say how one becomes the other.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from lm_jax.config import ModelConfig


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Length of every logical axis of a decoder's parameters."""
    return {
        "layers": config.num_layers,
        "vocab": config.vocab_size,
        "embed": config.d_model,
        "mlp": config.d_ff,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
    }


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """One parameter here and its tensor (or one tensor a layer) in a Hugging Face checkpoint."""

    path: str  # 'layers/attn/q/kernel'
    hf_name: str  # 'model.layers.{layer}.self_attn.q_proj.weight'
    axes: tuple[str, ...]  # our logical axes, with a leading 'layers' when stacked
    hf_axes: str  # the tensor's axes in the checkpoint; parentheses fuse axes, outermost first

    @property
    def stacked(self) -> bool:
        return self.axes[0] == "layers"

    @property
    def layer_axes(self) -> tuple[str, ...]:
        """Our axes of a single layer's tensor."""
        return self.axes[1:] if self.stacked else self.axes

    @property
    def hf_groups(self) -> tuple[tuple[str, ...], ...]:
        """The checkpoint's axes, each as the tuple of logical axes that are fused in it."""
        return tuple(tuple(g.strip("()").split()) for g in re.findall(r"\([^)]*\)|\S+", self.hf_axes))

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Our shape, the stacked layers included."""
        sizes = axis_sizes(config)
        return tuple(sizes[a] for a in self.axes)

    def hf_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of one tensor in the checkpoint."""
        sizes = axis_sizes(config)
        return tuple(math.prod(sizes[a] for a in group) for group in self.hf_groups)

    def hf_names(self, config: ModelConfig) -> list[str]:
        """Names in the checkpoint: one a layer when stacked, else a single one."""
        return [self.hf_name.format(layer=i) for i in range(config.num_layers)] if self.stacked else [self.hf_name]

    def to_ours(self, x: Any, config: ModelConfig) -> Any:
        """[checkpoint axes] -> [layer_axes], for one layer's array (numpy or jax); a view where possible."""
        sizes = axis_sizes(config)
        order = [a for group in self.hf_groups for a in group]
        return x.reshape([sizes[a] for a in order]).transpose([order.index(a) for a in self.layer_axes])

    def to_hf(self, x: Any, config: ModelConfig) -> Any:
        """[layer_axes] -> [checkpoint axes]; the inverse of `to_ours`."""
        order = [a for group in self.hf_groups for a in group]
        return x.transpose([self.layer_axes.index(a) for a in order]).reshape(self.hf_shape(config))


def decoder_table(config: ModelConfig) -> tuple[WeightSpec, ...]:
    """Every parameter of a decoder with this config, each once. Llama, Mistral and Qwen share these names."""
    attn, mlp = "model.layers.{layer}.self_attn", "model.layers.{layer}.mlp"
    specs = [WeightSpec("embed/embedding", "model.embed_tokens.weight", ("vocab", "embed"), "vocab embed")]

    def layer(path: str, hf_name: str, axes: str, hf_axes: str, present: bool = True) -> None:
        if present:
            specs.append(WeightSpec(f"layers/{path}", hf_name, ("layers", *axes.split()), hf_axes))

    layer("attn_norm/scale", "model.layers.{layer}.input_layernorm.weight", "embed", "embed")
    for name, heads in (("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads")):
        fused = f"({heads} head_dim)"
        layer(f"attn/{name}/kernel", f"{attn}.{name}_proj.weight", f"embed {heads} head_dim", f"{fused} embed")
        layer(f"attn/{name}/bias", f"{attn}.{name}_proj.bias", f"{heads} head_dim", fused, config.qkv_bias)
    layer("attn/o/kernel", f"{attn}.o_proj.weight", "heads head_dim embed", "embed (heads head_dim)")
    layer("attn/o/bias", f"{attn}.o_proj.bias", "embed", "embed", config.o_bias)
    layer("attn/q_norm/scale", f"{attn}.q_norm.weight", "head_dim", "head_dim", config.qk_norm)
    layer("attn/k_norm/scale", f"{attn}.k_norm.weight", "head_dim", "head_dim", config.qk_norm)
    layer("mlp_norm/scale", "model.layers.{layer}.post_attention_layernorm.weight", "embed", "embed")
    for name, source, target in (("gate", "embed", "mlp"), ("up", "embed", "mlp"), ("down", "mlp", "embed")):
        layer(f"mlp/{name}/kernel", f"{mlp}.{name}_proj.weight", f"{source} {target}", f"{target} {source}")
        layer(f"mlp/{name}/bias", f"{mlp}.{name}_proj.bias", target, target, config.mlp_bias)

    specs.append(WeightSpec("final_norm/scale", "model.norm.weight", ("embed",), "embed"))
    if not config.tie_embeddings:
        specs.append(WeightSpec("lm_head/kernel", "lm_head.weight", ("vocab", "embed"), "vocab embed"))
    return tuple(specs)


def flatten(nested: Mapping[str, Any]) -> dict[str, Any]:
    """{'a': {'b': x}} -> {'a/b': x}."""
    flat = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}/{rest}": leaf for rest, leaf in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{'a/b': x} -> {'a': {'b': x}}; the inverse of `flatten`."""
    nested: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return nested
