"""Eight devices generate what one does, token for token, compile each step once, and share the cache."""

import json
import sys

import pytest

pytestmark = pytest.mark.multi_device

# (data, fsdp, tensor). With a tensor axis of 8 there are more devices than key/value heads.
MESHES = ((8, 1, 1), (2, 2, 2), (1, 1, 8))
ONE = (1, 1, 1)
SETTINGS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.2, "top_p": 0.95, "repetition_penalty": 1.1, "num_samples": 2, "stop": ("x",)},
}


def name_of(sizes):
    return "x".join(map(str, sizes))


def computed(directory):
    """Runs in a process with 8 devices: the same rows on one device and on every mesh. Returns what the tests see."""
    import random

    import jax
    import numpy as np

    from lm_jax.checkpoints.runs import open_model
    from lm_jax.config import ComputeConfig, DecodeConfig, MeshConfig
    from lm_jax.data.tokenizers import load_tokenizer
    from lm_jax.generation import sampling as sampler
    from lm_jax.generation.requests import Request, SamplingConfig
    from lm_jax.models.cache import cache_shapes
    from lm_jax.sharding import make_mesh

    source, tokenizer = open_model(directory), load_tokenizer(directory)
    rng = random.Random(0)
    beginning = "".join(rng.choices("bfgjklop", k=40))  # shared by enough rows to be prefilled once
    texts = [beginning + "".join(rng.choices("bfgjklop", k=1 + i % 20)) for i in range(20)]
    texts += ["".join(rng.choices("bfgjklop", k=1 + 9 * i)) for i in range(10)]
    requests = [Request(str(i), text, 3 + i % 20) for i, text in enumerate(texts)]
    steps = (sampler.prefill, sampler.place, sampler.decode)

    def on_mesh(sizes):
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        params = source.load_params(mesh, "float32")
        generator = sampler.LocalGenerator(
            params, source.config, tokenizer, (0,), ComputeConfig("float32"), DecodeConfig(8, 128, 5), mesh
        )
        found = {}
        for name, fields in SETTINGS.items():
            before = [step._cache_size() for step in steps]
            done = {c.id: c for cs in generator.generate(requests, SamplingConfig(22, seed=3, **fields)) for c in cs}
            samples = [s for r in requests for s in done[r.id].samples]
            found[name] = {
                "answers": [(s.token_ids, s.text, s.finish_reason) for s in samples],
                "logprobs": [p for s in samples for p in s.logprobs],
                "compiled": [step._cache_size() - n for step, n in zip(steps, before, strict=True)],
            }
        blocks = jax.tree.leaves(cache_shapes(source.config, 8, 128, "float32", mesh))
        found["cuts"] = sorted({x.size // int(np.prod(x.sharding.shard_shape(x.shape))) for x in blocks})
        return found

    return {name_of(sizes): on_mesh(sizes) for sizes in (ONE, *MESHES)}


@pytest.fixture(scope="module")
def found(run_python, tmp_path_factory):
    from tests.checkpoints import make_checkpoint, make_tokenizer

    directory = tmp_path_factory.mktemp("model")
    heads = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
    # Two windows: one layer's cache is a ring
    window = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    # Rows of padding on each mesh but one, whose logits are those of words if nothing keeps them out
    make_checkpoint(directory, "qwen2", vocab_size=317, max_position_embeddings=256, **heads, **window)
    make_tokenizer(directory)
    out = run_python("-m", "tests.multi_device.test_generation", str(directory), devices=8, timeout=900)
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("sizes", MESHES, ids=name_of)
def test_equals_one_device(found, sizes, setting):
    here, one = found[name_of(sizes)][setting], found[name_of(ONE)][setting]
    assert here["answers"] == one["answers"]
    assert here["logprobs"] == pytest.approx(one["logprobs"], rel=0, abs=1e-4)
    assert len({tuple(ids) for ids, _, _ in one["answers"]}) > 25
    assert {reason for _, _, reason in one["answers"]} >= {"length", *(["stop"] if setting == "sampled" else [])}


@pytest.mark.parametrize("sizes", (ONE, *MESHES), ids=name_of)
def test_compiles_once(found, sizes):
    """Each step's result lies as the next one's input did. The prompts' cache has one shape in both settings."""
    here = found[name_of(sizes)]
    for setting, prefills in (("greedy", 1), ("sampled", 0)):  # with a penalty, slots carry what was seen
        prefill, place, decode = here[setting]["compiled"]
        assert (prefill, decode) == (prefills, 1)
        assert 1 <= place <= 2  # with and without an exchange between parts of the mesh


@pytest.mark.parametrize("sizes", MESHES, ids=name_of)
def test_each_device_holds_its_share(found, sizes):
    assert found[name_of(sizes)]["cuts"] == [8]


if __name__ == "__main__":
    print(json.dumps(computed(sys.argv[1])))
