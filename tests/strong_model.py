"""A scripted stand-in for a model, as an HTTP server's script: it reads the prompts and reacts to what stands in them.

It takes an instruction apart at its sentences, joins constraints back into one, contradicts a constraint, says which
of them an instruction has, and answers an instruction point by point, so that what went in is seen to come out.
"""

import re
from collections.abc import Callable

from musc_jax.prompts import DEFAULT, SEPARATOR
from tests.http_server import Asked, Reply, completion

TASK, POINT, AGAINST = "Does the response do this: ", "Does the response heed this: ", "Does the response act against this: "
_LEADS = re.compile(f"(?:{TASK}|{POINT})")
_SUBJECTS = "moths tides glass chess rivers bread maps clocks dunes violins".split()
_STAGES = {getattr(DEFAULT, name).task: name for name in ("decompose", "self_instruct", "recombine", "negate", "check")}


def stage_of(asked: Asked) -> str:
    """Which stage asks; `respond` where the prompt is an instruction by itself."""
    head = asked.body["messages"][0]["content"] if "messages" in asked.body else asked.body["prompt"]
    return next((name for task, name in _STAGES.items() if head.startswith(task)), "respond")


def question_of(asked: Asked) -> str:
    """The row's own question, of messages or of raw text."""
    return asked.prompt if "messages" in asked.body else asked.prompt.split(f"\n\n{SEPARATOR}\n\n")[-1]


def core(constraint: str) -> str:
    """What a constraint of this model's asks for, as it stands in an instruction."""
    return " ".join(_LEADS.sub("", constraint).rstrip("?").split())


def sentences(instruction: str) -> list[str]:
    """What the model takes for constraints: sentences, and the lines of a list; of a single one its halves."""
    parts = re.split(r"(?<=[.!?。！？])\s+|\n+", instruction.strip())
    parts = [part.strip(" .!?-*") for part in parts]
    parts = [part for part in parts if len(re.findall(r"\w+", part)) > 1]
    if len(parts) == 1 and len(words := parts[0].split()) >= 6:
        parts = [" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])]
    return parts


def answer(asked: Asked) -> str:
    """What a strong model would write."""
    stage, question = stage_of(asked), question_of(asked)
    return {
        "decompose": _decompose,
        "self_instruct": lambda text: _self_instruct(text, asked.body["seed"]),
        "recombine": _recombine,
        "negate": lambda text: AGAINST + core(re.search(r"Constraint:\n(.*)", text)[1]) + "?",
        "check": _check,
        "respond": _respond,
    }[stage](question)


def script(change: Callable[[str, Asked], str | Reply] = lambda text, asked: text) -> Callable[[Asked], Reply]:
    """A server's script. `change`: what becomes of the answer, as a text or a whole reply."""

    def reply(asked: Asked) -> Reply:
        changed = change(answer(asked), asked)
        return completion(asked, [changed]) if isinstance(changed, str) else changed

    return reply


def _numbered(texts: list[str]) -> str:
    return "\n".join(f"{i}. {text}" for i, text in enumerate(texts, 1))


def _items(text: str) -> list[str]:
    return re.findall(r"^\d+\. (.*)$", text, re.MULTILINE)


def _decompose(question: str) -> str:
    instruction = question.removeprefix("Instruction:\n").removesuffix("\n\nConstraints:")
    task, _, material = instruction.partition("\n\n")
    parts = sentences(task)
    constraints = [(TASK if i == 0 else POINT) + part + "?" for i, part in enumerate(parts)]
    return f"Constraints:\n{_numbered(constraints)}\n\nInput:\n{material.strip() or 'None'}"


def _self_instruct(question: str, seed: int) -> str:
    count = int(re.search(r"\d+", question)[0])
    subject, number = _SUBJECTS[seed % 10], seed // 10
    points = [f"mention {subject} number {number + i} beside {_SUBJECTS[(seed + i) % 10]}" for i in range(1, count)]
    parts = [f"write about {subject} in the year {number}", *points]
    constraints = [(TASK if i == 0 else POINT) + part + "?" for i, part in enumerate(parts)]
    return f"Constraints:\n{_numbered(constraints)}\n\nInstruction:\n{'. '.join(parts)}."


def _recombine(question: str) -> str:
    return ". ".join(map(core, _items(question.split("Constraints:\n", 1)[1]))) + "."


def _check(question: str) -> str:
    constraints, _, instruction = question.partition("\n\nInstruction:\n")
    given = {" ".join(part.split()) for part in instruction.replace(". ", "\n").split("\n")}
    given |= {part.rstrip(".") for part in given}
    flat = " ".join(instruction.split())
    return _numbered(["yes" if (c := core(item)) in given or c in flat else "no" for item in _items(constraints)])


def _respond(instruction: str) -> str:
    points = sentences(instruction) or [instruction.strip()]
    return f"{len(points)} points.\n" + "\n".join(f"- done: {point}" for point in points)
