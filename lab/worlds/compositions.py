"""Which kinds meet in training: a held-out split by composition, and compositions that the seed sees rarely."""

import enum
import random
from collections.abc import Collection

from lab.worlds.grammar import draw_kinds
from lab.worlds.world import World, draw

COMPLEX = (3, 4, 5)  # constraints of a complex instruction
HELD_OUT, RARE = 0.2, 0.2  # shares of all compositions
RARITY = 0.1  # how often a rare one stays where it is drawn


class Split(enum.StrEnum):
    """What a composition is for."""

    COMMON = "common"
    RARE = "rare"
    HELD_OUT = "held_out"


def split_of(world: World, kinds: Collection[str]) -> Split:
    """Where a set of kinds belongs, whatever its order. Fewer than 3 kinds are always common."""
    if len(kinds) < min(COMPLEX):
        return Split.COMMON
    place = draw(world, 0, " ".join(sorted(kinds)), 0).random()
    if place < HELD_OUT:
        return Split.HELD_OUT
    return Split.RARE if place < HELD_OUT + RARE else Split.COMMON


def draw_composition(
    world: World,
    count: int,
    rng: random.Random,
    held_out: bool = False,
    rarity: float = RARITY,
    naming: float = 1.0,
) -> tuple[str, ...]:
    """`count` kinds that can stand together, in random order.

    Args:
      held_out: draws from the compositions that training never sees, and from no others.
      rarity: share of the rare ones that stay; 1 draws them as often as any.
      naming: as in `grammar.draw_kinds`.
    """
    while True:
        kinds = draw_kinds(world, count, rng, naming)
        split = split_of(world, kinds)
        if held_out == (split is Split.HELD_OUT) and (split is not Split.RARE or rng.random() < rarity):
            return kinds
