"""A model's decomposition of an instruction, read from its answer (MuSC, arXiv 2502.11541, section 3.2)."""

import dataclasses
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from lm_jax.generation.answer_text import CLOSING, unfenced, unquoted, visible, without_closing
from lm_jax.generation.refusals import is_refusal
from musc_jax.pairs.demonstrations import MIN_CONSTRAINTS, Demonstration
from musc_jax.pairs.drops import Drop
from musc_jax.pairs.lists import list_items
from musc_jax.pairs.sections import Section, sections

MAX_CONSTRAINTS = 40  # more come from a model that no longer stops
MAX_AROUND = 200  # letters of prose around a list that is shorter than it
_NONE = re.compile(
    r"(?:none|n/?a|null|nil|no (?:specific |additional )?input|not (?:applicable|provided|given)|empty"
    r"|无|無|没有|ninguna?|aucune?|keine?|nenhuma?|nessuno|なし|нет|없음)(?!\w)",
    re.IGNORECASE,
)
_TELLING = {"Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Nd", "Nl", "No", "Sm", "Sc", "So"}
_AROUND = " \n\t*_()[]\"'.。-"
_JSON_KEYS = ("constraints", "decomposed_questions", "questions", "requirements")


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """What a response must meet, the task itself first, and the material that it works on, None where there is none."""

    constraints: tuple[str, ...]
    input: str | None = None


@dataclasses.dataclass(frozen=True)
class SelfInstructed:
    """A task of the model's own with its decomposition; the instruction holds its input."""

    instruction: str
    decomposition: Decomposition


def parse_decomposition(
    answer: str,
    instruction: str | None = None,
    finish_reason: str = "stop",
    examples: Sequence[Demonstration] = (),
    material: bool = True,
) -> Decomposition | Drop:
    """Reads the answer to `prompts.decompose`.

    Any manner of numbering and markdown passes, see `lists.list_items`; so do text around the list, JSON, and an
    answer that goes on with a further example, which is cut. Repeated items are merged. A list that ran into the limit
    of tokens is kept up to its last whole item, unless an input may have been lost with the rest.

    Args:
      answer: the model's text, with or without the label that raw text ends with.
      instruction: what was asked about. With it an input must stand in it, and is returned as it stands there.
      finish_reason: `length` where the answer ran into the limit of tokens.
      examples: the in-context examples, whose constraints are no answer to another instruction.
      material: whether the input is wanted; False where it is known, or nobody needs it.

    Returns:
      The decomposition, or why there is none: EMPTY, TRUNCATED, REFUSAL, UNPARSABLE, TOO_FEW_CONSTRAINTS (fewer than
      2), TOO_MANY_CONSTRAINTS, INVENTED_INPUT, ECHO (an example's constraints, or the whole
      instruction as input).
    """
    text = _readable(answer)
    if isinstance(text, Drop):
        return text
    if (read := _from_json(text)) is not None:
        items, given, tail, parts, at, ran_on = *read, None, [], 0, True
    else:
        parts = sections(text)
        at, items = _list_section(parts)
        given, tail, ran_on = _input_section(parts, at, text) if items else (None, None, False)
    if finish_reason == "length" and not ran_on:
        # An instruction of one line holds no material that a list which never came to the input could have lost
        if not items or (material and (given is not None or "\n" in (instruction or "").strip())):
            return Drop.TRUNCATED
        items = items if given is not None else _whole(parts[at].body)
        if not items:
            return Drop.TRUNCATED
    found = merged(item for item in items if not re.fullmatch(r"(?i)input\s*[:：]\s*none\W*", item))
    if drop := _count_fault(found):
        return drop
    if any(found == merged(e.constraints) and instruction not in (e.instruction, e.task) for e in examples):
        return Drop.ECHO
    source = _source(given, tail, instruction) if material else None
    return source if isinstance(source, Drop) else Decomposition(found, source)


def parse_self_instructed(
    answer: str, finish_reason: str = "stop", examples: Sequence[Demonstration] = ()
) -> SelfInstructed | Drop:
    """Reads the answer to `prompts.self_instruct`: constraints, then the instruction, in either order.

    Returns:
      The task, or EMPTY, TRUNCATED, REFUSAL, UNPARSABLE (no list, or no instruction), TOO_FEW_CONSTRAINTS,
      TOO_MANY_CONSTRAINTS, ECHO (the instruction of one of `examples`).
    """
    text = _readable(answer)
    if isinstance(text, Drop):
        return text
    parts = sections(text)
    at, items = _list_section(parts)
    tasks = [i for i, part in enumerate(parts) if part.label == "instruction" and part.body.strip()]
    if not items or not tasks:
        return Drop.TRUNCATED if finish_reason == "length" else Drop.UNPARSABLE
    # The instruction may have labels of its own, and a list of requirements; a further example ends it
    task = min((i for i in tasks if i > at), default=tasks[0])
    ends = [
        i
        for i, part in enumerate(parts)
        if i > task and (part.label == "separator" or (part.label == "constraints" and i != at and i < tasks[-1]))
    ]
    if task < at:
        ends = [at, *ends]
    if finish_reason == "length" and not (ends and task > at):
        return Drop.TRUNCATED
    end = parts[ends[0] - 1].end if ends else len(text)
    found = merged(items)
    if drop := _count_fault(found):
        return drop
    instruction = without_closing(text[parts[task].start : end]).strip()
    if folded(instruction) in {folded(given) for e in examples for given in (e.instruction, e.task)}:
        return Drop.ECHO
    return SelfInstructed(instruction, Decomposition(found))


def merged(texts: Iterable[str]) -> tuple[str, ...]:
    """Without repetitions, which may differ in case, width, spaces and punctuation; the first of each stays."""
    return tuple({folded(text) or text: text for text in reversed(list(texts))}.values())[::-1]


def folded(text: str) -> str:
    """Letters, digits, marks and symbols (as < or €) without spaces and punctuation; case and width folded."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if unicodedata.category(c) in _TELLING)


def _readable(answer: str) -> str | Drop:
    text = visible(answer)
    if text is None:
        return Drop.TRUNCATED
    if not text.strip():
        return Drop.EMPTY
    text = unfenced(text)
    return Drop.REFUSAL if is_refusal(text) else text


def _list_section(parts: list[Section]) -> tuple[int, list[str]]:
    """The first section that holds the answer's list, and its items; (0, []) where there is none."""
    for i, part in enumerate(parts):
        follows = parts[i + 1].label if i + 1 < len(parts) else None
        # What stands before a section of constraints is not the list, even if it has items: the instruction again
        if part.label == "constraints" or (part.label in (None, "output") and follows != "constraints"):
            if items := list_items(part.body):
                written = sum(len(folded(item)) for item in items)
                around = len(folded(part.body)) - written
                # A response with a list in it: the task was carried out instead
                return (0, []) if around > max(written, MAX_AROUND) else (i, items)
    return 0, []


def _whole(body: str) -> list[str]:
    """The items of a list that was cut, without the last one where it does not end as the first does."""
    items = list_items(body)
    end = items[0][-1]
    # What is left of a last line may be the next item's number, and look like more of the item before it
    for read in (items, list_items(body.rpartition("\n")[0])):
        if not end.isalnum() and read and read[-1].endswith(end):
            return read
    return items[:-1]


def _input_section(parts: list[Section], at: int, text: str) -> tuple[str | None, str | None, bool]:
    """The input's section, all text from it on, and whether the answer goes on with a further example."""
    if at + 1 < len(parts) and parts[at + 1].label == "input":
        return parts[at + 1].body, text[parts[at + 1].start :], len(parts) > at + 2
    before = [part.body for part in parts[:at] if part.label == "input"]
    return (before[0] if before else None), None, len(parts) > at + 1


def _source(given: str | None, tail: str | None, instruction: str | None) -> str | None | Drop:
    """The input that the answer means."""
    bare = "" if given is None else given.strip(_AROUND)
    if given is None or not bare or _NONE.fullmatch(bare):
        return None
    candidates = [text for text in (tail, given, _before_closing(given)) if text is not None and text.strip()]
    explained = bool(_NONE.match(bare.split("\n")[0]))  # "None (the instruction brings no material)"
    if instruction is None:
        return None if explained else unfenced(candidates[-1]).strip() or None
    for candidate in candidates:  # the longest first: the input may hold lines that look like labels
        for form in (candidate, unfenced(candidate), unquoted(candidate)):
            if span := _located(form.strip(), instruction):
                rest = folded(instruction[: span[0]] + instruction[span[1] :])
                return instruction[slice(*span)] if rest else Drop.ECHO
    return None if explained else Drop.INVENTED_INPUT


def _before_closing(text: str) -> str:
    lines = text.strip().split("\n")
    ends = [i for i, line in enumerate(lines) if i and CLOSING.match(line)]
    return "\n".join(lines[: ends[0]]) if ends else text


def _located(text: str, whole: str) -> tuple[int, int] | None:
    """Where `text` stands in `whole`, up to punctuation and spaces if it is not there verbatim."""
    if (start := whole.find(text)) >= 0:
        return start, start + len(text)
    letters = [(c, i) for i, character in enumerate(whole) for c in folded(character)]
    wanted = "".join(folded(character) for character in text)
    start = "".join(c for c, _ in letters).find(wanted) if wanted else -1
    if start < 0:
        return None
    begin, end = letters[start][1], letters[start + len(wanted) - 1][1] + 1
    # Punctuation around it belongs to it: all of it at the end of the instruction, else up to the end of the line
    after = letters[start + len(wanted)][1] if start + len(wanted) < len(letters) else len(whole)
    gap = whole[end:after]
    end += len(gap.rstrip() if after == len(whole) else gap.split("\n")[0].rstrip())
    while begin and not whole[begin - 1].isalnum() and not whole[begin - 1].isspace():
        begin -= 1
    return begin, end


def _from_json(text: str) -> tuple[list[str], str | None] | None:
    """(items, input) of an answer that is JSON, or None."""
    text = text.strip()
    if not text.startswith(("[", "{")):
        return None
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    given = None
    if isinstance(value, dict):
        lowered = {str(key).casefold(): item for key, item in value.items()}
        given = lowered.get("input")
        value = next((lowered[key] for key in _JSON_KEYS if key in lowered), None)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        return None
    return [" ".join(i.split()) for i in value if i.strip()], given if isinstance(given, str) else None


def _count_fault(items: tuple[str, ...]) -> Drop | None:
    if not items:
        return Drop.UNPARSABLE
    if len(items) < MIN_CONSTRAINTS:
        return Drop.TOO_FEW_CONSTRAINTS
    return Drop.TOO_MANY_CONSTRAINTS if len(items) > MAX_CONSTRAINTS else None
