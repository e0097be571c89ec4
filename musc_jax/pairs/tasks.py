"""The instructions that pairs are made from, as users have them."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from lm_jax.data.conversations import read_turns
from lm_jax.data.faults import Faults, RowIds
from lm_jax.data.layouts import Row, columns_of, present_columns, text_of
from lm_jax.data.messages import TEMPLATE_KWARGS, read_template_kwargs
from lm_jax.data.rows import read_rows
from lm_jax.errors import UserError
from musc_jax.pairs.demonstrations import with_input

# Where the instruction is, and the material apart from it
_COLUMNS = {"prompt": "input", "instruction": "input", "question": "context", "query": "input", "problem": "input"}
_APART = ("system", "system_prompt", "history", "tools")  # would be lost


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


def read_tasks(path: str, columns: str = "", max_dropped_share: float | None = None) -> tuple[list[Task], Faults]:
    """Reads instructions from a file, as `lm_jax.data.rows.read_rows` does, with ids that differ.

    Columns: `prompt` (a string, or messages that are one user message) or `instruction`, both with an optional `input`
    and `id`, or what public data sets call them; others are ignored. A row without id is called by its number. Blank
    instructions pass.

    Args:
      columns: as `columns.Renamed` has them.
      max_dropped_share: see `Faults`.

    Returns:
      The instructions, and the faults of the rows that are left out: a missing column, a value of the wrong type, an
      id twice.

    Raises:
      UserError: an unreadable file, too many faulty rows.
    """
    where = os.path.basename(path.rstrip("/"))
    rows = read_rows(path, renamed=columns)
    faults = Faults(where, max_dropped_share)
    ids, tasks = RowIds(faults), []
    for number, row in enumerate(rows):
        given = ids.of(number, row.get("id"))
        with faults.of(number):
            task = _task(row, given, f"{where} row {number}")
            if number not in faults.rows:
                tasks.append(task)
    faults.check(len(rows))
    if any(isinstance(task.id, str) for task in tasks):  # a column of a table has one type
        tasks = [dataclasses.replace(task, id=str(task.id)) for task in tasks]
    return tasks, faults


def _task(row: Row, id: str | int, at: str) -> Task:
    columns = present_columns(row)
    name = next((name for name in _COLUMNS if name in columns), None)
    if name is None:
        raise UserError(
            f"{at}: has none of {', '.join(_COLUMNS)} ({columns_of(row)}); add one, or name yours: "
            '--config.columns="instruction=..."'
        )
    if isinstance(columns[name], list):
        columns[name] = _only_message(columns[name], name, at)
    if apart := [name for name in _APART if columns.get(name)]:
        raise UserError(
            f"{at}: has {apart[0]}, and pairs are made of an instruction alone; drop the row, or leave the column out: "
            f'--config.columns="{apart[0]}="'
        )
    texts = [text_of(columns, column, at) for column in (name, _COLUMNS[name])]
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{at}: half a surrogate pair in the text; remove it") from error
    kwargs = read_template_kwargs(row.get(TEMPLATE_KWARGS), f"{at}: {TEMPLATE_KWARGS}")
    return Task(id, texts[0], texts[1] if texts[1].strip() else "", kwargs)


def _only_message(value: list, name: str, at: str) -> str:
    messages = read_turns(value, name, at)
    if [m["role"] for m in messages] != ["user"]:
        roles = ", ".join(m["role"] for m in messages)
        raise UserError(f"{at}: {name} has the messages {roles}; pairs are made from one user message; split the row")
    return messages[0]["content"]
