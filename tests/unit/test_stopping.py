"""Where a response ends: found the same however its tokens arrive, with tokenizers of both kinds."""

import random

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lm_jax.generation.stopping import Stops, resolve_stops, response_text
from tests.checkpoints import make_tokenizer

WORDS = ["▁the", "▁cat", "▁", "the", "cat", "s", "\n", "▁end", "e", "<0xE6>", "<0x97>", "<0xA5>"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def sentencepiece():
    """As Llama 2's: a word's token carries its leading space, which decoding strips from the first one."""
    vocab = {word: i for i, word in enumerate(["<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def as_they_arrive(tokenizer, prompt, ids, texts, sizes, think_end=""):
    """`Stops` as the sampler asks it, after every chunk of tokens."""
    have, sizes, stops = 0, iter(sizes), Stops(tokenizer, prompt, texts, think_end)
    while have < len(ids):
        new = min(next(sizes), len(ids) - have)
        have += new
        if found := stops.find(ids[:have], new):
            return found
    return None


def by_definition(tokenizer, prompt, ids, texts):
    """Token by token over the whole response."""
    for count in range(1, len(ids) + 1):
        text = response_text(tokenizer, prompt, ids[:count])
        if found := [text.index(stop) for stop in texts if stop in text]:
            return count, text[: min(found)]
    return None


STOPS = [("the",), (" the",), ("cat", "\n"), (" cat the",), ("日",), ("s日e", " end"), ("\n\n",), ("nowhere",)]


@pytest.mark.parametrize("stops", STOPS)
def test_chunks_change_nothing(sentencepiece, stops):
    rng, found = random.Random(0), 0
    prompt = sentencepiece.convert_tokens_to_ids(["<s>", "▁the", "▁cat"])
    for _ in range(150):
        pieces = rng.choices([[w] for w in WORDS[:9]] + [WORDS[9:]], k=rng.randint(1, 25))
        ids = sentencepiece.convert_tokens_to_ids(sum(pieces, []))
        sizes = [rng.choice([1, 2, 3, 16]) for _ in ids]
        expected = by_definition(sentencepiece, prompt, ids, stops)
        assert as_they_arrive(sentencepiece, prompt, ids, stops, sizes) == expected
        found += expected is not None
    assert found > 10 or stops == ("nowhere",)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2), (4,)])
def test_a_stop_that_begins_with_the_responses_first_space(sentencepiece, sizes):
    prompt, ids = (sentencepiece.convert_tokens_to_ids(x) for x in (["<s>", "cat"], ["▁the", "cat", "s", "s"]))
    assert response_text(sentencepiece, prompt, ids) == " thecatss"
    assert as_they_arrive(sentencepiece, prompt, ids, (" the",), sizes) == (1, "")
    assert as_they_arrive(sentencepiece, prompt, ids, ("the",), sizes) == (1, " ")


def test_characters_cut_over_tokens(byte_level):
    """Also where prompt and response share a character's bytes."""
    ids = byte_level("x日y")["input_ids"]
    assert len(ids) == 5
    for cut in range(1, 5):
        for sizes in ([1] * 5, [2] * 3, [5]):
            got = as_they_arrive(byte_level, ids[:cut], ids[cut:], ("y",), sizes)
            assert got[0] == 5 - cut and "y" not in got[1]
            if cut == 1:
                assert got[1] == "日"
                assert as_they_arrive(byte_level, ids[:1], ids[1:], ("日",), sizes) == (3, "")


def test_the_prompts_text_is_no_stop(byte_level):
    prompt = byte_level("what is the")["input_ids"]
    ids = byte_level(" hat")["input_ids"]
    assert Stops(byte_level, prompt, ("the", "e h", "is")).find(ids, len(ids)) is None
    assert Stops(byte_level, prompt, ("ha",)).find(ids, len(ids))[1] == " "


@pytest.mark.parametrize("sizes", [[1] * 99, [3] * 40, [7] * 20, [99]])
@pytest.mark.parametrize(
    ("prompt", "response", "end", "expected"),
    [
        # Stops inside thoughts do not count, whoever opens them
        ("what", "<think>the cat.\n\nso</think>hat.\n\nmore", "</think>", "<think>the cat.\n\nso</think>hat."),
        ("what\n<think>\n", "the cat.\n\nso</think>hat.\n\nmore", "</think>", "the cat.\n\nso</think>hat."),
        ("what", "[T]a\n\nb[/T]c\n\nd", "[/T]", "[T]a\n\nb[/T]c"),
        # Thoughts that do not end, or have not: none counts
        ("what", "<think>the cat.\n\nso", "</think>", None),
        ("what\n<think>\n", "the cat.\n\nso", "</think>", None),
        # No thoughts, or a prompt that closes them
        ("what", "the cat.\n\nso", "</think>", "the cat."),
        ("what<think>\n\n</think>\n\n", "the cat.\n\nso", "</think>", "the cat."),
        ("what", "a <think> b.\n\nso</think>", "</think>", "a <think> b."),
        # An end that does not say how thoughts begin: all before it may be thoughts
        ("what", "the cat.\n\nso END hat.\n\nmore", "END", "the cat.\n\nso END hat."),
        ("what", "<think>the cat.\n\nso</think>hat", "", "<think>the cat."),
    ],
)
def test_stops_inside_thoughts(byte_level, prompt, response, end, expected, sizes):
    prompt, ids = (byte_level(text)["input_ids"] for text in (prompt, response))
    found = as_they_arrive(byte_level, prompt, ids, ("\n\n", "zz"), sizes, end)
    assert (None if found is None else found[1]) == expected


def test_resolve(byte_level):
    ids, texts = resolve_stops(("\n\n", "<|im_start|>", 7, "<b>", 0, 7), byte_level, (0, 5))
    assert ids == (0, 5, 1, 7)
    assert texts == ("\n\n", "<b>")
