"""The reference writer: a response that meets any constraints that can stand together."""

import random
from collections.abc import Sequence
from typing import Any

from lab.worlds.forms import Form
from lab.worlds.grammar import Constraint, allowed_words, fewest_items
from lab.worlds.world import World


def write(world: World, group: str, constraints: Sequence[Constraint], rng: random.Random) -> str:
    """A well-formed response that meets all `constraints`; what they leave open is drawn.

    Args:
      group: name of the words to list.
      constraints: of `grammar.make_instruction`, or some of them.
    """
    return plan(world, group, constraints, rng).text()


def plan(world: World, group: str, constraints: Sequence[Constraint], rng: random.Random) -> Form:
    """The form of that response."""
    parts: dict[str, Any] = {"separator": world.separator}
    for constraint in constraints:
        kind = world.kind(constraint.kind)
        if kind.rule == "mark":
            parts[kind.slot] = dict(kind.values)[constraint.value]
        elif kind.rule == "numbered":
            parts["numbered"] = True
        elif kind.rule == "times":
            parts["times"] = world.number(constraint.value)
    return Form(words=_words(world, group, constraints, rng), **parts)


def _words(world: World, group: str, constraints: Sequence[Constraint], rng: random.Random) -> tuple[str, ...]:
    kinds = [world.kind(constraint.kind) for constraint in constraints]
    asked = list(zip(kinds, constraints, strict=True))
    required = {c.value for kind, c in asked if kind.rule in ("at", "include")}
    pool = [word for word in allowed_words(world, group, constraints) if word not in required]
    length = _length(world, asked, len(pool) + len(required), rng)
    placed = {kind.position % length: c.value for kind, c in asked if kind.rule == "at"}
    inner = [c.value for kind, c in asked if kind.rule == "include"]
    inner += rng.sample(pool, length - len(placed) - len(inner))
    rest = iter(rng.sample(inner, len(inner)))
    return tuple(placed[i] if i in placed else next(rest) for i in range(length))


def _length(world: World, asked, most: int, rng: random.Random) -> int:
    fewest = fewest_items([kind for kind, _ in asked])
    low, high = world.lengths
    for kind, constraint in asked:
        if kind.rule == "count":
            return world.number(constraint.value)
        if kind.rule == "minimum":
            low = world.number(constraint.value)
            high = max(high, low)
        elif kind.rule == "maximum":
            high = world.number(constraint.value)
            low = min(low, high)
    low = max(low, fewest)
    return rng.randint(low, max(low, min(high, most)))
