"""From a model's answer to constraints, and from constraints to perturbed ones."""

import json
import random
import unicodedata

import pytest

from lm_jax.data.similarity import similarity
from lm_jax.errors import UserError
from musc_jax.draws import shuffled, uniform
from musc_jax.pairs.constraints import (
    MAX_CONSTRAINTS,
    Decomposition,
    SelfInstructed,
    folded,
    merged,
    parse_decomposition,
    parse_self_instructed,
)
from musc_jax.pairs.drops import Drop
from musc_jax.pairs.perturb import SIMILAR, Edit, Kind, Perturbation, PerturbConfig, Pool, perturb
from musc_jax.pairs.prompts import decompose, negate, numbered, recombine

NOTE = "The pump failed at 3 a.m.; nobody was hurt."
INSTRUCTION = f"Rewrite the note below as a tweet. Use **two** hashtags and no emoji.\n\n{NOTE}"
TWEET, TAGS, EMOJI = "Is it a tweet?", "Does it use two hashtags?", "Is it free of emoji?"
ALL = (TWEET, TAGS, EMOJI)

# (manner, answer, finish reason, what comes out); INSTRUCTION is what was asked about
MANNERS = [
    ("as asked", f"Constraints:\n{numbered(ALL)}\n\nInput:\n{NOTE}", "stop", Decomposition(ALL, NOTE)),
    ("after the raw label", f"\n{numbered(ALL)}\n\nInput:\nNone", "stop", Decomposition(ALL)),
    (
        "talkative",
        f"Sure! Here are the constraints:\n\n{numbered(ALL)}\n\n**Input:** None\n\nLet me know if you need more!",
        "stop",
        Decomposition(ALL),
    ),
    (
        "closing without a blank line",
        f"{numbered(ALL)}\nI hope this helps! Feel free to ask for more.",
        "stop",
        Decomposition(ALL),
    ),
    (
        "bold, with an input that is followed by chat",
        f"## Constraints\n\n1. **{TWEET}**\n2. **{TAGS}**\n**3.** {EMOJI}\n\n## Input\n\n{NOTE}\n\nLet me know.",
        "stop",
        Decomposition(ALL, NOTE),
    ),
    (
        "bold titles before the text",
        "1. **Form:** Is it a tweet?\n2. **Tags** - exactly two?\n",
        "stop",
        Decomposition(("Form: Is it a tweet?", "Tags - exactly two?")),
    ),
    (
        "items over several lines",
        "1. Is it\n   a tweet?\n2. Does it use\ntwo hashtags?\n\n   3. Is it free\n      of emoji?",
        "stop",
        Decomposition(ALL),
    ),
    (
        "number and text on lines of their own",
        f"Constraint 1:\n{TWEET}\n\nConstraint 2:\n{TAGS}",
        "stop",
        Decomposition(ALL[:2]),
    ),
    ("a code fence", f"```text\n{numbered(ALL)}\n```", "stop", Decomposition(ALL)),
    (
        "JSON",
        f'```json\n{{"constraints": ["{TWEET}", "{TAGS}"], "input": "{NOTE}"}}\n```',
        "stop",
        Decomposition(ALL[:2], NOTE),
    ),
    ("a bare JSON list", f'["{TWEET}", "{TAGS}"]', "stop", Decomposition(ALL[:2])),
    ("questions without any marker", "\n".join(ALL), "stop", Decomposition(ALL)),
    ("all on one line", f"1. {TWEET} 2. {TAGS} 3. {EMOJI}", "stop", Decomposition(ALL)),
    (
        "groups with titles",
        "1. Format\n   - Is it a tweet?\n   - Does it use two hashtags?\n2. **Style**\n   * Is it free of emoji?",
        "stop",
        Decomposition(ALL),
    ),
    (
        "groups under headings",
        f"### Format\n1. {TWEET}\n2. {TAGS}\n\n### Style\n1. {EMOJI}",
        "stop",
        Decomposition(ALL),
    ),
    (
        "sub-items that make no sense alone",
        f"1. {TWEET}\n2. Does it name the following?\n   a) pump\n   b) time\n3. {EMOJI}",
        "stop",
        Decomposition((TWEET, "Does it name the following? pump; time", EMOJI)),
    ),
    (
        "nested numbers that start anew",
        f"1. {TWEET}\n2. Does it contain these?\n    1. two hashtags\n    2. the time\n3. {EMOJI}",
        "stop",
        Decomposition((TWEET, "Does it contain these? two hashtags; the time", EMOJI)),
    ),
    ("dotted numbers", f"1. Form\n1.1 {TWEET}\n1.2 {TAGS}\n2. {EMOJI}", "stop", Decomposition(ALL)),
    ("checkboxes", f"- [ ] {TWEET}\n- [x] {TAGS}", "stop", Decomposition(ALL[:2])),
    ("repeats", f"1. {TWEET}\n2. {TAGS}\n3. is it a tweet\n4. {TAGS}", "stop", Decomposition(ALL[:2])),
    (
        "the input as one more item",
        f"1. {TWEET}\n2. {TAGS}\n3. Input: None",
        "stop",
        Decomposition(ALL[:2]),
    ),
    ("the input as a bullet", f"- {TWEET}\n- {TAGS}\n- **Input:** {NOTE}", "stop", Decomposition(ALL[:2], NOTE)),
    ("the input first", f"**Input**: {NOTE}\n\n**Constraints**:\n{numbered(ALL)}", "stop", Decomposition(ALL, NOTE)),
    (
        "the input quoted and its punctuation lost",
        f'{numbered(ALL)}\n\nInput: "the pump failed at 3 a.m; nobody was hurt"',
        "stop",
        Decomposition(ALL, NOTE),
    ),
    (
        "no input, explained",
        f"{numbered(ALL)}\n\nInput:\nNone (the instruction brings no material)",
        "stop",
        Decomposition(ALL),
    ),
    (
        "the instruction again, with a list in it",
        f"Instruction:\n1. Rewrite it.\n2. Add tags.\n\nConstraints:\n{numbered(ALL)}",
        "stop",
        Decomposition(ALL),
    ),
    (
        "a base model running on",
        f"\n{numbered(ALL)}\n\nInput:\nNone\n\n###\n\nInstruction:\nWrite.\n\nConstraints:\n1. Is it a poem?\n2. Is",
        "length",
        Decomposition(ALL),
    ),
    (
        "running on without separator",
        f"\n{numbered(ALL)}\n\nInput:\n{NOTE}\n\nInstruction: Write a poem.\nConstraints:\n1. Is it a poem?\n2. Is",
        "length",
        Decomposition(ALL, NOTE),
    ),
    (
        "running on right after the list",
        f"{numbered(ALL)}\n\n**Example 2:**\n1. Is it a poem?\n2. Is it sad?",
        "stop",
        Decomposition(ALL),
    ),
    ("thoughts first", f"<think>\n1. hmm\n2. well\n</think>\n\n{numbered(ALL)}", "stop", Decomposition(ALL)),
    (
        "Chinese",
        "好的，以下是约束条件：\n\n约束：\n一、回答是否为推文？\n二、是否包含两个标签？\n三、是否没有表情符号？\n\n输入：无",
        "stop",
        Decomposition(("回答是否为推文？", "是否包含两个标签？", "是否没有表情符号？")),
    ),
    (
        "Chinese, more tightly",
        "1、回答是否为推文？\n2、是否包含\n两个标签？\n如需更多帮助，请告诉我。",
        "stop",
        Decomposition(("回答是否为推文？", "是否包含 两个标签？")),
    ),
    (
        "Spanish",
        "Restricciones:\n1. ¿Es un tuit?\n2. ¿Usa dos etiquetas?\n\nEntrada: ninguna",
        "stop",
        Decomposition(("¿Es un tuit?", "¿Usa dos etiquetas?")),
    ),
    (
        "statements",
        "* It is a tweet.\n* It uses two hashtags.",
        "stop",
        Decomposition(("It is a tweet.", "It uses two hashtags.")),
    ),
    ("Windows line ends", "1. Is it a tweet?\r\n2. Does it use two hashtags?\r\n", "stop", Decomposition(ALL[:2])),
    # Dropped, each with its reason
    ("nothing", " \n\t", "stop", Drop.EMPTY),
    ("only thoughts", "<think>\nThe instruction asks", "length", Drop.TRUNCATED),
    ("cut off", f"1. {TWEET}\n2. {TAGS}\n3. Is it", "length", Drop.TRUNCATED),
    ("a refusal", "I'm sorry, but I can't help with that.", "stop", Drop.REFUSAL),
    ("a refusal with a list", f"I cannot assist with this request. Try:\n{numbered(ALL)}", "stop", Drop.REFUSAL),
    ("a refusal in Chinese", "抱歉，我无法处理这个请求。", "stop", Drop.REFUSAL),
    ("one constraint", f"1. {TWEET}\n\nInput:\nNone", "stop", Drop.TOO_FEW_CONSTRAINTS),
    ("one constraint, repeated", "\n".join(f"{n}. {TWEET}" for n in range(1, 60)), "stop", Drop.TOO_FEW_CONSTRAINTS),
    ("prose", "The tweet has to use two hashtags, and there must not be any emoji in it.", "stop", Drop.UNPARSABLE),
    ("the task carried out", "Pump failed at 3 a.m. Nobody hurt. #pump #night", "stop", Drop.UNPARSABLE),
    (
        "a table",
        "| # | Constraint |\n|---|---|\n| 1 | Is it a tweet? |\n| 2 | Two hashtags? |",
        "stop",
        Drop.UNPARSABLE,
    ),
    ("the task carried out, with a list", f"{'The pump failed. ' * 20}\n\n1. pump\n2. night", "stop", Drop.UNPARSABLE),
    ("JSON of another kind", '{"a": 1}', "stop", Drop.UNPARSABLE),
    (
        "no end of constraints",
        "\n".join(f"{n}. Does it mention item {n}?" for n in range(1, MAX_CONSTRAINTS + 2)),
        "stop",
        Drop.TOO_MANY_CONSTRAINTS,
    ),
    ("an input that nobody gave", f"{numbered(ALL)}\n\nInput:\nThe pump ran well.", "stop", Drop.INVENTED_INPUT),
    ("the instruction as input", f"{numbered(ALL)}\n\nInput:\n{INSTRUCTION}", "stop", Drop.ECHO),
]


@pytest.mark.parametrize(("answer", "finish", "expected"), [m[1:] for m in MANNERS], ids=[m[0] for m in MANNERS])
def test_every_manner_of_answering(answer, finish, expected):
    assert parse_decomposition(answer, INSTRUCTION, finish) == expected


def test_the_manners_cover_every_reason_to_drop_a_decomposition():
    seen = {expected for *_, expected in MANNERS if isinstance(expected, Drop)}
    assert seen == {
        *(Drop.EMPTY, Drop.TRUNCATED, Drop.REFUSAL, Drop.UNPARSABLE, Drop.TOO_FEW_CONSTRAINTS),
        *(Drop.TOO_MANY_CONSTRAINTS, Drop.INVENTED_INPUT, Drop.ECHO),
    }
    assert sum(not isinstance(expected, Drop) for *_, expected in MANNERS) > 10


HAN = "一二三四五六七八九十"
STYLES = {
    "1.": lambda n, t: f"{n}. {t}",
    "1)": lambda n, t: f"{n}) {t}",
    "(1)": lambda n, t: f"({n}) {t}",
    "[1]": lambda n, t: f"[{n}] {t}",
    "1:": lambda n, t: f"{n}: {t}",
    "1、": lambda n, t: f"{n}、{t}",
    "（1）": lambda n, t: f"（{n}）{t}",
    "full width": lambda n, t: "".join(chr(ord(d) + 0xFEE0) for d in str(n)) + f"．{t}",
    "##1.": lambda n, t: f"##{n}. {t}",
    "### 1.": lambda n, t: f"### {n}. {t}",
    "**1.**": lambda n, t: f"**{n}.** {t}",
    "> 1.": lambda n, t: f"> {n}. {t}",
    "Constraint 1:": lambda n, t: f"Constraint {n}: {t}",
    "**Constraint 1:**": lambda n, t: f"**Constraint {n}:** {t}",
    "1. Constraint 1:": lambda n, t: f"{n}. Constraint {n}: {t}",
    "约束1：": lambda n, t: f"约束{n}：{t}",
    "Q1.": lambda n, t: f"Q{n}. {t}",
    "- 1.": lambda n, t: f"- {n}. {t}",
    "-": lambda n, t: f"- {t}",
    "*": lambda n, t: f"* {t}",
    "+": lambda n, t: f"+ {t}",
    "•": lambda n, t: f"• {t}",
    "•, glued": lambda n, t: f"•{t}",
    "- [ ]": lambda n, t: f"- [ ] {t}",
    "circled": lambda n, t: f"{chr(0x2460 + n - 1)} {t}",
    "circled, glued": lambda n, t: f"{chr(0x2460 + n - 1)}{t}",
    "black circles": lambda n, t: f"{chr(0x2776 + n - 1)} {t}" if n <= 10 else f"{chr(0x24EB + n - 11)} {t}",
    "in parentheses": lambda n, t: f"{chr(0x2474 + n - 1)} {t}",
    "keycaps": lambda n, t: f"{n}\ufe0f\u20e3 {t}" if n < 10 else f"{n}. {t}",
    "a.": lambda n, t: f"{chr(96 + n)}. {t}",
    "(A)": lambda n, t: f"({chr(64 + n)}) {t}",
    "一、": lambda n, t: f"{han(n)}、{t}",
    "第1条：": lambda n, t: f"第{n}条：{t}",
    "indented": lambda n, t: f"   {n}. {t}",
    "1\\.": lambda n, t: f"{n}\\. {t}",
}
ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789",
    "回答是否包含三个标题并且不超过字数限制",
    "абвгдежзиклмнопрстуфхцчшщыэюя",
    "אבגדהוזחטיכלמנסעפצקרשת",
    "ابتثجحخدذرزسشصضطظعغفقكلمنهوي",
    "กขคงจชซญดตถทธนบปผพมยรลวสหอ",
    "あいうえおかきくけこアイウエオ",
    "가나다라마바사아자차카타파하",
    "αβγδεζηθικλμνξοπρστυφχψω",
    "éèêëñçßøåæœžłđ",
    "😀🎉🚀≤≥×÷€",
)
INNER = [
    "**bold**",
    "{constraints}",
    '"quoted"',
    "(in brackets)",
    "a: b",
    "3.5",
    "x_y",
    "`code`",
    "50%",
    "#tag",
    "- dash",
]


def han(n):
    return HAN[n - 1] if n <= 10 else "十" + HAN[n - 11] if n < 20 else "二十"


def random_text(rng):
    """One line of words in random scripts, with marks inside of it; it begins with a letter and ends as one."""
    words = ["".join(rng.choices(rng.choice(ALPHABETS[:-1]), k=rng.randint(2, 9)))]
    for _ in range(rng.randint(3, 12)):
        pool = rng.choice(ALPHABETS)
        words.append(rng.choice(INNER) if rng.random() < 0.2 else "".join(rng.choices(pool, k=rng.randint(1, 8))))
    words[0] = "X" + words[0] if words[0][0].isdigit() or words[0][0] in HAN else words[0]
    return " ".join(words) + rng.choice(["?", "？", ".", "。", ""])


@pytest.mark.parametrize("style", STYLES)
def test_any_text_in_any_style_of_numbering_comes_back(style):
    rng = random.Random(style)
    for trial in range(200):
        texts = merged(random_text(rng) for _ in range(rng.randint(2, 15)))
        lines = [STYLES[style](n, t) for n, t in enumerate(texts, 1)]
        gap = rng.choice(["\n", "\n\n"])
        answer = rng.choice(["", "Constraints:\n", "Here are the constraints:\n\n"]) + gap.join(lines)
        answer += rng.choice(["", "\n\nInput:\nNone", "\n\nLet me know if you need anything else."])
        assert parse_decomposition(answer) == Decomposition(texts), (trial, answer)


def test_merging_keeps_the_first_and_what_differs_in_symbols():
    assert merged(["Is x < 5?", "is  X<5", "Is x > 5?", "Ｉs x > 5", "…", "!"]) == ("Is x < 5?", "Is x > 5?", "…", "!")
    assert folded("Ünïcode, Ａ＋b!") == "ünïcodea+b"


def test_an_examples_constraints_are_no_answer_to_another_instruction(shipped):
    answer, task = numbered(shipped[3].constraints), shipped[3].task
    assert parse_decomposition(answer, "Write a poem.", "stop", shipped) is Drop.ECHO
    assert parse_decomposition(answer, task, "stop", shipped).constraints == shipped[3].constraints
    assert parse_decomposition(numbered(ALL), "Write a poem.", "stop", shipped) == Decomposition(ALL)
    own = f"Constraints:\n{numbered(ALL)}\n\nInstruction:\n"
    assert parse_self_instructed(own + task, "stop", shipped) is Drop.ECHO
    assert parse_self_instructed(own + "Write a tweet.", "stop", shipped) == SELF


def test_an_input_with_lines_that_look_like_labels_stays_whole():
    source = "Question: why?\nInstruction: none\n\nExample 2:\n1. a\n\nLet me know."
    instruction = f"Answer it in one line, in rhyme.\n\n{source}"
    answer = f"Constraints:\n{numbered(ALL)}\n\nInput:\n{source}"
    assert parse_decomposition(answer, instruction) == Decomposition(ALL, source)
    # Without the instruction nothing says that these lines belong to it
    assert parse_decomposition(answer).input == "Question: why?"


def test_an_input_of_code_keeps_its_brackets():
    code = "def f(x):\n    return {x: [1]}"
    instruction = f"Explain this code in two sentences:\n{code}\n"
    for given in (f"```python\n{code}\n```", code, code.replace("    ", "  "), f'"{code}"'):
        assert parse_decomposition(f"{numbered(ALL)}\n\nInput:\n{given}", instruction).input == code


SELF = SelfInstructed("Write a tweet.", Decomposition(ALL))


@pytest.mark.parametrize(
    ("answer", "finish", "expected"),
    [
        (f"Constraints:\n{numbered(ALL)}\n\nInstruction:\nWrite a tweet.", "stop", SELF),
        (f"\n{numbered(ALL)}\n\n**Instruction:**\nWrite a tweet.\n\nLet me know!", "stop", SELF),
        (f"Sure!\n\n## Constraints\n{numbered(ALL)}\n\n## Task\nWrite a tweet.", "stop", SELF),
        (f"Instruction: Write a tweet.\n\nConstraints:\n{numbered(ALL)}", "stop", SELF),
        (
            f"\n{numbered(ALL)}\n\nInstruction:\nWrite a tweet.\n\n###\n\nNumber of constraints: 4\n\nConstr",
            "length",
            SELF,
        ),
        (f"\n{numbered(ALL)}\n\nInstruction:\nWrite a tweet.\n\nNumber of constraints: 4", "stop", SELF),
        (
            f"\n{numbered(ALL)}\n\nInstruction:\nWrite a tweet.\n\nConstraints:\n1. Is it?\n\nInstruction:\nA poem",
            "length",
            SELF,
        ),
        (
            f"Constraints:\n{numbered(ALL)}\n\nInstruction:\nWrite a tweet.\n\nInput:\n{NOTE}",
            "stop",
            SelfInstructed(f"Write a tweet.\n\nInput:\n{NOTE}", Decomposition(ALL)),
        ),
        (
            f"\n{numbered(ALL)}\n\nInstruction:\nWrite a tweet.\n\nRequirements:\n- two hashtags\n- no emoji",
            "stop",
            SelfInstructed("Write a tweet.\n\nRequirements:\n- two hashtags\n- no emoji", Decomposition(ALL)),
        ),
        (f"Constraints:\n{numbered(ALL)}\n\nInstruction:\nWrite a", "length", Drop.TRUNCATED),
        (f"Constraints:\n{numbered(ALL)}\n\nInstruction:\n", "stop", Drop.UNPARSABLE),
        (numbered(ALL), "stop", Drop.UNPARSABLE),
        ("Instruction: Write a tweet.", "stop", Drop.UNPARSABLE),
        (f"1. {TWEET}\n\nInstruction: Write a tweet.", "stop", Drop.TOO_FEW_CONSTRAINTS),
        ("", "stop", Drop.EMPTY),
        ("I can't assist with that.", "stop", Drop.REFUSAL),
    ],
)
def test_self_instructed_tasks(answer, finish, expected):
    assert parse_self_instructed(answer, finish) == expected


# Perturbation

MIXED = PerturbConfig(drop=0.5, substitute=0.25, negate=0.25, seed=3)


def row_constraints(rng, name):
    return tuple(f"Does {name} mention {' '.join(rng.sample(WORDS, 3))}?" for _ in range(rng.randint(2, 12)))


WORDS = [
    f"{a}{b}" for a in ("amber", "birch", "cedar", "drift", "ember", "frost") for b in ("ly", "ton", "ward", "set")
]


def test_ten_thousand_perturbations_touch_what_they_should_as_often_as_they_should():
    rng = random.Random(0)
    rows = {f"row {i}": row_constraints(rng, f"text {i}") for i in range(10_000)}
    pool = Pool(rows)
    planned = dict.fromkeys(Kind, 0)
    agree = []  # whether the first two touched constraints of a row met the same fate
    touched_at = {}  # number of constraints -> how often each place was touched
    for row_id, constraints in rows.items():
        made = perturb(constraints, row_id, MIXED, pool)
        n = len(constraints)
        touched = [edit.index for edit in made.edits if edit.planned is not Kind.KEPT]
        assert 0 not in touched and len(touched) == max(1, round(0.3 * n)) and made.edits[0].new == constraints[0]
        assert [edit.old for edit in made.edits] == list(constraints)
        agree += [made.edits[touched[0]].planned is made.edits[touched[1]].planned] if len(touched) > 1 else []
        for edit in made.edits:
            planned[edit.planned] += edit.index in touched
            assert edit.kind is edit.planned  # nothing fell back to a drop
            touched_at.setdefault(n, [0] * n)[edit.index] += edit.index in touched
            if edit.kind is Kind.SUBSTITUTED:
                assert edit.new not in constraints
                assert all(similarity(edit.new, own) < SIMILAR for own in constraints)
    total = sum(planned.values())
    expected = {Kind.DROPPED: 0.5 * total, Kind.SUBSTITUTED: 0.25 * total, Kind.NEGATED: 0.25 * total}
    assert planned[Kind.KEPT] == 0 and total > 10_000
    assert sum((planned[kind] - e) ** 2 / e for kind, e in expected.items()) < 13.82  # chi-squared, 2 degrees, p 0.001
    same = 0.5**2 + 0.25**2 + 0.25**2  # drawn apart from each other
    assert abs(sum(agree) - same * len(agree)) < 4 * (same * (1 - same) * len(agree)) ** 0.5 and len(agree) > 2000
    for counts in touched_at.values():  # no place is favoured: 4.5 standard deviations for each of 77 places
        mean = sum(counts) / (len(counts) - 1)
        assert all(abs(count - mean) < 4.5 * mean**0.5 for count in counts[1:])


def test_a_perturbation_depends_on_seed_and_row_id_alone():
    rng = random.Random(1)
    rows = {str(i): row_constraints(rng, f"text {i}") for i in range(200)}
    pool, again = Pool(rows), Pool(dict(reversed(rows.items())))
    made = [perturb(c, i, MIXED, pool) for i, c in rows.items()]
    assert made == [perturb(c, i, MIXED, again) for i, c in reversed(rows.items())][::-1]
    other = PerturbConfig(drop=0.5, substitute=0.25, negate=0.25, seed=4)
    assert sum(a != perturb(c, i, other, pool) for a, (i, c) in zip(made, rows.items(), strict=True)) > 100
    assert uniform(1, "row", 2) == 0.8072490650313718  # the same on every machine and in every version
    assert sorted(shuffled("abcdef", 5)) == list("abcdef") != shuffled("abcdef", 5)
    assert uniform("1", "23") != uniform("12", "3") and uniform(1) != uniform("1")


def test_substituted_and_negated_constraints_reach_the_recombination_prompt(shipped):
    rng = random.Random(2)
    rows = {str(i): row_constraints(rng, f"text {i}") for i in range(300)}
    pool = Pool(rows)
    seen = dict.fromkeys(Kind, 0)
    for row_id, constraints in rows.items():
        planned = perturb(constraints, row_id, MIXED, pool)
        for edit in planned.pending:
            assert negate(edit.old).question.endswith(edit.old)
        made = planned.resolve({edit.index: f"Never: {edit.old}" for edit in planned.pending})
        full = recombine(constraints, None, shipped)
        perturbed = recombine(made.constraints, None, shipped)
        assert full.turns == perturbed.turns and full.messages()[:-1] == perturbed.messages()[:-1]
        lines = [line.partition(". ")[2] for line in perturbed.question.split("\n") if line[:1].isdigit()]
        assert lines == list(made.constraints)
        for edit in made.edits:
            seen[edit.kind] += 1
            assert (edit.old in lines) == (edit.kind is Kind.KEPT)
            assert edit.kind is Kind.DROPPED or edit.new in lines
        assert made.kept == tuple(c in lines for c in constraints)
    assert min(seen.values()) > 30


def test_drop_only_is_the_default():
    made = [perturb(ALL, str(i)) for i in range(100)]
    assert {edit.kind for m in made for edit in m.edits} == {Kind.KEPT, Kind.DROPPED}
    assert {m.constraints for m in made} == {(TWEET, TAGS), (TWEET, EMOJI)}
    assert perturb((TWEET, TAGS), "x").constraints == (TWEET,)
    assert perturb(ALL, "x", PerturbConfig(ratio=1.0)).constraints == (TWEET,)


def test_a_negation_that_changes_nothing_becomes_a_drop():
    plan = perturb(ALL, "x", PerturbConfig(drop=0, negate=1.0, ratio=1.0))
    with pytest.raises(ValueError, match="waits for its negation"):
        _ = plan.constraints
    with pytest.raises(KeyError):
        plan.resolve({1: "something"})
    made = plan.resolve({1: None, 2: "Does it use emoji?"})
    assert made.edits == (
        Edit(0, Kind.KEPT, TWEET, TWEET, Kind.KEPT),
        Edit(1, Kind.DROPPED, TAGS, None, Kind.NEGATED),
        Edit(2, Kind.NEGATED, EMOJI, "Does it use emoji?", Kind.NEGATED),
    )
    assert made.constraints == (TWEET, "Does it use emoji?") and made.kept == (True, False, False)
    assert plan.resolve({1: "does it use two hashtags", 2: f" {TAGS}"}).constraints == (TWEET,)
    assert Perturbation.from_rows(made.rows()) == made
    assert made.rows()[1] == {"index": 1, "kind": "dropped", "old": TAGS, "new": None, "planned": "negated"}


def test_no_substitute_that_fits_becomes_a_drop():
    config = PerturbConfig(drop=0, substitute=1.0, ratio=1.0)
    unfit = {
        "mine": ALL,
        "near": ("A task", "Does it use two long hashtags?"),  # nearly the row's own
        "task": ("Does the poem rhyme?",),  # another row's task
        "script": ("任务", "通知的语气是否亲切？"),  # another script
    }
    made = perturb(ALL, "mine", config, Pool(unfit))
    assert [(e.kind, e.planned) for e in made.edits[1:]] == [(Kind.DROPPED, Kind.SUBSTITUTED)] * 2
    fit = Pool({**unfit, "fit": ("A task", "Does the reply mention Lisbon?")})
    made = perturb(ALL, "mine", config, fit)
    # One fits, and it is used once
    assert sorted(e.kind for e in made.edits[1:]) == [Kind.DROPPED, Kind.SUBSTITUTED]
    assert "Does the reply mention Lisbon?" in made.constraints
    assert len(fit) == 5 and len(Pool.of(["Are names fictional?"])) == 1
    assert perturb(ALL, "", config, Pool.of(["Are names fictional?"])).constraints.count("Are names fictional?") == 1


def test_settings_that_make_no_sense():
    for wrong in ({"drop": 0.5}, {"ratio": 1.5}, {"drop": 1.5, "substitute": -0.5}):
        with pytest.raises(UserError, match=r"^config\.perturb") as caught:
            PerturbConfig(**wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="fewer|nothing but the task"):
        perturb((TWEET,), "x")
    with pytest.raises(ValueError, match="pool"):
        perturb(ALL, "x", MIXED)


def test_real_constraints_come_back_in_any_style(examples):
    for style in STYLES.values():
        for example in examples:
            lines = "\n".join(style(n, text) for n, text in enumerate(example.constraints, 1))
            assert parse_decomposition(lines) == Decomposition(merged(example.constraints)), lines


def test_responses_are_rarely_taken_for_decompositions(shared_data):
    rows = [json.loads(line) for line in (shared_data / "ifeval_responses_gpt4.jsonl").open(encoding="utf-8")]
    read = [parse_decomposition(row["response"], row["prompt"]) for row in rows]
    taken = [r for r in read if isinstance(r, Decomposition)]
    # Those that are hardly more than a list: nothing in their form tells them from constraints
    assert len(taken) < 0.25 * len(rows) and read.count(Drop.UNPARSABLE) > 0.7 * len(rows)


def test_real_decompositions_come_back_from_their_own_rendering(examples):
    for example in examples:
        answer = decompose("", [example]).turns[0][1]
        got = parse_decomposition(answer, example.task)
        assert got.constraints == merged(example.constraints), answer
        assert (got.input or "").strip() == example.input.strip(), answer


@pytest.fixture(scope="module")
def shipped():
    from musc_jax.pairs.demonstrations import own_demonstrations

    return own_demonstrations()


@pytest.fixture(scope="module")
def examples(shipped, shared_data):
    from musc_jax.pairs.demonstrations import read_demonstrations

    real = [e for n in ("noinput", "input") for e in read_demonstrations(str(shared_data / f"infobench_{n}.json"))]
    assert len(real) == 248 and all(unicodedata.is_normalized("NFC", e.instruction) for e in real)
    return shipped + real
