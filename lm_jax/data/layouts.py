"""What the layouts of rows share: messages, ShareGPT's turns, LLaMA-Factory's alpaca columns, and one layout a file."""

import json
from collections.abc import Mapping
from typing import Any

from lm_jax.data.messages import (
    TEMPLATE_KWARGS,
    TOOLS,
    Message,
    messages_fault,
    read_template_kwargs,
    tidy_message,
    with_arguments,
    without_nulls,
)
from lm_jax.errors import UserError

# Of ShareGPT and LLaMA-Factory, and those of chat templates
_CALL = "function_call"
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", _CALL: "assistant"} | {
    role: role for role in ("user", "assistant", "system", "tool")
}


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
    return [tidy_message(item) for item in value]


def sharegpt_turns(value: Any, name: str, at: str) -> list[Message]:
    """ShareGPT's turns as messages, whether they have `from` and `value` or `role` and `content`.

    A `function_call`, whose text is the JSON of a call or of several, becomes an assistant message with `tool_calls`;
    an `observation` a message of role tool.

    Raises:
      UserError: no such turns, an unknown role, a call that is no JSON.
    """
    messages = []
    for turn in value if isinstance(value, list) else [None]:
        keys = ("from", "value") if isinstance(turn, Mapping) and turn.get("from") is not None else ("role", "content")
        role, content = (turn.get(key) if isinstance(turn, Mapping) else None for key in keys)
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(
                f"{at}: {name} must be a list of {{'from': ..., 'value': ...}} or {{'role': ..., 'content': ...}}; "
                "mend the row"
            )
        if role not in _ROLES:
            raise UserError(f"{at}: {name} has a turn from {role!r}; known are {', '.join(_ROLES)}: rename or drop it")
        messages.append(_call(content, name, at) if role == _CALL else message(_ROLES[role], content))
    if not messages:
        raise UserError(f"{at}: {name} is empty; drop the row")
    return messages


def _call(content: str, name: str, at: str) -> Message:
    try:
        calls = json.loads(content)
    except ValueError:
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise UserError(
            f"{at}: {name} has a {_CALL} that is no JSON of {{'name': ..., 'arguments': ...}}; mend the row"
        )
    return message("assistant", "") | {"tool_calls": [{"type": "function", "function": call} for call in calls]}


def prompt_with_tools(row: Mapping[str, Any], at: str) -> Any:
    """The row's `prompt`; of one of messages with what `with_tools` adds, which raises."""
    return with_tools(row["prompt"], row, at) if isinstance(row["prompt"], list) else row["prompt"]


def with_tools(messages: list[Message], row: Mapping[str, Any], at: str) -> list[Message]:
    """`messages` with what the row's columns `tools` and `chat_template_kwargs` give their template; see `messages`.

    `tools` is a list of JSON schemas or its JSON, `chat_template_kwargs` an object or its JSON.

    Raises:
      UserError: a column is neither.
    """
    arguments = read_template_kwargs(row.get(TEMPLATE_KWARGS), f"{at}: {TEMPLATE_KWARGS}")
    tools = row.get(TOOLS)
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            tools = 0
    if tools in (None, "", []) or isinstance(tools, str):
        return with_arguments(messages, arguments)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{at}: tools must be a list of JSON schemas, or the JSON of one; mend the row")
    return with_arguments(messages, arguments | {TOOLS: without_nulls(tools)})


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
