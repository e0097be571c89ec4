"""Plans of really compiled programs, for the CPU and, with libtpu, a TPU: collectives and matmuls known by hand."""

import importlib.util
import json
import sys

import pytest

pytestmark = pytest.mark.multi_device

DEVICES = 4
TRIPS, WIDTH, ROWS = 7, 256, 8
VOCABULARY = 1024  # x 32: more than all else of a layer


def computed(topology):
    """Runs in a process of its own; what the tests look at."""
    from lm_jax.planning.topologies import open_target

    target = open_target(topology)

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from lm_jax.config import ComputeConfig, LoraConfig, MeshConfig, ModelConfig, OptimConfig, RopeConfig
    from lm_jax.data.batches import batch_shapes
    from lm_jax.data.plans import Stack
    from lm_jax.planning.compiled import compile_program
    from lm_jax.planning.programs import Program
    from lm_jax.planning.traced import matmul_flops
    from lm_jax.sharding import make_mesh
    from lm_jax.training.program import step_program
    from lm_jax.training.supervised import VALUES, supervised_objective

    mesh = make_mesh(MeshConfig(1, 2, 2), list(target.devices))
    platform = target.devices[0].platform

    def summed(x):  # [ROWS, WIDTH] a device
        def body(_, x):
            return jax.lax.psum(x * 2 + 1, "tensor")

        return jax.lax.fori_loop(0, TRIPS, body, x)

    def gathered(x):
        return jax.lax.all_gather(x, ("fsdp", "tensor"), axis=0, tiled=True)

    def product(w, x):
        """Recomputed: 3 products forward, 3 again and 2 x 3 backward, but for the first's gradient of x."""

        def loss(w):
            one = jax.checkpoint(lambda x, _: (jnp.tanh(x @ w), None))
            return jnp.sum(jax.lax.scan(one, x, None, length=3)[0])

        return jax.grad(loss)(w)

    def dynamic(x, n):
        return jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] @ c[1]), (0, x))[1]

    model = ModelConfig("llama", VOCABULARY, 2, 32, 48, 4, 2, 8, RopeConfig(1e4), 1e-5, 64)
    step = step_program(
        model,
        supervised_objective(model, ComputeConfig("float32", logprob_chunk=16)),
        OptimConfig(1e-3, "constant", 0.0, 0.0, 0.9, 0.999, 1e-8, 0.0, 1.0),
        LoraConfig(0, 1.0, "all-linear", False),
        "float32",
        mesh,
        num_steps=1,
        seed=0,
    )
    batch = batch_shapes([Stack(1, 64)], 2, 2, mesh, VALUES)

    def given(*shape, spec=None):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec or PartitionSpec()))

    def cost(f, *arguments, **options):
        traced = (f if hasattr(f, "trace") else jax.jit(f, **options)).trace(*arguments)
        lowered = traced.lower(lowering_platforms=(platform,))
        found = compile_program(Program("a", lowered, 1, 1.0), target)
        return found.to_json() | {"flops": matmul_flops(traced)}

    both = PartitionSpec(("fsdp", "tensor"))
    square = given(WIDTH, WIDTH)
    with jax.set_mesh(mesh):
        cut = {"in_specs": both, "out_specs": both, "check_vma": False}
        whole = {"in_specs": both, "out_specs": PartitionSpec(), "check_vma": False}
        x = given(DEVICES * ROWS, WIDTH, spec=both)
        return {
            "summed": cost(jax.shard_map(summed, **cut), x),
            "gathered": cost(jax.shard_map(gathered, **whole), x),
            "product": cost(product, square, square),
            "in_parts": cost(jax.shard_map(lambda x: x @ x.T, **cut), x),
            "dynamic": cost(dynamic, square, jax.ShapeDtypeStruct((), np.int32)),
            "step": cost(step.step, step.state, batch),
            "donated": cost(lambda x: x + 1, x, donate_argnums=0),
            "too_large": cost(lambda x: x * 2, given(1 << 40)) if platform == "tpu" else None,
        }


@pytest.fixture(scope="module", params=["local", "v5e:2x2"])
def found(request, run_python):
    if request.param != "local" and importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, which compiles for TPUs, is not installed here (Linux on x86-64 alone has it)")
    devices = DEVICES if request.param == "local" else 1
    line = run_python("-m", "tests.multi_device.test_planning", request.param, devices=devices, timeout=600)
    return json.loads(line.splitlines()[-1])


def test_collectives_are_those_written(found):
    """A psum in a loop of 7 trips runs 7 times over groups of two; a gather's array is its result."""
    block = ROWS * WIDTH * 4
    psum = found["summed"]["collectives"]
    assert psum == {"all-reduce": {"count": TRIPS, "bytes": TRIPS * block, "wire_bytes": TRIPS * block}}
    (largest,) = found["summed"]["largest_collectives"]
    assert (largest["runs"], largest["group"], largest["certain"]) == (TRIPS, 2, True)
    gathered = found["gathered"]["collectives"]["all-gather"]
    assert gathered == {"count": 1, "bytes": DEVICES * block, "wire_bytes": (DEVICES - 1) * block}


def test_matmuls_are_counted_with_their_repetitions(found):
    once = 2 * WIDTH**3
    assert found["product"]["flops"] == once * (3 + 3 + 6)
    assert found["in_parts"]["flops"] == DEVICES * 2 * ROWS * ROWS * WIDTH  # on each device
    assert found["dynamic"]["flops"] == 0  # nobody knows how often


def test_embeddings_are_exchanged_once_a_step(found):
    """Their gradients are summed over all of the head's four chunks before devices exchange them."""
    whole = VOCABULARY // 2 * 32 * 4  # what a part of `tensor` has
    large = [c for c in found["step"]["largest_collectives"] if c["bytes"] >= whole]
    if found["too_large"] is not None:  # a TPU's fp32 step gathers it twice in the head: known, and not wanted
        large = [c for c in large if c["kind"] != "all-gather"]
    assert len(large) >= 2 and {(c["runs"], c["group"]) for c in large} == {(1, 2)}


def test_memory_is_what_lies_there(found):
    """Arguments, temporaries, and the program itself, which takes about a megabyte of a TPU's memory."""
    block = ROWS * WIDTH * 4
    donated, gathered = found["donated"], found["gathered"]
    assert donated["argument_bytes"] == block
    code = donated["hbm_bytes_per_chip"] - donated["temporary_bytes"] - block
    assert 0 <= code < 2**21
    assert gathered["hbm_bytes_per_chip"] >= block + DEVICES * block
    assert donated["fits"] is True


def test_what_does_not_fit_is_an_answer(found):
    if found["too_large"] is None:
        pytest.skip("a CPU's compiler refuses nothing")
    assert found["too_large"]["fits"] is False and found["too_large"]["collectives"] == {}
    assert found["too_large"]["hbm_bytes_per_chip"] >= 2 * 2**42
    assert found["too_large"]["hbm_limit_bytes"] == int(15.75 * 2**30) == found["donated"]["hbm_limit_bytes"]


if __name__ == "__main__":
    print(json.dumps(computed(None if sys.argv[1] == "local" else sys.argv[1])))
