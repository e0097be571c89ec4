"""Tokens as readable text, whatever the tokenizer cuts."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from lm_jax.data.pieces import token_pieces
from lm_jax.data.tokenizers import load_tokenizer
from tests.checkpoints import make_tokenizer

TEXTS = [
    "the cat and the hat",
    "naïve façade — 10 €",
    "日本語のテキスト, 寿司🍣👩‍👩‍👧 done",
    "\n\ttabs\r\n  and   spaces ",
    "שלום عالم e\u0301",
    "lost \ufffd\ufffd and found",
    "<|im_start|>user\nhi<|im_end|>",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Byte-level, with hardly a merge: every byte of a long character is a token."""
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path)
    return load_tokenizer(str(path))


class Wrapped:
    """What `token_pieces` needs of a tokenizer."""

    def __init__(self, backend):
        self.backend_tokenizer = backend


@pytest.fixture(scope="module")
def sentencepiece():
    """As Llama 2's: spaces are signs, unknown characters bytes, and decoding strips the first space."""
    signs = "▁abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *signs, "▁the"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    vocabulary += ["▁t", "▁th"]
    tokenizer = Tokenizer(
        models.BPE({t: i for i, t in enumerate(vocabulary)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Wrapped(tokenizer)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["tokenizer", "sentencepiece"])
def test_pieces_join_to_the_text_and_no_token_is_lost(kind, text, request):
    tokenizer = request.getfixturevalue(kind)
    before, ids = (tokenizer.backend_tokenizer.encode(t, add_special_tokens=False).ids for t in ("say", text))
    pieces = token_pieces(tokenizer, ids, before)
    assert sum(count for _, count in pieces) == len(ids)
    assert "".join(piece for piece, _ in pieces) == (text if kind == "tokenizer" else f" {text}")


def test_characters_stay_whole(tokenizer):
    ids = tokenizer("é日🍣", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2 + 3 + 4  # each byte a token
    assert token_pieces(tokenizer, ids) == [("é", 2), ("日", 3), ("🍣", 4)]


def test_a_character_that_was_cut_in_two(tokenizer):
    ids = tokenizer("a日", add_special_tokens=False)["input_ids"][:-1]
    (first, second) = token_pieces(tokenizer, ids)
    assert first == ("a", 1) and second == ("\ufffd", 2)


def test_bytes_that_are_no_text(tokenizer):
    (byte,) = tokenizer.backend_tokenizer.encode("é").ids[:1]
    pieces = token_pieces(tokenizer, [byte] * 20)
    assert sum(count for _, count in pieces) == 20 and max(count for _, count in pieces) <= 8


def test_special_tokens_are_shown(tokenizer):
    ids = tokenizer("hat<|im_end|>", add_special_tokens=False)["input_ids"]
    assert token_pieces(tokenizer, ids)[-1] == ("<|im_end|>", 1)


def test_pre_tokenizers_with_a_leading_space():
    """A decoder that strips the space in front of a text must not strip it in front of a token."""
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    assert token_pieces(Wrapped(tokenizer), [1, 0], [0]) == [(" b", 1), (" a", 1)]
