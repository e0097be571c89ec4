"""Meshes and specs: what does not fit is an error that names it. Running on several devices is in multi_device/."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from lm_jax.config import MeshConfig
from lm_jax.errors import UserError
from lm_jax.sharding import (
    ACTIVATION_RULES,
    activation_spec,
    batch_divisor,
    batch_sharding,
    constrain,
    make_mesh,
    param_spec,
    state_shardings,
)
from lm_jax.training.step import TrainState


class FakeMesh:
    shape = {"data": 2, "fsdp": 3, "tensor": 4}


def one_device_mesh():
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def test_make_mesh():
    mesh = one_device_mesh()
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert dict(make_mesh(MeshConfig(1, -1, 1), jax.devices()[:1]).shape) == dict(mesh.shape)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (2, 1, 1),
            r"data x fsdp x tensor = 2 x 1 x 1 does not fit 1 cpu device\(s\); choose sizes whose product is 1",
        ),
        ((-1, 2, 1), r"data x fsdp x tensor = -1 x 2 x 1 does not fit 1 cpu"),
        ((-1, -1, 1), "config.mesh: data=-1, fsdp=-1, tensor=1 must be positive, with at most one -1"),
        ((0, 1, 1), "config.mesh: data=0, fsdp=1, tensor=1 must be positive"),
        ((1, -2, 1), "config.mesh: data=1, fsdp=-2, tensor=1 must be positive"),
    ],
)
def test_make_mesh_errors(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(MeshConfig(*sizes), jax.devices()[:1])


def test_param_spec():
    axes = ("layers", "embed", "heads", "head_dim")
    assert param_spec("q", axes, (2, 6, 8, 16), FakeMesh) == PartitionSpec(None, "fsdp", "tensor", None)
    assert param_spec("e", ("vocab", "embed"), (8, 6), FakeMesh) == PartitionSpec("tensor", "fsdp")
    assert param_spec("d", ("mlp", "embed"), (8, 6), FakeMesh) == PartitionSpec("tensor", "fsdp")


def test_few_kv_heads_are_replicated():
    assert param_spec("k", ("embed", "kv_heads"), (6, 4), FakeMesh) == PartitionSpec("fsdp", "tensor")
    assert param_spec("k", ("embed", "kv_heads"), (6, 2), FakeMesh) == PartitionSpec("fsdp", None)


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        (("embed", "experts"), (6, 8), "parameter p/q: no sharding rule for its axis 'experts'; add it to PARAM_RULES"),
        (("embed",), (8,), "parameter p/q: axis embed of size 8 cannot be cut into 3 parts; set config.mesh.fsdp to a"),
        (("vocab",), (30,), "axis vocab of size 30 cannot be cut into 4 parts; set config.mesh.tensor to a divisor of"),
        (("heads",), (6,), "axis heads of size 6 cannot be cut into 4 parts"),
    ],
)
def test_param_spec_errors(axes, shape, message):
    with pytest.raises(UserError, match=message):
        param_spec("p/q", axes, shape, FakeMesh)


def test_state_shardings_follow_the_parameters():
    mesh, spec = one_device_mesh(), PartitionSpec("fsdp", "tensor")
    params = {"a": {"kernel": jnp.zeros((4, 4))}, "b": {"scale": jnp.zeros(4)}}
    specs = {"a/kernel": spec, "b/scale": PartitionSpec(None)}
    state = jax.eval_shape(lambda p: TrainState.create(p, optax.adamw(1e-3)), params)
    found = jax.tree_util.tree_leaves_with_path(state_shardings(state, specs, mesh))
    assert len(found) == len(jax.tree.leaves(state))
    for path, sharding in found:
        name = jax.tree_util.keystr(path)
        expected = spec if "kernel" in name else PartitionSpec(None) if "scale" in name else PartitionSpec()
        assert sharding.spec == expected, name
    moments = [p for p, s in found if s.spec == spec and "opt_state" in jax.tree_util.keystr(p)]
    assert len(moments) == 2, "AdamW's mu and nu"


def test_state_without_a_rule():
    state = {"adapter": {"kernel": np.zeros((4, 4))}, "step": np.zeros(())}
    with pytest.raises(UserError, match=r"parameter adapter/kernel of shape \(4, 4\): no sharding rule matches"):
        state_shardings(state, {"a/kernel": PartitionSpec()}, one_device_mesh())


def test_batch_layout():
    mesh = one_device_mesh()
    assert batch_sharding(mesh, leading=1).spec == PartitionSpec(None, ("data", "fsdp"))
    assert batch_divisor(FakeMesh) == 6


def test_activations():
    assert activation_spec("batch", "length", "embed") == PartitionSpec(("data", "fsdp"), None, None)
    assert activation_spec("batch", "length", "vocab") == PartitionSpec(("data", "fsdp"), None, "tensor")
    with pytest.raises(KeyError):
        activation_spec("batch", "experts")
    assert "experts" not in ACTIVATION_RULES


def test_constrain_without_a_mesh_changes_nothing():
    x = jnp.ones((2, 3))
    assert constrain(x, "batch", "length") is x


def test_constrain_checks_the_number_of_axes():
    with jax.set_mesh(one_device_mesh()), pytest.raises(ValueError):
        jax.jit(lambda x: constrain(x, "batch"))(jnp.ones((2, 3)))
