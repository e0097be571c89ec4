"""A directory's tokenizer.json is what is read, whatever transformers would build for the model's type.

The oracle is the `tokenizers` library on the file itself.
"""

import json
import random
import shutil

import pytest
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from lm_jax.checkpoints.directories import copy_side_files
from lm_jax.data.text import TextEncoder
from lm_jax.data.tokenizers import load_tokenizer, tokenizer_fingerprint
from lm_jax.errors import UserError
from tests.unit.test_text import CHATML

CORPUS = ["def f(x):\n    return x\n", "The sea is wide, and the sea is blue: 1234 times.", "中文 日本語 naïve 🙂"] * 5
PROBES = [
    "def f(x):\n    return x",
    "a  b   c    d",
    "\ttabs\t\tand\n\nlines\r\n ends ",
    "0 12 345 6789 1,000.5",
    "中文，日本語 한국어",
    "🙂👩‍👩‍👧 naïve Ångström e\u0301 ﬁ",
    "I'm THEY'LL don't",
    " leading and trailing ",
    "<s>[INST] Hi [/INST] a</s><s> [INST]b",
    "a<|im_end|>\nb <|im_end|> c<|im_start|>",
    "\u00a0\u200b\u3000",
]
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def trained(pre_tokenizer, alphabet=(), **model):
    """BPE whose vocabulary has every byte, where the model falls back to them."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", **model))
    backend.pre_tokenizer = pre_tokenizer
    special = [*SPECIALS, *(BYTES if model.get("byte_fallback") else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=list(alphabet), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    if model.get("byte_fallback"):  # bytes are pieces of the vocabulary, not tokens to be found in a text
        rules = json.loads(backend.to_str())
        rules["added_tokens"] = [token for token in rules["added_tokens"] if token["content"] in SPECIALS]
        backend = Tokenizer.from_str(json.dumps(rules))
    return backend


def metaspace():
    backend = trained(pre_tokenizers.Metaspace(prepend_scheme="never", split=False), byte_fallback=True, fuse_unk=True)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def llama2(**flags):
    """Sets a space before every piece of a text, also behind a special token."""
    backend = trained(pre_tokenizers.Metaspace(prepend_scheme="always", split=False), byte_fallback=True, fuse_unk=True)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def byte_level(regex=LLAMA3, bos=False):
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend = trained(pre_tokenizers.Sequence([split, last]), pre_tokenizers.ByteLevel.alphabet())
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def strips_right():
    """As Phi 3's: the line break behind an end token belongs to it."""
    backend = byte_level()
    backend.add_special_tokens([AddedToken("<|im_end|>", rstrip=True, normalized=False, special=True)])
    return backend


def directory(path, backend, model_type, **config):
    path.mkdir(exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    given = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": CHATML, **config}
    given = {name: value for name, value in given.items() if value != "absent"}
    (path / "tokenizer_config.json").write_text(json.dumps(given))
    return path


def written(path, special=False):
    backend = Tokenizer.from_file(str(path / "tokenizer.json"))
    return [backend.encode(text, add_special_tokens=special).ids for text in PROBES]


def ids(tokenizer, special=False):
    return [tokenizer(text, add_special_tokens=special)["input_ids"] for text in PROBES]


KINDS = [
    (metaspace, "qwen2", {}),
    (metaspace, "qwen2", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    (metaspace, "qwen3", {"tokenizer_class": "Qwen2Tokenizer"}),
    (metaspace, "llama", {"tokenizer_class": "LlamaTokenizerFast"}),
    (llama2, "llama", {"tokenizer_class": "LlamaTokenizer", "legacy": True}),
    (llama2, "llama", {"tokenizer_class": "LlamaTokenizerFast", "legacy": False, "add_prefix_space": True}),
    (llama2, "mistral", {"tokenizer_class": "LlamaTokenizer"}),
    (llama2, "qwen2", {"tokenizer_class": "LlamaTokenizerFast"}),
    (byte_level, "qwen2", {"tokenizer_class": "Qwen2Tokenizer"}),
    (byte_level, "llama", {"tokenizer_class": "LlamaTokenizerFast"}),
    (byte_level, "llama", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    (byte_level, "qwen3", {}),
    (strips_right, "llama", {"eos_token": "<|im_end|>"}),
    (strips_right, "qwen2", {"eos_token": "<|im_end|>"}),
]


@pytest.mark.parametrize(("make", "model_type", "config"), KINDS)
def test_ids_are_those_of_the_file(tmp_path, make, model_type, config):
    path = directory(tmp_path / "model", make(), model_type, **config)
    tokenizer = load_tokenizer(str(path), 800)
    assert ids(tokenizer) == written(path) and ids(tokenizer, special=True) == written(path, special=True)
    backend = Tokenizer.from_file(str(path / "tokenizer.json"))
    for found in written(path):
        assert tokenizer.decode(found) == backend.decode(found, skip_special_tokens=False)
    assert tokenizer.eos_token == config.get("eos_token", "</s>") and tokenizer.chat_template == CHATML
    random.seed(0)
    texts = ["".join(random.choices([*"ab \n\t1.é中🙂'", *SPECIALS], k=30)) for _ in range(200)]
    found = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert found == [e.ids for e in backend.encode_batch(texts, add_special_tokens=False)]


@pytest.mark.parametrize(("make", "model_type", "config"), [KINDS[i] for i in (0, 3, 4, 8)])
def test_transformers_own_classes_read_some_otherwise(tmp_path, make, model_type, config):
    """What the test above would miss if the files were read as they used to be."""
    path = directory(tmp_path / "model", make(), model_type, **config)
    assert ids(transformers.AutoTokenizer.from_pretrained(path)) != written(path)


def test_no_text_vanishes(tmp_path):
    path = directory(tmp_path / "model", metaspace(), "qwen2")
    tokenizer = load_tokenizer(str(path))
    for text in ("def f(x):\n    return x", "中文 🙂"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    ("bos", "config", "lead"),
    [
        (True, {}, [1]),
        (False, {}, []),
        (True, {"add_bos_token": False}, []),
        (False, {"add_bos_token": True}, [1]),
        (True, {"add_bos_token": True, "add_eos_token": False}, [1]),
        (True, {"add_eos_token": False}, [1]),  # of BOS it says nothing
        (True, {"add_bos_token": None}, [1]),
        (False, {"add_eos_token": True}, []),
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_leading_tokens_are_what_the_directory_says(tmp_path, bos, config, lead, model_type):
    path = directory(tmp_path / "model", byte_level(bos=bos), model_type, **config)
    tokenizer = load_tokenizer(str(path))
    encoder = TextEncoder(tokenizer, 100)
    backend = Tokenizer.from_file(str(path / "tokenizer.json"))
    for text in ("The sea", "def f"):
        plain = backend.encode(text, add_special_tokens=False).ids
        assert encoder.encode_prompt(text, "row 0").tolist() == [*lead, *plain]
        whole = encoder.encode(text, " is wide", "row 0")
        assert [*whole.prompt_ids, *whole.response_ids] == [
            *lead,
            *backend.encode(text + " is wide</s>", add_special_tokens=False).ids,
        ]


def test_names_that_the_directory_leaves_to_the_model_type(tmp_path):
    """Where it names no end token the class's serves, if the vocabulary has it; its other defaults add nothing."""
    none = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "absent")
    backend = byte_level()
    for model_type in ("qwen2", "llama"):
        with pytest.raises(UserError, match="no eos token; set eos_token in tokenizer_config.json"):
            load_tokenizer(str(directory(tmp_path / model_type, backend, model_type, **none)))
    backend.add_special_tokens(["<|endoftext|>"])
    path = directory(tmp_path / "whole", backend, "qwen2", **none)
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.eos_token == "<|endoftext|>" and ids(tokenizer) == written(path)
    # Qwen2's class would add <|endoftext|> as unknown and padding token: one id more than the embedding has
    path = directory(tmp_path / "code", metaspace(), "qwen2")
    size = Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab_size()
    assert len(load_tokenizer(str(path), size)) == size


def test_tokens_that_the_config_adds(tmp_path):
    added = {"700": {"content": "<|tool|>", "special": True}, "701": {"content": "<pad>", "special": True}}
    for make, kind in ((llama2, "llama"), (byte_level, "qwen2")):
        backend = make()
        size = backend.get_vocab_size()
        own = {str(size + i): token for i, token in enumerate(added.values())}
        path = directory(tmp_path / kind, backend, kind, added_tokens_decoder=own, pad_token="<pad>")
        tokenizer = load_tokenizer(str(path))
        assert tokenizer.convert_tokens_to_ids(["<|tool|>", "<pad>"]) == [size, size + 1] and len(tokenizer) == size + 2
        assert size in tokenizer("a<|tool|>b")["input_ids"] and ids(tokenizer) == written(path)


@pytest.mark.parametrize(("make", "model_type", "config"), [KINDS[0], KINDS[4], KINDS[8]])
def test_an_export_is_read_as_its_model(tmp_path, make, model_type, config):
    """Its files are the model's own, to the byte; here and in transformers."""
    path = directory(tmp_path / "model", make(), model_type, **config)
    copy = tmp_path / "copy"
    copy.mkdir()
    copy_side_files(path, copy)
    shutil.copy(path / "config.json", copy)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (copy / file).read_bytes() == (path / file).read_bytes()
    ours, its = load_tokenizer(str(path)), load_tokenizer(str(copy))
    assert tokenizer_fingerprint(ours) == tokenizer_fingerprint(its) and ids(its) == written(path)
    assert ids(transformers.PreTrainedTokenizerFast.from_pretrained(copy)) == written(path)
    theirs = [transformers.AutoTokenizer.from_pretrained(directory) for directory in (path, copy)]
    assert ids(theirs[0]) == ids(theirs[1])
