"""What a model writes besides decompositions, read or dropped; and what is thrown out afterwards."""

import json
import random
import time

import pytest

from lm_jax.data.similarity import near_duplicates, similarity, tokens
from lm_jax.generation.refusals import is_refusal
from musc_jax.pairs.constraints import parse_decomposition, parse_self_instructed
from musc_jax.pairs.demonstrations import Demonstration
from musc_jax.pairs.drops import Drop
from musc_jax.pairs.filters import (
    instructions_fault,
    pair_fault,
    verdicts_fault,
)
from musc_jax.pairs.instructions import parse_constraint, parse_instruction, parse_verdicts
from musc_jax.pairs.prompts import numbered

CONSTRAINTS = ("Is it a tweet?", "Does it use two hashtags?", "Is it free of emoji?")
GOOD = "Write a tweet with **two** hashtags and no emoji."
NOTE = "The pump failed at 3 a.m.; nobody was hurt."
EXAMPLE = Demonstration("Write a poem about rain.", "", ("Is it a poem?", "Is it about rain?"))
AUTHORED = """You are a critic.

Task: review the film.

Example:
A dull film -> 2/10

Requirements:
- two sentences
- no spoilers"""
SQUARE = "Input: a number\nOutput: its square\nWrite such a function."


@pytest.mark.parametrize(
    ("answer", "finish", "expected"),
    [
        (GOOD, "stop", GOOD),
        (f"\n{GOOD}\n", "stop", GOOD),
        (f"Instruction:\n{GOOD}", "stop", GOOD),
        (f"**Instruction**: {GOOD}", "stop", GOOD),
        (f"## Combined Instruction\n\n{GOOD}", "stop", GOOD),
        (f"指令：{GOOD}", "stop", GOOD),
        (f"Sure! Here is the instruction:\n\n{GOOD}", "stop", GOOD),
        (f"Here's the combined instruction: {GOOD}\n\nLet me know if you want changes.", "stop", GOOD),
        (f"Based on the constraints, the instruction is:\n{GOOD}", "stop", GOOD),
        (f"好的，以下是指令：\n{GOOD}", "stop", GOOD),
        (f'"{GOOD}"', "stop", GOOD),
        (f"“{GOOD}”", "stop", GOOD),
        (f'Here is the instruction:\n\n"{GOOD}"\n\nI hope this helps!', "stop", GOOD),
        (f"```\n{GOOD}\n```", "stop", GOOD),
        (f"```markdown\nInstruction:\n{GOOD}\n```", "stop", GOOD),
        ("**Write a tweet without emoji.**", "stop", "Write a tweet without emoji."),
        (f"Constraints:\n{numbered(CONSTRAINTS)}\n\nInstruction:\n{GOOD}", "stop", GOOD),
        (f"{numbered(CONSTRAINTS)}\n\nInstruction: {GOOD}", "stop", GOOD),
        (f"\n{GOOD}\n\n###\n\nInput:\nNone\n\nConstraints:\n1. Is", "length", GOOD),
        (f"\n{GOOD}\n\nInput:\nNone\n\nConstraints:\n1. Is", "length", GOOD),
        (f"\n{GOOD}\n\nConstraints:\n1. Is it a poem?\n\nInstruction:\nWrite a", "length", GOOD),
        (f"<think>Hmm.\n\nInstruction: x</think>\n{GOOD}", "stop", GOOD),
        # Labels, lists, quotes and openings that belong to the instruction stay
        (AUTHORED, "stop", AUTHORED),
        (SQUARE, "stop", SQUARE),
        (f"###\nAnswer:\n{GOOD}", "stop", GOOD),
        (f"Instruction:\n\nInstruction:\n{GOOD}", "stop", GOOD),
        (f"Instruction:\n{AUTHORED}", "stop", AUTHORED),
        ("Here is a list: a, b, c. Sort it downwards.", "stop", "Here is a list: a, b, c. Sort it downwards."),
        (
            '"Yes" or "No": answer with one, always in "quotes"',
            "stop",
            '"Yes" or "No": answer with one, always in "quotes"',
        ),
        ("**Write** a tweet about **rain**", "stop", "**Write** a tweet about **rain**"),
        ("写一条不含表情的推文", "stop", "写一条不含表情的推文"),
        # Dropped
        ("", "stop", Drop.EMPTY),
        ("Instruction:\n", "stop", Drop.EMPTY),
        ("Write a tweet with two", "length", Drop.TRUNCATED),
        ("<think>Hmm", "stop", Drop.TRUNCATED),
        ("I'm sorry, but I cannot help with that request.", "stop", Drop.REFUSAL),
        ("对不起，我不能帮助你完成这个任务。", "stop", Drop.REFUSAL),
        ("Tweet!", "stop", Drop.TOO_SHORT),
        (numbered(CONSTRAINTS), "stop", Drop.ECHO),
        ("Constraints:\n" + "\n".join(f"- {c}" for c in CONSTRAINTS), "stop", Drop.ECHO),
        ("Write a poem about rain", "stop", Drop.ECHO),
    ],
)
def test_recombined_instructions(answer, finish, expected):
    assert parse_instruction(answer, CONSTRAINTS, None, [EXAMPLE], finish) == expected


def test_the_input_is_in_the_instruction_once_and_word_for_word():
    for answer in ("Rewrite the note as a tweet.", "Instruction:\nRewrite the note as a tweet."):
        assert parse_instruction(answer, CONSTRAINTS, NOTE) == f"Rewrite the note as a tweet.\n\n{NOTE}"
    for answer in (
        f"Rewrite as a tweet: {NOTE}",
        f"Rewrite as a tweet.\n\nInput:\n{NOTE}",
        f"Rewrite “{NOTE[:-1]}” as a tweet",
    ):
        assert parse_instruction(answer, CONSTRAINTS, NOTE) == answer
    # Short or without letters: only a word of its own counts
    assert parse_instruction("Describe the category in one line.", CONSTRAINTS, "cat").endswith("\n\ncat")
    assert parse_instruction("Describe the word cat in one line.", CONSTRAINTS, "cat").endswith("one line.")
    assert parse_instruction("Explain the operator in one line.", CONSTRAINTS, "?:").endswith("\n\n?:")


@pytest.mark.parametrize(
    ("answer", "finish", "expected"),
    [
        ("Is it a letter?", "stop", "Is it a letter?"),
        ("Opposite:\nIs it a letter?", "stop", "Is it a letter?"),
        ("**New constraint:** Is it a letter?", "stop", "Is it a letter?"),
        ("Constraint: Is it a letter?", "stop", "Is it a letter?"),
        ('Sure! Here is the opposite constraint:\n\n1. "Is it a letter?"\n\nLet me know!', "stop", "Is it a letter?"),
        ("\nIs it a letter?\n\n###\n\nConstraint:\nIs", "length", "Is it a letter?"),
        ("回答是否不是推文？", "stop", "回答是否不是推文？"),
        ("Is it a\nletter?", "stop", "Is it a letter?"),
        ("is it a  Tweet", "stop", Drop.ECHO),
        ("", "stop", Drop.EMPTY),
        ("Opposite:", "stop", Drop.EMPTY),
        ("No.", "stop", Drop.TOO_SHORT),
        ("Is it a", "length", Drop.TRUNCATED),
        ("1. Is it a letter?\n2. Is it a poem?", "stop", Drop.UNPARSABLE),
        ("Well, " * 100, "stop", Drop.UNPARSABLE),
        ("I cannot assist with that.", "stop", Drop.REFUSAL),
    ],
)
def test_negations(answer, finish, expected):
    assert parse_constraint(answer, "Is it a tweet?", finish) == expected


@pytest.mark.parametrize(
    ("answer", "finish", "expected"),
    [
        ("1. yes\n2. no\n3. yes", "stop", (True, False, True)),
        ("Answers:\n1. Yes\n2. No\n3. Yes", "stop", (True, False, True)),
        ("Yes\nNo\nYes", "stop", (True, False, True)),
        ("1) **Yes** - it says so\n2) **No**, nothing about it\n3) Yes.", "stop", (True, False, True)),
        ("1: yes\n2: no\n3: yes", "stop", (True, False, True)),
        ("1. yes 2. no 3. yes", "stop", (True, False, True)),
        (
            "1. Is it a tweet? Yes\n2. Does it use two hashtags? No\n3. Is it free of emoji? Yes.",
            "stop",
            (True, False, True),
        ),
        ("1. 是\n2. 否\n3. 是的", "stop", (True, False, True)),
        ("1. ✓\n2. ✗\n3. ✓", "stop", (True, False, True)),
        ("\n1. yes\n2. no\n3. yes\n\n###\n\nConstraints:\n1. Is", "length", (True, False, True)),
        ("1. yes\n2. no", "stop", Drop.UNPARSABLE),
        ("1. yes\n2. no\n3. yes\n4. yes", "stop", Drop.UNPARSABLE),
        ("1. yes\n2. perhaps\n3. yes", "stop", Drop.UNPARSABLE),
        ("1. yes\n2. notably\n3. yes", "stop", Drop.UNPARSABLE),
        ("All of them are there.", "stop", Drop.UNPARSABLE),
        ("1. yes\n2. n", "length", Drop.TRUNCATED),
        ("", "stop", Drop.EMPTY),
        ("Sorry, I can't help with that.", "stop", Drop.REFUSAL),
    ],
)
def test_verdicts(answer, finish, expected):
    assert parse_verdicts(answer, 3, finish) == expected


def test_lost_and_kept_constraints():
    assert verdicts_fault((True, True), (True, True)) is None
    assert verdicts_fault((True, False), (True, True)) is Drop.LOST_CONSTRAINT
    assert verdicts_fault((True, False), (True, False)) is None
    assert verdicts_fault((True, True), (True, False)) is Drop.KEPT_CONSTRAINT
    assert verdicts_fault((False, True), (True, False)) is Drop.LOST_CONSTRAINT


# Refusals

REFUSALS = [
    "I'm sorry, but I can't assist with that.",
    "I’m sorry, I cannot fulfill this request.",
    "I am sorry, but as an AI language model, I do not have access to that.",
    "Sorry, I can't help you with that.",
    "I apologize, but I cannot provide instructions for this.",
    "As an AI language model, I cannot generate such content.",
    "Unfortunately, I am unable to assist with this.",
    "I must decline this request.",
    "I won't be able to help with this.",
    "抱歉，我无法满足您的请求。",
    "对不起，这个问题我不能回答。",
    "作为一个人工智能语言模型，我无法提供该内容。",
    "Lo siento, pero no puedo ayudar con eso.",
    "Je suis désolé, mais je ne peux pas vous aider.",
    "Es tut mir leid, aber dabei kann ich nicht helfen.",
    "Desculpe, mas não posso ajudar.",
    "Mi dispiace, ma non posso aiutarti.",
    "Извините, но я не могу помочь с этим.",
    "申し訳ありませんが、そのご依頼にはお応えできません。",
    "죄송합니다. 그 요청은 도와드릴 수 없습니다.",
]
ANSWERS = [
    "I'm sorry, but I'm unable to come into work today.",
    "I'm sorry for the delay of your order, and I cannot thank you enough for your patience.",
    "As an AI, I can assist you in coming up with ideas.",
    "Dear customer, unfortunately we cannot accept returns after 30 days.",
    "Unfortunately, the museum is closed on Mondays.",
    "I cannot wait to see you!",
    "I can't believe it is Friday already.",
    "Sorry seems to be the hardest word.",
    "We are unable to confirm the rumour, said the minister.",
    "The user asked: I'm sorry, but I can't assist with that.",
    "对不起，我迟到了。",
    "Leider kann ich heute früher gehen.",
    "",
]


def test_refusals_are_seen_and_answers_are_not_taken_for_them():
    assert [text for text in REFUSALS if not is_refusal(text)] == []
    assert [text for text in ANSWERS if is_refusal(text)] == []
    assert is_refusal(f'\n"**{REFUSALS[0]}**"')


def test_refusals_among_real_answers(shared_data):
    rows = json.loads((shared_data / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    flagged = [row["output"] for row in rows if is_refusal(row["output"])]
    # 0.7%, and each of them says that it is a model which cannot do what was asked
    assert len(flagged) == 7 and all("AI language model" in text[:60] for text in flagged)
    responses = [json.loads(line) for line in (shared_data / "ifeval_responses_gpt4.jsonl").open(encoding="utf-8")]
    assert not any(is_refusal(row["response"]) for row in responses)
    pairs = json.loads((shared_data / "musc_tdpo_demo.json").read_text(encoding="utf-8"))
    assert not any(is_refusal(row[side]) for row in pairs for side in ("chosen", "rejected"))


def test_pairs_that_teach_nothing():
    assert pair_fault("a b", "a c") is None
    assert pair_fault(" ", "a") is Drop.EMPTY_RESPONSE and pair_fault("a", "\n") is Drop.EMPTY_RESPONSE
    assert pair_fault("a  b\n", "a b") is Drop.IDENTICAL_PAIR
    assert pair_fault("a b", REFUSALS[0]) is Drop.REFUSAL and pair_fault(REFUSALS[9], "a") is Drop.REFUSAL
    assert pair_fault("a", "b", rejected_finish="length") is Drop.TRUNCATED
    assert instructions_fault("Write it!", "write  it") is Drop.IDENTICAL_INSTRUCTIONS
    assert instructions_fault("Write it in 3 words.", "Write it in 4 words.") is None


# Near-duplicates


def brute_force(texts, threshold):
    """The same by comparing every text with every kept one, on plain sets of word trigrams."""

    def grams(text):
        words = tokens(text)
        return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}

    kept, found = [], []
    for i, text in enumerate(texts):
        mine = grams(text)
        match = next(
            (j for j, other in kept if 10 * len(mine & other) >= threshold * 10 * len(mine | other) - 1e-6), None
        )
        found.append(match)
        if match is None:
            kept.append((i, mine))
    return found


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 1.0])
def test_near_duplicates_equal_comparing_all_with_all(threshold):
    rng = random.Random(threshold)
    words = [f"w{i}" for i in range(30)]
    texts = ["", "!", "one", "One."]
    for _ in range(400):
        if rng.random() < 0.5:
            changed = rng.choice(texts).split()
            for _ in range(rng.randint(0, 3)):
                at = rng.randint(0, len(changed))
                changed[at : at + rng.randint(0, 1)] = rng.choices(words, k=rng.randint(0, 2))
            texts.append(" ".join(changed))
        else:
            texts.append(" ".join(rng.choices(words, k=rng.randint(1, 30))))
    found = near_duplicates(texts, threshold)
    assert found == brute_force(texts, threshold)
    assert sum(match is not None for match in found) > 20


def test_the_threshold_itself_is_near_enough():
    long = "a b c d e f g h i j k l"
    assert near_duplicates([long, "a b c d e f g h i"], 0.7) == [None, 0]  # 7 of 10 trigrams
    assert near_duplicates([long, "a b c d e f g h i"], 0.71) == [None, None]
    words = [f"w{i}" for i in range(27)]
    assert near_duplicates([" ".join(words), " ".join(words[:16])], 0.56) == [None, 0]  # 14 of 25
    assert near_duplicates([]) == []
    with pytest.raises(ValueError, match="threshold"):
        near_duplicates([long], 0)


def test_near_duplicates_among_real_instructions(shared_data):
    texts = [json.loads(line)["prompt"] for line in (shared_data / "ifeval_prompts.jsonl").open(encoding="utf-8")]
    texts += [row["prompt"] for row in json.loads((shared_data / "cfbench.json").read_text(encoding="utf-8"))[:200]]
    assert near_duplicates(texts) == brute_force(texts, 0.7)
    # Case, spaces and punctuation make no difference, in any script
    again = near_duplicates(texts + [f"  {text.upper()} !" for text in texts])[len(texts) :]
    assert None not in again


def test_near_duplicates_do_not_compare_all_pairs():
    rng = random.Random(0)
    words = [f"word{i}" for i in range(3000)]
    head = "Please write a short text in plain words that meets the following requirements, namely:"
    texts = [f"{head} {' '.join(rng.choices(words, k=25))}" for _ in range(20_000)]  # all begin alike
    started = time.process_time()
    assert near_duplicates(texts).count(None) == len(texts)
    assert time.process_time() - started < 60  # all pairs would take over ten minutes


def test_similarity_and_tokens():
    assert tokens("Ｗrite 3 poems, 写诗 now!") == ["write", "3", "poems", "写", "诗", "now"]
    assert similarity("a b c", "A, B!") == pytest.approx(2 / 3)
    assert (similarity("", "!"), similarity("", "a"), similarity("写诗", "写书")) == (1.0, 0.0, pytest.approx(1 / 3))


def test_no_answer_breaks_or_stalls_a_parser():
    rng = random.Random(5)
    pieces = [
        "1. ",
        "- ",
        "**",
        "\n",
        "\n\n",
        "```",
        "|",
        "---",
        ":",
        "Input:",
        "Constraints:",
        "Instruction:",
        " ",
        "###",
        "a?",
        '"',
    ]
    pieces += [
        "<think>",
        "</think>",
        "[",
        "{",
        "①",
        "一、",
        "(",
        "#",
        "\t",
        "yes",
        "is it good?",
        "I'm sorry",
        "\u2028",
        "\0",
        "😀",
    ]
    answers = ["".join(rng.choices(pieces, k=rng.randint(1, 40))) for _ in range(3000)]
    answers += [piece * 20_000 for piece in pieces] + [f"{piece} x\n" * 5_000 for piece in pieces] + ["[" * 100_000]
    started = time.process_time()
    for answer in answers:
        finish = rng.choice(["stop", "length"])
        read = parse_decomposition(answer, GOOD, finish)
        assert isinstance(read, Drop) or (len(read.constraints) >= 2 and all(read.constraints))
        read = parse_self_instructed(answer, finish)
        assert isinstance(read, Drop) or read.instruction.strip()
        for text in (
            parse_instruction(answer, CONSTRAINTS, None, [EXAMPLE], finish),
            parse_constraint(answer, "x y", finish),
        ):
            assert isinstance(text, Drop) or text.strip() == text != ""
        read = parse_verdicts(answer, 2, finish)
        assert isinstance(read, Drop) or len(read) == 2
    assert time.process_time() - started < 120
