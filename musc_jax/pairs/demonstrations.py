"""In-context examples: instructions that people decomposed into constraints, in InFoBench's format."""

import dataclasses
import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any

from lm_jax.data.rows import read_rows
from lm_jax.errors import UserError
from musc_jax.draws import shuffled

_CONSTRAINTS = ("decomposed_questions", "constraints")
MIN_CONSTRAINTS = 2


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """One decomposed instruction. `input` is the material that it works on, "" where it has none."""

    instruction: str
    input: str
    constraints: tuple[str, ...]

    @property
    def task(self) -> str:
        """The whole text that a model is given: instruction and input."""
        return with_input(self.instruction, self.input)


def with_input(instruction: str, input: str | None) -> str:
    """Instruction and input as one text."""
    return f"{instruction}\n\n{input}" if input else instruction


def read_demonstrations(path: str) -> list[Demonstration]:
    """Reads examples from a file, as `lm_jax.data.rows.read_rows` does.

    Columns: `instruction`, `decomposed_questions` (or `constraints`), a list of texts that begins with the task
    itself, and `input`, which may be absent, null or empty. Others are ignored.

    Raises:
      UserError: naming file and row: unreadable file, a missing column, a value of the wrong type, an empty text,
        fewer than 2 constraints.
    """
    return [demonstration(row, f"{path} row {number}") for number, row in enumerate(read_rows(path, ["instruction"]))]


def own_demonstrations() -> list[Demonstration]:
    """The ten examples that come with the package, three of them with an input, one in Chinese."""
    with importlib.resources.as_file(importlib.resources.files("musc_jax.pairs") / "examples_data") as directory:
        return read_demonstrations(str(directory / "decompositions.jsonl"))


def pick(demonstrations: Sequence[Demonstration], count: int, seed: int, *key: str | int) -> tuple[Demonstration, ...]:
    """`count` different examples, a function of `seed` and `key`; with and without input where there are both.

    One choice for all rows (no key) lets every prompt share its beginning; self-instruct gives the row's number as key.

    Raises:
      UserError: fewer examples than asked for.
    """
    if not 1 <= count <= len(demonstrations):
        raise UserError(
            f"{count} in-context examples asked for, {len(demonstrations)} there; ask for 1 to {len(demonstrations)}"
        )
    chosen = shuffled(range(len(demonstrations)), seed, "demonstrations", *key)
    if count > 1:
        # The first of each kind goes first, so that neither is cut off
        kinds = {bool(demonstrations[i].input): i for i in reversed(chosen)}
        chosen = [i for i in chosen if i in kinds.values()] + [i for i in chosen if i not in kinds.values()]
    return tuple(demonstrations[i] for i in chosen[:count])


def demonstration(row: Mapping[str, Any], at: str) -> Demonstration:
    """One row of `read_demonstrations`, with the same columns and errors; `at` names it in them."""
    name = next((name for name in _CONSTRAINTS if row.get(name) is not None), None)
    if name is None:
        raise UserError(f"{at}: column 'decomposed_questions' (or 'constraints') is missing or null; add the list")
    instruction, text, constraints = row["instruction"], row.get("input"), row[name]
    text = "" if text is None else text
    for column, value in (("instruction", instruction), ("input", text)):
        if not isinstance(value, str):
            raise UserError(f"{at}: {column} must be a string, got {type(value).__name__}; mend the row")
    if not instruction.strip():
        raise UserError(f"{at}: instruction is empty; fill it in or drop the row")
    if not isinstance(constraints, list) or not all(isinstance(c, str) and c.strip() for c in constraints):
        raise UserError(f"{at}: {name} must be a list of texts, none of them empty; mend the row")
    if len(constraints) < MIN_CONSTRAINTS:
        raise UserError(f"{at}: {name} has {len(constraints)}; an example needs at least {MIN_CONSTRAINTS}")
    return Demonstration(instruction, text.strip() and text, tuple(" ".join(c.split()) for c in constraints))
