"""Which tokens of a response a constraint decides: where a method that weighs tokens by constraints should look."""

from collections.abc import Collection, Iterator, Sequence

from lab.worlds.grammar import Constraint, read_instruction
from lab.worlds.world import World, tokens

GOVERNED, OTHER, END = LABELS = ("governed", "other", "end")


def dropped(world: World, full: str, perturbed: str) -> list[Constraint]:
    """The constraints of one instruction that another lacks; none where one of them is no instruction of the world."""
    asked, left = read_instruction(world, full), read_instruction(world, perturbed)
    if asked is None or left is None:
        return []
    return [constraint for constraint in asked.constraints if constraint not in left.constraints]


def labels(world: World, constraints: Collection[Constraint], response: str) -> list[str]:
    """One of LABELS for each token of a response, the end token included: whether one of `constraints` decides it.

    A length decides what follows an item, a place the word that stands there, whichever it is, a mark what is in its
    slot; an excluded word, or a half that all must come from, every word.
    """
    found = tokens(response)
    governed = {place for constraint in constraints for place in _places(world, constraint, found)}
    return [GOVERNED if place in governed else OTHER for place in range(len(found))] + [END]


def _places(world: World, constraint: Constraint, found: Sequence[str]) -> Iterator[int]:
    kind, items = world.kind(constraint.kind), _items(world, found)
    match kind.rule:
        case "count" | "minimum" | "maximum":
            yield from (item[-1] + 1 for item in items if item[-1] + 1 < len(found))
        case "at":
            if -len(items) <= kind.position < len(items):
                yield from items[kind.position]
        case "include":
            yield from (place for place, token in enumerate(found) if token == constraint.value)
        case "exclude" | "only":
            yield from (place for item in items for place in item)
        case "numbered":
            yield from (place for place, token in enumerate(found) if token.isdecimal())
        case "times":
            yield from (place for item in items for place in item[1:])
        case "mark":
            marks = world.marks_of(kind.slot)
            yield from (place for place, token in enumerate(found) if token in marks)
        case _:
            raise ValueError(f"no rule {kind.rule!r}")


def _items(world: World, found: Sequence[str]) -> list[list[int]]:
    """The places of each item's words; repetitions in a row are one item."""
    items: list[list[int]] = []
    for place, token in enumerate(found):
        if token not in world.words:
            continue
        if items and items[-1][-1] == place - 1 and found[place - 1] == token:
            items[-1].append(place)
        else:
            items.append([place])
    return items
