"""What methods are given in a world: instructions, responses without instructions, pairs."""

from collections.abc import Collection, Sequence

from lab.worlds.compositions import COMPLEX, draw_composition
from lab.worlds.grammar import Instruction, make_instruction
from lab.worlds.seed_data import PAIRED, Row, conversation
from lab.worlds.world import World, draw
from lab.worlds.writer import write


def instructions(
    world: World,
    seed: int,
    purpose: str,
    count: int,
    counts: Sequence[int] = COMPLEX,
    held_out: bool = False,
    rarity: float = 1.0,
    avoid: Collection[str] = (),
) -> list[Instruction]:
    """Instructions whose texts all differ; a function of the arguments alone.

    Args:
      purpose: names the draw; other purposes give other instructions.
      counts: numbers of constraints, each as often.
      held_out: of complex instructions only those whose composition no training row has.
      rarity: as in `compositions.draw_composition`.
      avoid: texts that none of them may have, as those of another split.
    """
    found: dict[str, Instruction] = {}
    index, avoided = 0, frozenset(avoid)
    while len(found) < count:
        rng = draw(world, seed, purpose, index)
        number = rng.choice(counts)
        kinds = draw_composition(world, number, rng, held_out and number >= min(COMPLEX), rarity)
        instruction = make_instruction(world, kinds, rng)
        if instruction.text not in avoided:
            found.setdefault(instruction.text, instruction)
        index += 1
    return list(found.values())


def prompts(world: World, given: Sequence[Instruction], name: str) -> list[Row]:
    """Instructions as rows with `id` and `prompt`, messages."""
    asked = [[{"role": "user", "content": instruction.text}] for instruction in given]
    return [{"id": f"{world.name}-{name}-{i}", "prompt": prompt} for i, prompt in enumerate(asked)]


def clean_pairs(world: World, seed: int, count: int) -> list[Row]:
    """Instructions with correct responses, as supervised rows with `source` seed."""
    return [
        {
            "id": f"{world.name}-pair-{i}",
            "messages": conversation(instruction.text, _response(world, instruction, seed, "pair", i)),
            "source": "seed",
        }
        for i, instruction in enumerate(instructions(world, seed, "pair", count, PAIRED))
    ]


def unlabelled_responses(world: World, seed: int, count: int) -> list[Row]:
    """Correct responses to instructions that are not given: rows with `id` and `response`."""
    return [
        {"id": f"{world.name}-response-{i}", "response": _response(world, instruction, seed, "unlabelled", i)}
        for i, instruction in enumerate(instructions(world, seed, "unlabelled", count, PAIRED))
    ]


def _response(world: World, instruction: Instruction, seed: int, purpose: str, index: int) -> str:
    rng = draw(world, seed, f"{purpose}/response", index)
    return write(world, instruction.group, instruction.constraints, rng)
