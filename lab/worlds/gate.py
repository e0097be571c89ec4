"""What a seed model must be able to do before anything is learnt from it: copy words, and take instructions apart."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lab.worlds.compositions import COMPLEX
from lab.worlds.data import instructions, prompts
from lab.worlds.grammar import Instruction, make_instruction
from lab.worlds.seed_data import EXAMPLES, SIMPLE, Row, decomposed
from lab.worlds.verifiers import Verdict, verify
from lab.worlds.world import World, draw
from lm_jax.errors import UserError
from musc_jax.pairs.conversations import decomposing

GATED = ("start_with", "decompose")


@dataclasses.dataclass(frozen=True)
class Gate:
    """Instructions that no seed row draws, by purpose, and the questions about them.

    Attributes:
      asked: simple, start_with (one constraint: the first word) and complex (held-out compositions) instructions.
      decompositions: of the simple and of the complex ones, the conversations with the right answer as the last turn.
    """

    world: World
    asked: Mapping[str, Sequence[Instruction]]
    decompositions: Mapping[str, Sequence[Sequence[Mapping[str, str]]]]

    def rows(self) -> list[Row]:
        """All questions: rows with `id` and `prompt`."""
        rows = [row for name, given in self.asked.items() for row in prompts(self.world, given, name)]
        return rows + [
            {"id": f"decompose-{name}-{i}", "prompt": conversation[:-1]}
            for name, made in self.decompositions.items()
            for i, conversation in enumerate(made)
        ]

    def measure(self, answers: Mapping[str, str | None]) -> dict[str, float]:
        """Shares of what was right, by task.

        Args:
          answers: id of each of `rows` -> answer; None where there is none.
        """
        verdicts = {name: self._verdicts(name, answers) for name in self.asked}
        exact = {
            name: _share(c[-1]["content"] == answers[f"decompose-{name}-{i}"] for i, c in enumerate(made))
            for name, made in self.decompositions.items()
        }
        return {
            "start_with": _share(v.met[0] for v in verdicts["start_with"]),
            "decompose": exact["simple"],
            "decompose_complex": exact["complex"],
            "simple_all_met": _share(v.all_met for v in verdicts["simple"]),
            "complex_all_met": _share(v.all_met for v in verdicts["complex"]),
            "complex_constraints_met": _share(met for v in verdicts["complex"] for met in v.met),
            "well_formed": _share(v.well_formed for given in verdicts.values() for v in given),
        }

    def _verdicts(self, name: str, answers: Mapping[str, str | None]) -> list[Verdict]:
        rows = prompts(self.world, self.asked[name], name)
        pairs = zip(self.asked[name], rows, strict=True)
        return [verify(self.world, instruction, answers[row["id"]] or "") for instruction, row in pairs]


def make_gate(world: World, seed: int, count: int, examples: Sequence[Mapping[str, Any]]) -> Gate:
    """`count` questions of each sort; a function of the arguments alone.

    Args:
      examples: rows of `seed_data.decomposed`; the first `EXAMPLES` stand in every question.
    """
    first = next(kind.name for kind in world.kinds if kind.rule == "at" and kind.position == 0)
    asked = {
        "simple": instructions(world, seed, "gate/simple", count, SIMPLE[1:]),
        "start_with": [make_instruction(world, [first], draw(world, seed, "gate/first", i)) for i in range(count)],
        "complex": instructions(world, seed, "gate/complex", count, COMPLEX, held_out=True),
    }
    shots = examples[:EXAMPLES]
    given = {name: asked[name] for name in ("simple", "complex")}
    made = {name: [decomposing(decomposed(world, i), shots) for i in of] for name, of in given.items()}
    return Gate(world, asked, made)


def check_gate(shares: Mapping[str, float], least: float, model: str) -> None:
    """Raises UserError where a gated share of `Gate.measure` is below `least`, naming it, `model` and the cure."""
    if weak := below_gate(shares, least):
        raise UserError(
            f"{model}: {weak} below the gate of {least:.0%}: a "
            "method amplifies what its seed model half knows and teaches nothing new, so nothing can be learnt from "
            "this one; fit with another config.seed or more config.rows"
        )


def below_gate(shares: Mapping[str, float], least: float) -> str:
    """The gated shares below `least`, with their numbers; empty where all of them pass."""
    return " and ".join(f"{name} {shares[name]:.1%}" for name in GATED if shares[name] < least)


def _share(right) -> float:
    given = list(right)
    return sum(given) / len(given)
