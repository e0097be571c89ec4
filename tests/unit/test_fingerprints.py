"""What makes another model: a weight, or a field that the forward pass reads; not where and when it was written."""

import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lm_jax.checkpoints.fingerprints import weights_fingerprint
from lm_jax.checkpoints.runs import open_model
from lm_jax.checkpoints.weight_files import open_checkpoint
from tests.checkpoints import edit_config, make_checkpoint

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "original"
    make_checkpoint(path, "qwen3", tie_word_embeddings=False)
    return path


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


def fingerprint(path) -> str:
    return open_model(str(path)).fingerprint


def rewrite(path, change, metadata=None) -> None:
    tensors = load_file(path / FILE)
    save_file(change(tensors) or tensors, path / FILE, metadata)


def touched(path):
    for file in path.iterdir():
        os.utime(file, (1, 1))


def written_again(path):
    """Another order and metadata, so other bytes of the file."""
    rewrite(path, lambda tensors: dict(reversed(tensors.items())), {"format": "pt", "by": "another"})


def renamed_fields(path):
    edit_config(path, _name_or_path="elsewhere", transformers_version="9.9", torch_dtype="float32", use_cache=False)


@pytest.mark.parametrize("change", [lambda path: None, touched, written_again, renamed_fields])
def test_the_same_model(original, copy, change):
    change(copy)
    assert fingerprint(copy) == fingerprint(original)


def test_however_it_is_cut_into_files(original, tmp_path):
    make_checkpoint(tmp_path / "cut", "qwen3", tie_word_embeddings=False, max_shard_size="20KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 3
    assert fingerprint(tmp_path / "cut") == fingerprint(original)


def test_every_weight_counts(original, copy):
    """One number of each tensor, wherever it stands, and none of the results are equal."""
    rng, seen = np.random.default_rng(0), {fingerprint(original)}
    names = sorted(load_file(original / FILE))
    for name in names:
        shutil.copy(original / FILE, copy / FILE)

        def change(tensors, name=name):
            tensors[name].flat[rng.integers(tensors[name].size)] += 1e-3

        rewrite(copy, change)
        seen.add(fingerprint(copy))
    assert len(seen) == len(names) + 1 > 20


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {name.replace("layers.0", "layers.9"): x for name, x in tensors.items()},
        lambda tensors: {name: x.astype(np.float16) for name, x in tensors.items()},
        lambda tensors: {name: x.reshape(-1) for name, x in tensors.items()},
        lambda tensors: dict(zip(tensors, [*tensors.values()][::-1], strict=True)),
    ],
    ids=["names", "dtype", "shape", "exchanged"],
)
def test_more_than_numbers_counts(original, copy, change):
    rewrite(copy, change)
    assert weights_fingerprint(open_checkpoint(copy)) != weights_fingerprint(open_checkpoint(original))


@pytest.mark.parametrize("fields", [{"rms_norm_eps": 1e-5}, {"hidden_act": "gelu"}])
def test_what_the_forward_pass_reads_counts(original, copy, fields):
    edit_config(copy, **fields)
    assert fingerprint(copy) != fingerprint(original)


def test_of_a_large_model_every_tensor_is_looked_at(tmp_path):
    """A quarter of the bytes: an edit of a whole tensor is always seen, a small one as often as is said."""
    rng = np.random.default_rng(0)
    tensors = {f"w{i}": rng.normal(size=(1024, 256)).astype(np.float32) for i in range(4)}
    tensors |= {f"norm{i}": rng.normal(size=256).astype(np.float32) for i in range(4)}
    whole = sum(x.nbytes for x in tensors.values()) // 4

    def found(edited) -> str:
        save_file(edited, tmp_path / FILE)
        return weights_fingerprint(open_checkpoint(tmp_path), whole)

    before = found(tensors)
    for name in tensors:
        assert found({**tensors, name: tensors[name] * 1.001}) != before, name
    rows = [(f"w{rng.integers(4)}", rng.integers(1024)) for _ in range(40)]
    seen = 0
    for name, row in rows:
        edited = tensors[name].copy()
        edited[row] += 1  # 1 KiB: of each tensor's 16 blocks five are read
        seen += found({**tensors, name: edited}) != before
    assert 0.15 < seen / len(rows) < 0.5
