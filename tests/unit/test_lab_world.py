"""The lab's worlds: no contradictions, a writer that is always right, verifiers that see what breaks."""

import dataclasses
import itertools
import subprocess
import sys

import pytest

from lab.worlds.compositions import COMPLEX, Split, draw_composition, split_of
from lab.worlds.forms import Form, form_of, read
from lab.worlds.grammar import (
    Constraint,
    Instruction,
    allowed_words,
    compatible,
    draw_kinds,
    make_instruction,
    questions,
    read_instruction,
)
from lab.worlds.lists import LISTS
from lab.worlds.trips import TRIPS
from lab.worlds.verifiers import verify
from lab.worlds.world import SLOTS, Kind, World, draw, groups
from lab.worlds.writer import plan, write

WORLDS = pytest.mark.parametrize("world", [LISTS, TRIPS], ids=lambda world: world.name)
_COUNT = 2000


def drawn(world, purpose, count=_COUNT, most=5):
    for index in range(count):
        rng = draw(world, 0, purpose, index)
        yield make_instruction(world, draw_kinds(world, index % (most + 1), rng), rng), rng


@WORLDS
def test_the_writer_meets_every_constraint(world):
    for instruction, rng in drawn(world, "writer"):
        response = write(world, instruction.group, instruction.constraints, rng)
        verdict = verify(world, instruction, response)
        assert verdict.well_formed and all(verdict.met), (instruction, response, verdict)


@WORLDS
def test_every_pair_of_kinds_that_can_stand_together_is_satisfiable_in_every_group(world):
    together = 0
    for pair in itertools.combinations([kind.name for kind in world.kinds], 2):
        if compatible(world, pair):
            together += 1
            for group in world.groups:
                rng = draw(world, 0, "pairs", together)
                instruction = make_instruction(world, pair, rng, group.name)
                assert verify(world, instruction, write(world, group.name, instruction.constraints, rng)).all_met
    assert together > 70


def test_responses_by_hand():
    world = dataclasses.replace(LISTS, name="both", kinds=(*LISTS.kinds, TRIPS.kind("note")))
    instruction = Instruction(
        "tools",
        (
            Constraint("first", "axe"),
            Constraint("before", "star"),
            Constraint("twice", "two"),
            Constraint("closing", "bye"),
            Constraint("note", "map"),
            Constraint("bracket", "round"),
        ),
        "",
    )
    for response, met, well_formed in (
        ("( * axe axe, * saw saw ) bye\nmap", "111111", True),
        ("( * saw saw, * axe axe ) bye\nmap", "011111", True),
        ("( axe axe, saw saw ) bye\nmap", "101111", True),
        ("( * axe axe, saw saw ) bye\nmap", "101111", False),  # not before each
        ("( * axe, * saw saw ) bye\nmap", "110111", False),
        ("( * axe axe, * saw ) bye\nmap", "110111", False),
        ("( * axe axe, * saw saw )\nmap", "111011", True),
        ("( * axe axe, * saw saw ) bye", "111101", True),
        ("* axe axe, * saw saw bye\nmap", "111110", True),
        ("( * axe axe, * saw saw bye\nmap", "111110", False),
        ("( * axe axe, * tea tea ) bye\nmap", "111111", False),  # a drink
        ("( * axe axe, * axe axe ) bye\nmap", "111111", True),  # the same word again
        ("( * axe axe, * saw saw ) bye\nmap\nmap", "111101", False),
        ("bye\nmap", "000000", False),
        ("", "000000", False),
    ):
        verdict = verify(world, instruction, response)
        assert ("".join("01"[met] for met in verdict.met), verdict.well_formed) == (met, well_formed), response


def broken(world, group, constraints, at, rng):
    """A form that breaks the constraint at `at` as directly as can be, and what else that may change; or None."""
    form = plan(world, group, constraints, rng)
    constraint = constraints[at]
    kind = world.kind(constraint.kind)
    if kind.rule == "mark":
        others = [held for value, held in kind.values if value != constraint.value]
        absent = {"bracket": ("", ""), "separator": world.separator}.get(kind.slot, "")
        return dataclasses.replace(form, **{kind.slot: rng.choice([*others, absent])})
    if kind.rule == "numbered":
        return dataclasses.replace(form, numbered=False)
    if kind.rule == "times":
        return dataclasses.replace(form, times=1)
    words = list(form.words)
    free = [w for w in allowed_words(world, group, constraints) if w not in words]
    asked = {world.kind(c.kind).position % len(words) for c in constraints if world.kind(c.kind).rule == "at"}
    included = {c.value for c in constraints if world.kind(c.kind).rule == "include"}
    open_places = [i for i, w in enumerate(words) if i not in asked and w not in included]
    match kind.rule:
        case "at" if free:
            words[kind.position] = free[0]
        case "include" if free:
            words[words.index(constraint.value)] = free[0]
        case "exclude" if open_places:
            words[open_places[0]] = constraint.value
        case "only" if open_places:
            half = world.half(world.group(group), constraint.value)
            spare = {c.value for c in constraints}
            words[open_places[0]] = next(w for w in world.group(group).words if w not in half and w not in spare)
        case "count" | "minimum" if open_places and len(words) > 2 and not asked:
            del words[open_places[0]]
            while kind.rule == "minimum" and len(words) >= world.number(constraint.value):
                words.pop()
        case "maximum" if not asked and len(free) >= 3:
            words += free[: world.number(constraint.value) + 1 - len(words)]
        case _:
            return None
    return dataclasses.replace(form, words=tuple(words))


@WORLDS
def test_what_breaks_one_constraint_is_seen_by_its_verifier_alone(world):
    seen = set()
    for instruction, rng in drawn(world, "breaking", count=2500):
        if not instruction.constraints:
            continue
        at = rng.randrange(len(instruction.constraints))
        rule = world.kind(instruction.constraints[at].kind).rule
        form = broken(world, instruction.group, instruction.constraints, at, rng)
        words = world.group(instruction.group).words
        if form is None or (rule == "minimum" and any(c.value in words for c in instruction.constraints)):
            continue
        verdict = verify(world, instruction, form.text())
        expected = tuple(i != at for i in range(len(instruction.constraints)))
        assert verdict.met == expected, (instruction, form.text())
        assert verdict.well_formed
        seen.add(instruction.constraints[at].kind)
    assert seen == {kind.name for kind in world.kinds}


@WORLDS
def test_reading_gives_back_the_form(world):
    for instruction, rng in drawn(world, "forms", count=1000):
        form = plan(world, instruction.group, instruction.constraints, rng)
        assert form_of(world, read(world, form.text())) == form


@WORLDS
def test_instructions_are_read_back_in_every_phrasing(world):
    for instruction, _ in drawn(world, "reading", count=1000):
        assert read_instruction(world, instruction.text) == instruction
    assert read_instruction(world, instruction.text + " sing.") is None
    assert read_instruction(world, "sing.") is None


@WORLDS
def test_no_two_constraints_look_alike(world):
    """A sentence or a question that stood for two constraints could not be decomposed."""
    sentences, asked = [], []
    for kind in world.kinds:
        values = [value for value, _ in kind.values] or {"only": world.halves, "numbered": ("",)}.get(kind.rule, ("x",))
        assert 3 <= len(kind.phrasings) <= 4
        sentences += [text.replace("{}", value) for text in kind.phrasings for value in values]
        asked += [kind.question.replace("{}", value) for value in values]
    assert len(set(sentences)) == len(sentences) and len(set(asked)) == len(asked)
    assert not any(". " in text for text in sentences)


@WORLDS
def test_contradictions_never_meet(world):
    lengths = [kind.name for kind in world.kinds if kind.rule in ("count", "minimum", "maximum")]
    assert len(lengths) == (3 if world is TRIPS else 1)
    for pair in itertools.combinations(lengths, 2):
        assert not compatible(world, pair)
        with pytest.raises(ValueError, match="cannot stand in one instruction"):
            make_instruction(world, pair, draw(world, 0, "never", 0))
    for instruction, _ in drawn(world, "contradictions"):
        words = [c.value for c in instruction.constraints if world.kind(c.kind).rule in ("at", "include", "exclude")]
        assert len(set(words)) == len(words)
        assert sum(c.kind in lengths for c in instruction.constraints) <= 1
    assert not compatible(TRIPS, ["long", "mood", "avoid"])  # six of the five words that are left


@WORLDS
def test_compositions_are_split_once_for_all(world):
    names = [kind.name for kind in world.kinds]
    sets = [kinds for kinds in itertools.combinations(names, 3) if compatible(world, kinds)]
    splits = [split_of(world, kinds) for kinds in sets]
    for split, low, high in ((Split.HELD_OUT, 0.13, 0.27), (Split.RARE, 0.13, 0.27)):
        assert low < splits.count(split) / len(sets) < high
    assert split_of(world, sets[0]) == split_of(world, sets[0][::-1])
    assert {split_of(world, pair) for pair in itertools.combinations(names, 2)} == {Split.COMMON}
    trained = [draw_composition(world, COMPLEX[i % 3], draw(world, 0, "train", i)) for i in range(1500)]
    held_out = [draw_composition(world, COMPLEX[i % 3], draw(world, 0, "test", i), held_out=True) for i in range(300)]
    assert {split_of(world, kinds) for kinds in held_out} == {Split.HELD_OUT}
    counts = [split_of(world, kinds) for kinds in trained]
    assert counts.count(Split.HELD_OUT) == 0
    assert 0 < counts.count(Split.RARE) / len(trained) < 0.05  # 2.6% expected; 20% without rarity


def test_draws_do_not_depend_on_the_process():
    code = (
        "from lab.worlds.lists import LISTS; from lab.worlds.world import draw;"
        "from lab.worlds.grammar import *; r = draw(LISTS, 3, 'x', 5);"
        "print(make_instruction(LISTS, draw_kinds(LISTS, 4, r), r).text, end='')"
    )
    rng = draw(LISTS, 3, "x", 5)
    here = make_instruction(LISTS, draw_kinds(LISTS, 4, rng), rng).text
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == here
    other = draw(LISTS, 4, "x", 5)
    assert make_instruction(LISTS, draw_kinds(LISTS, 4, other), other).text != here


def test_questions_stand_in_the_order_of_the_text():
    instruction = Instruction("tools", (Constraint("last", "saw"), Constraint("count", "three")), "")
    assert questions(LISTS, instruction) == (
        "does the response list tools?",
        "is the last word saw?",
        "does the list have exactly three words?",
    )


def test_a_world_that_cannot_be_read_is_refused():
    kind = Kind("star", "mark", ("a {}",), "a {}?", (("star", "*"),), slot="before")
    parts = dict(name="w", task=("{}",), task_question="{}?", groups=groups({"g": "a b"}), halves=("l", "r"))
    parts |= dict(numbers=(), copying="say {}")
    World(kinds=(kind,), **parts)
    for wrong, message in (
        (dataclasses.replace(kind, slot="nowhere"), "no rule"),
        (dataclasses.replace(kind, rule="alphabetical"), "no rule"),
        (dataclasses.replace(kind, values=(("star", "a"),)), "stand for two things"),
        (dataclasses.replace(kind, question="is it?"), "lacks its value"),
    ):
        with pytest.raises(ValueError, match=message):
            World(kinds=(wrong,), **parts)
    assert set(SLOTS) <= {field.name for field in dataclasses.fields(Form)}
