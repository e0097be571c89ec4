"""What an ablation of the lab knows of a method: its arms on one seed model, and how each is trained."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from lab.worlds.answers import truly_answers
from lab.worlds.data import prompts
from lab.worlds.grammar import Instruction
from lab.worlds.world import World
from lm_jax.data.rows import write_jsonl

Row = dict[str, Any]
DEV, TEST = SPLITS = ("dev", "test")


class Learnt(NamedTuple):
    """What an arm was trained on, besides what all arms are given.

    Attributes:
      rows: pairs of preference, or of an instruction and a response.
      truth: share of them whose (chosen) response does all that its instruction asks for; None without rows.
    """

    rows: int
    truth: float | None


class Arms(Protocol):
    """The arms of one method on one seed model.

    Attributes:
      about: arm -> what it is, in the order of the table; those alone that are to be run.
      base: the model that they all begin with.
    """

    @property
    def about(self) -> Mapping[str, str]: ...

    @property
    def base(self) -> str: ...

    def prepare(self, dev: int, test: int) -> None:
        """Makes what arms share: splits of so many instructions, pairs, scores; what is there stays."""

    def rates(self, arm: str) -> Sequence[float]:
        """The learning rates that it chooses among; none: it trains nothing."""

    def train(self, arm: str, rate: float, directory: str) -> str:
        """Trains it below `directory`; the model that comes out. Goes on where it was."""

    def asked(self, split: str) -> str:
        """The file of instructions of one of SPLITS."""

    def learnt(self, arm: str, directory: str) -> Learnt:
        """What the arm learnt that was trained below `directory`."""

    def extras(self) -> Row:
        """What else is measured once a seed, ready for JSON."""


def write_split(world: World, given: Sequence[Instruction], path: str, system: str | None = None) -> None:
    """Instructions as rows with `id` and `prompt`, behind a system message where there is one."""
    head = [] if system is None else [{"role": "system", "content": system}]
    write_jsonl(path, [{**row, "prompt": head + row["prompt"]} for row in prompts(world, given, "asked")])


def learnt_of(world: World, pairs: Sequence[tuple[str, str]]) -> Learnt:
    """Of (instruction, response)."""
    true = sum(truly_answers(world, instruction, response) for instruction, response in pairs)
    return Learnt(len(pairs), true / len(pairs) if pairs else None)
