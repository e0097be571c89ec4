"""float32 means float32 on a TPU too: every product of every compiled program, seen in its text."""

import importlib.util
import json
import re
import sys

import pytest

pytestmark = [pytest.mark.multi_device, pytest.mark.slow]

PRODUCT = re.compile(r"= \(?(\w+)\[.* (?:dot|convolution)\(")


def computed(dtype: str) -> dict[str, list[str]]:
    """Runs in a process of its own: of each program the lines of its products, as compiled for a TPU."""
    from lm_jax.planning.topologies import open_target

    target = open_target("v5e:2x2")

    import jax

    from lm_jax.config import (
        BatchConfig,
        ComputeConfig,
        DecodeConfig,
        LoraConfig,
        MeshConfig,
        ModelConfig,
        OptimConfig,
        RopeConfig,
    )
    from lm_jax.data.batches import batch_shapes
    from lm_jax.data.plans import Stack
    from lm_jax.generation.requests import SamplingConfig
    from lm_jax.planning.programs import decode_programs, score_program
    from lm_jax.sharding import make_mesh
    from lm_jax.training.program import step_program
    from musc_jax.training.losses import LossConfig
    from musc_jax.training.objective import preference_objective

    mesh = make_mesh(MeshConfig(1, 2, 2), list(target.devices))
    model = ModelConfig("llama", 1024, 2, 256, 512, 4, 2, 64, RopeConfig(5e5), 1e-5, 4096)
    compute = ComputeConfig(dtype, remat="full", logprob_chunk=64)
    objective = preference_objective(model, compute, LossConfig("sigmoid", 0.1, 0.0, 0.0, 0.0))
    optim = OptimConfig(5e-6, "cosine", 0.1, 0.0, 0.9, 0.999, 1e-8, 0.0, 1.0)
    program = step_program(model, objective, optim, LoraConfig(0, 1.0, "all-linear", False), dtype, mesh, 9, 0)
    batch = batch_shapes([Stack(1, 256)], 2, 1, mesh, objective.values)
    with jax.set_mesh(mesh):
        lowered = {"train": program.step.trace(program.state, batch, None).lower(lowering_platforms=("tpu",))}
    others = [score_program(BatchConfig(2, 256), compute, 128, model, mesh)]
    sampling = SamplingConfig(1, temperature=0.7, top_k=50, top_p=0.9)
    others += decode_programs(DecodeConfig(8, 128, 4), compute, sampling, dtype, model, mesh)
    lowered |= {other.name: other.lowered for other in others}
    texts = {name: program.compile().as_text() for name, program in lowered.items()}
    return {name: [line for line in text.splitlines() if PRODUCT.search(line)] for name, text in texts.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_made_in_their_dtype(dtype, run_python):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, which compiles for TPUs, is not installed here (Linux on x86-64 alone has it)")
    line = run_python("-m", "tests.multi_device.test_precision", dtype, devices=1, timeout=900)
    found = json.loads(line.splitlines()[-1])
    assert found.keys() == {"train", "score", "prefill", "decode"}
    for name, products in found.items():
        exact = ["operand_precision={highest,highest}" in line for line in products]
        assert len(products) >= 8, name  # of a layer alone: q, k, v, o, gate, up, down, and the head
        assert all(exact) if dtype == "float32" else not all(exact), (name, products)


if __name__ == "__main__":
    print(json.dumps(computed(sys.argv[1])))
