"""Conversations in the forms that rows have, as messages of role and content."""

import json
import re
from collections.abc import Mapping
from typing import Any

from lm_jax.data.messages import TEMPLATE_ARGUMENTS, WEIGHT, Message, without_nulls
from lm_jax.errors import UserError

_CALLS = ("function_call", "tool_call")  # whose text is the JSON of a call or of several
_ROLES = {
    name: role
    for role, names in {
        "user": "user human prompter",
        "assistant": "assistant gpt chatgpt bing bard model bot chatbot function_call tool_call",
        "system": "system",
        "tool": "tool observation function function_response tool_response",
    }.items()
    for name in names.split()
}
_LEARNT = ("train", "training", "train_on_turn")  # axolotl's names for a weight of true or false
# Texts that hold a conversation: what stands before a turn of which role. Of Anthropic's HH-RLHF, Guanaco and ChatML
_MARKS = tuple(map(re.compile, (r"\n\n(Human|Assistant): ?", r"### (Human|Assistant):", r"<\|im_start\|>(\w+)\n")))
_CHATML_END = re.compile(r"<\|im_end\|>\s*$")


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def read_turns(value: Any, name: str, at: str) -> list[Message]:
    """A conversation as messages.

    Of a list: messages of `role` and `content` (a text, or OpenAI's parts of text), ShareGPT's `from` and `value`,
    {"input", "output"} or [question, answer] for two turns, texts for turns of user and assistant one after the other.
    Or one such turn; an object with such `messages`; a text with marks between the turns; the JSON of any of it. Roles
    get the names that chat templates know; calls become `tool_calls`. An assistant's turn keeps a WEIGHT that is not 1.

    Args:
      name: the column.
      at: names the row in errors, as in all functions here.

    Raises:
      UserError: it is none, or a turn holds more than text.
    """
    if isinstance(value, str):
        value = _from_text(value, name, at)
    if isinstance(value, Mapping):
        value = value["messages"] if isinstance(value.get("messages"), list) else [value]
    if not isinstance(value, list):
        raise UserError(f"{at}: {name} must be a string or messages, got {type(value).__name__}; {_GIVE}")
    if not value:
        raise UserError(f"{at}: {name} is an empty list of messages; {_GIVE}, or drop the row")
    messages: list[Message] = []
    for number, turn in enumerate(value):
        what = f"{at}: {name} message {number}"
        pair = turn if isinstance(turn, (list, tuple)) and len(turn) == 2 else None
        if isinstance(turn, Mapping) and {"input", "output"} <= turn.keys():
            pair = turn["input"], turn["output"]
        if pair is not None:
            messages += [_message({"role": r, "content": c}, what) for r, c in zip(_TALK, pair, strict=True)]
        elif isinstance(turn, str):
            messages.append(message(_TALK[number % 2], turn))
        elif isinstance(turn, Mapping):
            messages.append(_message(turn, what))
        else:
            raise UserError(f"{what} is no object but {type(turn).__name__}; {_GIVE}")
    if any(m["role"] == TEMPLATE_ARGUMENTS for m in messages):
        raise UserError(
            f"{at}: {name} has a message of the role {TEMPLATE_ARGUMENTS}, kept for the columns tools and "
            "chat_template_kwargs; rename the role"
        )
    return messages


_TALK = ("user", "assistant")
_GIVE = "give a list of {'role': ..., 'content': ...}"


def without_weights(messages: list[Message], at: str, refuse: bool) -> list[Message]:
    """`messages`, where only supervised rows know a turn's weight; raises UserError for one where they `refuse` it."""
    if refuse and any(WEIGHT in m for m in messages):
        raise UserError(f"{at}: a response has a turn of another weight than 1, which only supervised rows can have")
    return [{key: value for key, value in m.items() if key != WEIGHT} for m in messages]


def _message(given_turn: Mapping[str, Any], what: str) -> Message:
    turn: dict[str, Any] = without_nulls(dict(given_turn))
    sharegpt = "role" not in turn
    given = turn.pop("from" if sharegpt else "role", None)
    content = next((turn.pop(key) for key in ("content", "value", "text") if key in turn), None)
    if not isinstance(given, str):
        raise UserError(f"{what} has no role that is a string; {_GIVE}")
    role = _ROLES.get(given.lower(), "" if sharegpt else given)  # a template may know others
    if not role:
        raise UserError(f"{what} is from {given!r}; known are {', '.join(_ROLES)}: rename or drop it")
    if isinstance(call := turn.pop("function_call", None), dict):  # of OpenAI's API before it had tools
        turn["tool_calls"] = [{"type": "function", "function": call}]
    if isinstance(content, list):
        content = _parts(content, what)
    if content is None and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise UserError(f"{what} has no content that is a string; {_GIVE}")
    if given.lower() in _CALLS:
        content, turn["tool_calls"] = "", _calls(content, what)
    weight = _weight(turn, role, what)
    return {"role": role, "content": content, **turn, **({} if weight == 1 else {WEIGHT: weight})}


def _weight(turn: dict[str, Any], role: str, what: str) -> float:
    """Takes the keys that say how much a turn is learnt out of it; only those of the assistant's can be."""
    found = [turn.pop(key) for key in (WEIGHT, *_LEARNT) if key in turn]
    for value in found:
        if type(value) not in (bool, int, float) or not 0 <= value < 1e30:
            raise UserError(f"{what} has the weight {value!r}, no number >= 0; mend it")
        if value is True and role != "assistant":
            raise UserError(f"{what} is to be learnt, but is of the {role}; only the assistant's turns can be")
    return float(min(found)) if found and role == "assistant" else 1.0


def _parts(parts: list[Any], what: str) -> str:
    texts: list[str] = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise UserError(f"{what} has a part of type {kind!r}, and models here read text alone; drop the row")
        texts.append(text)
    return "".join(texts)


def _calls(content: str, what: str) -> list[dict[str, Any]]:
    try:
        calls = json.loads(content)
    except ValueError:
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise UserError(f"{what} is a {_CALLS[0]} that is no JSON of {{'name': ..., 'arguments': ...}}; mend the row")
    return [{"type": "function", "function": call} for call in calls]


def _from_text(text: str, name: str, at: str) -> Any:
    """The JSON of a conversation, or the turns between the marks of one."""
    if text.lstrip().startswith(("[", "{")):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pass
    for marks in _MARKS:
        before, *turns = marks.split(text)
        if turns and not before.strip():
            return [
                {"from": role, "value": _tidy(content, marks)} for role, content in zip(*[iter(turns)] * 2, strict=True)
            ]
    raise UserError(
        f"{at}: {name} is a text without turns that could be told apart (as '### Human: ... ### Assistant: ...'), and "
        "no column is a prompt; give messages, or name the columns of yours: "
        '--config.columns="prompt=..."'
    )


def _tidy(content: str, marks: re.Pattern[str]) -> str:
    if marks is _MARKS[0]:  # as TRL's conversion of HH-RLHF
        return content
    return _CHATML_END.sub("", content) if marks is _MARKS[2] else content.strip()
