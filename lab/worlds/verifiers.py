"""Whether a response does what an instruction asks: each constraint by itself, all together, and its form."""

import dataclasses

from lab.worlds.forms import Reading, form_of, read
from lab.worlds.grammar import Constraint, Instruction
from lab.worlds.world import Kind, World

MOST_WORDS = 8  # more come from a model that does not stop
MOST_TIMES = 3


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a response does.

    Attributes:
      met: of each constraint, in the instruction's order.
      well_formed: words of the right group and nothing else, in one form from the first to the last. A word may come
        again: a small model that has to look back at all it has said learns little else.
    """

    met: tuple[bool, ...]
    well_formed: bool

    @property
    def all_met(self) -> bool:
        """All that was asked for, the task itself included."""
        return self.well_formed and all(self.met)


def verify(world: World, instruction: Instruction, response: str) -> Verdict:
    """Reads `response` and checks it against every constraint of `instruction`."""
    reading = read(world, response)
    met = tuple(meets(world, instruction.group, constraint, reading) for constraint in instruction.constraints)
    return Verdict(met, _well_formed(world, instruction.group, reading, response))


def meets(world: World, group: str, constraint: Constraint, reading: Reading) -> bool:
    """Whether one constraint is met, whatever the rest of the response is like. Without items none is."""
    kind, value = world.kind(constraint.kind), constraint.value
    words = reading.words
    if not words:
        return False
    match kind.rule:
        case "count":
            return len(words) == world.number(value)
        case "minimum":
            return len(words) >= world.number(value)
        case "maximum":
            return len(words) <= world.number(value)
        case "at":
            return -len(words) <= kind.position < len(words) and words[kind.position] == value
        case "include":
            return value in words
        case "exclude":
            return value not in words
        case "only":
            return set(words) <= set(world.half(world.group(group), value))
        case "numbered":
            numbers = [[token for token in lead if token.isdecimal()] for lead in reading.leads]
            return numbers == [[str(number)] for number in range(1, len(words) + 1)]
        case "times":
            return set(reading.times) == {world.number(value)}
        case "mark":
            return _marked(world, kind, dict(kind.values)[value], reading)
    raise ValueError(f"no rule {kind.rule!r}")


def _marked(world: World, kind: Kind, text: str | tuple[str, str], reading: Reading) -> bool:
    def found(part: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(token for token in part if token in world.marks_of(kind.slot))

    match kind.slot:
        case "opening":
            return reading.head[:1] == (text,)
        case "title":
            return found(reading.head) == (text,)
        case "bracket":
            return (found(reading.head), found(reading.tail)) == tuple((mark,) for mark in text)
        case "closing":
            return reading.tail[-1:] == (text,)
        case "second_line":
            return reading.below == text
        case "before":
            return all(found(lead) == (text,) for lead in reading.leads)
        case "after":
            return all(found(trail) == (text,) for trail in reading.trails)
        case "separator":
            # A list of one thing has nothing between
            return bool(reading.gaps) and all(found(gap) == (str(text).strip(),) for gap in reading.gaps)
    raise ValueError(f"no slot {kind.slot!r}")


def _well_formed(world: World, group: str, reading: Reading, response: str) -> bool:
    form, words = form_of(world, reading), reading.words
    if form is None or form.text() != response:
        return False
    below = {mark for kind in world.kinds if kind.slot == "second_line" for mark in kind.marks}
    brackets = {("", "")} | {pair for kind in world.kinds if kind.slot == "bracket" for _, pair in kind.values}
    return (
        2 <= len(words) <= MOST_WORDS
        and set(words) <= set(world.group(group).words)
        and reading.times[0] <= MOST_TIMES
        and form.bracket in brackets
        and (reading.below is None or reading.below in below)
    )
