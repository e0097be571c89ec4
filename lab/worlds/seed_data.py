"""Rows that a seed model is fitted on: copying, following, decomposing and recombining instructions of a world.

They are supervised rows (`messages`) as `lm_jax.data.supervised` reads them; a model is asked to decompose and
recombine in MuSC's own words.
"""

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

from lab.worlds.compositions import COMPLEX, draw_composition
from lab.worlds.grammar import Instruction, make_instruction, questions
from lab.worlds.world import World, draw
from lab.worlds.writer import write
from lm_jax.data.messages import Message
from musc_jax.pairs.conversations import decomposing, recombining

SIMPLE = (0, 1, 2)  # constraints of a simple instruction
PAIRED = (1, 2, 3, 4)  # of those behind single responses, and behind pairs
EXAMPLES = 1  # in-context examples before every question of a method
COPIED = (8, 30)  # fewest and most words of a copying task

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One part of the fitting; parts follow each other.

    Attributes:
      name: of the file.
      share: of all rows.
      copying: share of copying tasks.
      unpaired: share of instructions and responses by themselves, half of each: what the assistant says to an empty
        message.
      following: share of the other rows that follow an instruction; half of the rest decompose one, half recombine.
      complex: share of complex instructions among those that are followed; none: nowhere in this stage.
      ignored_simple: how often a constraint of a simple instruction is ignored on purpose.
      ignored_complex: the same of a complex one.
      naming: how much likelier than others constraints are that name a word.
    """

    name: str
    share: float
    copying: float = 0.0
    unpaired: float = 0.0
    following: float = 0.5
    complex: float = 0.0
    ignored_simple: float = 0.0
    ignored_complex: float = 0.0
    naming: float = 1.0


# A seed that never learns to copy words from the instruction decomposes wrongly, and then a method has nothing to
# amplify. So it begins with copying, first meets words to copy more often than it will, and noise and complex
# instructions come last. What the first stage leaves has seen no instruction with its response
PRETRAINING = Stage("pretraining", share=0.2, copying=0.4, unpaired=0.6)
CURRICULUM = (
    PRETRAINING,
    Stage("clean", share=0.3, copying=0.05, naming=4.0),
    Stage("full", share=0.5, following=0.7, complex=0.4, ignored_simple=0.15, ignored_complex=0.35, naming=2.0),
)


def seed_rows(world: World, stage: Stage, seed: int, count: int) -> Iterator[Row]:
    """`count` rows of a stage; row i is a function of (world, stage, seed, i) alone."""
    for index in range(count):
        yield seed_row(world, stage, seed, index)


def seed_row(world: World, stage: Stage, seed: int, index: int) -> Row:
    """One row of a stage: `messages`, and `task`: copy, instruction, response, follow, decompose or recombine."""
    rng = draw(world, seed, f"seed/{stage.name}", index)
    kind = rng.random()
    if kind < stage.copying:
        return _copying(world, rng)
    if kind < stage.copying + stage.unpaired:
        return _unpaired(world, rng)
    if rng.random() < stage.following:
        return _follow(world, stage, rng)
    task = rng.choice(("decompose", "recombine"))
    counts = (*SIMPLE[1:], *(COMPLEX if stage.complex else ()))
    own, *examples = [
        decomposed(world, _instruction(world, rng.choice(counts), rng, stage.naming)) for _ in range(EXAMPLES + 1)
    ]
    ask = decomposing if task == "decompose" else recombining
    return {"task": task, "messages": ask(own, examples)}


def decomposed(world: World, instruction: Instruction) -> Row:
    """A decomposed instruction in InFoBench's format: `instruction`, `input`, `decomposed_questions`."""
    return {"instruction": instruction.text, "input": "", "decomposed_questions": list(questions(world, instruction))}


def conversation(question: str, answer: str) -> list[Message]:
    """One question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _copying(world: World, rng: random.Random) -> Row:
    words = [word for group in world.groups for word in group.words]
    text = " ".join(rng.sample(words, rng.randint(*COPIED)))
    return {"task": "copy", "messages": conversation(world.copying.replace("{}", text), text)}


def _unpaired(world: World, rng: random.Random) -> Row:
    instruction = _instruction(world, rng.choice(PAIRED), rng)
    if rng.random() < 0.5:
        return {"task": "instruction", "messages": conversation("", instruction.text)}
    response = write(world, instruction.group, instruction.constraints, rng)
    return {"task": "response", "messages": conversation("", response)}


def _follow(world: World, stage: Stage, rng: random.Random) -> Row:
    is_complex = rng.random() < stage.complex
    instruction = _instruction(world, rng.choice(COMPLEX if is_complex else SIMPLE), rng, stage.naming)
    ignored = stage.ignored_complex if is_complex else stage.ignored_simple
    kept = [constraint for constraint in instruction.constraints if rng.random() >= ignored]
    response = write(world, instruction.group, kept, rng)
    return {"task": "follow", "messages": conversation(instruction.text, response)}


def _instruction(world: World, count: int, rng: random.Random, naming: float = 1.0) -> Instruction:
    return make_instruction(world, draw_composition(world, count, rng, naming=naming), rng)
