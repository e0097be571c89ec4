"""Layouts of rows: which columns hold the prompt and the responses, as one table for each kind of row.

docs/data.md shows a row of every layout, with the public data set that looks like it.
"""

import collections
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_jax.data.conversations import message, read_turns, without_weights
from lm_jax.data.faults import Faults
from lm_jax.data.messages import (
    TEMPLATE_KWARGS,
    TOOLS,
    Message,
    Text,
    read_template_kwargs,
    with_arguments,
    without_nulls,
)
from lm_jax.errors import UserError

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Columns that stand together, in lower case.

    Attributes:
      asked: what the response answers. `prompt` is raw text where it is a string; any other string, those of several
        columns joined by line breaks, is a user's message. The first column is needed. None: the answers hold it.
      answers: the response, or the chosen and the rejected one.
      better: a column that says which of two answers is the better one, where their order does not.
      first, second: its values for either; (): a number below 0 or above.
    """

    asked: tuple[str, ...]
    answers: tuple[str, ...]
    better: str | None = None
    first: str = ""
    second: str = ""

    @property
    def needed(self) -> tuple[str, ...]:
        return (*self.asked[:1], *self.answers, *([self.better] if self.better else []))

    @property
    def columns(self) -> frozenset[str]:
        return frozenset((*self.asked, *self.needed))

    def __str__(self) -> str:
        return ", ".join((*self.asked, *self.needed[bool(self.asked) :]))


def _layout(asked: str, answers: str, better: str | None = None, first: str = "", second: str = "") -> Layout:
    return Layout(tuple(asked.split()), tuple(answers.split()), better, first, second)


# The first that fits is taken
PREFERENCE = (
    _layout("prompt", "chosen rejected"),
    _layout("instruction input", "chosen rejected"),
    _layout("question context", "chosen rejected"),
    _layout("conversations", "chosen rejected"),
    _layout("input", "chosen rejected"),
    _layout("", "chosen rejected"),
    _layout("instruction input", "chosen_response rejected_response"),
    _layout("prompt", "chosen_response rejected_response"),
    _layout("input", "preferred_output non_preferred_output"),
    _layout("question", "response_j response_k"),
    _layout("prompt", "response_1 response_2", "preference_strength"),
    _layout("context", "response1 response2", "overall_preference"),
    _layout("instruction input", "output_1 output_2", "label", "1", "2"),
    _layout("prompt", "response_0 response_1", "better_response_id", "0", "1"),
    _layout("history", "human_ref_a human_ref_b", "labels", "1", "0"),
    _layout("", "conversation_a conversation_b", "winner", "model_a", "model_b"),
)
SUPERVISED = (
    _layout("", "messages"),
    _layout("", "conversations"),
    _layout("", "conversation"),
    _layout("prompt", "response"),
    _layout("prompt", "completion"),
    _layout("instruction input", "output"),
    _layout("instruction context", "response"),
    _layout("question context", "response"),
    _layout("question context", "answer"),
    _layout("query", "response"),
    _layout("problem", "solution"),
    _layout("problem", "generated_solution"),
    _layout("question", "generated_solution"),
    _layout("", "data"),
    _layout("", "text"),
)
PROMPTS = (
    _layout("prompt", ""),
    _layout("instruction input", ""),
    _layout("question context", ""),
    _layout("query", ""),
    _layout("problem", ""),
    _layout("messages", ""),
    _layout("conversations", ""),
)

STRING = "a string"
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_TURNS = ("messages", "conversations")  # columns whose text, if they hold one, is a conversation


@dataclasses.dataclass(frozen=True)
class Read:
    """A row. `prompt` is None where the answers are whole conversations; the rest is strings (raw text) or messages."""

    row: int
    prompt: Text | None
    answers: list[Text]
    columns: dict[str, Any]  # as `present_columns` gives them

    @property
    def form(self) -> str:
        return STRING if isinstance(self.prompt, str) else "messages"


def present_columns(row: Row) -> dict[str, Any]:
    """The row without nulls, which datasets and Parquet fill in where a row does not have a column; names in lower
    case, unless the row has one of that name too."""
    found = {name: value for name, value in row.items() if value is not None}
    return {name.lower() if name.lower() not in found else name: value for name, value in found.items()}


def columns_of(row: Row) -> str:
    """The names of a row's columns, for an error."""
    return f"it has {', '.join(sorted(name for name, value in row.items() if value is not None)) or 'no columns'}"


def with_response(column: str) -> tuple[Layout, ...]:
    """Supervised rows that learn a column: beside one that is asked it is the response, alone a conversation."""
    asked = dict.fromkeys(layout.asked for layout in PROMPTS if layout.asked[0] not in _TURNS)
    return (*(Layout(names, (column,)) for names in asked), Layout((), (column,)))


def read_layout(
    rows: Sequence[Row], layouts: Sequence[Layout], faults: Faults, named: Sequence[str] = ()
) -> tuple[Layout, list[Read]]:
    """The rows of one file in the layout that most of them have, and that layout.

    A column `system` (or `system_prompt`) is the first message, `history` the turns before the question, `tools` what
    the model may call. Where the file has any of them, or the answers are messages, a string prompt is a user's message
    too; where they are whole conversations, it must be a question in them.

    Args:
      layouts: which there may be.
      faults: gets every row that could not be read, with the cure.
      named: columns that the user named: a layout that has them goes first.

    Raises:
      UserError: no row has any of the layouts.
    """
    layouts = sorted(layouts, key=lambda layout: -sum(name in layout.columns for name in named))
    present = [present_columns(row) for row in rows]
    fits = [next((la for la in layouts if all(n in columns for n in la.needed)), None) for columns in present]
    found = collections.Counter(fit for fit in fits if fit is not None).most_common(1)
    layout = found[0][0] if found else _nearest(present[0] if rows else {}, layouts)
    if layout is None:
        as_in = ",".join(f"{name}=..." for name in layouts[0].needed)
        raise UserError(
            f"{faults.where} row 0: {columns_of(rows[0])}, no layout that is known; name yours, as in --config.columns="
            f'"{as_in}", or rename them to {"; or ".join(map(str, layouts))}'
        )
    chat = any(not _blank(columns.get(name)) for columns in present for name in (*_SYSTEM, "history", TOOLS))
    read = []
    for number, (columns, fit) in enumerate(zip(present, fits, strict=True)):
        at = f"{faults.where} row {number}"
        with faults.of(number):
            if fit is not layout and any(name not in columns for name in layout.needed):
                raise _misfit(rows[number], layout, fit, at)
            read.append(Read(number, *_read(columns, layout, chat, at), columns))
    return layout, read


def read_prompts(rows: Sequence[Row], faults: Faults, named: Sequence[str] = ()) -> dict[int, Text]:
    """Row number -> what the model is given, a string (raw text) or messages; see `read_layout`."""
    layout, read = read_layout(rows, PROMPTS, faults, named)
    found = {}
    for r in read:
        at = f"{faults.where} row {r.row}"
        with faults.of(r.row):
            prompt = r.prompt or ""
            if not isinstance(prompt, str):
                if layout.asked[0] in _TURNS and prompt[-1]["role"] == "assistant":
                    raise UserError(f"{at}: {layout.asked[0]} ends with an answer already; leave that turn out")
                prompt = without_weights(prompt, at, refuse=False)
            found[r.row] = prompt
    return found


def read_as(layout: Layout, read: list[Read]) -> str:
    """What the rows are, for a report."""
    return f"{layout}" + (" (raw text)" if read and read[0].form == STRING else "")


def one_form(read: list[Read], form: Callable[[Read], str], faults: Faults) -> list[Read]:
    """The rows in the commonest form, where a file must have one; what is odd about the others is noted."""
    forms = collections.Counter(map(form, read)).most_common(1)
    kept = []
    for r in read:
        if form(r) == forms[0][0]:
            kept.append(r)
        else:
            faults.add(r.row, f"{faults.where} row {r.row}: {form(r)}, but in most rows {forms[0][0]}; {_SPLIT}")
    return kept


_SYSTEM = ("system", "system_prompt")
_SPLIT = "one file must have one layout, so split it"


def _nearest(columns: Row, layouts: Sequence[Layout]) -> Layout | None:
    """The layout of which the row has most columns and lacks fewest."""
    best = max(layouts, key=lambda layout: 2 * sum(n in columns for n in layout.needed) - len(layout.needed))
    return best if any(name in columns for name in best.needed) else None


def _misfit(row: Row, layout: Layout, fit: Layout | None, at: str) -> UserError:
    if fit is not None:
        return UserError(f"{at}: the columns are {fit}, but in most rows {layout}; {_SPLIT} ({columns_of(row)})")
    missing = next(name for name in layout.needed if name not in present_columns(row))
    return UserError(
        f"{at}: column {missing!r} is missing, of {layout} ({columns_of(row)}); add it, or name yours: "
        f'--config.columns="{missing}=..."'
    )


def _read(columns: Row, layout: Layout, chat: bool, at: str) -> tuple[Text | None, list[Text]]:
    """(prompt, answers)"""
    for name in _MEDIA:
        if not _blank(columns.get(name)):
            raise UserError(
                f"{at}: has {name}, and models here read text alone; drop the row or leave it out: "
                f'--config.columns="{name}="'
            )
    answers = [_answer(columns[name], name, bool(layout.asked), at) for name in layout.answers]
    question = _question(columns, layout, at) if layout.asked else None
    if (
        isinstance(question, str)
        and layout.asked[0] == "prompt"
        and not chat
        and all(isinstance(a, str) for a in answers)
    ):
        return question, answers
    before = _before(columns, layout, at)
    turns = [[message("assistant", a)] if isinstance(a, str) else a for a in answers]
    if isinstance(question, list):
        repeated = len(question) if all(t[: len(question)] == question for t in turns) else 0
        return _behind(before, question, at), [t[repeated:] for t in turns]
    if question is not None and all(t[0]["role"] == "assistant" for t in turns):
        return _behind(before, [message("user", question)], at), list(turns)
    for t in turns:
        if question is not None and question.strip() not in [m["content"].strip() for m in t if m["role"] == "user"]:
            raise UserError(
                f"{at}: {layout.asked[0]} is no question of the conversation in {' or '.join(layout.answers)}; make "
                f'them alike, or leave it out: --config.columns="{layout.asked[0]}="'
            )
    return None, [_behind(before, t, at) for t in turns]


def _answer(value: Any, name: str, asked: bool, at: str) -> Text:
    if asked and isinstance(value, str):
        return value
    if asked and isinstance(value, list) and value and not all(isinstance(turn, Mapping) for turn in value):
        raise UserError(
            f"{at}: {name} is a list of {type(value[0]).__name__}, neither a string nor messages; mend the row"
        )
    return read_turns(value, name, at)


def _question(columns: Row, layout: Layout, at: str) -> Text:
    first, *others = layout.asked
    if not isinstance(columns[first], str) or first in _TURNS:
        return read_turns(columns[first], first, at)
    if first == "prompt":
        text = columns[first]
    elif not (text := "\n".join(filter(None, (text_of(columns, name, at) for name in layout.asked)))):
        raise UserError(f"{at}: {' and '.join(layout.asked)} are both empty; drop the row")
    for name in ("input", "context"):
        beside = columns.get(name)
        if not (
            name in layout.asked or _blank(beside) or "original_instruction" in columns or str(beside).strip() in text
        ):
            raise UserError(
                f"{at}: {name} would be left out, as it stands beside {first}; give the two as --config.columns="
                f'"instruction={first},input={name}", or leave it out: --config.columns="{name}="'
            )
    return text


def _before(columns: Row, layout: Layout, at: str) -> list[Message]:
    """What other columns put before the question: what the template takes, a system message, earlier turns."""
    asked = columns[layout.asked[0]] if layout.asked else None
    given = asked if isinstance(asked, Mapping) and TOOLS in asked else columns  # OpenAI's has its tools inside
    arguments = read_template_kwargs(columns.get(TEMPLATE_KWARGS), f"{at}: {TEMPLATE_KWARGS}")
    tools = _tools(given, at)
    messages = with_arguments([], arguments | ({TOOLS: without_nulls(tools)} if tools else {}))
    systems = {text for name in _SYSTEM if (text := text_of(columns, name, at)).strip()}
    if len(systems) > 1:
        raise UserError(f"{at}: {' and '.join(_SYSTEM)} differ; keep one of them")
    messages += [message("system", text) for text in systems]
    history = [] if "history" in layout.asked else columns.get("history") or []
    if not isinstance(history, list):
        raise UserError(f"{at}: history must be a list of [question, answer] strings, or empty; mend the row")
    return [*messages, *(read_turns(history, "history", at) if history else [])]


def _behind(before: list[Message], messages: list[Message], at: str) -> list[Message]:
    """`messages` behind what other columns put before them; a system message stands once."""
    own = [m for m in messages if m["role"] == "system"]
    if own and any(m["role"] == "system" for m in before):
        if [m["content"].strip() for m in before if m["role"] == "system"] != [own[0]["content"].strip()]:
            raise UserError(f"{at}: has a system message and another text in the column for one; keep one of them")
        before = [m for m in before if m["role"] != "system"]
    return [*before, *messages]


def _tools(columns: Row, at: str) -> list[Any]:
    """The functions of the column `tools`, a list of JSON schemas or its JSON."""
    tools = columns.get(TOOLS)
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            tools = 0
    if _blank(tools):
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{at}: tools must be a list of JSON schemas, or the JSON of one; mend the row")
    return tools


def text_of(columns: Row, name: str, at: str) -> str:
    """A column that is a text, empty where there is none; raises UserError for anything else."""
    value = columns.get(name, "")
    if not isinstance(value, str):
        raise UserError(f"{at}: {name} must be a string, got {type(value).__name__}; mend the row")
    return value


def _blank(value: Any) -> bool:
    return value is None or value in ("", [], {}) or (isinstance(value, str) and not value.strip())


def counted(dropped: Mapping[str, int]) -> str:
    """Reasons with how many rows each took, for a report."""
    return ", ".join(f"{n} {reason}" for reason, n in dropped.items() if n)
