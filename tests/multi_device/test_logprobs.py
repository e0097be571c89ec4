"""The head on eight devices, rows, columns and words cut in every way, gives what one device gives."""

import json

import pytest

pytestmark = pytest.mark.multi_device

MESHES = ((1, 1, 8), (2, 2, 2), (8, 1, 1), (1, 8, 1))  # (data, fsdp, tensor)


def computed():
    """Runs in a process with 8 devices: for each mesh and dtype the largest difference to one device, by what it is."""
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from lm_jax.config import MeshConfig
    from lm_jax.models import logprobs
    from lm_jax.sharding import batch_sharding, make_mesh

    logprobs.BLOCK = 6  # does not divide the 8 to 64 words of a device, and leaves blocks that hold no target
    rng = np.random.default_rng(0)
    hidden, embedding = rng.standard_normal((8, 9, 16)), rng.standard_normal((64, 16))
    targets, mask = rng.integers(0, 64, (8, 9)), np.arange(9) >= rng.integers(0, 10, (8, 1))
    cotangents = rng.standard_normal((2, 8, 9)).astype(np.float32)

    def on(mesh, dtype):
        @functools.partial(jax.jit, out_shardings=(rows, rows, rows, words))
        def run(hidden, embedding, targets, mask, cotangents):
            fn = functools.partial(logprobs.token_logprobs, targets=targets, mask=mask, chunk=4)
            out, pull_back = jax.vjp(fn, hidden, embedding)
            return *out, *pull_back(tuple(cotangents))

        with jax.set_mesh(mesh):
            arrays = [
                (hidden.astype(dtype), rows),
                (embedding.astype(np.float32), words),
                (targets, rows),
                (mask, rows),
            ]
            return run(*(jax.device_put(x, s) for x, s in arrays), cotangents)

    found = {}
    for dtype in ("float32", "bfloat16"):
        for sizes in ((1, 1, 1), *MESHES):
            mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
            rows, words = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
            got = [np.asarray(x, np.float32) for x in on(mesh, jnp.dtype(dtype))]
            if mesh.size == 1:
                expected = got
            far = [float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in zip(got, expected, strict=True)]
            found[f"{dtype} {sizes}"] = dict(
                zip(("logprobs", "entropies", "d hidden", "d embedding"), far, strict=True)
            )
    return found


@pytest.fixture(scope="module")
def found(run_python):
    return json.loads(run_python("-m", "tests.multi_device.test_logprobs", devices=8).splitlines()[-1])


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_equals_one_device(found, dtype, tolerance, sizes):
    for what, difference in found[f"{dtype} {sizes}"].items():
        assert difference < (1e-5 if what in ("logprobs", "entropies") else tolerance), what


if __name__ == "__main__":
    print(json.dumps(computed()))
