"""A base in nf4 on two devices, cut along either axis, is the one of a single device."""

import json
import sys

import pytest

from tests.checkpoints import make_checkpoint

pytestmark = pytest.mark.multi_device

MESHES = {"fsdp": (1, 2, 1), "tensor": (1, 1, 2)}


def computed(directory):
    """Runs in a process with 2 devices: by mesh, the largest relative differences to one device."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np

    from lm_jax.checkpoints.runs import open_model, param_specs
    from lm_jax.config import ComputeConfig, LoraConfig, MeshConfig
    from lm_jax.data.packing import Segment, fill_rows
    from lm_jax.errors import UserError
    from lm_jax.models.forward import packed_logprobs
    from lm_jax.models.lora import init_adapters, join
    from lm_jax.models.weights import flatten, nest
    from lm_jax.sharding import make_mesh

    source = dataclasses.replace(open_model(directory), precision="nf4")
    compute = ComputeConfig("float32", remat="full", attention="reference", logprob_chunk=8)
    lora = LoraConfig(2, 4.0, "all-linear", False, base="nf4")
    rng = np.random.default_rng(0)
    segments = [Segment(*(rng.integers(1, 300, n).astype(np.int32) for n in (4, size))) for size in (5, 9)]
    batch = fill_rows([[0], [1]], [(s,) for s in segments], 16, 1)
    moved: dict[str, np.ndarray] = {}

    def on_mesh(sizes):
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        params = source.load_params(mesh, "float32")
        for path, spec in param_specs(source.config, mesh, "nf4").items():
            x = flatten(params)[path]
            assert x.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), x.ndim), path
        adapters = init_adapters(source.config, lora, mesh, seed=0)
        for path, x in flatten(adapters).items():
            moved.setdefault(path, np.float32(0.1 * rng.standard_normal(x.shape)))
        adapters = jax.tree.map(lambda x, add: x + add, adapters, nest(moved))

        def total(adapters, params):
            logprobs = packed_logprobs(join(params, adapters, lora), batch, source.config, compute)
            return jnp.sum(logprobs * batch["loss_mask"]), logprobs

        with jax.set_mesh(mesh):
            grads, logprobs = jax.jit(jax.grad(total, has_aux=True))(adapters, params)
        codes = {k: np.asarray(x).astype(np.float32) for k, x in flatten(params).items() if "kernel_" in k}
        grads = {k: np.asarray(x) for k, x in flatten(grads).items()}
        shares = [x.addressable_shards[0].data.size / x.size for k, x in flatten(params).items() if "kernel_" in k]
        return codes, {"logprobs": np.asarray(logprobs), **grads}, max(shares)

    found, (codes, expected, _) = {}, on_mesh((1, 1, 1))
    for name, sizes in MESHES.items():
        its_codes, got, share = on_mesh(sizes)
        found[name] = {
            "share": share,
            "same_codes": all(np.array_equal(its_codes[k], x) for k, x in codes.items()),
            "differences": {k: float(np.abs(got[k] - x).max() / np.abs(x).max()) for k, x in expected.items()},
        }
    try:
        param_specs(dataclasses.replace(source.config, d_model=64), make_mesh(MeshConfig(*MESHES["fsdp"])), "nf4")
    except UserError as e:
        found["refused"] = str(e)
    return found


@pytest.mark.slow
def test_two_devices_are_one(run_python, tmp_path):
    # Two blocks on every contracted axis; those of the output projection span four heads
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
    make_checkpoint(tmp_path, "qwen3", **sizes, head_dim=16)
    out = run_python("-m", "tests.multi_device.test_nf4", str(tmp_path), devices=2, timeout=600)
    found = json.loads(out.splitlines()[-1])
    for name in MESHES:
        assert found[name]["same_codes"] and found[name]["share"] == 0.5
        differences = found[name]["differences"]
        assert len(differences) == 1 + 14 and max(differences.values()) < 1e-5, differences
    assert "cuts between blocks of 64 weights only" in found["refused"]


if __name__ == "__main__":
    print(json.dumps(computed(sys.argv[1])))
