"""In-context examples and prompts: read strictly, filled in word for word, alike up to the question."""

import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distributions

import jinja2
import pytest

from lm_jax.data.messages import messages_fault
from lm_jax.data.rows import write_jsonl
from lm_jax.errors import UserError
from musc_jax.pairs.constraints import folded, parse_decomposition
from musc_jax.pairs.demonstrations import Demonstration, own_demonstrations, pick, read_demonstrations, with_input
from musc_jax.pairs.instructions import parse_constraint, parse_instruction, parse_verdicts
from musc_jax.pairs.prompts import (
    DEFAULT,
    SEPARATOR,
    STOP,
    Prompts,
    Wording,
    check,
    decompose,
    negate,
    numbered,
    recombine,
    self_instruct,
)
from tests.checkpoints import CHATML

OWN = own_demonstrations()
EXAMPLES = pick(OWN, 4, 0)
TRICKY = [
    "{instruction} {constraints} {input} {0} {} {{ x }} {% if %}",
    "**Bold** and __bold__ and `code` and <|im_end|> and </s> and [INST]",
    f"{SEPARATOR}\n\nInstruction:\nConstraints:\n1. a\n\nInput:\nNone",
    r"\1 \g<0> %s $x \n \{instruction\} \\",
    "  leading and trailing space \n\n",
    "嵌套 {instruction}\u2028\u00a0\u200b\ufeff e\u0301 👩‍👩‍👧",
]


@pytest.fixture(scope="module")
def instructions(shared_data):
    """(where, text) of every instruction in the real data."""

    def lines(name):
        return [json.loads(line) for line in (shared_data / name).read_text(encoding="utf-8").splitlines()]

    found = [("ifeval", row["prompt"]) for row in lines("ifeval_prompts.jsonl")]
    found += [
        ("self-instruct", with_input(row["instruction"], instance["input"]))
        for row in lines("self_instruct_seed_tasks.jsonl")
        for instance in row["instances"][:1]
    ]
    assert len(found) == 541 + 175
    found += [("cfbench", row["prompt"]) for row in json.loads((shared_data / "cfbench.json").read_text("utf-8"))]
    return found


def rendered(messages):
    environment = jinja2.Environment()
    return environment.from_string(CHATML).render(messages=messages, add_generation_prompt=True)


def holds(prompt, text):
    """Whether the question of a prompt has `text` word for word, in each form that a model may be given."""
    user = prompt.messages()[-1]["content"]
    return (
        text in user
        and text in prompt.text()
        and prompt.messages(system=False)[-1]["content"] == user
        and text in rendered(prompt.messages())
    )


def test_every_real_instruction_goes_through_word_for_word(instructions):
    bare = decompose("", EXAMPLES)
    for where, text in [*instructions, *(("tricky", text) for text in TRICKY)]:
        prompt = decompose(text, EXAMPLES)
        assert holds(prompt, text), (where, text)
        # Nothing but the question differs, and in it nothing but the instruction
        assert (prompt.task, prompt.turns, prompt.opening) == (bare.task, bare.turns, bare.opening)
        assert prompt.question == bare.question + text
        assert prompt.text() == bare.text().removesuffix(f"\n\n{bare.opening}") + f"{text}\n\n{prompt.opening}"


def test_every_real_instruction_goes_through_the_other_prompts(instructions):
    rng = random.Random(0)
    texts = [text for _, text in instructions] + TRICKY
    for text in texts:
        others = rng.sample(texts, 3)
        assert holds(recombine([others[0], text], others[1], EXAMPLES), text)
        assert holds(recombine(others, text, EXAMPLES), text)
        assert holds(check(others, text, EXAMPLES), text)
        assert holds(negate(text), text)
        example = Demonstration(text, others[0], (others[1], text))
        for prompt in (decompose("x", [example]), recombine(["x"], None, [example])):
            assert text in prompt.turns[0][0] + prompt.turns[0][1] and text in prompt.text()


def test_random_unicode_goes_through_word_for_word():
    rng = random.Random(1)
    for _ in range(2000):
        # Any code point but surrogates, which no text file has
        text = "".join(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(40))
        text = text[:20] + rng.choice(["{instruction}", "{input}", "{", "}}", "**", "\\1", "%s"]) + text[20:]
        assert holds(decompose(text, EXAMPLES[:1]), text)


def test_messages_have_the_roles_that_templates_need():
    for prompt in (
        decompose("a", EXAMPLES),
        recombine(["a", "b"], None, EXAMPLES),
        self_instruct(OWN, 0, 0),
        negate("a"),
        check(["a"], "b", EXAMPLES),
    ):
        with_system, without = prompt.messages(), prompt.messages(system=False)
        assert messages_fault(with_system) is None and messages_fault(without) is None
        roles = [m["role"] for m in with_system]
        assert roles == ["system"] + ["user", "assistant"] * len(prompt.turns) + ["user"]
        assert [m["role"] for m in without] == roles[1:]
        assert with_system[0]["content"] == prompt.task and without[0]["content"].startswith(prompt.task)
        assert without[1:] == with_system[2:]
        assert prompt.text().endswith(prompt.opening) and prompt.opening.endswith(":")
        assert prompt.text().count(f"\n{SEPARATOR}\n") == len(prompt.turns) + 1
        assert STOP == (f"\n{SEPARATOR}\n",) and STOP[0] in prompt.text()
        assert all(answer.startswith(prompt.opening) for _, answer in prompt.turns)


def test_rows_share_everything_before_the_question():
    first, second = decompose("Write a poem.", EXAMPLES), decompose("Sing.", EXAMPLES)
    assert first.messages()[:-1] == second.messages()[:-1]
    shared = os.path.commonprefix([first.text(), second.text()])
    assert shared.endswith("Instruction:\n") and first.text() == shared + f"Write a poem.\n\n{first.opening}"
    full = recombine(["A?", "B?", "C?"], "the note", EXAMPLES).text()
    perturbed = recombine(["A?", "C?"], "the note", EXAMPLES).text()
    assert os.path.commonprefix([full, perturbed]).endswith("Input:\nthe note\n\nConstraints:\n1. A?\n2. ")


def test_what_the_examples_show_can_be_read():
    for example in OWN:
        question, answer = decompose("", [example]).turns[0]
        assert question.endswith(example.task)
        read = parse_decomposition(answer, example.task)
        assert (read.constraints, read.input or "") == (example.constraints, example.input)
        asked, written = recombine([], None, [example]).turns[0]
        assert numbered(example.constraints) in asked and (example.input or "None") in asked
        assert parse_instruction(written, example.constraints, example.input) == example.task
        assert parse_instruction(written, example.constraints) == example.instruction
    verdicts = check(["a"], "b", EXAMPLES).turns
    for example, (asked, answered) in zip(EXAMPLES, verdicts, strict=True):
        read = parse_verdicts(answered, len(example.constraints) + 1)
        listed = re.findall(r"^\d+\. (.*)$", asked.split("\n\nInstruction:\n")[0], re.MULTILINE)
        assert [text in example.constraints for text in listed] == list(read) and read.count(False) == 1
    for given, opposite in ((q.partition("\n")[2], a) for q, a in negate("x").turns):
        assert parse_constraint(opposite, given) == opposite.partition("\n")[2]
    with pytest.raises(ValueError, match="at least 2"):
        check(["a"], "b", EXAMPLES[:1])


def test_self_instruct_depends_on_seed_and_index_alone():
    prompts = [self_instruct(OWN, 7, i) for i in range(200)]
    assert prompts == [self_instruct(OWN, 7, i) for i in reversed(range(200))][::-1]
    assert prompts[:20] != [self_instruct(OWN, 8, i) for i in range(20)]
    assert len({p.turns for p in prompts}) > 150
    counts = [int(p.question.rpartition(" ")[2]) for p in prompts]
    assert set(counts) == {4, 5, 6, 7, 8}
    for prompt in prompts:
        assert len(set(prompt.turns)) == 4
        for question, answer in prompt.turns:
            assert int(question.rpartition(" ")[2]) == len(
                re.findall(r"^\d+\. ", answer.split("\n\n")[0], re.MULTILINE)
            )


def test_wording_can_be_replaced():
    wording = Wording(
        "Zerlege.", 'Auftrag {instruction} {"json": {x}}', "Anforderungen:\n{constraints}\nEingabe: {input}"
    )
    prompt = decompose("Tu {input}!", OWN[:1], Prompts(decompose=wording))
    assert prompt.question == 'Auftrag Tu {input}! {"json": {x}}' and prompt.task == "Zerlege."
    assert prompt.opening == "Anforderungen:" and prompt.text().startswith("Zerlege.\n\n###\n\nAuftrag Write")
    assert dataclasses.replace(DEFAULT, decompose=wording).recombine == DEFAULT.recombine


@pytest.mark.parametrize(
    ("question", "answer", "say"),
    [
        ("no marker", "{constraints}{input}", "prompts.decompose.question: has the markers none; it must have {instr"),
        ("{instruction}{instruction}", "{constraints}{input}", "has the markers {instruction}, {instruction};"),
        ("{instruction}", "{constraints}", "prompts.decompose.answer: has the markers {constraints}; it must have "),
        ("{instruction}", "{constraints}{input}{count}", "each once"),
    ],
)
def test_templates_without_their_markers(question, answer, say):
    with pytest.raises(UserError) as caught:
        Prompts(decompose=Wording("Do it.", question, answer))
    assert say in str(caught.value) and "\n" not in str(caught.value)


# In-context examples


def test_the_real_examples_can_be_read(shared_data):
    for name, count, with_material in (("noinput", 231, 0), ("input", 17, 17)):
        path = shared_data / f"infobench_{name}.json"
        found, raw = read_demonstrations(str(path)), json.loads(path.read_text(encoding="utf-8"))
        assert len(found) == count and sum(bool(e.input) for e in found) == with_material
        for example, row in zip(found, raw, strict=True):
            assert (example.instruction, example.input) == (row["instruction"], row["input"])
            assert list(example.constraints) == [" ".join(q.split()) for q in row["decomposed_questions"]]
        for prompt in (decompose("x", found[:5]), recombine(["x"], None, found[:5])):
            for example in found[:5]:
                assert example.instruction in prompt.text() and numbered(example.constraints) in prompt.text()


def test_our_own_examples_are_our_own_and_sound(shared_data):
    assert len(OWN) == 10 and sum(bool(e.input) for e in OWN) == 3
    assert all(4 <= len(e.constraints) <= 7 and len(set(e.constraints)) == len(e.constraints) for e in OWN)
    assert all(c.endswith(("?", "？")) for e in OWN for c in e.constraints)
    theirs = [e for n in ("noinput", "input") for e in read_demonstrations(str(shared_data / f"infobench_{n}.json"))]
    copied = {folded(c) for e in theirs for c in (*e.constraints, e.instruction)}
    assert not copied & {folded(c) for e in OWN for c in (*e.constraints, e.instruction)}


GOOD = {"instruction": "Write.", "decomposed_questions": ["Is it written?", "Is it short?"]}


@pytest.mark.parametrize(
    ("row", "say"),
    [
        ({**GOOD, "instruction": " "}, "instruction is empty"),
        ({**GOOD, "instruction": ["a"]}, "instruction must be a string, got list"),
        ({**GOOD, "input": 3}, "input must be a string, got int"),
        ({**GOOD, "decomposed_questions": None}, "column 'decomposed_questions' (or 'constraints') is missing or null"),
        ({**GOOD, "decomposed_questions": "Is it?"}, "must be a list of texts"),
        ({**GOOD, "decomposed_questions": ["Is it?", ""]}, "must be a list of texts, none of them empty"),
        ({**GOOD, "decomposed_questions": ["Is it?"]}, "has 1; an example needs at least 2"),
        ({"decomposed_questions": ["a", "b"]}, "column 'instruction' is missing"),
        ("text", "expected an object, got str"),
    ],
)
def test_faulty_examples_are_named(tmp_path, row, say):
    path = tmp_path / "examples.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(row)}\n")
    with pytest.raises(UserError) as caught:
        read_demonstrations(str(path))
    assert str(caught.value).startswith(f"{path} row 1: ") and say in str(caught.value)
    assert "\n" not in str(caught.value)


def test_columns_of_either_name(tmp_path):
    path = str(tmp_path / "examples.jsonl")
    write_jsonl(
        path, [{"instruction": "Write.", "input": None, "constraints": ["a\n  b", "c"]}, {**GOOD, "input": " \n"}]
    )
    assert read_demonstrations(path) == [
        Demonstration("Write.", "", ("a b", "c")),
        Demonstration("Write.", "", ("Is it written?", "Is it short?")),
    ]


def test_picking_takes_both_kinds_and_depends_on_its_key():
    for seed in range(50):
        chosen = pick(OWN, 3, seed)
        assert len(set(chosen)) == 3 and 0 < sum(bool(e.input) for e in chosen) < 3
        assert chosen == pick(OWN, 3, seed) and set(pick(OWN, 10, seed)) == set(OWN)
    assert len({pick(OWN, 3, 0, i) for i in range(50)}) > 30
    assert len({e for i in range(100) for e in pick(OWN, 3, 0, i)}) == 10
    only = [e for e in OWN if e.input]
    assert set(pick(only, 3, 0)) == set(only) and len(pick(only, 1, 0)) == 1
    for count in (0, 11):
        with pytest.raises(UserError, match="in-context examples asked for"):
            pick(OWN, count, 0)


def test_an_installed_wheel_has_the_examples(repo_root, tmp_path):
    if not any(d.name.lower() == "setuptools" and int(d.version.split(".")[0]) >= 77 for d in distributions()):
        pytest.skip("no setuptools 77 here to build a wheel with")
    build = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", tmp_path, "."],
        cwd=copied(repo_root, tmp_path / "source"),
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import musc_jax.pairs.demonstrations as d; print(len(d.own_demonstrations()), d.__file__)"
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    installed = tmp_path / "site" / "musc_jax" / "pairs" / "demonstrations.py"
    assert out.stdout.split() == ["10", str(installed)], out.stderr[-2000:]


def copied(root, target):
    """What a wheel is made from, apart from the checkout, where building would leave files behind."""
    for name in ("lm_jax", "musc_jax", "main_jax", "launch"):
        shutil.copytree(root / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, target / name)
    return target
