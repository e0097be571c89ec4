"""What MAIN's two models are asked, and instructions read from the reverse model's answers."""

import json

import pytest

from lm_jax.data.supervised import SEED, SYNTHETIC
from lm_jax.errors import UserError
from main_jax.prompts import PromptConfig, Prompts, open_prompts
from main_jax.rounds.instructions import Fault, copy_rate, read_instruction
from tests.checkpoints import make_tokenizer

WORDS = {
    "format": "auto",
    "seed_system": "Seed.",
    "synthetic_system": "Web.",
    "reverse_system": "",
    "reverse_question": "Which instruction is answered by this?\n\n{response}",
    "forward_text": "{system}\n\nInstruction:\n{instruction}\n\nResponse:\n",
    "reverse_text": "{system}\n\nResponse:\n{response}\n\nInstruction:\n",
}
CONFIG = PromptConfig(**WORDS)
RESPONSE = "Rain is water that falls from clouds. It forms when drops grow heavy enough to fall to the ground."
NASTY = "a {response} {system} {{x}} \\1 {instruction}"


def test_messages():
    prompts = Prompts(CONFIG, "messages")
    assert prompts.forward("Why?", SEED) == [
        {"role": "system", "content": "Seed."},
        {"role": "user", "content": "Why?"},
    ]
    assert prompts.forward("Why?", SYNTHETIC)[0] == {"role": "system", "content": "Web."}
    assert prompts.reverse("So.") == [{"role": "user", "content": "Which instruction is answered by this?\n\nSo."}]
    assert prompts.no_instruction(SYNTHETIC) == [
        {"role": "system", "content": "Web."},
        {"role": "user", "content": ""},
    ]
    assert prompts.stop("forward") == prompts.stop("reverse") == ()
    with pytest.raises(KeyError):
        prompts.forward("Why?", "other")


def test_a_template_without_system_messages():
    prompts = Prompts(CONFIG, "messages", system=False)
    assert prompts.forward("Why?", SEED) == [{"role": "user", "content": "Seed.\n\nWhy?"}]
    assert prompts.reverse("So.")[0]["role"] == "user" and len(prompts.reverse("So.")) == 1


def test_text():
    prompts = Prompts(CONFIG, "text")
    assert prompts.forward("Why?", SEED) == "Seed.\n\nInstruction:\nWhy?\n\nResponse:\n"
    assert prompts.forward("Why?", SYNTHETIC) == "Web.\n\nInstruction:\nWhy?\n\nResponse:\n"
    assert prompts.no_instruction(SEED) == "Seed.\n\nInstruction:\n\n\nResponse:\n"
    assert prompts.reverse("So.") == "Response:\nSo.\n\nInstruction:\n"
    # A base model that runs on begins the template anew
    assert prompts.stop("forward") == ("\nInstruction:",) and prompts.stop("reverse") == ("\nResponse:",)


@pytest.mark.parametrize("format", ["messages", "text"])
def test_texts_come_out_as_they_went_in(format):
    prompts = Prompts(CONFIG, format)
    for prompt in (prompts.forward(NASTY, SEED), prompts.reverse(NASTY)):
        shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        assert shown.count(NASTY) == 1 and shown.count("{response}") == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "chat"}, "config.prompts.format='chat': must be auto, messages or text"),
        ({"forward_text": "{instruction}"}, "config.prompts.forward_text: has the markers {instruction}; it must have"),
        ({"reverse_question": "What?"}, "config.prompts.reverse_question: has the markers none"),
        ({"reverse_text": "{system}{response}{response}"}, "{system}, {response}, {response}; it must have {system}"),
        ({"reverse_question": "{response}{instruction}"}, "it must have {response}, each once"),
    ],
)
def test_faulty_words(change, says):
    with pytest.raises(UserError) as caught:
        PromptConfig(**{**WORDS, **change})
    assert says in str(caught.value)


def test_the_form_that_the_tokenizer_takes(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    assert open_prompts(CONFIG, tokenizer, "m") == Prompts(CONFIG, "messages", True)
    text = PromptConfig(**{**WORDS, "format": "text"})
    assert open_prompts(text, tokenizer, "m") == Prompts(text, "text", True)
    tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    assert open_prompts(CONFIG, tokenizer, "m") == Prompts(CONFIG, "messages", False)
    tokenizer.chat_template = None
    assert open_prompts(CONFIG, tokenizer, "m").format == "text"
    with pytest.raises(UserError, match="config.prompts.format='messages': the tokenizer of m has no chat template"):
        open_prompts(PromptConfig(**{**WORDS, "format": "messages"}), tokenizer, "m")


GOOD = "Explain how rain forms."


@pytest.mark.parametrize(
    ("answer", "finish", "expected"),
    [
        (GOOD, "stop", GOOD),
        (f"  \n{GOOD}\n\n", "stop", GOOD),
        (f"Instruction: {GOOD}", "stop", GOOD),
        (f"**Instruction:** {GOOD}", "stop", GOOD),
        (f"### Instruction\n{GOOD}", "stop", GOOD),
        (f"User: {GOOD}", "stop", GOOD),
        (f"The original question: {GOOD}", "stop", GOOD),
        (f"指令：{GOOD}", "stop", GOOD),
        (f'"{GOOD}"', "stop", GOOD),
        (f'Instruction: "{GOOD}"', "stop", GOOD),
        (f'"Instruction: {GOOD}"', "stop", GOOD),
        (f"“{GOOD}”", "stop", GOOD),
        (f"**{GOOD}**", "stop", GOOD),
        (f"```\n{GOOD}\n```", "stop", GOOD),
        (f"Sure! Here is the instruction:\n\n{GOOD}", "stop", GOOD),
        (f"Sure! Here is the instruction that it answers: {GOOD}\n\nLet me know if it fits!", "stop", GOOD),
        (f"A possible question for this response is: {GOOD}", "stop", GOOD),
        (f"The prompt that this text answers could be:\n{GOOD}", "stop", GOOD),
        (f"<think>Rain, so ...</think>\n{GOOD}", "stop", GOOD),
        (f"{GOOD}\n\nResponse:\n{RESPONSE}", "stop", GOOD),
        (f"{GOOD}\n\n**Answer:** Rain", "length", GOOD),  # ran on after it was complete
        (f"Instruction: {GOOD}\nOutput:\nRain is", "length", GOOD),
        # What belongs to the instruction stays
        ("Explain this:\n\n- rain\n- snow", "stop", "Explain this:\n\n- rain\n- snow"),
        ('What is "rain"?', "stop", 'What is "rain"?'),
        ("Question 3 of the exam: why does it rain?", "stop", "Question 3 of the exam: why does it rain?"),
        (
            "Write a plan for the task. Use this format:\nPart 1",
            "stop",
            "Write a plan for the task. Use this format:\nPart 1",
        ),
        ("什么是雨？请解释", "stop", "什么是雨？请解释"),
        # No instruction
        ("", "stop", Fault.EMPTY),
        ("  \n ", "stop", Fault.EMPTY),
        ("Instruction:", "stop", Fault.EMPTY),
        ("...", "stop", Fault.EMPTY),
        ("I'm sorry, but I cannot help with that.", "stop", Fault.REFUSAL),
        ("Explain how rain", "length", Fault.TRUNCATED),
        ("<think>Rain, so", "stop", Fault.TRUNCATED),
        ("Rain?", "stop", Fault.TOO_SHORT),
        ("Explain " + "very " * 199 + "well", "stop", Fault.TOO_LONG),
        ("Rain is water that falls from clouds.", "stop", Fault.COPY),
        ("Instruction: It forms when drops grow heavy enough to fall to the ground!", "stop", Fault.COPY),
    ],
)
def test_instructions_from_answers(answer, finish, expected):
    found = read_instruction(answer, RESPONSE, finish)
    assert found == expected and isinstance(found, Fault) == isinstance(expected, Fault)


def test_lengths_at_their_bounds():
    assert read_instruction("Explain rain now", RESPONSE) == "Explain rain now"
    assert isinstance(read_instruction("a " * 201, ""), Fault) and not isinstance(
        read_instruction("a " * 200, ""), Fault
    )


def test_copy_rate_by_hand():
    assert copy_rate("one two three four five six", "Zero ONE two, three four five!") == 0.5  # the first of two 5-grams
    assert copy_rate("one two three four", "one two three four") == 0  # none to be found
    assert copy_rate("a b c d e a b c d e", "a b c d e") == 1 / 5  # a set: a..e, b..a, c..b, d..c, e..d
    assert copy_rate("one two three four five", "five four three two one") == 0


def test_real_instructions_are_read_as_they_are(shared_data):
    """Answers often begin by saying the question again: that is no copy."""
    rows = json.loads((shared_data / "alpaca_en_demo.json").read_text())
    found = [read_instruction(row["instruction"], row["output"]) for row in rows]
    faults = [f for f in found if isinstance(f, Fault)]
    assert len(faults) <= 10 and set(faults) == {Fault.COPY}
    assert all(f == row["instruction"] for f, row in zip(found, rows, strict=True) if not isinstance(f, Fault))
    copies = [read_instruction(row["output"].split("\n")[0], row["output"]) for row in rows]
    assert not [c for c in copies if not isinstance(c, Fault) and copy_rate(c, c) == 1]
