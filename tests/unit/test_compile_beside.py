"""The step compiles while weights load: whichever of the two fails first ends the run at once, with its own error."""

import threading
import types

import jax
import jax.numpy as jnp
import pytest

from lm_jax.config import MeshConfig
from lm_jax.sharding import make_mesh
from lm_jax.training.program import compile_beside


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def program(compile_step):
    """A step whose compilation is `compile_step`."""
    lowered = types.SimpleNamespace(compile=compile_step)
    return types.SimpleNamespace(step=types.SimpleNamespace(lower=lambda *_: lowered), state=None, frozen=None)


def fails(error):
    def fail():
        raise error

    return fail


@pytest.fixture
def endless():
    """What lasts until the test's end."""
    over = threading.Event()
    yield lambda: over.wait(60)
    over.set()


def test_both(mesh):
    compiled = []
    found = compile_beside(program(lambda: compiled.append(jax.sharding.get_abstract_mesh())), mesh, None, lambda: 3)
    assert found == 3 and compiled == [mesh.abstract_mesh]


def test_a_failed_compilation_ends_the_loading(mesh, endless):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 40G of 16G")
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        compile_beside(program(fails(error)), mesh, None, endless)
    assert raised.value is error


def test_a_failed_loading_ends_the_compilation(mesh, endless):
    with pytest.raises(OSError, match="no such tensor"):
        compile_beside(program(endless), mesh, None, fails(OSError("no such tensor")))


def test_what_does_not_compile(mesh):
    step = jax.jit(lambda state, batch, frozen: state @ batch)
    made = types.SimpleNamespace(step=step, state=jax.ShapeDtypeStruct((2, 3), jnp.float32), frozen=None)
    with pytest.raises(TypeError, match="contracting dim"):
        compile_beside(made, mesh, jax.ShapeDtypeStruct((2, 3), jnp.float32), lambda: None)
