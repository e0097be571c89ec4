"""The questions of the stages with their right answers, for fitting a model that shall be able to answer them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lm_jax.data.messages import Message
from musc_jax.pairs import prompts
from musc_jax.pairs.demonstrations import Demonstration, demonstration
from musc_jax.pairs.prompts import Prompt


def decomposing(row: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> list[Message]:
    """What `prompts.decompose` asks about a decomposed instruction, and the answer that is right.

    Args:
      row: in InFoBench's format, as `demonstrations.read_demonstrations` reads it.
      examples: the in-context examples, in the same format.

    Raises:
      UserError: a row that is no decomposed instruction.
    """
    return _solved(prompts.decompose("", _read(row, examples)))


def recombining(row: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> list[Message]:
    """What `prompts.recombine` asks about the constraints of `row`, and the instruction; see `decomposing`."""
    return _solved(prompts.recombine((), None, _read(row, examples)))


def task_texts() -> tuple[str, ...]:
    """The descriptions of the two tasks, as the conversations begin with them."""
    return prompts.DEFAULT.decompose.task, prompts.DEFAULT.recombine.task


def _read(row: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> list[Demonstration]:
    return [demonstration(given, "in-context example") for given in examples] + [demonstration(row, "row")]


def _solved(prompt: Prompt) -> list[Message]:
    """Its last example as the question, with the answer."""
    *turns, (question, answer) = prompt.turns
    asked = dataclasses.replace(prompt, turns=tuple(turns), question=question)
    return [*asked.messages(), {"role": "assistant", "content": answer}]
