"""GGUF files against transformers' reading of them, on torch: parameters to the bit, log-probs, the exported model."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

from lm_jax.checkpoints.hf import export_hf, load_params
from lm_jax.checkpoints.runs import open_model
from lm_jax.config import MeshConfig
from lm_jax.models.rope import rope_to_hf
from lm_jax.models.weights import flatten
from lm_jax.sharding import make_mesh
from tests.checkpoints import make_checkpoint, make_tokenizer
from tests.ggufs import write_gguf
from tests.parity.test_lora import our_logprobs, their_logprobs

TOLERANCE = 1e-5  # nats
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}  # blocks of 256
FAMILIES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-head": ("llama", {"head_dim": 16, "num_key_value_heads": 4}),
    "mistral": ("mistral", {"rope_theta": 1e6}),
    "qwen2": ("qwen2", {}),
}
K_QUANTS = (Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)
KINDS = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, *K_QUANTS)


def made(path, family, kind=Kind.F32, config=None, **options):
    """(the GGUF file, transformers' model of it, fp32)."""
    make_checkpoint(path / "hf", family, **(config or {}))
    make_tokenizer(path / "hf")
    file = write_gguf(path / "model.gguf", path / "hf", kind, **options)
    return file, theirs(file)


def theirs(file):
    read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):  # what is read is not quantised any more, and could not be saved else
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.load_state_dict(read.state_dict())
    return model.float().eval()


def loaded(file):
    source = open_model(str(file))
    return source, source.load_params(make_mesh(MeshConfig(1, 1, 1)), "float32")


def assert_like(file, model, tmp_path):
    source, params = loaded(file)
    # Their tensors through our reader of directories: the same bits
    model.save_pretrained(tmp_path / "theirs")
    expected = flatten(load_params(tmp_path / "theirs", source.config, None))
    assert expected.keys() == flatten(params).keys()
    for path, x in flatten(params).items():
        np.testing.assert_array_equal(x, expected[path], err_msg=path)
    with torch.no_grad():
        logprobs = their_logprobs(model).numpy()
    # Blocks of random bytes give log-probs in the hundreds
    np.testing.assert_allclose(our_logprobs(params, source.config), logprobs, rtol=1e-5, atol=TOLERANCE)
    return source, params


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family(name, tmp_path):
    family, config = FAMILIES[name]
    file, model = made(tmp_path, family, config=config)
    source, params = assert_like(file, model, tmp_path)
    export_hf(params, source.config, tmp_path / "out", source.directory, "float32")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(their_logprobs(again), their_logprobs(model))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_each_kind_of_numbers(kind, tmp_path):
    file, model = made(tmp_path, "llama", kind, config=WIDE)
    source, params = assert_like(file, model, tmp_path)
    embedding = np.asarray(params["embed"]["embedding"])
    assert np.isfinite(embedding).all() and embedding.std() > 1e-3
    if kind in K_QUANTS:  # an oracle that shares no line with the package
        from transformers.integrations.gguf.dequant import dequantize

        from lm_jax.checkpoints.gguf import read_gguf

        stored = read_gguf(file).tensors["token_embd.weight"]
        their = dequantize(torch.tensor(np.array(stored.data)), int(kind)).reshape(stored.shape)
        np.testing.assert_allclose(embedding, their.numpy(), rtol=1e-6, atol=1e-9)


def test_a_mix_of_kinds(tmp_path):
    """As files of the wild have it, on qwen2 with its biases."""
    mix = {"token_embd": Kind.Q4_K, "output": Kind.Q6_K, "attn_v": Kind.Q8_0, "ffn_down": Kind.F16}

    def kind(name):
        return next((k for part, k in mix.items() if part in name.split(".")), Kind.Q5_0)

    config = {key: value for key, value in WIDE.items() if key != "head_dim"}
    file, model = made(tmp_path, "qwen2", kind, config=config)
    assert_like(file, model, tmp_path)


def test_greedy_text_equals_transformers(tmp_path):
    from lm_jax.config import ComputeConfig, DecodeConfig
    from lm_jax.data.tokenizers import end_token_ids, load_tokenizer
    from lm_jax.generation.requests import Request, SamplingConfig
    from lm_jax.generation.sampling import LocalGenerator

    file, model = made(tmp_path, "llama", Kind.Q8_0, config=WIDE)
    source, params = loaded(file)
    tokenizer = load_tokenizer(source.directory, source.config.vocab_size)
    ends, mesh = end_token_ids(source.directory, tokenizer), make_mesh(MeshConfig(1, 1, 1))
    compute, decode = ComputeConfig("float32"), DecodeConfig(4, 64, 8)
    generator = LocalGenerator(params, source.config, tokenizer, ends, compute, decode, mesh)
    texts = ["the cat", "what is this", "a"]
    requests = [Request(str(i), text, 20) for i, text in enumerate(texts)]
    done = {c.id: c for cs in generator.generate(requests, SamplingConfig(20, temperature=0.0)) for c in cs}
    known = {i for text, i in tokenizer.get_vocab().items() if not text.startswith("[PAD")}
    fillers = [i for i in range(source.config.vocab_size) if i not in known]  # they are never drawn
    for i, text in enumerate(texts):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        made_ids = model.generate(
            ids, max_new_tokens=20, do_sample=False, eos_token_id=list(ends), pad_token_id=0, suppress_tokens=fillers
        )
        assert list(done[str(i)].samples[0].token_ids) == made_ids[0, ids.shape[1] :].tolist()


def test_eight_devices_load_what_one_does(tmp_path, run_python):
    make_checkpoint(tmp_path / "hf", "llama", vocab_size=319, **WIDE)
    make_tokenizer(tmp_path / "hf")
    file = write_gguf(tmp_path / "model.gguf", tmp_path / "hf", Kind.Q8_0)
    code = f"""if True:
        import numpy as np
        from lm_jax.checkpoints.runs import open_model
        from lm_jax.config import MeshConfig
        from lm_jax.models.weights import flatten
        from lm_jax.sharding import make_mesh
        import jax
        source = open_model({str(file)!r})
        meshes = make_mesh(MeshConfig(2, 2, 2)), make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
        cut, whole = (flatten(source.load_params(mesh, "float32")) for mesh in meshes)
        for path, x in whole.items():
            np.testing.assert_array_equal(cut[path][: len(x)], x)
        print("equal")
    """
    assert "equal" in run_python("-c", code, devices=8)


# --- rotary scaling, which transformers does not read from GGUF: llama.cpp's rules, worked out

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}


def llama3_factors(head_dim: int, theta: float, scaling: dict) -> np.ndarray:
    """What llama.cpp's converter writes as rope_freqs.weight, from the wavelengths."""
    waves = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    original, low, high = (
        scaling[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    smooth = (original / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return np.where(waves < original / high, 1, np.where(waves > original / low, scaling["factor"], between)).astype(
        np.float32
    )


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_scaling(factor, tmp_path):
    """It comes back as config.json has it, so that transformers' model of that directory is the oracle."""
    scaling = LLAMA3 | {"factor": factor}
    config = {**WIDE, "max_position_embeddings": 131072, "rope_theta": 5e5, "rope_scaling": scaling}
    model = make_checkpoint(tmp_path / "hf", "llama", **config)
    make_tokenizer(tmp_path / "hf")
    tensors = {"rope_freqs.weight": llama3_factors(64, 5e5, scaling)}
    source, params = loaded(write_gguf(tmp_path / "model.gguf", tmp_path / "hf", tensors=tensors))
    expected = {key: scaling[key] for key in LLAMA3}  # transformers adds the theta to what it is given
    assert rope_to_hf(source.config.rope)["rope_scaling"] == expected
    with torch.no_grad():
        logprobs = their_logprobs(model).numpy()
    np.testing.assert_allclose(our_logprobs(params, source.config), logprobs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scale_linear": 1.0}, None),
        ({"rope.scaling.type": "none"}, None),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        ),
    ],
)
def test_other_scalings(keys, scaling, tmp_path):
    model = make_checkpoint(tmp_path / "hf", "qwen2", **({"rope_scaling": scaling} if scaling else {}))
    make_tokenizer(tmp_path / "hf")
    metadata = {f"qwen2.{key}": value for key, value in keys.items()}
    source, params = loaded(write_gguf(tmp_path / "model.gguf", tmp_path / "hf", metadata=metadata))
    with torch.no_grad():
        logprobs = their_logprobs(model).numpy()
    np.testing.assert_allclose(our_logprobs(params, source.config), logprobs, rtol=0, atol=TOLERANCE)


def test_a_model_in_parts(tmp_path):
    make_checkpoint(tmp_path / "hf", "llama")
    make_tokenizer(tmp_path / "hf")
    whole = write_gguf(tmp_path / "model.gguf", tmp_path / "hf")
    names = [name for name in ("token_embd", "output", "output_norm")]
    parts = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    first = tuple(f"{name}.weight" for name in names)
    from lm_jax.checkpoints.gguf import read_gguf

    rest = tuple(name for name in read_gguf(whole).tensors if name not in first)
    write_gguf(parts[0], tmp_path / "hf", remove=rest, metadata={"split.count": 2, "split.no": 0})
    write_gguf(parts[1], tmp_path / "hf", remove=first, metadata={"split.count": 2, "split.no": 1}, tokenizer=False)
    expected = flatten(loaded(whole)[1])
    for part in parts[:1]:
        for path, x in flatten(loaded(part)[1]).items():
            np.testing.assert_array_equal(x, expected[path])


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"])
def test_real_files(name, tmp_path):
    """The files that real models come as: parameters are transformers' to the bit, ids those of its tokenizer."""
    root = os.environ.get("LM_JAX_REAL_MODELS")
    if not root or not (Path(root) / f"{name}.gguf").exists():
        pytest.skip("LM_JAX_REAL_MODELS names no folder with that GGUF file")
    file = Path(root) / f"{name}.gguf"
    model = theirs(file)
    source, params = loaded(file)
    model.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["model_type"] == source.config.family
    expected = load_params(tmp_path / "theirs", source.config, None)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert dataclasses.replace(open_model(str(tmp_path / "theirs")).config) == source.config
