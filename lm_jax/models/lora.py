"""Low-rank adapters (LoRA, arXiv 2106.09685): y = x W + scale * (x A) B, W frozen, A and B trained.

Adapters are a pytree of their own, in the shape of the parameters: beside each target's `kernel` stand `lora_a` [*C, r]
and `lora_b` [r, *F], layers stacked. Joined with the frozen parameters they are parameters like any other, which every
function that takes parameters takes too. Which kernels there are comes from the weight table.
Dropout acts on the adapters' input, as in PEFT. What it draws from is a leaf beside the factors, which training alone
joins: parameters without it have none.
"""

import dataclasses
import fnmatch
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lm_jax.config import LoraConfig, ModelConfig, split_names
from lm_jax.errors import UserError
from lm_jax.models.linear import LORA_A, LORA_B, LORA_KEEP, LORA_KEY
from lm_jax.models.registry import weight_table
from lm_jax.models.weights import WeightSpec, axis_sizes, flatten, nest
from lm_jax.sharding import param_spec

ALL_LINEAR = "all-linear"  # PEFT's word for it


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """The two factors beside one kernel.

    Attributes:
      kernel: the target in the weight table.
      rank: r.
    """

    kernel: WeightSpec
    rank: int

    @property
    def module(self) -> str:
        """The last part of the module's name in a Hugging Face checkpoint: `q_proj`."""
        return self.kernel.hf_name.split(".")[-2]

    @property
    def axes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The kernel's contracted and produced axes, of one layer; a checkpoint's matrix is [produced, contracted]."""
        produced, contracted = self.kernel.hf_groups
        return contracted, produced

    def shapes(self, config: ModelConfig) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
        """path -> (axes, shape) of both factors, the stacked layers included."""
        sizes = {**axis_sizes(config), "rank": self.rank}
        contracted, produced = self.axes
        parent = self.kernel.path.rpartition("/")[0]
        both = {LORA_A: ("layers", *contracted, "rank"), LORA_B: ("layers", "rank", *produced)}
        return {f"{parent}/{name}": (axes, tuple(sizes[a] for a in axes)) for name, axes in both.items()}


def all_adapters(config: ModelConfig, rank: int) -> tuple[AdapterSpec, ...]:
    """Those of all projections that may have one."""
    kernels = [s for s in weight_table(config) if s.stacked and s.path.endswith("/kernel")]
    return tuple(AdapterSpec(kernel, rank) for kernel in kernels)


def adapter_table(config: ModelConfig, lora: LoraConfig) -> tuple[AdapterSpec, ...]:
    """The adapters that `lora.targets` names: comma-separated patterns of PEFT's module names (`q_proj`, `*_proj`).

    Raises:
      UserError: a pattern that matches no projection of an attention or feed-forward layer.
    """
    specs = all_adapters(config, lora.rank)
    patterns = split_names(lora.targets)
    patterns = ["*"] if patterns == [ALL_LINEAR] else patterns
    for pattern in patterns or [""]:
        if not any(fnmatch.fnmatchcase(s.module, pattern) for s in specs):
            raise UserError(
                f"config.lora.targets={lora.targets!r}: {pattern!r} matches no module; choose {ALL_LINEAR} or some of "
                f"{', '.join(s.module for s in specs)}"
            )
    return tuple(s for s in specs if any(fnmatch.fnmatchcase(s.module, p) for p in patterns))


def adapter_specs(config: ModelConfig, lora: LoraConfig, mesh: jax.sharding.Mesh) -> dict[str, PartitionSpec]:
    """Path -> PartitionSpec of every factor: cut as the kernel is, the rank not."""
    return {
        path: param_spec(path, axes, shape, mesh)
        for spec in adapter_table(config, lora)
        for path, (axes, shape) in spec.shapes(config).items()
    }


def abstract_adapters(config: ModelConfig, lora: LoraConfig, mesh: jax.sharding.Mesh) -> dict:
    """ShapeDtypeStructs of the adapters with their shardings, fp32, and no array."""
    specs = adapter_specs(config, lora, mesh)
    return nest(
        {
            path: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, specs[path]))
            for spec in adapter_table(config, lora)
            for path, (_, shape) in spec.shapes(config).items()
        }
    )


def init_adapters(config: ModelConfig, lora: LoraConfig, mesh: jax.sharding.Mesh, seed: int) -> dict:
    """Adapters born sharded that change nothing yet: A uniform in +-1/sqrt(fan-in), as PEFT draws it, B zero."""
    abstract = abstract_adapters(config, lora, mesh)

    def draw() -> dict:
        made = {}
        for path, x in flatten(abstract).items():
            if path.endswith(LORA_B):
                made[path] = jnp.zeros(x.shape, x.dtype)
            else:
                bound = math.prod(x.shape[1:-1]) ** -0.5
                made[path] = jax.random.uniform(_named_key(jax.random.key(seed), path), x.shape, x.dtype, -bound, bound)
        return nest(made)

    return jax.jit(draw, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))()


def join(
    params: Mapping[str, Any], adapters: Mapping[str, Any], lora: LoraConfig, key: jax.Array | None = None
) -> dict:
    """Parameters with adapters in place: what the decoder reads. The scale goes into B, so gradients pass it.

    Args:
      key: of the masks that `lora.dropout` draws, an own one for every layer and target; None: no dropout.
    """
    flat = {path: x * lora.scale if path.endswith(LORA_B) else x for path, x in flatten(adapters).items()}
    if key is not None and lora.dropout:
        for path, x in flatten(adapters).items():
            if path.endswith(LORA_A):
                parent = path.rpartition("/")[0]
                flat[f"{parent}/{LORA_KEY}"] = jax.random.split(_named_key(key, parent), len(x))
                flat[f"{parent}/{LORA_KEEP}"] = jnp.full(len(x), 1 - lora.dropout, jnp.float32)
    return nest({**flatten(params), **flat})


def without_dropout(params: Mapping[str, Any]) -> dict:
    """What `join` gives without a key."""
    return nest({path: x for path, x in flatten(params).items() if not path.endswith((LORA_KEY, LORA_KEEP))})


def dropout_key(seed: int, step: jax.Array, microbatch: jax.Array) -> jax.Array:
    """Of a microbatch's masks: a function of these three alone, so that a run goes on as if it had never stopped."""
    key = _named_key(jax.random.key(seed), "dropout")
    return jax.random.fold_in(jax.random.fold_in(key, step), microbatch)


def _named_key(key: jax.Array, name: str) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def merge(params: dict, adapters: dict, lora: LoraConfig) -> dict:
    """W + scale * A B for every target, summed in fp32 and kept in W's dtype and sharding; `params` are used up."""
    merged, flat = flatten(params), flatten(adapters)
    for path in [p for p in flat if p.endswith(LORA_A)]:
        parent = path.rpartition("/")[0]
        kernel = merged[f"{parent}/kernel"]
        add = jax.jit(_add_product, donate_argnums=0, static_argnums=3, out_shardings=kernel.sharding)
        merged[f"{parent}/kernel"] = add(kernel, flat[path], flat[f"{parent}/{LORA_B}"], lora.scale)
    return nest(merged)


def _add_product(kernel, a, b, scale):
    layers, rank = b.shape[:2]
    product = jnp.matmul(a.reshape(layers, -1, rank), b.reshape(layers, rank, -1), precision="highest")
    return (kernel.astype(jnp.float32) + scale * product.reshape(kernel.shape)).astype(kernel.dtype)


def stack(parts: Sequence[tuple[Mapping[str, Any], LoraConfig]], config: ModelConfig) -> tuple[dict, LoraConfig]:
    """Adapters that were trained one on the other, as a single one on the model below them all.

    sum_i s_i A_i B_i = [A_1 ... A_n] [s_1 B_1; ...; s_n B_n]: ranks add up, the scale becomes 1. Zeros stand for a part
    that has no adapter on a kernel that another one has.

    Args:
      parts: adapters and how each is joined; the order does not matter.
    """
    modules = {spec.module: None for _, lora in parts for spec in adapter_table(config, lora)}
    rank = sum(lora.rank for _, lora in parts)
    whole = LoraConfig(rank, float(rank), ",".join(modules), rslora=False)
    flat = {}
    for spec in adapter_table(config, whole):
        for path in spec.shapes(config):
            is_a, given = path.endswith(LORA_A), []
            for adapters, lora in parts:
                _, shape = AdapterSpec(spec.kernel, lora.rank).shapes(config)[path]
                x = flatten(adapters).get(path, jnp.zeros(shape, jnp.float32))
                given.append(x if is_a else x * lora.scale)
            flat[path] = jnp.concatenate(given, axis=-1 if is_a else 1)
    return nest(flat), whole
