"""The form of a response: written from its parts, and read back into them.

Reading is loose, so that each verifier sees its own part of a response that is broken elsewhere; a response is well
formed where what was read writes the very same text.
"""

import dataclasses

from lab.worlds.world import World, tokens


@dataclasses.dataclass(frozen=True)
class Form:
    """All parts of a response; an empty part is absent. Texts are as in `Kind.values`."""

    words: tuple[str, ...]
    separator: str
    opening: str = ""
    title: str = ""
    bracket: tuple[str, str] = ("", "")
    before: str = ""
    after: str = ""
    numbered: bool = False
    times: int = 1
    closing: str = ""
    second_line: str = ""

    def text(self) -> str:
        """The response."""
        items = self.separator.join(self._item(number, word) for number, word in enumerate(self.words, 1))
        title = f"{self.title}:" if self.title else ""
        parts = (self.opening, title, self.bracket[0], items, self.bracket[1], self.closing)
        line = " ".join(part for part in parts if part)
        return f"{line}\n{self.second_line}" if self.second_line else line

    def _item(self, number: int, word: str) -> str:
        parts = (str(number) if self.numbered else "", self.before, *[word] * self.times)
        return " ".join(part for part in parts if part) + self.after


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a response has where.

    Attributes:
      words: its items, words of any group; repetitions in a row are one item.
      times: how often in a row each of them stands.
      head: tokens of the first line before the first item, what belongs to the item too.
      gaps: tokens between one item and the next.
      tail: tokens of the first line after the last item, what belongs to the item too.
      below: what stands below the first line; None where there is no second line.
    """

    words: tuple[str, ...]
    times: tuple[int, ...]
    head: tuple[str, ...]
    gaps: tuple[tuple[str, ...], ...]
    tail: tuple[str, ...]
    below: str | None

    @property
    def leads(self) -> tuple[tuple[str, ...], ...]:
        """Of each item the tokens between it and the one before."""
        return (self.head, *self.gaps) if self.words else ()

    @property
    def trails(self) -> tuple[tuple[str, ...], ...]:
        """Of each item the tokens between it and the next one."""
        return (*self.gaps, self.tail) if self.words else ()


def read(world: World, text: str) -> Reading:
    """Reads any text."""
    line, newline, below = text.partition("\n")
    words: list[str] = []
    times: list[int] = []
    between: list[list[str]] = [[]]  # before the first item, between the items, after the last
    for token in tokens(line):
        if token not in world.words:
            between[-1].append(token)
        elif words and words[-1] == token and not between[-1]:
            times[-1] += 1
        else:
            words.append(token)
            times.append(1)
            between.append([])
    parts = tuple(tuple(part) for part in between)
    tail = parts[-1] if words else ()
    return Reading(tuple(words), tuple(times), parts[0], parts[1:-1], tail, below if newline else None)


def form_of(world: World, reading: Reading) -> Form | None:
    """The form that a reading has, as far as its first item and its ends tell; None without items.

    It is the form of the text that was read just where it writes the same text.
    """
    if not reading.words:
        return None

    def only(found: tuple[str, ...], slot: str) -> str:
        return next((token for token in found if token in world.marks_of(slot)), "")

    texts = {token: text for text in _separators(world) for token in tokens(text)}
    gap = only(reading.gaps[0], "separator") if reading.gaps else ""
    return Form(
        words=reading.words,
        separator=texts.get(gap, world.separator),
        opening=only(reading.head, "opening"),
        title=only(reading.head, "title"),
        bracket=(only(reading.head, "bracket"), only(reading.tail, "bracket")),
        before=only(reading.head, "before"),
        after=only(reading.trails[0], "after"),
        numbered="1" in reading.head,
        times=reading.times[0],
        closing=only(reading.tail, "closing"),
        second_line=reading.below or "",
    )


def _separators(world: World) -> list[str]:
    return [world.separator, *(mark for kind in world.kinds if kind.slot == "separator" for mark in kind.marks)]
