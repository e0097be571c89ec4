"""A checkpoint directory made to harm: each attack ends in one clear error, at once, and nothing of it is executed."""

import functools
import json
import shutil
import struct
import time

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from lm_jax.checkpoints.hf import load_params
from lm_jax.checkpoints.weight_files import check_finite
from lm_jax.data import chat
from lm_jax.data.text import TextEncoder
from lm_jax.data.tokenizers import end_token_ids, load_tokenizer
from lm_jax.errors import UserError
from lm_jax.models.registry import read_model_config
from tests.checkpoints import edit_config, make_checkpoint, make_tokenizer

NORM, WEIGHTS = "model.norm.weight", "model.safetensors"
QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
USER = [{"role": "user", "content": "hi"}]
TURNS = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    make_checkpoint(path, "llama")
    make_tokenizer(path)
    return path


@pytest.fixture
def model(source, tmp_path):
    return shutil.copytree(source, tmp_path / "model")


def load(path, dtype="float32"):
    return load_params(path, read_model_config(path), None, dtype)


def refused(call, *parts: str) -> None:
    """`call` raises our error in time, which names `parts` in one line."""
    begun = time.monotonic()
    with pytest.raises(UserError) as error:
        call()
    line = str(error.value)
    assert [] == [part for part in parts if part not in line] and "\n" not in line, line
    assert time.monotonic() - begun < 5


# --- safetensors -----------------------------------------------------------------------------------------------------


def header(path) -> tuple[dict, bytes]:
    raw = (path / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def with_header(path, text: str, body: bytes) -> None:
    (path / WEIGHTS).write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + body)


@pytest.mark.parametrize("size", [10 * 2**30, 2**64 - 1, 2**63, 10**6, 0, 2])
def test_lengths_of_the_header_that_lie(model, size):
    raw = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(struct.pack("<Q", size) + raw[8:])
    refused(lambda: load(model), WEIGHTS, "truncated or no safetensors file", "download it again")


@pytest.mark.parametrize(
    "fields",
    [
        {"data_offsets": [0, 128]},  # another tensor's bytes
        {"data_offsets": [10**9, 10**9 + 128]},
        {"data_offsets": [128, 0]},
        {"data_offsets": [-128, 0]},
        {"data_offsets": [2**63, 2**63 + 128]},
        {"data_offsets": [2**70, 2**70 + 128]},
        {"shape": [33]},
        {"shape": [2**40, 2**40]},
        {"shape": [32.5]},
        {"shape": [-1]},
        {"dtype": "F16"},
        {"dtype": "Q9"},
        {"dtype": None},
    ],
)
def test_entries_of_the_header_that_lie(model, fields):
    entries, body = header(model)
    with_header(model, json.dumps(entries | {NORM: entries[NORM] | fields}), body)
    refused(lambda: load(model), WEIGHTS, "download it again")


@pytest.mark.parametrize("text", ['{"a":' * 100_000 + "1" + "}" * 100_000, '{"a":' + DEEP + "}", "[]", '"x"', "\0\0"])
def test_headers_that_are_something_else(model, text):
    with_header(model, text, header(model)[1])
    refused(lambda: load(model), WEIGHTS, "download it again")


def test_a_tensor_that_stands_twice_in_a_header(model):
    entries, body = header(model)
    with_header(model, f"{json.dumps(entries)[:-1]}, {json.dumps(NORM)}: {json.dumps(entries[NORM])}}}", body)
    refused(lambda: load(model), WEIGHTS, f"'{NORM}' stands twice", "download it again")


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [NORM, "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_number_that_is_none(model, name, value, dtype):
    tensors = load_file(model / WEIGHTS)
    tensors[name].flat[3] = value
    save_file(tensors, model / WEIGHTS)
    refused(lambda: load(model, dtype), str(model), name, "NaN or infinity", dtype, "download it again")


def test_finite_is_what_numpy_calls_finite():
    """Every 16-bit pattern, and as many of 32 bits."""
    import ml_dtypes

    patterns = np.arange(2**16, dtype=np.uint16)
    for numbers in (
        patterns.view(np.float16),
        patterns.view(ml_dtypes.bfloat16),
        (patterns.astype(np.uint32) << 16).view(np.float32),
        (patterns.astype(np.uint32) << 16 | 1).view(np.float32),
    ):
        finite = np.isfinite(numbers.astype(np.float32))
        check_finite(numbers[finite], "x", "m")
        for bad in np.flatnonzero(~finite)[::97]:
            with pytest.raises(UserError):
                check_finite(numbers[[0, bad, 1]], "x", "m")


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "a/../../x.safetensors", "..", "a\\b.safetensors", "x\0.safetensors"],
)
def test_shards_that_lie_elsewhere(model, name):
    shutil.copy(model / WEIGHTS, model.parent / WEIGHTS)  # what a traversal would find
    (model / WEIGHTS).unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NORM: name}}))
    refused(lambda: load(model), "index.json", "correct the index")


def test_pickles_are_never_read(model):
    (model / WEIGHTS).unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(model / "executed").encode() + b"'\ntR.")
    refused(lambda: load(model), "pickles", "never read", "save_pretrained")
    assert not (model / "executed").exists()


# --- config.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        *({name: size} for name in ("hidden_size", "vocab_size", "intermediate_size") for size in (10**12, 10**400)),
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": 10**6},
        {**QWEN, "num_hidden_layers": 10**12},
        {"num_attention_heads": 10**12},
        {"num_key_value_heads": 10**400},
        {"head_dim": 2**62},
        {"max_position_embeddings": 10**15},
        {"rms_norm_eps": 10**400},
        {"rms_norm_eps": float("nan")},
        {"rope_theta": 10**400, "rope_parameters": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10**400}},
        {"rope_parameters": {"rope_type": ["default"], "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": {}, "rope_theta": [1]}},
        {"model_type": ["llama"]},
        {"model_type": {}},
        {"architectures": {"a": [["x"]]}},
        {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}},
    ],
    ids=str,
)
def test_configs(model, fields):
    (model / "evil.py").write_text(f"open({str(model / 'executed')!r}, 'w')")
    edit_config(model, **fields)
    refused(lambda: load(model), str(model))
    assert not (model / "executed").exists()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"model_type": "llama", "model_type": "gpt2"}', "'model_type' stands twice"),
        ('{"a": ' + DEEP + "}", "recursion"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "digits"),
        (b'{"\xff": 1}', "utf-8"),
    ],
)
def test_configs_that_are_hardly_json(model, content, part):
    (model / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(lambda: load(model), "config.json", "not readable as JSON", part)


# --- tokenizer -------------------------------------------------------------------------------------------------------


def tokenizer_json(path, **changes) -> None:
    file = path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def tokenizer_model(path, **changes) -> None:
    tokenizer_json(path, model=json.loads((path / "tokenizer.json").read_text())["model"] | changes)


NESTED = functools.reduce(lambda inner, _: {"type": "Sequence", "normalizers": [inner]}, range(100), {"type": "NFC"})
UNKNOWN_TOKEN = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "none", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}


@pytest.mark.parametrize(
    "change",
    [
        lambda p: (p / "tokenizer.json").write_text(DEEP),
        lambda p: (p / "tokenizer.json").write_bytes(bytes(range(256)) * 1000),
        lambda p: (p / "tokenizer.json").write_text("[]"),
        lambda p: tokenizer_model(p, vocab=None),
        lambda p: tokenizer_model(p, vocab={"a": 2**32}, merges=[]),
        lambda p: tokenizer_model(p, vocab={"a": -1}, merges=[]),
        lambda p: tokenizer_model(p, merges=[["none", "such"]]),
        lambda p: tokenizer_json(p, normalizer=NESTED),
        lambda p: tokenizer_json(p, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),  # Rust panics
        lambda p: tokenizer_json(p, post_processor=UNKNOWN_TOKEN),  # panics once it is used
        lambda p: (p / "tokenizer_config.json").write_text(DEEP),
        lambda p: (p / "tokenizer_config.json").write_text("[]"),
    ],
)
def test_tokenizers(model, change):
    change(model)
    refused(lambda: load_tokenizer(str(model)), str(model), "cannot be loaded", "tokenizer.json")


def test_ids_beyond_the_embedding(model):
    vocab = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    tokenizer_model(model, vocab=vocab | {"far": 2**32 - 1})
    refused(lambda: load_tokenizer(str(model), 320), "larger than the embedding", "4294967296")


@pytest.mark.parametrize("named", ["EvilTokenizer", None, "tokenization_evil.EvilTokenizer"])
@pytest.mark.parametrize("mapped", [True, False])
def test_code_beside_a_tokenizer_is_never_run(model, named, mapped):
    """transformers may refuse such a directory, or take its tokenizer.json; either way nothing in it is imported."""
    for name in ("tokenization_evil.py", "evil.py"):
        (model / name).write_text(f"open({str(model / 'executed')!r}, 'w')\nclass EvilTokenizer: pass\n")
    file = model / "tokenizer_config.json"
    config = json.loads(file.read_text())
    if named:
        config["tokenizer_class"] = named
    if mapped:
        config["auto_map"] = {"AutoTokenizer": ["evil.EvilTokenizer", "tokenization_evil.EvilTokenizer"]}
    file.write_text(json.dumps(config))
    try:
        assert load_tokenizer(str(model)).is_fast
    except UserError as error:
        assert "custom code" in str(error)
    assert not (model / "executed").exists()


def test_that_code_would_leave_a_trace(model):
    """What the test above looks for is there where code is trusted."""
    test_code_beside_a_tokenizer_is_never_run(model, "EvilTokenizer", True)
    with pytest.raises(Exception):  # noqa: B017 it is no tokenizer
        transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=True).encode("a")
    assert (model / "executed").exists()


@pytest.mark.parametrize("ids", [DEEP, "1" + "0" * 30, "[-5]", "Infinity", '"x"', "[[]]", "{}"])
def test_end_tokens(model, ids):
    (model / "generation_config.json").write_text(f'{{"eos_token_id": {ids}}}')
    tokenizer = load_tokenizer(str(model))
    refused(lambda: end_token_ids(str(model), tokenizer), "generation_config.json", "eos_token_id", "mend the file")


# --- chat template ---------------------------------------------------------------------------------------------------


def encode(path, template: str):
    (path / "chat_template.jinja").write_text(template)
    return TextEncoder(load_tokenizer(str(path)), 64).encode(USER, "yes", "rows.jsonl row 0")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ cycler.__init__.__globals__.os.system('touch executed') }}",
        "{{ messages.append({'role': 'user', 'content': 'more'}) }}",
        "{{ messages[0].update({'content': 'other'}) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in range(10**12) %}x{% endfor %}",
        "{{ 'x' * 10**15 }}",
        "{{ raise_exception('first\nsecond') }}",
        "{% for",
    ],
)
def test_escapes_from_the_sandbox(model, attack):
    refused(lambda: encode(model, attack + TURNS), "rows.jsonl row 0", "chat template refuses", "mend")


@pytest.mark.parametrize("harmless", ["{{ raise_exception.__globals__ }}", "{{ ''|attr('__class__') }}"])
def test_what_the_sandbox_answers_with_nothing(model, harmless):
    expected = encode(model, TURNS)
    assert encode(model, harmless + TURNS).prompt_ids.tolist() == expected.prompt_ids.tolist()


@pytest.mark.parametrize(
    ("attack", "part"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does not end"),
        ("{{ 'x' * 3000000 }}", "3,000,0"),
    ],
)
def test_templates_without_end(model, attack, part, monkeypatch):
    monkeypatch.setattr(chat, "_SECONDS", 1.0)
    refused(lambda: encode(model, attack + TURNS), "rows.jsonl row 0", part)


def test_templates_that_fill_the_memory(model, monkeypatch):
    monkeypatch.setattr(chat, "_peak_bytes", iter(range(0, 2**40, 2**30)).__next__)  # 1 GiB more at each look
    attack = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    refused(lambda: encode(model, attack + TURNS), "rows.jsonl row 0", "more than 2 GiB of memory")


def test_a_long_conversation_is_not_too_long():
    tokenizer = transformers.PreTrainedTokenizerFast.__new__(transformers.PreTrainedTokenizerFast)
    tokenizer.apply_chat_template = lambda messages, **_: "".join(m["content"] for m in messages)
    assert len(chat.render_chat(tokenizer, [{"role": "user", "content": "x" * 3_000_000}])) == 3_000_000
