"""What the layouts of rows share: messages, LLaMA-Factory's alpaca columns, and one layout a file."""

from collections.abc import Mapping
from typing import Any

from lm_jax.data.text import Message, messages_fault
from lm_jax.errors import UserError


def present_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without nulls: datasets and Parquet fill a column that a row does not have with null."""
    return {name: value for name, value in row.items() if value is not None}


def columns_of(row: Mapping[str, Any]) -> str:
    """The names of a row's columns, for an error."""
    return f"it has {', '.join(sorted(row)) or 'no columns'}"


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def checked_messages(value: Any, name: str, at: str) -> list[Message]:
    """`value`, if it is messages.

    Args:
      name: the column.
      at: names the row in errors, as in all functions here.

    Raises:
      UserError: it is none.
    """
    if fault := messages_fault(value):
        raise UserError(f"{at}: {name} {fault}; give a list of {{'role': ..., 'content': ...}}")
    return value


def alpaca_prompt(row: Mapping[str, Any], at: str) -> list[Message]:
    """The messages of `instruction` + `input`, after those of `system` and `history` where there are any.

    Raises:
      UserError: no question, or a column that is no text.
    """
    system, *asked = (alpaca_text(row, name, at) for name in ("system", "instruction", "input"))
    question = "\n".join(filter(None, asked))
    if not question:
        raise UserError(f"{at}: instruction and input are both empty; drop the row")
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(t, str) for t in turn) for turn in history
    ):
        raise UserError(f"{at}: history must be a list of [question, answer] strings, or empty; mend the row")
    prompt = [message("system", system)] if system else []
    for question_before, answer in history:
        prompt += [message("user", question_before), message("assistant", answer)]
    return [*prompt, message("user", question)]


def alpaca_text(row: Mapping[str, Any], name: str, at: str) -> str:
    """A column that stands beside `instruction`; empty where there is none.

    Raises:
      UserError: it is no string.
    """
    value = row.get(name, "")
    if not isinstance(value, str):
        raise UserError(f"{at}: {name} must be a string beside 'instruction', got {type(value).__name__}; mend it")
    return value


def check_one_layout(this: str, first: str, row: Mapping[str, Any], at: str, where: str) -> None:
    """Raises UserError where a row's layout, said in words, is not that of the file's first row."""
    if this != first:
        raise UserError(
            f"{at}: {this}, but {where} row 0: {first}; one file must have one layout, so split it ({columns_of(row)})"
        )


def counted(dropped: Mapping[str, int]) -> str:
    """Reasons with how many rows each took, for a report."""
    return ", ".join(f"{n} {reason}" for reason, n in dropped.items() if n)
