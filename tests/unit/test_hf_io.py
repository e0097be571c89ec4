"""Import and export are exact and strict; memory stays near one tensor; an export is whole or absent."""

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import textwrap

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from lm_jax.checkpoints import directories as model_directories
from lm_jax.checkpoints import hf as hf_io
from lm_jax.checkpoints import weight_files
from lm_jax.checkpoints.directories import resolve_model_dir
from lm_jax.checkpoints.hf import export_hf, load_params
from lm_jax.errors import UserError
from lm_jax.models.registry import config_from_hf, read_model_config, weight_table
from lm_jax.models.weights import WeightSpec, flatten, nest
from tests.checkpoints import edit_config, make_checkpoint, make_tokenizer

FILE, INDEX = weight_files.SINGLE_FILE, weight_files.INDEX_FILE
NORM = "model.norm.weight"


def all_tensors(path):
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert ours[name].dtype == x.dtype and ours[name].tobytes() == x.tobytes(), name


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny Llama in fp32 with a tokenizer; not to be written to."""
    path = tmp_path_factory.mktemp("source")
    make_checkpoint(path, "llama", attention_bias=True, vocab_size=319)  # no mesh here divides it
    make_tokenizer(path)
    return path


@pytest.fixture
def broken(source, tmp_path):
    """A copy to break, and its tensors."""
    path = tmp_path / "broken"
    shutil.copytree(source, path)
    return path, load_file(path / FILE)


def load(path, **kwargs):
    return load_params(path, read_model_config(path), None, **kwargs)


# --- exactness ---


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_import_export_is_bit_equal(family, dtype, sharded, tmp_path):
    size = 20_000 if sharded else 5_000_000_000
    tie = {"tie_word_embeddings": family == "qwen3"}
    make_checkpoint(tmp_path / "a", family, dtype=dtype, max_shard_size=size, **tie)
    config = read_model_config(tmp_path / "a")
    params = load_params(tmp_path / "a", config, None)
    assert all(x.dtype == np.float32 for x in flatten(params).values())
    export_hf(params, config, tmp_path / "b", tmp_path / "a", dtype, size)
    assert_same_bits(all_tensors(tmp_path / "b"), all_tensors(tmp_path / "a"))
    assert (tmp_path / "b" / INDEX).exists() == sharded
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1 if sharded else (tmp_path / "b" / FILE).exists()


@pytest.mark.parametrize("size", [20_000, 5_000_000_000])
def test_transformers_loads_the_export_and_generates_the_same(size, source, tmp_path):
    config = read_model_config(source)
    export_hf(load(source), config, tmp_path / "out", source, "float32", size)
    outputs = []
    for path in (source, tmp_path / "out"):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        messages = [{"role": "user", "content": "what is the cat?"}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        ids = prompt["input_ids"] if not isinstance(prompt, torch.Tensor) else prompt
        outputs.append(model.generate(ids, max_new_tokens=8, do_sample=False))
    assert torch.equal(*outputs)


def test_export_keeps_what_the_source_directory_had(source, tmp_path):
    copy, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(source, copy)
    edit_config(copy, task_specific_params={"mine": 1}, torch_dtype="float16", eos_token_id=[0, 5])
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "tool.jinja").write_text("x")
    (copy / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    export_hf(load(copy), read_model_config(copy), out, copy, "bfloat16")
    written = json.loads((out / "config.json").read_text())
    assert written["task_specific_params"] == {"mine": 1} and written["eos_token_id"] == [0, 5]
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert {"rope_theta", "rope_scaling", "rope_parameters"} <= written.keys()
    assert config_from_hf(written) == read_model_config(source)
    tool = "additional_chat_templates/tool.jinja"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", tool):
        assert (out / name).read_bytes() == (copy / name).read_bytes()
    assert any((out / name).exists() for name in ("chat_template.jinja", "tokenizer_config.json"))
    assert {x.dtype for x in load_file(out / FILE).values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_export_without_a_source_directory(source, tmp_path):
    export_hf(load(source), read_model_config(source), tmp_path / "out", None, "float32")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", FILE]
    assert read_model_config(tmp_path / "out") == read_model_config(source)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_load_casts(dtype, source):
    full, cast = flatten(load(source)), flatten(load(source, dtype=dtype))
    for path, x in full.items():
        np.testing.assert_array_equal(np.asarray(x).astype(hf_io.DTYPES[dtype]), cast[path])


def test_every_slice_is_copied_whole_in_any_layout(source):
    config = read_model_config(source)
    spec = WeightSpec("x", "x", ("layers", "embed", "heads", "head_dim"), "(heads head_dim) embed")
    tensor = np.arange(32 * 32).reshape(32, 32)
    whole = spec.to_ours(tensor, config)
    np.testing.assert_array_equal(spec.to_hf(whole, config), tensor)
    wide = np.arange(7 * 19 * 21).reshape(7, 19, 21)  # no multiples of a strip
    slices = [whole[i] for i in (np.s_[3:9, 1:3, :], np.s_[:, 2:4, 1:5], np.s_[0:1, 0:1, 7:8], np.s_[:, :, :])]
    for given in [*slices, *(wide.transpose(order) for order in itertools.permutations(range(3))), wide[0, 0]]:
        for stored, dtype in itertools.product(hf_io.STORED_DTYPES.values(), hf_io.DTYPES.values()):
            copied, expected = np.zeros(given.shape, dtype), given.astype(stored)
            hf_io._copy(copied, expected)
            np.testing.assert_array_equal(copied, expected.astype(dtype))


def test_paths_and_names_are_unique(source):
    for config in (read_model_config(source), dataclasses.replace(read_model_config(source), qk_norm=True)):
        table = weight_table(config)
        names = [name for spec in table for name in spec.hf_names(config)]
        assert len({s.path for s in table}) == len(table) and len(set(names)) == len(names)
    flat = {spec.path: 0 for spec in table}
    assert flatten(nest(flat)) == flat


def run_python(code, *args, devices=1):
    flags = f"--xla_force_host_platform_device_count={devices}"
    # Freed arrays go back to the system at once, so that resident memory is memory in use.
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), *map(str, args)], env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_sharded_load_and_export_equal_one_device(source, tmp_path):
    code = """
        import sys, jax, numpy as np
        from jax.sharding import NamedSharding
        from lm_jax.config import MeshConfig
        from lm_jax.checkpoints.hf import export_hf, load_params
        from lm_jax.checkpoints.weight_files import StoredTensor
        from lm_jax.checkpoints.runs import param_specs
        from lm_jax.models.registry import read_model_config, weight_table
        from lm_jax.models.weights import flatten, nest
        from lm_jax.sharding import make_mesh
        source, out = sys.argv[1:]
        config = read_model_config(source)
        mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
        specs = param_specs(config, mesh)
        shardings = nest({path: NamedSharding(mesh, spec) for path, spec in specs.items()})
        reads, array = [], StoredTensor.array.fget
        StoredTensor.array = property(lambda tensor: reads.append(1) or array(tensor))
        sharded = load_params(source, config, shardings)
        assert len(reads) == sum(len(s.hf_names(config)) for s in weight_table(config)), "each once, for all devices"
        plain = load_params(source, config, None)
        for path, x in flatten(plain).items():
            found = flatten(sharded)[path]
            assert found.sharding.spec == specs[path]
            np.testing.assert_array_equal(found[: len(x)], x)
            assert len(found) == 2 * -(-len(x) // 2) and not found[len(x) :].any(), "padded with zeros"
        export_hf(sharded, config, out, source, "float32")
    """
    run_python(code, source, tmp_path / "out", devices=8)
    assert_same_bits(all_tensors(tmp_path / "out"), all_tensors(source))


MEMORY = """
    import sys, threading, time, jax, numpy as np
    from lm_jax.checkpoints.hf import export_hf, load_params
    from lm_jax.models.registry import read_model_config
    def resident():  # bytes of this process, the mapped pages of files too
        kinds = ("RssAnon", "RssFile")
        return sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kinds)) * 1024
    peak, stop = 0, threading.Event()
    def watch():
        global peak
        while not stop.is_set():
            peak = max(peak, resident())
            time.sleep(0.0005)
    source, out, action, shard = sys.argv[1:]
    config = read_model_config(source)
    jax.block_until_ready(jax.numpy.ones(8))
    if action == "export":
        params = load_params(source, config, None, "bfloat16")
    before = resident()
    threading.Thread(target=watch).start()
    if action == "load":
        params = load_params(source, config, None)
    else:
        export_hf(params, config, out, source, "bfloat16", int(shard))
    time.sleep(0.01)
    stop.set()
    leaves = jax.tree.leaves(params)
    kept = sum(x.nbytes for x in leaves) if action == "load" else 0
    print(peak - before - kept, max(x.nbytes for x in leaves), sum(x.nbytes for x in leaves))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """About 100 million parameters, 200 MB in bf16."""
    path = tmp_path_factory.mktemp("large")
    sizes = dict(hidden_size=1024, intermediate_size=2752, num_hidden_layers=8, num_attention_heads=8)
    make_checkpoint(path, "llama", dtype="bfloat16", vocab_size=2048, num_key_value_heads=4, **sizes)
    return path


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_loading_needs_no_more_than_one_stacked_tensor_besides_the_parameters(large):
    extra, largest, total = map(int, run_python(MEMORY, large, "-", "load", 0).split())
    print(f"load: {extra / 1e6:.0f} MB extra; largest stacked tensor {largest / 1e6:.0f} MB, all {total / 1e6:.0f} MB")
    assert total > 3e8
    assert extra < 1.2 * largest  # the whole file, were it kept, would be another 2.2


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_exporting_needs_about_one_shard(large, tmp_path):
    shard = 60_000_000
    extra, _, total = map(int, run_python(MEMORY, large, tmp_path / "out", "export", shard).split())
    print(f"export: {extra / 1e6:.0f} MB extra; shard {shard / 1e6:.0f} MB, all {total / 1e6:.0f} MB")
    assert total > 1.5e8
    assert extra < shard + 40e6  # a few tensors of 6 MB on their way into the shard, and the compiled slicing
    assert_same_bits(all_tensors(tmp_path / "out"), all_tensors(large))


# --- strictness ---


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"model\.layers\.1\.mlp\.up_proj\.weight missing"),
        (lambda t: t.pop("lm_head.weight"), r"lm_head\.weight missing.*tie_word_embeddings"),
        (lambda t: [t.pop(n) for n in list(t) if "mlp" in n], r"\(6 tensors\) missing"),
        (lambda t: t.update({"model.extra.weight": np.ones(3, np.float32)}), r"model\.extra\.weight unknown"),
        (lambda t: t.update({NORM: np.ones(33, np.float32)}), r"model\.norm\.weight \(33,\), expected \(32,\)"),
        (lambda t: t.update({NORM: np.ones(32, np.int8)}), r"model\.norm\.weight \(I8\) .*unsupported dtype"),
        (lambda t: t.update({NORM: np.ones(32, np.float64)}), r"model\.norm\.weight \(F64\)"),
    ],
)
def test_wrong_tensors_raise_with_their_names(change, message, broken):
    path, tensors = broken
    change(tensors)
    save_file(tensors, path / FILE)
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_config_and_weights_that_disagree_raise(broken):
    path, _ = broken
    edit_config(path, attention_bias=False)
    with pytest.raises(UserError, match=r"q_proj\.bias.* unknown"):
        load(path)
    edit_config(path, attention_bias=True, num_key_value_heads=4)
    with pytest.raises(UserError, match=r"k_proj\.weight \(16, 32\), expected \(32, 32\)"):
        load(path)


def test_rotary_tables_of_old_checkpoints_are_ignored(broken):
    path, tensors = broken
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"):
        tensors[name] = np.ones(4, np.float32)
    save_file(tensors, path / FILE)
    load(path)


def test_tied_models_accept_an_equal_output_embedding_only(broken):
    path, tensors = broken
    edit_config(path, tie_word_embeddings=True)
    with pytest.raises(UserError, match="lm_head.weight differs from .*set tie_word_embeddings"):
        load(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, path / FILE)
    params = load(path)
    assert "lm_head" not in params
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, path / FILE)
    with pytest.raises(UserError, match="differs"):
        load(path)


@pytest.fixture
def broken_shards(broken):
    path, tensors = broken
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({n: tensors[n] for n in part}, path / file)
    (path / FILE).unlink()
    weight_map = {n: file for file, part in files.items() for n in part}
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    load(path)
    return path, tensors, weight_map


def test_doubled_tensors_raise(broken_shards):
    path, tensors, _ = broken_shards
    save_file(tensors, path / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match="in more than one weight file"):
        load(path)


def test_a_missing_shard_raises(broken_shards):
    path, *_ = broken_shards
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors: this weight file is missing; download"):
        load(path)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x.bin", "..\\x.safetensors"]
)
def test_an_index_cannot_leave_its_directory(name, broken_shards):
    path, _, weight_map = broken_shards
    shutil.copy(path / "model-00001-of-00002.safetensors", path.parent / "secret.safetensors")
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": name}}))
    with pytest.raises(UserError, match=r"index\.json: weight_map names"):
        load(path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_a_broken_index_raises(content, broken_shards):
    path, *_ = broken_shards
    (path / INDEX).write_text(content)
    with pytest.raises(UserError, match=r"index\.json: .*download"):
        load(path)


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000, -1])
def test_a_truncated_file_raises(keep, broken):
    path, _ = broken
    data = (path / FILE).read_bytes()
    (path / FILE).write_bytes(data[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors: truncated or no safetensors file.*download it again"):
        load(path)


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", bytes(64), b"\xff" * 64]
)
def test_a_corrupt_file_raises(content, broken):
    path, _ = broken
    (path / FILE).write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: truncated or no safetensors file"):
        load(path)


def test_other_weight_files_raise_with_the_cure(broken):
    path, _ = broken
    shutil.copy(path / FILE, path / "model-00001-of-00001.safetensors")
    (path / INDEX).write_text("{}")
    with pytest.raises(UserError, match="has both"):
        load(path)
    (path / INDEX).unlink()
    (path / FILE).unlink()
    with pytest.raises(UserError, match="neither"):
        load(path)
    (path / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(UserError, match="has no model.safetensors"):
        load(path)
    (path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pickles only.*convert them to safetensors"):
        load(path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cpu_device_takes_what_was_read_uncopied(dtype, source, monkeypatch):
    made, aligned = [], hf_io._aligned
    monkeypatch.setattr(hf_io, "_aligned", lambda *args: made.append(aligned(*args)) or made[-1])
    leaves = jax.tree.leaves(load_params(source, read_model_config(source), None, dtype))
    assert {x.unsafe_buffer_pointer() for x in leaves} == {array.ctypes.data for array in made}
    before = [array.copy() for array in made]
    jax.jit(lambda xs: [x + 1 for x in xs], donate_argnums=0)(leaves)  # as a step does with what it trains
    assert all(map(np.array_equal, made, before)), "other devices may read the same memory"


# --- a whole export or none ---


def leftovers(path):
    """Directories beside the output that a reader could take for a model."""
    return [p for p in path.iterdir() if (p / "config.json").exists()]


@pytest.mark.parametrize("failing", ["save_file", "copy_side_files", "_write_json"])
def test_a_failed_export_leaves_nothing(failing, source, tmp_path, monkeypatch):
    config, params = read_model_config(source), load(source)
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        if failing != "save_file" or len(calls) == 2:
            raise OSError("No space left on device")
        return save_file(*args, **kwargs)

    monkeypatch.setattr(hf_io, failing, fail)
    with pytest.raises(OSError, match="No space"):
        export_hf(params, config, tmp_path / "out", source, "float32", 20_000)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_under_an_export_is_one_line(source, tmp_path):
    """safetensors writes by itself, with errors of its own."""
    code = """
        import resource, signal, sys
        from lm_jax.checkpoints import hf as hf_io
        from lm_jax.errors import UserError
        from lm_jax.models.registry import read_model_config
        source, out = sys.argv[1:]
        config = read_model_config(source)
        params = hf_io.load_params(source, config, None)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            hf_io.export_hf(params, config, out, source, "float32")
            said = ""
        except UserError as error:
            said = str(error)
        assert out in said and "there is room" in said, said
    """
    run_python(code, source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_nothing_that_looks_whole_and_can_be_repeated(source, tmp_path):
    code = """
        import os, sys
        from lm_jax.checkpoints import hf as hf_io
        from lm_jax.models.registry import read_model_config
        source, out = sys.argv[1:]
        config = read_model_config(source)
        params = hf_io.load_params(source, config, None)
        hf_io.copy_side_files = lambda *_: os.kill(os.getpid(), 9)
        hf_io.export_hf(params, config, out, source, "float32", 20_000)
    """
    with pytest.raises(AssertionError):
        run_python(code, source, tmp_path / "out")
    assert not (tmp_path / "out").exists() and leftovers(tmp_path) == []
    export_hf(load(source), read_model_config(source), tmp_path / "out", source, "float32")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_export_refuses_what_it_cannot_do(source, tmp_path):
    config, params = read_model_config(source), load(source)
    out = tmp_path / "out"
    out.mkdir()
    export_hf(params, config, out, source, "float32")  # an empty directory is taken
    with pytest.raises(UserError, match="exists and is not empty; choose another"):
        export_hf(params, config, out, source, "float32")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="exists and is not empty"):
        export_hf(params, config, tmp_path / "file", source, "float32")
    other = tmp_path / "other"
    with pytest.raises(UserError, match="export dtype 'int8'"):
        export_hf(params, config, other, source, "int8")
    with pytest.raises(UserError, match="describes another model"):
        export_hf(params, dataclasses.replace(config, norm_eps=0.1), other, source, "float32")
    with pytest.raises(UserError, match="layers/attn/o/bias"):
        export_hf(params, dataclasses.replace(config, o_bias=False), other, source, "float32")
    large = nest(flatten(params) | {"final_norm/scale": np.full(32, 1e5, np.float32)})
    with pytest.raises(UserError, match="model.norm.weight: values overflow in float16"):
        export_hf(large, config, other, source, "float16")
    assert not other.exists()


# --- where a model is ---


def test_resolve_model_dir(source, tmp_path, monkeypatch):
    assert resolve_model_dir(str(source)) == source
    seen = {}

    def download(model, **kwargs):
        seen.update(kwargs, model=model)
        return str(source)

    monkeypatch.setattr(model_directories, "snapshot_download", download)
    assert resolve_model_dir("Qwen/Qwen3-0.6B") == source
    assert seen["model"] == "Qwen/Qwen3-0.6B" and "*.safetensors" in seen["allow_patterns"]
    for bad in (str(tmp_path / "absent"), "../up", "a/b/c", "", "name with space"):
        with pytest.raises(UserError, match="no such directory; give one, or a hub id"):
            resolve_model_dir(bad)

    def offline(model, **kwargs):
        raise FileNotFoundError("cannot reach the hub\nsecond line")

    monkeypatch.setattr(model_directories, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"no such directory, and no such hub id .*cannot reach the hub\)") as error:
        resolve_model_dir("a/b")
    assert "\n" not in str(error.value)
