"""Token ids of (prompt, response): agreement with TRL, and every hard error with its row and its cure."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lm_jax.data.text import TextEncoder, checked
from lm_jax.data.tokenizers import end_token_ids, load_tokenizer, token_ids, tokenizer_fingerprint
from lm_jax.errors import UserError

CORPUS = ["\n\nWrite a poem about the sea.\n\nThe sea is wide and the sea is blue.\nuser assistant system think\n"] * 4
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"]
WHERE = "pairs.jsonl row 17 (chosen)"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# In the manner of Qwen3: the last assistant turn opens with an empty think block
THINK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# In the manner of Llama 3 and Gemma: the template writes BOS itself
WITH_BOS = "{{ bos_token }}" + CHATML
NO_END = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
NO_PREFIX = "{{ messages | length }} messages: " + CHATML
REFUSES = "{{ raise_exception('Conversation roles must alternate') }}"


def byte_level(template=None, bos=False, eos_after=False, eos="</s>"):
    backend = Tokenizer(models.BPE())
    # Line breaks in one piece, as Llama 3 and Qwen have it, so that they merge
    pieces = pre_tokenizers.Split(Regex(r"\s*\n+| ?\p{L}+| ?[^\s\p{L}]+|\s+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    if bos or eos_after:
        single = ("<s> " if bos else "") + "$A" + (" </s>" if eos_after else "")
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token="<pad>", chat_template=template
    )


def sentencepiece_like(legacy=False):
    """Sets a space before every text: as a pre-tokenizer, or (as Llama 2's files do) as a normaliser."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    )
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def chat_encoder(template, max_length=500, **kwargs):
    tokenizer = byte_level(template, **kwargs)
    return TextEncoder(tokenizer, max_length, [tokenizer.convert_tokens_to_ids("<|im_end|>")])


def ids(encoded):
    return encoded.prompt_ids.tolist() + encoded.response_ids.tolist()


@pytest.fixture(scope="module")
def trl_tokenize():
    return pytest.importorskip("trl.data_utils")._tokenize


@pytest.mark.parametrize("make", [byte_level, lambda: byte_level(bos=True), sentencepiece_like])
def test_raw_strings_agree_with_trl(make, trl_tokenize):
    tokenizer = make()
    prompt, response = "Write a poem about the sea.", " The sea is wide."
    encoded = TextEncoder(tokenizer, 500).encode(prompt, response, WHERE)
    assert encoded.prompt_ids.dtype == encoded.response_ids.dtype == np.int32
    assert encoded.prompt_ids.tolist() == trl_tokenize(tokenizer, prompt)["input_ids"]
    assert ids(encoded) == trl_tokenize(tokenizer, prompt + response + "</s>")["input_ids"]
    assert not encoded.boundary_split and not encoded.truncated


@pytest.mark.parametrize("template", [CHATML, WITH_BOS])
@pytest.mark.parametrize("bos", [False, True])
def test_messages_agree_with_trl_up_to_the_end_token(template, bos, trl_tokenize):
    encoder = chat_encoder(template, bos=bos)
    tokenizer = encoder._tokenizer
    prompt, response = user("Write a poem"), assistant("The sea is wide.")
    encoded = encoder.encode(prompt, response, WHERE)
    assert encoded.prompt_ids.tolist() == trl_tokenize(tokenizer, prompt, add_generation_prompt=True)["input_ids"]
    theirs = trl_tokenize(tokenizer, prompt + response)["input_ids"]
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert ids(encoded) + newline == theirs
    assert tokenizer.decode(encoded.response_ids[-1:]) == "<|im_end|>"
    assert ids(encoded).count(tokenizer.bos_token_id) == (template is WITH_BOS)


def test_string_response_after_messages_is_an_assistant_message():
    encoder = chat_encoder(CHATML)
    assert ids(encoder.encode(user("Hi"), "The sea", WHERE)) == ids(
        encoder.encode(user("Hi"), assistant("The sea"), WHERE)
    )


def test_response_of_several_turns_ends_with_its_last_end_token():
    encoder = chat_encoder(CHATML)
    turns = assistant("one") + user("more") + assistant("two")
    text = encoder._tokenizer.decode(encoder.encode(user("Hi"), turns, WHERE).response_ids)
    assert text.startswith("one<|im_end|>") and text.endswith("two<|im_end|>")


def test_trailing_eos_of_the_tokenizer_stands_only_after_the_response():
    tokenizer = byte_level(bos=True, eos_after=True)
    encoded = TextEncoder(tokenizer, 500).encode("Write a", " poem", WHERE)
    assert tokenizer.decode(ids(encoded)) == "<s>Write a poem</s>"
    assert tokenizer.decode(TextEncoder(tokenizer, 500).encode_prompt("Write a", WHERE)) == "<s>Write a"


def test_eos_is_not_added_to_a_response_that_ends_with_it():
    encoder = TextEncoder(byte_level(), 500)
    assert ids(encoder.encode("Write", " a poem</s>", WHERE)) == ids(encoder.encode("Write", " a poem", WHERE))


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like, lambda: sentencepiece_like(legacy=True)])
@pytest.mark.parametrize(("prompt", "response"), [("Write a po", "em about"), ("The se", "a is"), ("sea is ", "wide")])
def test_merge_across_the_boundary_keeps_the_prompt_and_the_text(make, prompt, response):
    encoder = TextEncoder(make(), 500)
    encoded = encoder.encode(prompt, response, WHERE)
    assert encoded.prompt_ids.tolist() == encoder.encode_prompt(prompt, WHERE).tolist()
    # No space slips in before a response that is tokenised apart
    assert encoder._tokenizer.decode(ids(encoded), skip_special_tokens=True) == prompt + response
    whole = encoder._tokenizer(prompt + response + "</s>")["input_ids"]
    assert encoded.boundary_split == (ids(encoded) != whole)


def test_boundary_split_is_flagged():
    encoder = TextEncoder(byte_level(), 500)
    assert encoder.encode("Write a po", "em", WHERE).boundary_split
    assert not encoder.encode("Write a", " poem", WHERE).boundary_split


def test_merge_across_a_template_boundary_is_no_template_fault():
    encoder = chat_encoder(CHATML)
    tokenizer = encoder._tokenizer
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    encoded = encoder.encode(user("Hi"), assistant("\nThe sea"), WHERE)
    assert encoded.boundary_split
    assert encoded.prompt_ids.tolist() == encoder.encode_prompt(user("Hi"), WHERE).tolist()
    assert tokenizer.decode(encoded.response_ids) == "\nThe sea<|im_end|>"


@pytest.mark.parametrize("template", [None, CHATML, THINK, WITH_BOS])
def test_generation_starts_from_the_prompt_of_training(template):
    encoder = chat_encoder(template, bos=True)
    prompt = user("Write a poem") if template else "Write a poem"
    assert encoder.encode_prompt(prompt, WHERE).tolist() == encoder.encode(prompt, " a", WHERE).prompt_ids.tolist()


def test_many_rows_equal_one_by_one(monkeypatch):
    monkeypatch.setattr("lm_jax.data.text._BATCH", 3)
    encoder = chat_encoder(WITH_BOS, bos=True)
    prompts = [f"Write a poem {i}" if i % 2 else user(f"poem {i}") for i in range(8)]
    responses = [f" sea {i} blue" if i % 2 else assistant(f"sea {i}") for i in range(8)]
    wheres = [f"rows.jsonl row {i}" for i in range(8)]
    many = encoder.encode_many(prompts, responses, wheres)
    assert [ids(m) for m in many] == [ids(encoder.encode(*row)) for row in zip(prompts, responses, wheres, strict=True)]
    starts = encoder.encode_prompts(prompts, wheres)
    assert [s.tolist() for s in starts] == [m.prompt_ids.tolist() for m in many]
    responses[5] = ""
    prompts[4] = user("poem " * 500)
    with_faults = encoder.encode_many(prompts, responses, wheres)
    assert [ids(m) for i, m in enumerate(with_faults) if i not in (4, 5)] == [
        ids(m) for i, m in enumerate(many) if i not in (4, 5)
    ]
    assert "rows.jsonl row 4: the response is lost" in str(with_faults[4]) and "row 5: the resp" in str(with_faults[5])
    assert "row 4: the response is lost" in str(encoder.encode_prompts(prompts, wheres)[4])
    with pytest.raises(UserError, match="rows.jsonl row 4: the response is lost"):
        checked(with_faults)


def test_truncation_cuts_the_responses_tail():
    tokenizer = byte_level(bos=True)
    full = TextEncoder(tokenizer, 500).encode("Write a", " poem about the sea", WHERE)
    prompt, length = len(full.prompt_ids), len(full.response_ids)
    for max_length in range(prompt + 1, prompt + length + 1):
        cut = TextEncoder(tokenizer, max_length).encode("Write a", " poem about the sea", WHERE)
        assert ids(cut) == ids(full)[:max_length]
        assert (cut.truncated, cut.full_length) == (max_length < prompt + length, length)
    for encode in (lambda e: e.encode("Write a", " poem", WHERE), lambda e: e.encode_prompt("Write a", WHERE)):
        error = raised(encode, TextEncoder(tokenizer, prompt))
        assert f"prompt alone has {prompt} tokens" in error and "raise max_length" in error


def test_a_pad_token_that_is_the_eos_or_stands_in_the_text_is_kept():
    tokenizer = byte_level()
    tokenizer.pad_token = tokenizer.eos_token
    encoded = TextEncoder(tokenizer, 500).encode("Write", " a</s> poem <pad>", WHERE)
    assert tokenizer.decode(encoded.response_ids) == " a</s> poem <pad></s>"


def raised(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    text = str(caught.value)
    assert text.startswith(WHERE + ":") and "\n" not in text
    return text


@pytest.mark.parametrize(
    ("template", "prompt", "response", "says", "cure"),
    [
        (None, "Write", "", "response is empty", "drop the row"),
        (None, "Write", " \n", "response is empty", "drop the row"),
        (None, "Write", "</s>", "response is empty", "drop the row"),
        (CHATML, user("Write"), assistant(""), "response is empty", "drop the row"),
        (THINK, user("Write"), assistant(" "), "response is empty", "drop the row"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
         user("Write"), assistant("a"), "does not show the text of the assistant's turn", "mend it"),
        (None, "", "a poem", "prompt has no tokens", "give a prompt"),
        (None, "Write", "a poem</s></s>", "doubled EOS: the response ends with '</s></s>'", "remove the end token"),
        (CHATML, user("Write"), assistant("a<|im_end|>"), "doubled EOS", "remove the end token"),
        (CHATML, user("<s>Hi"), assistant("a"), None, None),
        (WITH_BOS.replace("{{ bos_token }}", "{{ bos_token }}<s>"), user("Hi"), assistant("a"), "doubled BOS",
         "remove it"),
        (NO_PREFIX, user("Hi"), assistant("a") + user("b") + assistant("c"), "shows the prompt otherwise once several "
         "turns follow: alone it goes on with '1 messages", "give the last turn alone"),
        (NO_END, user("Hi"), assistant("a"), "end token not trained", "eos_token_id in generation_config.json"),
        (NO_END, user("Hi"), assistant("a</s> poem"), "end token not trained", "eos_token_id"),
        (None, user("Hi"), assistant("a"), "no chat template", "set chat_template"),
        (REFUSES, user("Hi"), assistant("a"), "roles user (Conversation roles must alternate)", "roles and order"),
        (CHATML, "Hi", assistant("a"), "prompt is a string but the response is messages", "make them alike"),
        (None, "Hi \ud83d", "a", "half a surrogate pair at character 3", "remove it"),
        (None, "Hi", "\ud83d", "half a surrogate pair at character 2", "remove it"),
        (CHATML, user("Hi"), assistant("\ud83d"), "half a surrogate pair", "remove it"),
        (CHATML, user("\ud83d"), assistant("a"), "half a surrogate pair", "remove it"),
        (None, 3, "a", "prompt must be a string or messages, got int", "give a string"),
        (None, "Hi", None, "response must be a string or messages, got NoneType", "give a string"),
        (CHATML, [], "a", "prompt is an empty list", "give a string or a list"),
        (CHATML, [{"role": "user"}], "a", "prompt message 0 has no content", "'content'"),
        (CHATML, user("Hi") + ["x"], "a", "prompt message 1 is no object but str", "'content'"),
        (CHATML, user("Hi"), [{"content": "a"}], "response message 0 has no role", "'role'"),
        (CHATML, user("Hi"), assistant(None), "response message 0 has no content", "'content'"),
    ],
)  # fmt: skip
def test_hard_errors(template, prompt, response, says, cure):
    encoder = chat_encoder(template)
    if says is None:
        encoder.encode(prompt, response, WHERE)
        return
    error = raised(encoder.encode, prompt, response, WHERE)
    assert says in error and cure in error


def test_doubled_bos_of_a_string():
    encoder = TextEncoder(byte_level(bos=True), 500)
    for encode in (lambda: encoder.encode("<s>Hi", "a", WHERE), lambda: encoder.encode_prompt("<s>Hi", WHERE)):
        error = raised(encode)
        assert "doubled BOS: the prompt begins with '<s>'" in error and "remove it from the text" in error
    # A tokenizer that adds none leaves it to the text
    assert ids(TextEncoder(byte_level(), 500).encode("<s>Hi", "a", WHERE))[0] == 0


def test_a_template_that_asks_for_the_date_gets_the_same_every_day():
    asks = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"  # Llama 3.2
    dated = asks + "{{ date_string }} " + CHATML
    fixed = CHATML.replace("{%", "26 Jul 2024 {%", 1)
    ids = [chat_encoder(template).encode_prompt(user("Hi"), "row 0").tolist() for template in (dated, fixed)]
    assert ids[0] == ids[1]


def test_the_templates_end_token_must_be_known():
    tokenizer = byte_level(CHATML)
    assert "end token not trained" in raised(TextEncoder(tokenizer, 500).encode, user("Hi"), assistant("a"), WHERE)


def test_load_tokenizer(tmp_path):
    byte_level(CHATML).save_pretrained(tmp_path / "whole")
    tokenizer = load_tokenizer(str(tmp_path / "whole"), 330)
    assert tokenizer.chat_template == CHATML and len(tokenizer) <= 330
    with pytest.raises(UserError, match=rf"the tokenizer has {len(tokenizer)} ids, the embedding 50 rows; use the"):
        load_tokenizer(str(tmp_path / "whole"), 50)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="none: no tokenizer in it; copy tokenizer.json"):
        load_tokenizer(str(tmp_path / "none"))
    (tmp_path / "whole" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded .*check the path"):
        load_tokenizer(str(tmp_path / "whole"))
    byte_level(eos=None).save_pretrained(tmp_path / "endless")
    with pytest.raises(UserError, match="no eos token; set eos_token"):
        load_tokenizer(str(tmp_path / "endless"))


def test_a_tokenizer_without_a_fast_form_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: SimpleNamespace(is_fast=False))
    with pytest.raises(UserError, match="org/slow: its tokenizer has no fast form; save one with a tokenizer.json"):
        load_tokenizer("org/slow")


def test_token_ids_with_holes_and_added_tokens():
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 5, "<e>": 6}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    tokenizer.add_tokens(["c"])
    assert token_ids(tokenizer) == [0, 5, 6, tokenizer.convert_tokens_to_ids("c")]


def test_end_token_ids(tmp_path):
    tokenizer = byte_level()
    assert end_token_ids(str(tmp_path), tokenizer) == (1,)
    config = tmp_path / "generation_config.json"
    for value, expected in ((3, (1, 3)), ([3, 1], (1, 3)), (None, (1,))):
        config.write_text(json.dumps({"eos_token_id": value}))
        assert end_token_ids(str(tmp_path), tokenizer) == expected
    for broken in ("{", '{"eos_token_id": "x"}', "[]"):
        config.write_text(broken)
        with pytest.raises(UserError, match="generation_config.json: eos_token_id .*mend"):
            end_token_ids(str(tmp_path), tokenizer)


@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": None, "top_p": 0.9}, {"eos_token_id": 4}])
def test_end_token_ids_of_config_json_where_generation_config_names_none(tmp_path, generation):
    """What merging tools write; transformers' generation config of a model is the oracle."""
    tokenizer, hf = byte_level(), {"model_type": "llama", "vocab_size": 320, "eos_token_id": [1, 2]}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    if generation:
        expected = generation["eos_token_id"] or hf["eos_token_id"]
    else:
        expected = transformers.GenerationConfig.from_model_config(transformers.AutoConfig.for_model(**hf)).eos_token_id
    assert set(end_token_ids(str(tmp_path), tokenizer)) == {1, *([expected] if isinstance(expected, int) else expected)}
    (tmp_path / "config.json").write_text('{"eos_token_id": "x"}')
    if generation != {"eos_token_id": 4}:
        with pytest.raises(UserError, match=r"/config.json: eos_token_id .*mend"):
            end_token_ids(str(tmp_path), tokenizer)


def test_fingerprint_follows_what_decides_the_ids(tmp_path):
    tokenizer = byte_level(CHATML)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    tokenizer.save_pretrained(tmp_path)
    assert before == tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(load_tokenizer(str(tmp_path)))
    others = [byte_level(THINK), byte_level(CHATML, bos=True), byte_level(CHATML, eos="<|im_end|>"), byte_level()]
    assert len({before, *map(tokenizer_fingerprint, others)}) == 5
