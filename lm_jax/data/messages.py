"""Prompts and responses as rows have them: raw text, or messages with what their chat template takes besides."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_jax.errors import UserError

Message = dict[str, Any]  # role and content, strings, and what else a template reads: tool_calls, reasoning_content
Text = str | list[Message]  # raw text, or messages for the chat template

# Role of a first message that no template sees: its content is the JSON of the arguments that the template of this row
# takes, `tools` (the functions that the assistant may call) among them
TEMPLATE_ARGUMENTS = "template_arguments"
WEIGHT = "weight"  # of an assistant's turn, which no template sees; with 0 it is read, not learnt
TOOLS, TEMPLATE_KWARGS = "tools", "chat_template_kwargs"  # columns that become that message
_EXAMPLE = '{"enable_thinking": false}'


def messages_fault(value: Any) -> str | None:
    """What is wrong with `value` as messages, or None."""
    if not isinstance(value, list):
        return f"must be a string or messages, got {type(value).__name__}"
    if not value:
        return "is an empty list of messages"
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            return f"message {i} is no object but {type(message).__name__}"
        needed = ("role",) if message.get("tool_calls") and message.get("content") is None else ("role", "content")
        for name in needed:
            if not isinstance(message.get(name), str):
                return f"message {i} has no {name} that is a string"
        if message["role"] == TEMPLATE_ARGUMENTS and not (i == 0 and _json_object(message["content"]) is not None):
            return f"message {i} has the role {TEMPLATE_ARGUMENTS}, kept for the columns {TOOLS} and {TEMPLATE_KWARGS}"
    return None


def tidy_message(message: Message) -> Message:
    """A message of `messages_fault` None as a template gets it: with a content, and without nulls, which datasets and
    Parquet fill in."""
    return {"content": "", **{key: value for key, value in without_nulls(message).items() if key != WEIGHT}}


def is_learnt(message: Message) -> bool:
    """Whether supervised training learns the turn where it is part of a response."""
    return message["role"] == "assistant" and message.get(WEIGHT) != 0


def without_nulls(value: Any) -> Any:
    """Nested lists and objects without the objects' nulls."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def with_arguments(messages: Sequence[Message], arguments: Mapping[str, Any]) -> list[Message]:
    """`messages` behind what their chat template takes besides; see `split_arguments`."""
    head = [{"role": TEMPLATE_ARGUMENTS, "content": json.dumps(arguments)}] if arguments else []
    return [*head, *messages]


def split_arguments(messages: Sequence[Message]) -> tuple[dict[str, Any], list[Message]]:
    """(what the chat template takes besides, by its argument's name, the messages that it shows)."""
    if messages and messages[0]["role"] == TEMPLATE_ARGUMENTS:
        return json.loads(messages[0]["content"]), list(messages[1:])
    return {}, list(messages)


def read_template_kwargs(value: Any, name: str) -> dict[str, Any]:
    """A template's arguments from a config key or a column: an object or the JSON of one; None and "" are none.

    Raises:
      UserError: it is neither, or has what is not the template's to get; `name` is the key, or the row and column.
    """
    if isinstance(value, str):
        value = _json_object(value) if value.strip() else {}
    elif value is None:
        value = {}
    if not isinstance(value, dict):
        raise UserError(f"{name}: must be a JSON object, as {_EXAMPLE}; mend it")
    if wrong := sorted(value.keys() & _reserved()):
        raise UserError(f"{name}: {wrong[0]} is set by the command itself; leave it out")
    return without_nulls(value)


def map_call_arguments(messages: Sequence[Message], change: Callable[[Any], Any]) -> list[Message]:
    """The messages with the arguments of their tool calls changed."""

    def changed(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return {**call, "function": changed(call["function"])}
        return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call

    return [
        {**message, "tool_calls": [changed(call) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def decoded_arguments(arguments: Any) -> Any:
    """A call's arguments as an object where they are the JSON of one, as OpenAI's API gives them; else as they are."""
    found = _json_object(arguments) if isinstance(arguments, str) else None
    return arguments if found is None else found


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _reserved() -> frozenset[str]:
    from transformers import PreTrainedTokenizerBase

    own = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return frozenset({*own, "messages"} - {"self", "documents", "kwargs"})
