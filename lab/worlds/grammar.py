"""Instructions of a world: a task and constraints that do not contradict each other, in words, in any order."""

import dataclasses
import random
from collections.abc import Sequence

from lab.worlds.world import Group, Kind, World

NAMING = ("at", "include", "exclude")  # rules whose value is a word of the group
_LENGTHS = ("count", "minimum", "maximum")


@dataclasses.dataclass(frozen=True)
class Constraint:
    """A kind with its value, as the instruction names it; "" where the kind has none."""

    kind: str
    value: str = ""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """What is asked for, and in which words.

    Attributes:
      group: name of the words to list.
      constraints: in the order of the text.
      text: what a model is given.
    """

    group: str
    constraints: tuple[Constraint, ...]
    text: str

    @property
    def composition(self) -> frozenset[str]:
        """The kinds that it is made of."""
        return frozenset(constraint.kind for constraint in self.constraints)


def compatible(world: World, kinds: Sequence[str]) -> bool:
    """Whether these kinds can stand in one instruction: no two of one family, and a length that the others allow."""
    chosen = [world.kind(name) for name in kinds]
    families = [kind.family or kind.name for kind in chosen]
    return len(set(families)) == len(families) and all(
        _fitting(world, kind, chosen) for kind in chosen if kind.rule in _LENGTHS
    )


def draw_kinds(world: World, count: int, rng: random.Random, naming: float = 1.0) -> tuple[str, ...]:
    """`count` different kinds that can stand together, in random order; ValueError where there are not so many.

    Args:
      naming: how much likelier than another a kind is drawn that names a word of the group.
    """
    odds = {kind.name: naming if kind.rule in NAMING else 1.0 for kind in world.kinds}
    # Weighted sampling without replacement (Efraimidis and Spirakis, 2006)
    order = sorted(odds, key=lambda name: rng.random() ** (1 / odds[name]), reverse=True)
    chosen: list[str] = []
    for name in order:
        if len(chosen) < count and compatible(world, [*chosen, name]):
            chosen.append(name)
    if len(chosen) < count:
        raise ValueError(f"{world.name}: no {count} kinds that can stand together")
    return tuple(rng.sample(chosen, count))


def make_instruction(world: World, kinds: Sequence[str], rng: random.Random, group: str | None = None) -> Instruction:
    """An instruction with a constraint of each of `kinds`, in their order; a response that meets all exists.

    Raises:
      ValueError: kinds that contradict each other.
    """
    if not compatible(world, kinds):
        raise ValueError(f"{world.name}: {', '.join(kinds)} cannot stand in one instruction")
    chosen = world.group(group) if group else rng.choice(world.groups)
    constraints = _constraints(world, [world.kind(name) for name in kinds], chosen, rng)
    return Instruction(chosen.name, constraints, render(world, chosen.name, constraints, rng))


def render(world: World, group: str, constraints: Sequence[Constraint], rng: random.Random) -> str:
    """The task and each constraint as a sentence of its own, each in one of its phrasings."""
    sentences = [rng.choice(world.task).replace("{}", group)]
    sentences += [rng.choice(world.kind(c.kind).phrasings).replace("{}", c.value) for c in constraints]
    return " ".join(f"{sentence}." for sentence in sentences)


def questions(world: World, instruction: Instruction) -> tuple[str, ...]:
    """What a correct decomposition lists: the task, then the constraints in their order, as yes/no questions."""
    asked = (world.kind(c.kind).question.replace("{}", c.value) for c in instruction.constraints)
    return (world.task_question.replace("{}", instruction.group), *asked)


def read_instruction(world: World, text: str) -> Instruction | None:
    """The instruction that a text is, in any phrasings; None where a sentence is none of the world's.

    Contradictory and repeated constraints are read as they stand: a model may write them.
    """
    task, *sentences = [sentence.strip() for sentence in text.strip().removesuffix(".").split(". ")]
    group = next((g.name for g in world.groups if task in {t.replace("{}", g.name) for t in world.task}), None)
    if group is None:
        return None
    found = [_read_sentence(world, group, sentence) for sentence in sentences]
    known = [constraint for constraint in found if constraint is not None]
    return Instruction(group, tuple(known), text) if len(known) == len(found) else None


def _read_sentence(world: World, group: str, sentence: str) -> Constraint | None:
    for kind in world.kinds:
        for value in _values(world, kind, group):
            if sentence in {phrasing.replace("{}", value) for phrasing in kind.phrasings}:
                return Constraint(kind.name, value)
    return None


def _values(world: World, kind: Kind, group: str) -> Sequence[str]:
    """All values that a kind can have in a group."""
    if kind.rule in NAMING:
        return world.group(group).words
    if kind.rule in ("only", "numbered"):
        return world.halves if kind.rule == "only" else ("",)
    return [name for name, _ in kind.values]


def allowed_words(world: World, group: str, constraints: Sequence[Constraint]) -> tuple[str, ...]:
    """The words that a response may list."""
    words = world.group(group).words
    for constraint in constraints:
        rule = world.kind(constraint.kind).rule
        if rule == "only":
            half = world.half(world.group(group), constraint.value)
            words = tuple(word for word in words if word in half)
        elif rule == "exclude":
            words = tuple(word for word in words if word != constraint.value)
    return words


def _fitting(world: World, length: Kind, kinds: Sequence[Kind]) -> list[str]:
    """The values of a length that the other kinds allow in every group."""
    words = min(len(group.words) for group in world.groups)
    words //= 1 + any(kind.rule == "only" for kind in kinds)
    most = words - sum(kind.rule == "exclude" for kind in kinds)
    return [name for name, _ in length.values if fewest_items(kinds) <= world.number(name) <= most]


def _constraints(world: World, kinds: Sequence[Kind], group: Group, rng: random.Random) -> tuple[Constraint, ...]:
    """Values that do not contradict each other: words first, since they bound the lengths."""
    values: dict[str, str] = {}
    for kind in kinds:
        if kind.rule == "only":
            values[kind.name] = rng.choice(world.halves)
        elif kind.rule == "mark" or kind.rule == "times":
            values[kind.name] = rng.choice(kind.values)[0]
        elif kind.rule == "numbered":
            values[kind.name] = ""
    halves = [Constraint(name, value) for name, value in values.items() if world.kind(name).rule == "only"]
    pool = list(allowed_words(world, group.name, halves))
    named = [kind for kind in kinds if kind.rule in NAMING]
    # All different: a word that is asked for twice, or asked for and excluded, would be redundant or impossible
    values |= {kind.name: word for kind, word in zip(named, rng.sample(pool, len(named)), strict=True)}
    values |= {kind.name: rng.choice(_fitting(world, kind, kinds)) for kind in kinds if kind.rule in _LENGTHS}
    return tuple(Constraint(kind.name, values[kind.name]) for kind in kinds)


def fewest_items(kinds: Sequence[Kind]) -> int:
    """So many items hold the words that these kinds ask for, each in its place; at least 2, a list."""
    places = [kind.position for kind in kinds if kind.rule == "at"]
    ends = max([p + 1 for p in places if p >= 0], default=0) + max([-p for p in places if p < 0], default=0)
    inner = sum(kind.rule == "include" for kind in kinds)
    free = ends - len(places)
    return max(2, ends + max(0, inner - free))
