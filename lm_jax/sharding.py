"""The mesh, and which array axis lies along which mesh axis.

Every array axis has a logical name; one table maps logical names to mesh axes. Parameters get their logical axes from
the weight tables (`lm_jax.models.weights`), activations name theirs where `constrain` is called. Mesh axes:
`data` (replicas), `fsdp` (parameters and batch), `tensor` (heads, feed-forward, vocabulary).
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lm_jax.config import MeshConfig
from lm_jax.distributed.processes import reached
from lm_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

PARAM_RULES: Mapping[str, str | None] = {
    "layers": None,  # scanned over
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",  # replicated where the axis does not divide them; see `param_spec`
    "head_dim": None,
    "mlp": "tensor",
    "rank": None,  # of adapters: small
    "block": None,  # of quantised weights: those of one scale stay together
}
ACTIVATION_RULES: Mapping[str, Any] = {
    "batch": BATCH_AXES,
    "length": None,
    "embed": None,
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with axes `data`, `fsdp`, `tensor` over all devices; one size may be -1.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError(
            f"config.mesh: data={config.data}, fsdp={config.fsdp}, tensor={config.tensor} must be positive, with at "
            "most one -1 (all that are left); set the others, to 1 for instance"
        )
    known = int(np.prod([s for s in sizes if s != -1]))
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise UserError(
            f"config.mesh: data x fsdp x tensor = {' x '.join(map(str, sizes))} does not fit {len(devices)} "
            f"{devices[0].platform} device(s); choose sizes whose product is {len(devices)} (one may be -1)"
        )
    # Explicit axes, the default, make linen's Dense fail; Auto leaves propagation to the compiler.
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def padded_shape(axes: tuple[str, ...], shape: tuple[int, ...], sharding: Any) -> tuple[int, ...]:
    """A parameter's shape on a mesh: the vocabulary ends in rows of padding, zeros, so that the mesh divides it.

    Args:
      sharding: the mesh, or anything with a `mesh`; what has none needs no padding.
    """
    mesh = getattr(sharding, "mesh", sharding)
    parts = mesh.shape[PARAM_RULES["vocab"]] if isinstance(mesh, Mesh | AbstractMesh) else 1
    return tuple(size + -size % parts if name == "vocab" else size for name, size in zip(axes, shape, strict=True))


def param_spec(path: str, axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The PartitionSpec of one parameter.

    Raises:
      UserError: an axis without a rule, or a size that the mesh does not divide.
    """
    spec = []
    for name, size in zip(axes, shape, strict=True):
        if name not in PARAM_RULES:
            raise UserError(f"parameter {path}: no sharding rule for its axis {name!r}; add it to PARAM_RULES")
        mesh_axis = PARAM_RULES[name]
        if mesh_axis is not None and size % mesh.shape[mesh_axis]:
            if name != "kv_heads":
                raise UserError(
                    f"parameter {path}: axis {name} of size {size} cannot be cut into {mesh.shape[mesh_axis]} parts; "
                    f"set config.mesh.{mesh_axis} to a divisor of {size}"
                )
            mesh_axis = None  # few key/value heads: each device keeps all of them
        spec.append(mesh_axis)
    return PartitionSpec(*spec)


def state_shardings(state: Any, param_specs: Mapping[str, PartitionSpec], mesh: Mesh) -> Any:
    """Shardings for a whole state (parameters, optimiser moments, counters) from the parameters' specs.

    A leaf whose path ends with a parameter's path takes that parameter's spec; a scalar is replicated.

    Args:
      state: any pytree of arrays or ShapeDtypeStructs.
      param_specs: parameter path (`a/b/c`) -> PartitionSpec.

    Raises:
      UserError: a leaf that is neither, so that no large array is ever replicated by accident.
    """

    def one(path, leaf):
        keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
        for start in range(len(keys)):
            if (spec := param_specs.get("/".join(keys[start:]))) is not None:
                return NamedSharding(mesh, spec)
        if np.ndim(leaf) == 0:
            return NamedSharding(mesh, PartitionSpec())
        raise UserError(f"parameter {'/'.join(keys)} of shape {tuple(leaf.shape)}: no sharding rule matches its path")

    return jax.tree_util.tree_map_with_path(one, state)


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Sharding of an array whose rows follow `leading` unsharded axes (microbatches)."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, BATCH_AXES))


def batch_divisor(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return int(np.prod([mesh.shape[a] for a in BATCH_AXES]))


def activation_spec(*axes: str) -> PartitionSpec:
    """The PartitionSpec of an activation, from its logical axes."""
    return PartitionSpec(*(ACTIVATION_RULES[a] for a in axes))


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Pins an activation's layout on the mesh that `jax.set_mesh` made current; without a mesh there is nothing to pin.

    An axis that the mesh does not divide (few key/value heads, a row count of one while tracing shapes) is left whole,
    and so is one that a surrounding `shard_map` has cut already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = []
    for size, name in zip(x.shape, axes, strict=True):
        rule = ACTIVATION_RULES[name]
        rule = tuple(a for a in ((rule,) if isinstance(rule, str) else rule or ()) if a not in mesh.manual_axes)
        parts = int(np.prod([mesh.shape[a] for a in rule]))
        spec.append(rule if rule and size % parts == 0 else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def to_host(arrays: Any) -> Any:
    """A pytree of arrays as NumPy arrays, whole on every process: what other processes hold is fetched from them."""
    if all(x.is_fully_addressable for x in jax.tree.leaves(arrays)):
        return jax.device_get(arrays)
    reached("a gathering of arrays")
    return jax.tree.map(np.asarray, multihost_utils.process_allgather(arrays, tiled=True))
