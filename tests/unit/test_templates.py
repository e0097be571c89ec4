"""Published chat templates: what is learnt follows on what generation is given, turn by turn; oracle: transformers."""

import datetime
import importlib.resources
import json

import numpy as np
import pytest

from lm_jax.data.faults import Faults
from lm_jax.data.layouts import read_prompts
from lm_jax.data.text import TextEncoder
from lm_jax.data.tokenizers import load_tokenizer, opens_thoughts, tokenizer_fingerprint
from lm_jax.errors import UserError
from tests.unit.test_text import CHATML, byte_level

trl = pytest.importorskip("trl")  # brings the templates of published models
WHERE = "rows.jsonl row 4"
# Of Mistral-7B-Instruct-v0.3, without its branches for tools
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("After the optional system message, conversation roles must alternate") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}"""
ENDS = ["<|im_end|>", "<｜end▁of▁sentence｜>", "<|eot_id|>", "<end_of_turn>", "<|return|>", "<|call|>"]
ENDS += ["<|end|>", "<|END_OF_TURN_TOKEN|>", "</s>"]
OTHERS = ["<｜User｜>", "<｜Assistant｜>", "[INST]", "[/INST]", "<think>", "</think>", "<|im_start|>"]
SYSTEM = {"role": "system", "content": "Be terse."}
THOUGHTS, CLOSED = "<think>\nLet me see.\n</think>\n\nIt is.", "Let me see.\n</think>\n\nIt is."
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo", "days": null}'}}
NO_THINKING = {"enable_thinking": False}


def user(text):
    return {"role": "user", "content": text}


def said(text, **others):
    return {"role": "assistant", "content": text, **others}


def published(name):
    if name == "mistral_v0_3":
        return MISTRAL
    if name == "smollm2":
        return CHATML
    return importlib.resources.files("trl").joinpath("chat_templates", f"{name}.jinja").read_text()


def encoder_of(template, max_length=4000, **kwargs):
    tokenizer = byte_level(template)
    tokenizer.add_special_tokens({"additional_special_tokens": [*ENDS, *OTHERS]})
    tokenizer.chat_template_kwargs = kwargs
    return TextEncoder(tokenizer, max_length, tokenizer.convert_tokens_to_ids(ENDS)), tokenizer


def given(tokenizer, messages, **kwargs):
    """What transformers gives generation."""
    kwargs = {"date_string": "26 Jul 2024", **kwargs}
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)
    return text.replace(str(datetime.date.today()), "2024-07-26")  # what calls strftime_now by itself


@pytest.mark.parametrize(
    ("name", "kwargs", "before", "turn", "ending", "expected"),
    [
        # The generation prompt opens thoughts, which finished turns do not show
        ("deepseek_r1_distill", {}, [user("Hi")], said("Yes."), "<think>\n", "Yes.<｜end▁of▁sentence｜>"),
        ("deepseek_r1_distill", {}, [user("Hi")], said(CLOSED), "<think>\n", f"{CLOSED}<｜end▁of▁sentence｜>"),
        ("deepseek_r1_distill", {}, [user("Hi")], said(THOUGHTS), "<think>\n", f"{CLOSED}<｜end▁of▁sentence｜>"),
        ("deepseek_r1_distill", {}, [user("Hi")], said("It is.", reasoning_content="Let me see."), "<think>\n",
         f"{CLOSED}<｜end▁of▁sentence｜>"),
        ("deepseek_r1_distill", {}, [SYSTEM, user("Hi"), said(THOUGHTS), user("Go on")], said(CLOSED),
         "<｜Assistant｜>\n\nIt is.<｜end▁of▁sentence｜><｜User｜>Go on<｜Assistant｜><think>\n",
         f"{CLOSED}<｜end▁of▁sentence｜>"),
        # A finished turn has an empty block of thoughts, where it has none of its own
        ("qwen3", {}, [user("Hi")], said("Yes."), "<|im_start|>assistant\n", "Yes.<|im_end|>"),
        ("qwen3", {}, [user("Hi")], said(THOUGHTS), "<|im_start|>assistant\n", f"{THOUGHTS}<|im_end|>"),
        ("qwen3", {}, [user("Hi")], said("It is.", reasoning_content="Let me see."), "<|im_start|>assistant\n",
         f"{THOUGHTS}<|im_end|>"),
        ("qwen3", {}, [user("Hi")], said("<think>\n\n</think>\n\nYes."), "<|im_start|>assistant\n",
         "<think>\n\n</think>\n\nYes.<|im_end|>"),
        ("qwen3", {}, [user("Hi"), said(THOUGHTS), user("So")], said("Yes."),
         "<|im_start|>assistant\nIt is.<|im_end|>\n<|im_start|>user\nSo<|im_end|>\n<|im_start|>assistant\n",
         "Yes.<|im_end|>"),
        ("qwen3", NO_THINKING, [user("Hi")], said("Yes."), "<think>\n\n</think>\n\n", "Yes.<|im_end|>"),
        ("qwen3", NO_THINKING, [user("Hi")], said("<think>\n\n</think>\n\nYes."), "<think>\n\n</think>\n\n",
         "Yes.<|im_end|>"),
        # Thoughts where they are switched off: the response as it is
        ("qwen3", NO_THINKING, [user("Hi")], said(THOUGHTS), "<think>\n\n</think>\n\n", f"{THOUGHTS}<|im_end|>"),
        # A tool's answer is no new query
        ("qwen3", {}, [user("Hi"), said("", tool_calls=[CALL]), {"role": "tool", "content": "rain"}], said("It rains."),
         "</tool_response><|im_end|>\n<|im_start|>assistant\n", "It rains.<|im_end|>"),
        # The system message stands before the user's last turn alone
        ("mistral_v0_3", {}, [SYSTEM, user("Hi")], said(" Yes. "), "[INST] Be terse.\n\nHi[/INST]", " Yes.</s>"),
        ("mistral_v0_3", {}, [SYSTEM, user("[/INST] x"), said("a"), user("b")], said("c"),
         "[INST] [/INST] x[/INST] a</s>[INST] Be terse.\n\nb[/INST]", " c</s>"),
        ("mistral_v0_3", {}, [user("Hi")], said("Yes."), "<s>[INST] Hi[/INST]", " Yes.</s>"),
        # Neither repeats what the prompt of generation has: the rest closes the thoughts
        ("qwen3_5_think", {}, [user("Hi")], said(THOUGHTS), "<think>\n", f"{CLOSED}<|im_end|>"),
        ("nemotron_3_nano", {}, [user("Hi")], said("Yes."), "<think>\n", "Yes.<|im_end|>"),
        ("gptoss", {}, [user("Hi")], said("Yes."), "<|start|>assistant",
         "<|channel|>final<|message|>Yes.<|return|>"),
        ("llama3_1", {}, [user("Hi")], said("\nYes. "), "<|end_header_id|>\n\n", "Yes.<|eot_id|>"),
    ],
)  # fmt: skip
def test_a_response_follows_on_what_generation_is_given(name, kwargs, before, turn, ending, expected):
    encoder, tokenizer = encoder_of(published(name), **kwargs)
    encoded = encoder.encode(before, [turn], WHERE)
    start = given(tokenizer, before, **kwargs)
    assert start.endswith(ending)
    assert encoded.prompt_ids.tolist() == tokenizer(start, add_special_tokens=False)["input_ids"]
    assert encoded.prompt_ids.tolist() == encoder.encode_prompt(before, WHERE).tolist()
    assert tokenizer.decode(encoded.response_ids) == expected
    # A conversation of this turn alone is learnt alike
    ((alone,),) = encoder.encode_conversations([before], [[turn]], [WHERE])
    assert alone.response_ids.tolist() == encoded.response_ids.tolist() and alone.loss_mask is None


TEMPLATES = ["deepseek_r1_distill", "deepseekv3", "qwen3", "qwen3_5_think", "qwen3_instruct_2507", "qwen2_5", "gptoss"]
TEMPLATES += ["llama3", "llama3_1", "llama3_2", "phi3", "lfm2", "nemotron_3_nano", "gemma3", "mistral_v0_3", "smollm2"]


@pytest.mark.parametrize("kwargs", [{}, NO_THINKING])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_turn_of_a_conversation_is_learnt_where_generation_would_be(name, kwargs):
    template = published(name)
    encoder, tokenizer = encoder_of(template, **kwargs)
    messages = [SYSTEM, user("one"), said("two"), user("three"), said(THOUGHTS), user("five"), said("six")]
    (examples,) = encoder.encode_conversations([messages[:2]], [messages[2:]], [WHERE])
    learnt = []
    for example in examples:
        ids = [*example.prompt_ids, *example.response_ids]
        mask = np.concatenate([np.zeros(len(example.prompt_ids), bool), mask_of(example)])
        for begin in np.flatnonzero(mask & ~np.roll(mask, 1)):
            end = begin + next((i for i, m in enumerate(mask[begin:]) if not m), len(mask) - begin)
            learnt.append((tokenizer.decode(ids[:begin]), tokenizer.decode(ids[begin:end])))
    contexts = [given(tokenizer, messages[:i], **kwargs) for i in (2, 4, 6)]
    assert [before for before, _ in learnt] == contexts
    for (_, text), words in zip(learnt, ("two", "Let me see.", "six"), strict=True):
        assert words in text and text.endswith(tuple(ENDS))
    # As many examples as the template shows pasts
    ongoing = [b.startswith(a + text) for (a, text), b in zip(learnt[:-1], contexts[1:], strict=True)]
    assert len(examples) == 1 + ongoing.count(False)
    assert len(examples) == {"smollm2": 1, "gptoss": 3, "mistral_v0_3": 3}.get(name, len(examples))


def mask_of(example):
    return np.ones(len(example.response_ids), bool) if example.loss_mask is None else example.loss_mask


def test_a_conversation_without_thoughts_is_one_example_of_qwen3():
    """The empty block is no part of it, so that the past never changes; TRL's ids less those blocks."""
    encoder, tokenizer = encoder_of(published("qwen3"))
    messages = [user("one"), said("two"), user("three"), said("four")]
    ((example,),) = encoder.encode_conversations([messages[:1]], [messages[1:]], [WHERE])
    theirs = trl.data_utils.apply_chat_template({"messages": messages}, tokenizer)["text"]
    text = tokenizer.decode([*example.prompt_ids, *example.response_ids])
    assert text + "\n" == theirs.replace("<think>\n\n</think>\n\n", "") != theirs


def test_later_turns_that_do_not_fit_are_cut_like_those_of_one_example():
    messages = [user("one"), said("two"), user("three " * 30), said("four")]
    for name in ("smollm2", "deepseek_r1_distill"):
        encoder, tokenizer = encoder_of(published(name), max_length=60)
        ((example,),) = encoder.encode_conversations([messages[:1]], [messages[1:]], [WHERE])
        assert example.truncated and "two" in tokenizer.decode(example.response_ids)
        with pytest.raises(UserError, match="lost to truncation"):
            encoder.encode(messages[:3], messages[3:], WHERE)


def test_several_turns_as_one_response():
    """A pair's response may be several messages; where the template rewrites the first, the cure is named."""
    turns = [said("two"), user("three"), said("four")]
    encoder, tokenizer = encoder_of(published("qwen3"))
    text = tokenizer.decode(encoder.encode([user("one")], turns, WHERE).response_ids)
    assert text == "two<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>"
    encoder, _ = encoder_of(published("deepseek_r1_distill"))
    with pytest.raises(UserError, match="row 4: .*otherwise once several turns follow: .*give the last turn alone"):
        encoder.encode([user("one")], turns, WHERE)


@pytest.mark.parametrize(
    ("template", "turn", "says"),
    [
        (CHATML, said("Let me look.", tool_calls=[CALL]), "does not show the tool calls"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", said("a"), "does not show the text"),
    ],
)
def test_what_a_template_leaves_out(template, turn, says):
    encoder, _ = encoder_of(template)
    with pytest.raises(UserError, match=f"row 4: the chat template {says} of the assistant's turn; mend it, or drop"):
        encoder.encode([user("Hi")], [turn], WHERE)


# --- arguments of the template ---------------------------------------------------------------------------------------


def test_a_rows_arguments_go_before_the_keys():
    encoder, tokenizer = encoder_of(published("qwen3"), enable_thinking=True)
    row = {"chat_template_kwargs": json.dumps(NO_THINKING)}
    prompts = [[user("Hi")], read_prompts([row | {"prompt": [user("Hi")]}], Faults("rows"))[0]]
    plain, without = encoder.encode_prompts(prompts, [WHERE] * 2)
    expected = [given(tokenizer, [user("Hi")]), given(tokenizer, [user("Hi")], **NO_THINKING)]
    assert [tokenizer.decode(ids) for ids in (plain, without)] == expected and expected[0] != expected[1]
    assert encoder.encode(prompts[1], "Yes.", WHERE).prompt_ids.tolist() == without.tolist()
    nulls = {"chat_template_kwargs": {"enable_thinking": None}}  # as Parquet fills them in
    assert read_prompts([nulls | {"prompt": [user("Hi")]}], Faults("rows")) == {0: [user("Hi")]}


def test_keys_of_a_tokenizer(tmp_path, capsys):
    byte_level(published("qwen3")).save_pretrained(tmp_path)
    plain, without = (load_tokenizer(str(tmp_path), None, kwargs) for kwargs in ("", json.dumps(NO_THINKING)))
    assert tokenizer_fingerprint(plain) != tokenizer_fingerprint(without)
    assert "no-think" not in capsys.readouterr().err
    assert load_tokenizer(str(tmp_path), None, '{"enable_thinknig": false}').chat_template_kwargs
    assert f"config.chat_template_kwargs: the chat template of {tmp_path} does not read enable_thinknig" in (
        capsys.readouterr().err
    )
    for wrong, says in (("[]", "must be a JSON object, as"), ('{"tokenize": true}', "tokenize is set by the command")):
        with pytest.raises(UserError, match=f"config.chat_template_kwargs: {says}"):
            load_tokenizer(str(tmp_path), None, wrong)


@pytest.mark.parametrize(
    ("name", "kwargs", "opened"),
    [
        ("deepseek_r1_distill", {}, "<think>"),
        ("qwen3_5_think", {}, "<think>"),
        ("qwen3_5_think", NO_THINKING, ""),
        ("qwen3", {}, ""),
        ("llama3", {}, ""),
        ("smollm2", {}, ""),
    ],
)
def test_responses_that_begin_in_thoughts(name, kwargs, opened):
    assert opens_thoughts(encoder_of(published(name))[1], kwargs) == opened


# --- tool calls, the clock -------------------------------------------------------------------------------------------

LOADS = {"city": "Oslo", "days": None}
SHOWN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}{% for c in m.tool_calls %}[[%s]]"
SHOWN += "{% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
SHOWN += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
AS_JSON = SHOWN.replace("[[%s]]", "{{ c.function.name }}: {{ c.function.arguments | tojson }}")
BY_NAME = SHOWN.replace(
    "[[%s]]", "{{ c.function.name }}{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}"
)
AS_TEXT = SHOWN.replace("[[%s]]", "{{ c.function.name + ': ' + c.function.arguments }}")


@pytest.mark.parametrize("template", [AS_JSON, BY_NAME, *map(published, ("qwen2_5", "qwen3", "llama3_1", "glm4moe"))])
def test_a_calls_arguments_reach_the_template_as_an_object(template):
    """The oracle: transformers with the same call, its arguments an object."""
    encoder, tokenizer = encoder_of(template)
    with_object = {**CALL, "function": {**CALL["function"], "arguments": LOADS}}
    for before in ([user("Hi")], [user("Hi"), said("", tool_calls=[CALL]), {"role": "tool", "content": "rain"}]):
        theirs = [m | ({"tool_calls": [with_object]} if "tool_calls" in m else {}) for m in before]
        assert tokenizer.decode(encoder.encode_prompt(before, WHERE)) == given(tokenizer, theirs)
    if "glm" not in template and "[gMASK]" not in template:  # GLM sets no end token
        text = tokenizer.decode(encoder.encode([user("Hi")], [said("", tool_calls=[CALL])], WHERE).response_ids)
        start, whole = given(tokenizer, [user("Hi")]), [user("Hi"), said("", tool_calls=[with_object])]
        whole = tokenizer.apply_chat_template(whole, tokenize=False, date_string="26 Jul 2024")
        assert start + text == whole.replace("<think>\n\n</think>\n\n", "").rstrip("\n") and "\\" not in text


@pytest.mark.parametrize("template", [AS_TEXT, published("deepseekv3")])
def test_a_template_that_wants_a_calls_text_gets_it(template):
    encoder, tokenizer = encoder_of(template)
    text = tokenizer.decode(encoder.encode([user("Hi")], [said("", tool_calls=[CALL])], WHERE).response_ids)
    assert CALL["function"]["arguments"] in text


@pytest.mark.parametrize("arguments", ["", "[1]", "3", "none", '{"city": ', '"{}"'])
def test_what_is_no_object_stays(arguments):
    call = {"function": {"name": "weather", "arguments": arguments}}
    encoder, tokenizer = encoder_of(AS_JSON)
    text = tokenizer.decode(encoder.encode([user("Hi")], [said("", tool_calls=[call])], WHERE).response_ids)
    assert f"weather: {json.dumps(arguments)}" in text


def test_the_clock_of_templates_stands_still():
    asks = "{{ strftime_now('%d %b %Y') }} {{ strftime_now('%H:%M %A') }} " + CHATML
    encoder, tokenizer = encoder_of(asks)
    assert tokenizer.decode(encoder.encode_prompt([user("Hi")], WHERE)).startswith("26 Jul 2024 00:00 Friday <|im_st")
    # Others' templates go on by the clock
    assert str(datetime.date.today().year) in tokenizer.apply_chat_template([user("Hi")], tokenize=False)
    both = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    llama, tokenizer = encoder_of(published("llama3_2"))
    assert "Today Date: 26 Jul 2024" in tokenizer.decode(llama.encode_prompt([user("Hi")], WHERE))
    own, tokenizer = encoder_of(both + "{{ date_string }} " + CHATML, date_string="1 Jan 2000")
    assert tokenizer.decode(own.encode_prompt([user("Hi")], WHERE)).startswith("1 Jan 2000 ")
