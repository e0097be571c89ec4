"""The instructions that pairs are made from, as users have them."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from lm_jax.data.messages import TEMPLATE_KWARGS, messages_fault, read_template_kwargs
from lm_jax.data.rows import read_rows
from lm_jax.errors import UserError
from musc_jax.pairs.demonstrations import with_input


@dataclasses.dataclass(frozen=True)
class Task:
    """One instruction.

    Attributes:
      input: material that the user gave apart from it, "" where there is none.
      chat_template_kwargs: what the chat template takes besides for all that is asked about it.
    """

    id: str | int
    instruction: str
    input: str = ""
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def text(self) -> str:
        """The whole text that a model is given."""
        return with_input(self.instruction, self.input)


def read_tasks(path: str) -> list[Task]:
    """Reads instructions from a file, as `lm_jax.data.rows.read_rows` does, with ids that differ.

    Columns: `prompt` (a string, or messages that are one user message) or `instruction`, both with an optional `input`,
    `id` and `chat_template_kwargs`; others are ignored. A row without id is called by its number. Blank instructions
    pass.

    Raises:
      UserError: naming file and row: unreadable file, a missing column, a value of the wrong type, an id twice.
    """
    where = os.path.basename(path.rstrip("/"))
    rows = read_rows(path)
    tasks = [_task(row, number, f"{where} row {number}") for number, row in enumerate(rows)]
    if any(isinstance(task.id, str) for task in tasks):  # a column of a table has one type
        tasks = [dataclasses.replace(task, id=str(task.id)) for task in tasks]
    first: dict[str, int] = {}
    for number, task in enumerate(tasks):
        if (before := first.setdefault(str(task.id), number)) != number:
            raise UserError(
                f"{where} row {number}: has the same id {task.id!r} as row {before} (a row without one is called by "
                "its number); ids decide the random draws and must differ"
            )
    return tasks


def _task(row: Mapping[str, Any], number: int, at: str) -> Task:
    row = {name: value for name, value in row.items() if value is not None}
    name = next((name for name in ("prompt", "instruction") if name in row), None)
    if name is None:
        raise UserError(
            f"{at}: has neither 'prompt' nor 'instruction'; it has {', '.join(sorted(row)) or 'none'}; rename or add "
            "the column"
        )
    texts = {name: row[name], "input": row.get("input", "")}
    if isinstance(texts[name], list):
        texts[name] = _only_message(texts[name], f"{at}: {name}")
    for column, value in texts.items():
        if not isinstance(value, str):
            raise UserError(f"{at}: {column} must be a string, got {type(value).__name__}; mend the row")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{at}: half a surrogate pair in {column}; remove it") from error
    id = row.get("id", number)
    if type(id) not in (int, str) or id == "":
        raise UserError(f"{at}: id must be a string or a whole number, got {id!r}; mend it or leave it out")
    kwargs = read_template_kwargs(row.get(TEMPLATE_KWARGS), f"{at}: {TEMPLATE_KWARGS}")
    return Task(id, texts[name], texts["input"] if texts["input"].strip() else "", kwargs)


def _only_message(messages: list[Any], what: str) -> str:
    if fault := messages_fault(messages):
        raise UserError(f"{what} {fault}; give a string or one user message")
    if len(messages) != 1 or messages[0]["role"] != "user":
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"{what} has the messages {roles}; pairs are made from one user message; split the row")
    return messages[0]["content"]
