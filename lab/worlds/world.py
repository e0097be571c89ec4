"""What a verifiable world is made of: groups of words, kinds of constraints, and the words of both. Data, no rules.

A response of any world is one or two lines of single-space separated words:

    [opening] [title:] [bracket] item, item, ... [bracket] [closing]
    [second line]

and an item is `[number] [before] word[after]`, the word once or several times. `lab.worlds.forms` writes and reads it.
"""

import dataclasses
import functools
import random
import re
from collections.abc import Mapping

# What a constraint of each rule does; its value is what the instruction names
RULES = (
    "count",  # so many items
    "minimum",
    "maximum",
    "at",  # the word at `position` is the one named
    "include",
    "exclude",
    "only",  # all from one of a group's halves
    "mark",  # `slot` holds the text that the value stands for
    "numbered",  # 1, 2, 3 before the items
    "times",  # each word so many times in a row
)
SLOTS = ("opening", "title", "bracket", "separator", "before", "after", "closing", "second_line")
_TOKEN = re.compile(r"\n|[^\W_]+|[^\w\s]")


@dataclasses.dataclass(frozen=True)
class Group:
    """Words that a response lists, and how the instruction calls them. The first half and the second are sub-groups."""

    name: str
    words: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of constraint.

    Attributes:
      name: unique in its world.
      rule: one of RULES.
      phrasings: sentences that ask for it; `{}` stands for the value, where it has one.
      question: the yes/no question that a decomposition states it as.
      values: of `mark`: what the instruction names -> what the response holds, a pair of texts for a bracket; of
        numbers: names among `World.numbers`. Empty where the values are words of the group.
      slot: of `mark`, one of SLOTS.
      position: of `at`; negative from the end.
      family: kinds of one family contradict each other and never meet in an instruction; empty: a family of its own.
    """

    name: str
    rule: str
    phrasings: tuple[str, ...]
    question: str
    values: tuple[tuple[str, str | tuple[str, str]], ...] = ()
    slot: str = ""
    position: int = 0
    family: str = ""

    @property
    def marks(self) -> tuple[str, ...]:
        """All texts that its slot can hold."""
        held = [text for _, text in self.values] if self.rule == "mark" else []
        return tuple(mark for text in held for mark in ([text] if isinstance(text, str) else text))


@dataclasses.dataclass(frozen=True)
class World:
    """A closed world.

    Attributes:
      name: of the world; part of every random draw.
      task: phrasings of the task; `{}` stands for the group.
      task_question: the same as a yes/no question.
      groups: no word is in two of them.
      kinds: the constraints that it knows.
      numbers: name -> number, of items and repetitions.
      copying: asks to repeat the words that stand for `{}`.
      halves: how the first and the second half of every group are called, where a kind asks for one of them.
      separator: between the items where none is asked for.
      lengths: fewest and most items where no length is asked for.

    Raises:
      ValueError: a rule or slot that does not exist, a word or mark that stands for two things.
    """

    name: str
    task: tuple[str, ...]
    task_question: str
    groups: tuple[Group, ...]
    kinds: tuple[Kind, ...]
    numbers: tuple[tuple[str, int], ...]
    copying: str
    halves: tuple[str, str] = ("", "")
    separator: str = ", "
    lengths: tuple[int, int] = (3, 5)

    def __post_init__(self):
        for kind in self.kinds:
            if kind.rule not in RULES or (kind.rule == "mark") != (kind.slot in SLOTS):
                raise ValueError(f"{self.name}: kind {kind.name!r}: no rule {kind.rule!r} with slot {kind.slot!r}")
            asks = all(("{}" in text) == (kind.rule != "numbered") for text in (*kind.phrasings, kind.question))
            if not asks:
                raise ValueError(f"{self.name}: kind {kind.name!r}: a phrasing lacks its value, or has one too many")
        names = [kind.name for kind in self.kinds]
        # A reader tells what a token is by the token alone
        meanings = [word for group in self.groups for word in group.words]
        meanings += [str(n) for n in range(1, 10)]
        meanings += [token for slot in SLOTS if slot != "second_line" for token in self.marks_of(slot)]
        for what in (names, meanings):
            if doubled := sorted({text for text in what if what.count(text) > 1}):
                raise ValueError(f"{self.name}: {', '.join(doubled)} stand for two things")

    def kind(self, name: str) -> Kind:
        """The kind of that name; KeyError where there is none."""
        return self._kinds[name]

    def group(self, name: str) -> Group:
        """The group of that name; KeyError where there is none."""
        return self._groups[name]

    @functools.cached_property
    def words(self) -> frozenset[str]:
        """Those of all groups."""
        return frozenset(word for group in self.groups for word in group.words)

    @functools.cached_property
    def _kinds(self) -> dict[str, Kind]:
        return {kind.name: kind for kind in self.kinds}

    @functools.cached_property
    def _groups(self) -> dict[str, Group]:
        return {group.name: group for group in self.groups}

    @functools.cached_property
    def _slots(self) -> dict[str, tuple[str, ...]]:
        return {slot: self._in_slot(slot) for slot in SLOTS}

    def half(self, group: Group, name: str) -> tuple[str, ...]:
        """The words of one of a group's halves."""
        middle = len(group.words) // 2
        return group.words[:middle] if self.halves.index(name) == 0 else group.words[middle:]

    def number(self, name: str) -> int:
        """The number that a word of the instruction stands for."""
        return dict(self.numbers)[name]

    def marks_of(self, slot: str) -> tuple[str, ...]:
        """All tokens that can stand in a slot."""
        return self._slots[slot]

    def _in_slot(self, slot: str) -> tuple[str, ...]:
        texts = [mark for kind in self.kinds if kind.slot == slot for mark in kind.marks]
        texts += [self.separator] if slot == "separator" else []
        return tuple(dict.fromkeys(token for text in texts for token in tokens(text)))


def groups(words: Mapping[str, str]) -> tuple[Group, ...]:
    """Groups from their names and their words, separated by spaces."""
    return tuple(Group(name, tuple(text.split())) for name, text in words.items())


def named(*names: str) -> tuple[tuple[str, str], ...]:
    """Values that the response holds as the instruction names them."""
    return tuple((name, name) for name in names)


def tokens(text: str) -> list[str]:
    """Words, punctuation marks and newlines, as the tokenizer of the world cuts them."""
    return _TOKEN.findall(text)


def draw(world: World, seed: int, purpose: str, index: int) -> random.Random:
    """The random numbers of one thing: a function of these four alone, alike on every machine."""
    return random.Random(f"{world.name} {seed} {purpose} {index}")
