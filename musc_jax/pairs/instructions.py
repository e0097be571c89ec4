"""An instruction, a constraint or verdicts on constraints, read from a model's answer."""

import itertools
import re
from collections.abc import Sequence

from lm_jax.data.similarity import tokens
from lm_jax.generation.answer_text import is_opening, unfenced, unquoted, visible, without_closing, without_opening
from lm_jax.generation.refusals import is_refusal
from lm_jax.generation.verdicts import NO, YES
from musc_jax.pairs.constraints import folded
from musc_jax.pairs.demonstrations import Demonstration, with_input
from musc_jax.pairs.drops import Drop
from musc_jax.pairs.lists import list_items, unbold
from musc_jax.pairs.sections import Section, sections

MIN_TOKENS = 3  # "Write." asks for nothing
_NO_INPUT = re.compile(r"[\s*_(\[]*(?:none|n/?a|null|无|無)[\s*_)\].。]*", re.IGNORECASE)
_CONSTRAINT_LABEL = re.compile(
    r"[\s*_#]*(?:the )?(?:new |negated |opposite |opposing |contrary |contradicting |reversed? )*"
    r"(?:constraint|question|opposite|约束|新约束|相反的约束|相反)[\s*_]*[:：][\s*_]*",
    re.IGNORECASE,
)
_VERDICT = re.compile(rf"[\s\"'*_(\[]*(?:(?P<yes>{YES})|(?P<no>{NO}))(?![^\W\d_])", re.IGNORECASE)
_LAST_VERDICT = re.compile(rf"[\W_](?:(?P<yes>{YES})|(?P<no>{NO}))\W*$", re.IGNORECASE)
_LAYERS = 8  # of labels, quotes and fences around an instruction; an answer of thousands is no instruction
_TAIL = 40  # characters, of a line, that may hold the verdict after the constraint itself


def parse_instruction(
    answer: str,
    constraints: Sequence[str],
    input: str | None = None,
    examples: Sequence[Demonstration] = (),
    finish_reason: str = "stop",
) -> str | Drop:
    """Reads the answer to `prompts.recombine`; what comes back is a whole prompt, the input in it.

    Openings, labels, quotes, fences, closings and further examples are taken off. Markdown within the instruction,
    `**` among it, stays. An input that the answer does not hold is put below it, so that both sides of a pair have it
    word for word.

    Args:
      constraints: what was asked to be recombined.
      input: the row's, or None.
      examples: the in-context examples, whose instructions are no answer.
      finish_reason: `length` where the answer ran into the limit of tokens.

    Returns:
      The instruction, or EMPTY, TRUNCATED, REFUSAL, TOO_SHORT (fewer than 3 words), ECHO (the constraints as they were
      given, or an example's instruction).
    """
    text = visible(answer)
    if text is None:
        return Drop.TRUNCATED
    text, ran_on = _instruction_in(unfenced(text), constraints)
    if finish_reason == "length" and not ran_on:
        return Drop.TRUNCATED
    text = _bare(text)
    if not text:
        return Drop.EMPTY
    if is_refusal(text):
        return Drop.REFUSAL
    if _is_echo(text, constraints, examples):
        return Drop.ECHO
    if len(tokens(text)) < MIN_TOKENS:
        return Drop.TOO_SHORT
    return text if not input or _holds(text, input) else with_input(text, input)


def parse_constraint(answer: str, given: str, finish_reason: str = "stop") -> str | Drop:
    """Reads the answer to `prompts.negate`: one constraint, on one line, that differs from `given`.

    Returns:
      The constraint, or EMPTY, TRUNCATED, REFUSAL, TOO_SHORT (one word), ECHO (`given` again), UNPARSABLE (more than
      one constraint, or far more text than one).
    """
    text = visible(answer)
    if text is None:
        return Drop.TRUNCATED
    parts = sections(unfenced(text))
    ends = [i for i, part in enumerate(parts) if i and (part.label == "separator" or _any(parts[:i]))]
    if finish_reason == "length" and not ends:
        return Drop.TRUNCATED
    body = next((part.body for part in parts if part.body.strip() and not is_opening(part.body)), "")
    if not body.strip():
        return Drop.EMPTY
    if is_refusal(body):
        return Drop.REFUSAL
    body = without_opening(without_closing(body.strip())).strip()
    if label := _CONSTRAINT_LABEL.match(body):
        body = body[label.end() :].strip()
    if not body:
        return Drop.EMPTY
    items = list_items(body) if "\n" in body else list_items(body)[:1]
    paragraph = " ".join(body.split("\n\n")[0].split())
    text = items[0] if items else unquoted(unbold(paragraph))
    if len(items) > 1 or len(text) > 3 * len(given) + 200:
        return Drop.UNPARSABLE
    if folded(text) == folded(given):
        return Drop.ECHO
    return text if len(tokens(text)) >= 2 else Drop.TOO_SHORT


def parse_verdicts(answer: str, count: int, finish_reason: str = "stop") -> tuple[bool, ...] | Drop:
    """Reads the answer to `prompts.check`: yes or no for each of `count` constraints.

    Returns:
      The verdicts in order, or EMPTY, TRUNCATED, REFUSAL, UNPARSABLE (not exactly `count` of them, or neither yes nor
      no).
    """
    text = visible(answer)
    if text is None:
        return Drop.TRUNCATED
    if not text.strip():
        return Drop.EMPTY
    if is_refusal(text):
        return Drop.REFUSAL
    parts = sections(unfenced(text))
    body = next((part.body for part in parts if _verdicts(part.body)), "")
    ran_on = any(part.label == "separator" for part in parts)
    verdicts = _verdicts(body)
    if finish_reason == "length" and not ran_on and len(verdicts) <= count:
        return Drop.TRUNCATED
    known = tuple(verdict for verdict in verdicts if verdict is not None)
    return Drop.UNPARSABLE if len(verdicts) != count or len(known) < len(verdicts) else known


def _bare(text: str) -> str:
    """Without what stands around an instruction, layer by layer."""
    for _ in range(_LAYERS):
        bare = without_closing(without_opening(text)).strip()
        bare = _unemphasised(unquoted(_unemphasised(unfenced(bare).strip())))
        first = sections(bare)[:2]
        if len(first) == 2 and first[1].label == "instruction" and not first[0].body.strip():
            bare = bare[first[1].start :].strip()
        if bare == text:
            break
        text = bare
    return text


def _verdicts(body: str) -> list[bool | None]:
    lines = list_items(body) or [line for line in body.split("\n") if line.strip()]
    found = [_VERDICT.match(line) or _LAST_VERDICT.search(line[-_TAIL:]) for line in lines]
    verdicts = [bool(match["yes"]) if match else None for match in found]
    return verdicts if any(verdict is not None for verdict in verdicts) else []


def _instruction_in(text: str, constraints: Sequence[str]) -> tuple[str, bool]:
    """The part of an answer that is the instruction, and whether a further example follows it."""
    parts = list(itertools.dropwhile(_is_blank, sections(text)))
    if not parts:
        return "", False
    labelled = [
        i
        for i, part in enumerate(parts)
        if part.label == "instruction" and all(_is_before(before, constraints) for before in parts[:i])
    ]
    first = next((i for i in labelled if parts[i].body.strip()), labelled[0] if labelled else 0)
    # A label that begins the instruction itself belongs to it
    begin = parts[first].start if labelled or parts[0].label in (None, "separator", "output") else 0
    for i in range(first + 1, len(parts)):
        label, following = parts[i].label, parts[i + 1].label if i + 1 < len(parts) else None
        empty_input = label == "input" and (_NO_INPUT.fullmatch(parts[i].body) or following == "constraints")
        if label == "separator" or empty_input or (label == "constraints" and following == "instruction"):
            return text[begin : parts[i - 1].end], True
    return text[begin:], False


def _holds(text: str, input: str) -> bool:
    letters = folded(input)
    # Punctuation and spaces may differ in a long input; a short one ("cat") must not be found inside a word
    verbatim = re.search(rf"(?<!\w){re.escape(input.strip())}(?!\w)", text)
    return bool(verbatim) or (len(letters) >= 20 and letters in folded(text))


def _is_blank(part: Section) -> bool:
    return part.label in (None, "separator") and not part.body.strip()


def _is_before(part: Section, constraints: Sequence[str]) -> bool:
    """Whether a section only leads up to the instruction: nothing, an announcement, or the question again."""
    if part.label is None:
        given = {folded(text) for text in constraints}
        items = list_items(part.body)
        return (
            not part.body.strip()
            or is_opening(part.body)
            or (bool(items) and all(folded(item) in given for item in items))
        )
    return part.label in ("input", "constraints", "separator", "example", "output")


def _is_echo(text: str, constraints: Sequence[str], examples: Sequence[Demonstration]) -> bool:
    letters = folded(text)
    if letters in {folded(t) for e in examples for t in (e.instruction, e.task)}:
        return True
    for constraint in sorted(map(folded, constraints), key=len, reverse=True):
        letters = letters.replace(constraint, "")
    return re.sub(r"\d|constraints?|input|none|约束", "", letters) == ""


def _unemphasised(text: str) -> str:
    for mark in ("**", "__"):
        inner = text[2:-2]
        if len(text) > 4 and text.startswith(mark) and text.endswith(mark) and mark not in inner:
            return inner.strip()
    return text


def _any(parts: Sequence[Section]) -> bool:
    return any(part.body.strip() and not is_opening(part.body) for part in parts)
