"""The parsers of answers take any text: they never raise, lose no whole item, and reading twice changes nothing."""

import hypothesis
from hypothesis import strategies as st

from musc_jax.pairs.constraints import Decomposition, merged, parse_decomposition, parse_self_instructed
from musc_jax.pairs.demonstrations import own_demonstrations
from musc_jax.pairs.drops import Drop
from musc_jax.pairs.instructions import parse_constraint, parse_instruction, parse_verdicts
from musc_jax.pairs.lists import list_items
from musc_jax.pairs.prompts import numbered
from musc_jax.pairs.sections import sections

EXAMPLES = own_demonstrations()
MARKS = (
    *(
        "1. ",
        "2) ",
        "(3) ",
        "４．",
        "①",
        "一、",
        "5️⃣ ",
        "- ",
        "* ",
        "• ",
        "a. ",
        "1.2 ",
        "Constraint 1: ",
        "约束2：",
        "- [ ] ",
    ),
    *("**", "__", "```", "~~~", "|", "|---|", "###", "---", "#", "> ", ":", "?", "\\", '"', "<think>", "</think>"),
    *("Constraints:", "## Input", "Instruction:", "指令：", "Output:", "Example 2:", "None", "Let me know", "Sure!"),
    *(
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "    ",
        "\u2028",
        "\x0b",
        "\x00",
        "ﬁ",
        "İ",
        "ß",
        "\u0301",
        "10",
        "999",
        "Is it short?",
    ),
)
LINES = st.lists(st.one_of(st.sampled_from(MARKS), st.text(max_size=12)), max_size=14).map("".join)
ANSWERS = st.one_of(st.text(max_size=80), LINES, st.lists(LINES, max_size=8).map("\n".join))
FINISHES = st.sampled_from(("stop", "length"))
WORDS = st.text(alphabet="abcdefgh", min_size=2, max_size=8)
ITEMS = st.lists(
    st.lists(WORDS, min_size=3, max_size=8).map(lambda w: f"X{' '.join(w)}?"), min_size=2, max_size=12, unique=True
)


@hypothesis.given(ANSWERS, ANSWERS, FINISHES)
def test_no_answer_raises(answer, instruction, finish):
    for found in (
        parse_decomposition(answer, None, finish, EXAMPLES),
        parse_decomposition(answer, instruction, finish, EXAMPLES),
        parse_decomposition(answer, instruction, finish, EXAMPLES, material=False),
    ):
        if isinstance(found, Decomposition):
            assert len(found.constraints) >= 2 and all(
                c == c.strip() != "" and "\n" not in c for c in found.constraints
            )
            assert found.input is None or found.input in instruction or instruction == ""
    parse_self_instructed(answer, finish, EXAMPLES)
    made = parse_instruction(answer, (instruction, "Is it short?"), instruction, EXAMPLES, finish)
    assert isinstance(made, Drop) or made.strip()
    parse_constraint(answer, instruction, finish)
    verdicts = parse_verdicts(answer, 2, finish)
    assert isinstance(verdicts, Drop) or len(verdicts) == 2


@hypothesis.given(ANSWERS)
def test_merging_twice_changes_nothing(answer):
    items = merged(list_items(answer))
    assert merged(items) == items


@hypothesis.given(ANSWERS)
def test_sections_hold_the_whole_text(answer):
    parts = sections(answer)
    assert parts[0].label is None and parts[0].start == 0 and parts[-1].end == len(answer)
    for part, after in zip(parts, [*parts[1:], None], strict=True):
        assert answer[part.start : part.end] == part.body
        between = answer[part.end : after.start] if after else ""
        assert "\n" not in between.strip("\n")  # a label, on its line
    assert [p.label for p in sections(parts[0].body)] == [None]


@hypothesis.given(
    ITEMS, st.sampled_from(("{}. {}", "{}) {}", "({}) {}", "**{}.** {}", "- {1}", "Constraint {}: {}")), ANSWERS
)
def test_no_item_is_lost(items, style, before):
    """Whatever stands before the list, in its own section."""
    text = f"{before}\n\nConstraints:\n" + "\n".join(style.format(n, t) for n, t in enumerate(items, 1))
    found = [section for section in sections(text) if section.label == "constraints"][-1]
    assert list_items(found.body) == items


@hypothesis.given(ITEMS, st.integers(0, 200))
def test_a_cut_list_keeps_its_whole_items(items, at):
    text = numbered(items)
    cut = text[: len(text) - at]
    whole = merged(item for item in items if f". {item}\n" in f"{cut}\n")
    found = parse_decomposition(cut, "An instruction of one line.", "length")
    if len(whole) >= 2:
        assert found.constraints == whole
    else:
        assert isinstance(found, Drop)


@hypothesis.given(ANSWERS)
def test_an_instruction_that_was_read_is_read_the_same_again(answer):
    made = parse_instruction(answer, ())
    assert isinstance(made, Drop) or parse_instruction(made, ()) == made
