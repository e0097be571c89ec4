"""A frozen base in nf4: the paper's values, numpy's codes and scales, the plain model of these weights, its bytes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from scipy.stats import norm

from lm_jax.checkpoints.runs import abstract_params, open_model
from lm_jax.config import ComputeConfig, LoraConfig, MeshConfig, ModelConfig, RopeConfig, from_config_dict
from lm_jax.data.packing import Segment, fill_rows
from lm_jax.errors import UserError
from lm_jax.models import quantized
from lm_jax.models.forward import packed_logprobs
from lm_jax.models.linear import contract_nf4
from lm_jax.models.lora import abstract_adapters, init_adapters, join
from lm_jax.models.nf4 import NF4, dequantize
from lm_jax.models.weights import flatten, nest
from lm_jax.sharding import make_mesh
from tests.checkpoints import make_checkpoint

COMPUTE = ComputeConfig("float32", remat="full", attention="reference", logprob_chunk=8)
LORA = LoraConfig(2, 4.0, "all-linear", False, base="nf4")
PROJECTIONS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}  # contracted axes


def by_hand(kernel, num_axes, block):
    """(codes, scales, what they stand for) of one layer's kernel, as section 3 of the paper has it."""
    values = np.array(NF4, np.float32)
    blocks = kernel.reshape(-1, block, *kernel.shape[num_axes:])
    scales = np.abs(blocks).max(1)
    codes = np.abs((blocks / scales[:, None])[..., None] - values).argmin(-1)
    return codes, scales, (values[codes] * scales[:, None]).reshape(kernel.shape)


def packed(codes):
    """Two codes in a byte: the first half of a block low, the second high."""
    half = codes.shape[1] // 2
    return (codes[:, :half] + 16 * codes[:, half:]).astype(np.uint8)


def load(path, precision, dtype="float32", mesh=None):
    source = dataclasses.replace(open_model(str(path)), precision=precision)
    return jax.device_get(source.load_params(mesh or make_mesh(MeshConfig(1, 1, 1)), dtype)), source


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Four heads of 16, so that a block of the output projection spans heads; blocks of 32 in the feed-forward."""
    path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, "qwen2", hidden_size=64, intermediate_size=96)
    return path


@pytest.fixture(scope="module")
def plain(path):
    """(the full parameters, flat; those that nf4 stands for, flat)."""
    full = flatten(load(path, "full")[0])
    back = dict(full)
    for name in [n for n in full if n.startswith("layers/") and n.endswith("/kernel")]:
        axes = PROJECTIONS[name.split("/")[2]]
        block = 32 if name.split("/")[2] == "down" else 64
        back[name] = np.stack([by_hand(layer, axes, block)[2] for layer in full[name]])
    return full, back


def test_the_values_are_those_of_the_paper():
    """Appendix E: quantiles of a normal distribution, 8 below and 9 above a shared zero, scaled to [-1, 1]."""
    offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2  # bounds the outermost quantiles
    negative, positive = (norm.ppf(np.linspace(offset, 0.5, n)[:-1]) for n in (8, 9))
    expected = np.sort([*-negative, 0, *positive]) / positive.max()
    np.testing.assert_allclose(NF4, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("shape", "num_axes", "block"), [((128, 2, 3), 1, 64), ((4, 16, 5), 2, 64), ((96, 7), 1, 32)])
def test_dequantised_as_qwix_and_numpy_do(shape, num_axes, block):
    kernel = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    codes, scales, expected = by_hand(kernel, num_axes, block)
    assert set(np.unique(codes)) == set(range(16))
    ours = dequantize(jnp.asarray(packed(codes)), jnp.asarray(scales), shape, jnp.float32)
    np.testing.assert_array_equal(ours, expected)
    flat = kernel.reshape(math.prod(shape[:num_axes]), -1)
    theirs = qwix.quantize(jnp.asarray(flat), "nf4", channelwise_axes=(1,), tiled_axes={0: block})
    np.testing.assert_array_equal(ours, qwix.dequantize(theirs).reshape(shape))


def test_loaded_codes_are_numpys(path, plain):
    params, source = load(path, "nf4", "bfloat16")  # codes and scales do not depend on the run's dtype
    flat, full = flatten(params), plain[0]
    for name, x in full.items():
        parent, _, leaf = name.rpartition("/")
        if not (name.startswith("layers/") and leaf == "kernel"):
            assert flat.pop(name).dtype == jnp.bfloat16
            continue
        projection = name.split("/")[2]
        made = [by_hand(layer, PROJECTIONS[projection], 32 if projection == "down" else 64) for layer in x]
        codes, scales = flat.pop(f"{parent}/kernel_codes"), flat.pop(f"{parent}/kernel_scales")
        assert codes.dtype == np.uint8 and scales.dtype == np.float32
        np.testing.assert_array_equal(codes, np.stack([packed(m[0]) for m in made]))
        np.testing.assert_array_equal(scales, np.stack([m[1] for m in made]))
    assert not flat
    abstract = abstract_params(source.config, make_mesh(MeshConfig(1, 1, 1)), "bfloat16", "nf4")
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)


def test_forward_and_gradients_are_those_of_the_plain_model(path, plain):
    params, source = load(path, "nf4")
    adapters = init_adapters(source.config, LORA, make_mesh(MeshConfig(1, 1, 1)), seed=0)
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(lambda x: x + np.float32(0.1 * rng.standard_normal(x.shape)), adapters)
    segments = [Segment(*(rng.integers(1, 300, n).astype(np.int32) for n in (4, size))) for size in (5, 9)]
    row = fill_rows([[0, 1]], [(s,) for s in segments], 24, 2)

    @jax.jit
    def run(frozen, adapters):
        def total(adapters):
            joined = join(frozen, adapters, LORA)
            logprobs = packed_logprobs(joined, row, source.config, COMPUTE)
            return jnp.sum(logprobs * row["loss_mask"]), logprobs

        return jax.grad(total, has_aux=True)(adapters)

    (ours, logprobs), (theirs, expected) = run(params, adapters), run(nest(plain[1]), adapters)
    np.testing.assert_allclose(logprobs, expected, rtol=0, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()), ours, theirs)
    assert np.abs(run(nest(plain[0]), adapters)[1] - logprobs).max() > 1e-2  # the quantisation is seen


def test_only_codes_are_kept_for_the_backward_pass():
    codes, scales = jnp.ones((1, 32, 8), jnp.uint8), jnp.ones((1, 8))
    kept = jax.tree.leaves(jax.vjp(lambda x: contract_nf4(x, codes, scales), jnp.ones((3, 64)))[1])
    assert max(getattr(x, "nbytes", 0) for x in kept) == codes.nbytes


def test_bytes(path, plain):
    params, full = load(path, "nf4", "bfloat16")[0], plain[0]
    projections = {n: x.size for n, x in full.items() if n.startswith("layers/") and n.endswith("/kernel")}
    scales = sum(size // (32 if "/down/" in n else 64) for n, size in projections.items())
    others = sum(x.size for n, x in full.items() if n not in projections)
    expected = sum(projections.values()) / 2 + 4 * scales + 2 * others
    assert sum(x.nbytes for x in jax.tree.leaves(params)) == expected


@pytest.mark.slow
def test_no_more_than_a_layer_is_full_at_a_time(optimized):
    """The step needs no more memory beside its arguments than that of a full base; see the comments in nf4.py."""
    config = ModelConfig("llama", 64, 8, 128, 256, 4, 4, 32, RopeConfig(1e4), 1e-5, 64)
    mesh, ones = make_mesh(MeshConfig(1, 1, 1)), np.ones(2, np.int32)
    batch = fill_rows([[0]], [(Segment(ones, ones),)], 8, 1)

    def temporaries(base):
        lora = dataclasses.replace(LORA, base=base)

        def total(adapters, params):
            return jnp.sum(packed_logprobs(join(params, adapters, lora), batch, config, COMPUTE))

        shapes = abstract_adapters(config, lora, mesh), abstract_params(config, mesh, "float32", base)
        with jax.set_mesh(mesh):
            return jax.jit(jax.grad(total)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    layer = 4 * (4 * 128 * 128 + 3 * 128 * 256)
    assert temporaries("nf4") < temporaries("full") + layer


def test_refused(monkeypatch):
    keys = {"rank": 0, "alpha": 1.0, "targets": "all-linear", "rslora": False}
    with pytest.raises(UserError, match="config.lora.base=nf4: a quantised model cannot be trained itself"):
        from_config_dict(LoraConfig, {**keys, "base": "nf4"})
    with pytest.raises(UserError, match="config.lora.base: unknown 'int3'; choose from full, nf4"):
        from_config_dict(LoraConfig, {**keys, "base": "int3"})
    quantized.check_quantizer("nf4")
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    quantized.check_quantizer("full")
    with pytest.raises(UserError, match=r"needs qwix, which is not installed: pip install -e '\.\[qlora\]'"):
        quantized.check_quantizer("nf4")
