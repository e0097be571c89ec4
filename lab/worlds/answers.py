"""What answers in a world are worth: verdicts of rows, and shares of them with their uncertainty."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lab.worlds.grammar import read_instruction
from lab.worlds.verifiers import Verdict, verify
from lab.worlds.world import World

_Z = 1.96  # of a normal distribution, for 95%


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and the half width of its 95% interval (normal approximation)."""

    mean: float
    half_width: float

    def percent(self, signed: bool = False) -> str:
        """As "41.0 ± 2.1", in per cent."""
        return f"{100 * self.mean:{'+' if signed else ''}.1f} ± {100 * self.half_width:.1f}"


def verdicts(world: World, rows: Iterable[Mapping[str, Any]]) -> list[Verdict]:
    """Of each row's `response` to the last message of its `prompt`, an instruction of the world; none is wrong.

    Raises:
      ValueError: a prompt that is no instruction of the world.
    """
    return [verdict(world, row["prompt"][-1]["content"], row["response"]) for row in rows]


def verdict(world: World, instruction: str, response: str | None) -> Verdict:
    """Of one response; see `verdicts`."""
    read = read_instruction(world, instruction)
    if read is None:
        raise ValueError(f"{world.name}: no instruction: {instruction!r}")
    return verify(world, read, response or "")


def shares(found: Sequence[Verdict]) -> dict[str, float]:
    """Of at least one answer: `all_met` of an instruction, `each` constraint by itself, `well_formed`."""
    each = [met for verdict in found for met in verdict.met]
    return {
        "all_met": sum(verdict.all_met for verdict in found) / len(found),
        "each": sum(each) / max(len(each), 1),
        "well_formed": sum(verdict.well_formed for verdict in found) / len(found),
    }


def truly_answers(world: World, instruction: str, response: str) -> bool:
    """Whether `response` does everything that `instruction`, which a model wrote, asks for, whatever else it does."""
    read = read_instruction(world, instruction)
    return read is not None and verify(world, read, response).all_met


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent values; of paired differences too. At least two values."""
    array = np.asarray(values, float)
    return Estimate(float(array.mean()), _Z * float(array.std(ddof=1)) / math.sqrt(len(array)))
