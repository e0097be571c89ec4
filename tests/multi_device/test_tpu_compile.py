"""The sharded training step, the scoring pass and the sampler's steps compile for a TPU pod, without having one."""

import importlib.util
import json
import os
import re

import pytest

pytestmark = [pytest.mark.multi_device, pytest.mark.slow]

TOPOLOGY, CHIPS = "v5e:4x4", 16
# libtpu asks the machine what it is; on a machine that is no TPU these answer.
ENVIRONMENT = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",  # what is compiled is what a pod would run
}
HBM = 16 * 2**30  # bytes of a v5e chip
MESH = (2, 4, 2)
PARTS = 8  # of each parameter: fsdp x tensor; the data axis holds replicas
ROWS, ROW_LENGTH, LAYERS = 32, 4096, 2
DECODE_MESH = (2, 1, 8)
SLOTS, PROMPTS, PROMPT_LENGTH, CONTEXT = 64, 16, 1024, 2048


def attention_gradient(mesh):
    """With a window, heads of 128 and fewer key/value heads than the 8 tensor parts."""
    import jax
    import jax.numpy as jnp

    from lm_jax.models.attention import attention

    def total(q, k, v, segment_ids):
        return jnp.sum(attention(q, k, v, segment_ids, window=1000).astype(jnp.float32))

    return jax.jit(jax.grad(total, argnums=(0, 1, 2)))


def attention_shapes(mesh):
    import jax
    import jax.numpy as jnp

    from lm_jax.sharding import batch_sharding

    rows = batch_sharding(mesh)
    heads = [jax.ShapeDtypeStruct((4, 1500, n, 128), jnp.bfloat16, sharding=rows) for n in (16, 4, 4)]
    return *heads, jax.ShapeDtypeStruct((4, 1500), jnp.int32, sharding=rows)


def computed():
    """Runs in a process of its own: compiles all programs and returns the bytes that each takes on a chip."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from lm_jax.checkpoints.runs import param_shardings, param_specs
    from lm_jax.config import ComputeConfig, MeshConfig, ModelConfig, OptimConfig, RopeConfig
    from lm_jax.generation import decoding
    from lm_jax.generation.requests import SamplingConfig
    from lm_jax.generation.token_choice import filters_of
    from lm_jax.models.cache import cache_shapes
    from lm_jax.models.forward import packed_statistics
    from lm_jax.models.registry import weight_table
    from lm_jax.models.weights import nest
    from lm_jax.sharding import batch_sharding, make_mesh, state_shardings
    from lm_jax.training.optim import make_optimizer, make_schedule
    from lm_jax.training.step import TrainState, make_train_step
    from musc_jax.training.losses import LossConfig
    from musc_jax.training.objective import preference_objective

    # Llama-3.2-1B, with fewer of its layers.
    model = ModelConfig(
        "llama", 128_256, LAYERS, 2048, 8192, 32, 8, 64, RopeConfig(5e5), 1e-5, 131_072, tie_embeddings=True
    )
    compute = ComputeConfig("bfloat16", remat="full", logprob_chunk=256)
    devices = topologies.get_topology_desc(TOPOLOGY, platform="tpu").devices
    mesh = make_mesh(MeshConfig(*MESH), list(devices))
    assert mesh.size == CHIPS and devices[0].platform == "tpu"

    optim = OptimConfig(5e-6, "cosine", 0.1, 0.0, 0.9, 0.999, 1e-8, 0.0, 1.0)
    schedule = make_schedule(optim, 100)
    optimizer = make_optimizer(optim, schedule)
    objective = preference_objective(model, compute, LossConfig("sigmoid", 0.1, 0.0, 0.0, 0.0))
    shapes = nest({s.path: jax.ShapeDtypeStruct(s.shape(model), jnp.float32) for s in weight_table(model)})
    state = jax.eval_shape(lambda p: TrainState.create(p, optimizer), shapes)
    shardings = state_shardings(state, param_specs(model, mesh), mesh)

    def placed(tree, shardings):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    def batch(*leading):
        sharding = batch_sharding(mesh, len(leading) - 1)

        def struct(dtype, width):
            return jax.ShapeDtypeStruct((*leading, width), dtype, sharding=sharding)

        integers = ("tokens", "positions", "segment_ids", "targets")
        return (
            {name: struct(jnp.int32, ROW_LENGTH) for name in integers}
            | {name: struct(jnp.float32, ROW_LENGTH) for name in ("loss_mask", "weights", "ref_logprobs")}
            | {"example_ids": struct(jnp.int32, 8)}
        )

    step = jax.jit(make_train_step(objective, optimizer, schedule), donate_argnums=0, out_shardings=(shardings, None))
    with jax.set_mesh(mesh):
        programs = {
            "train": step.lower(placed(state, shardings), [batch(1, ROWS)]),
            "score": packed_statistics.lower(
                placed(shapes, param_shardings(model, mesh)), batch(ROWS), model, compute, ("logprobs", "entropies")
            ),
        }
    mesh = make_mesh(MeshConfig(*DECODE_MESH), list(devices))
    compute = ComputeConfig("bfloat16", remat="none")
    params = placed(shapes, param_shardings(model, mesh))
    slots = decoding.slot_shapes(model, compute, SLOTS, CONTEXT, False, mesh)
    cache = cache_shapes(model, PROMPTS, PROMPT_LENGTH, compute.dtype, mesh)

    def given(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    known = given(bool, model.vocab_size)
    filters, strengths = filters_of(SamplingConfig(1, temperature=0.7, top_k=50, top_p=0.9, min_p=0.05))
    tokens, lengths, first = given(jnp.int32, PROMPTS, PROMPT_LENGTH), given(jnp.int32, PROMPTS), given(jnp.int32)
    to = decoding.Placement(*(given(jnp.int32, 8),) * 3, given(jnp.uint32, 8, 2))
    with jax.set_mesh(mesh):
        prefill = decoding.prefill.lower(params, cache, tokens, lengths, first, model, compute)
        prompts = decoding.Prompts(cache, jax.ShapeDtypeStruct((PROMPTS, model.d_model), jnp.bfloat16))
        programs |= {
            "prefill": prefill,
            "place": decoding.place.lower(slots, prompts, tokens, lengths, to, exchange=True),
            "decode": decoding.decode.lower(
                params, slots, given(bool, SLOTS), given(jnp.int32, 2), known, strengths, 16, model, compute, filters
            ),
            "attention": attention_gradient(mesh).lower(*attention_shapes(mesh)),
        }
        found = {
            "params": sum(x.size for x in jax.tree.leaves(shapes)),
            "slots": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(slots.cache)),
        }
        for name, lowered in programs.items():
            compiled = lowered.compile()
            text = compiled.as_text()
            memory = compiled.memory_analysis()
            found[name] = {
                "arguments": memory.argument_size_in_bytes,
                "outputs": memory.output_size_in_bytes,
                "aliased": memory.alias_size_in_bytes,
                "temporary": memory.temp_size_in_bytes,
                "collectives": [c for c in ("all-gather", "reduce-scatter", "all-reduce") if c in text],
                "kernels": text.count("tpu_custom_call"),
                "whole_batch": sorted(set(re.findall(rf"\w+\[{ROWS},{ROW_LENGTH},\d\d+\]", text))),
            }
    return found


@pytest.fixture(scope="module")
def found(run_python):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, which compiles for TPUs, is not installed here (Linux on x86-64 alone has it)")
    return json.loads(run_python("-m", "tests.multi_device.test_tpu_compile", timeout=900).splitlines()[-1])


def test_train_step_compiles(found):
    """Each chip holds its share of the fp32 parameters and both moments, updated in place, and fits its memory."""
    state = 3 * 4 * found["params"] / PARTS
    train = found["train"]
    assert state < train["arguments"] < 1.02 * state
    assert train["aliased"] > 0.98 * state, "the state is not donated"
    assert 0 < train["temporary"] < HBM - train["arguments"]
    assert train["collectives"]


def test_scoring_pass_compiles(found):
    params = 4 * found["params"] / PARTS
    score = found["score"]
    assert params < score["arguments"] < 1.02 * params
    assert 0 < score["temporary"] < found["train"]["temporary"], "scoring keeps nothing for a backward pass"


@pytest.mark.parametrize(("program", "kernels"), [("train", 4), ("score", 1), ("attention", 3)])
def test_attention_is_the_kernel(found, program, kernels):
    """Once forward, again where it is rematerialised, and one kernel for d q and one for d k and d v."""
    assert found[program]["kernels"] == kernels


@pytest.mark.parametrize("program", ["train", "score"])
def test_no_chip_holds_the_activations_of_all_rows(found, program):
    """Else memory would grow with the global batch, however many chips share it."""
    assert not found[program]["whole_batch"]


def test_sampler_compiles(found):
    """Slots are updated in place, a chip holds its share of them and of the parameters, and little beside them."""
    params = 4 * found["params"] / DECODE_MESH[2]  # on each chip of a replica
    slots = found["slots"] / CHIPS
    decode, place, prefill = (found[name] for name in ("decode", "place", "prefill"))
    # Tiles of 128 lanes are half empty where the last axis is a head of 64 or a block of 64 places
    for step in (decode, place):
        assert slots < step["aliased"] < 1.5 * slots, "the slots are not donated"
    assert params + slots < decode["arguments"] < 1.01 * params + 1.5 * slots
    assert decode["outputs"] - decode["aliased"] < 0.01 * slots
    assert 0 < decode["temporary"] < HBM - decode["arguments"]
    assert place["temporary"] < slots
    assert params < prefill["arguments"] and 0 < prefill["temporary"] < HBM - prefill["arguments"]
    assert decode["collectives"] and prefill["collectives"]


def test_no_whole_logits(found):
    """One chip's logits of all its tokens would take more than the step takes in all."""
    logits = ROWS * ROW_LENGTH // CHIPS * 128_256 * 4
    assert found["train"]["temporary"] < logits and found["score"]["temporary"] < logits


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    print(json.dumps(computed()))
