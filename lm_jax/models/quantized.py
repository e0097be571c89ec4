"""Which parameters of a frozen model are kept in nf4, and how they get there: the base of QLoRA (arXiv 2305.14314).

Every projection of an attention or feed-forward layer is; embeddings, output embedding, norms and biases stay as they
are. A scale is the largest magnitude of BLOCK weights that follow each other along the contracted axes, C flattened.
Scales stay in fp32, where the paper quantises them a second time: a weight takes 4 + 32 / BLOCK = 4.5 bits.

qwix quantises. What it has for the way back flattens the array, for which every device would first gather the others'
parts, so that `lm_jax.models.nf4` has its own.
"""

import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from lm_jax.config import NF4, ModelConfig
from lm_jax.errors import UserError
from lm_jax.models.nf4 import CODES, SCALES, pack
from lm_jax.models.registry import weight_table
from lm_jax.models.weights import WeightSpec, axis_sizes, flatten, nest
from lm_jax.sharding import param_spec

BLOCK = 64  # weights a scale, as in the paper; of a model whose contracted axis it does not divide, a divisor of it


def is_quantized(spec: WeightSpec) -> bool:
    """Whether a parameter is a projection of an attention or feed-forward layer."""
    return spec.stacked and spec.path.endswith("/kernel")


def leaves(spec: WeightSpec, config: ModelConfig) -> dict[str, tuple[tuple[str, ...], tuple[int, ...], Any]]:
    """path -> (axes, shape, dtype) of what stands for one kernel; the axis of blocks has the name of what it cuts."""
    sizes = axis_sizes(config)
    produced, contracted = spec.hf_groups
    block, features = _block(spec, config), tuple(sizes[a] for a in produced)
    before = (config.num_layers, math.prod(sizes[a] for a in contracted) // block)
    axes = ("layers", contracted[0])
    parent = spec.path.rpartition("/")[0]
    return {
        f"{parent}/{CODES}": ((*axes, "block", *produced), (*before, block // 2, *features), jnp.uint8),
        f"{parent}/{SCALES}": ((*axes, *produced), (*before, *features), jnp.float32),
    }


def _block(spec: WeightSpec, config: ModelConfig) -> int:
    # Of the model alone, never of the mesh: a run may go on on another one.
    size = math.prod(axis_sizes(config)[a] for a in spec.hf_groups[1])
    if size % 2:
        raise UserError(f"parameter {spec.path}: config.lora.base=nf4 packs pairs of weights, {size} is odd; use full")
    return math.gcd(BLOCK, size)


def leaf_specs(spec: WeightSpec, config: ModelConfig, mesh: Mesh) -> dict[str, PartitionSpec]:
    """path -> PartitionSpec of what stands for one kernel, cut as the kernel is.

    Raises:
      UserError: a mesh that would cut a block in two.
    """
    try:
        return {path: param_spec(path, axes, shape, mesh) for path, (axes, shape, _) in leaves(spec, config).items()}
    except UserError as e:
        raise UserError(f"{e}; config.lora.base=nf4 cuts between blocks of {_block(spec, config)} weights only") from e


def check_quantizer(base: str) -> None:
    """Raises UserError where `config.lora.base` needs qwix and it is not installed, before anything is read."""
    if base == NF4 and importlib.util.find_spec("qwix") is None:
        raise UserError("config.lora.base=nf4 needs qwix, which is not installed: pip install -e '.[qlora]'")


def quantize(kernel: jax.Array, spec: WeightSpec, config: ModelConfig, mesh: Mesh) -> dict[str, jax.Array]:
    """The leaves that stand for a kernel of all layers, which is used up; every device quantises its part, fp32.

    Raises:
      UserError: a mesh that would cut a block in two.
    """
    import qwix

    specs, block = leaf_specs(spec, config, mesh), _block(spec, config)
    contracted = len(spec.hf_groups[1])

    def one(weight):
        made = qwix.quantize(weight, "nf4", channelwise_axes=(1,), tiled_axes={0: block})
        return pack(made.qvalue.reshape(-1, block, weight.shape[1])), made.scale

    def local(kernel):
        features = kernel.shape[1 + contracted :]
        flat = kernel.astype(jnp.float32).reshape(len(kernel), -1, math.prod(features))
        codes, scales = jax.lax.map(one, flat)  # layer by layer: it compares every weight with all 16 values
        made = (x.reshape(*x.shape[:-1], *features) for x in (codes, scales))
        return dict(zip(specs, made, strict=True))

    whole = param_spec(spec.path, spec.axes, kernel.shape, mesh)
    made = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=whole, out_specs=specs))(kernel)
    jax.block_until_ready(made)
    kernel.delete()
    return made


def replacement(
    config: ModelConfig, mesh: Mesh, dtype: str
) -> Callable[[WeightSpec, jax.Array], Mapping[str, jax.Array]]:
    """(parameter's spec, its fp32 array) -> what is kept of it: a projection in nf4, else the array in `dtype`."""

    def replace(spec, x):
        return quantize(x, spec, config, mesh) if is_quantized(spec) else {spec.path: x.astype(dtype)}

    return replace


def quantize_params(params: Mapping[str, Any], config: ModelConfig, mesh: Mesh, dtype: str) -> dict[str, Any]:
    """`replacement` of one parameter after the other; `params`, fp32, are used up."""
    flat, replace = flatten(params), replacement(config, mesh, dtype)
    made: dict[str, Any] = {}
    for spec in weight_table(config):
        made |= replace(spec, flat.pop(spec.path))
    return nest(made)
