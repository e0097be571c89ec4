"""A scripted stand-in for a model, as an HTTP server's script: it reads the prompts and reacts to what stands in them.

It takes an instruction apart at its sentences, joins constraints back into one, contradicts a constraint, says which
of them an instruction has, and answers an instruction point by point, so that what went in is seen to come out. As a
judge it looks which points a response has, and corrects one by answering anew.
"""

import dataclasses
import hashlib
import json
import random
import re
import time
from collections.abc import Callable

from lm_jax.data.messages import split_arguments
from lm_jax.errors import UserError
from lm_jax.generation.requests import Completion, Sample
from musc_jax.pairs.prompts import DEFAULT, SEPARATOR
from tests.http_server import Asked, Reply, completion

TASK, POINT, AGAINST = (
    "Does the response do this: ",
    "Does the response heed this: ",
    "Does the response act against this: ",
)
_LEADS = re.compile(f"(?:{TASK}|{POINT})")
_SUBJECTS = "moths tides glass chess rivers bread maps clocks dunes violins".split()
_STAGES = {getattr(DEFAULT, field.name).task: field.name for field in dataclasses.fields(DEFAULT)}


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
    """What the model takes for points: sentences, and the lines of a list."""
    parts = re.split(r"(?<=[.!?。！？])\s+|\n+", instruction.strip())
    parts = [part.strip(" .!?-*") for part in parts]
    return [part for part in parts if len(re.findall(r"\w+", part)) > 1]


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
        "score": _score,
        "meets": _meets,
        "critique": _critique,
        "revise": lambda text: _respond(_judged(text)[0]),
    }[stage](question)


def points_done(instruction: str, response: str) -> list[bool]:
    """Which points of an instruction a response of this model has."""
    return [f"- done: {point}\n" in f"{response}\n" for point in sentences(instruction)]


def careless(text: str, asked: Asked) -> str:
    """A `change`: a response lacks about every third point, other ones in every sample."""
    if stage_of(asked) != "respond":
        return text
    head, *points = text.split("\n")
    draw = random.Random(asked.body["seed"])
    return "\n".join([head, *(point for point in points if draw.random() < 2 / 3)])


def script(change: Callable = lambda text, asked: text) -> Callable[[Asked], Reply]:
    """A server's script. `change`: what becomes of an answer: a text, or a completion (see `cut` and `failed`)."""

    def reply(asked: Asked) -> Reply:
        changed = change(answer(asked), asked)
        if isinstance(changed, str):
            return completion(asked, [changed])
        if changed.error:
            return Reply({"error": {"message": changed.error}}, 400)
        return completion(asked, [changed.samples[0].text], changed.samples[0].finish_reason)

    return reply


def _numbered(texts: list[str]) -> str:
    return "\n".join(f"{i}. {text}" for i, text in enumerate(texts, 1))


def _items(text: str) -> list[str]:
    return re.findall(r"^\d+\. (.*)$", text, re.MULTILINE)


def _decompose(question: str) -> str:
    instruction = question.removeprefix("Instruction:\n").removesuffix("\n\nConstraints:")
    task, _, material = instruction.partition("\n\n")
    parts = sentences(task)
    if len(parts) == 1 and len(words := parts[0].split()) >= 6:
        parts = [" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])]
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
    text = " ".join(instruction.split())
    wanted = [core(item) for item in _items(constraints)]
    return _numbered(["yes" if point in text.replace(AGAINST + point, "") else "no" for point in wanted])


def _judged(question: str) -> tuple[str, str]:
    """(instruction, response) that a judge is asked about; in raw text the answer's label stands behind them."""
    instruction, _, rest = question.removeprefix("Instruction:\n").partition("\n\nResponse:\n")
    response = re.split(r"\n\n(?:Reasons:|Faults:|Answers:|Revised response:)", rest)[0]
    return instruction.split("\n\nConstraints:\n")[0], response


def _score(question: str) -> str:
    done = points_done(*_judged(question))
    return f"Reasons:\nIt has {sum(done)} of {len(done)} points.\n\nScore: {1 + 4 * sum(done) // max(len(done), 1)}"


def _meets(question: str) -> str:
    constraints = _items(question.split("\n\nConstraints:\n")[1].split("\n\nResponse:\n")[0])
    _, response = _judged(question)
    text = " ".join(response.split())
    return "Answers:\n" + _numbered(["yes" if core(item) in text else "no" for item in constraints])


def _critique(question: str) -> str:
    instruction, response = _judged(question)
    done = zip(sentences(instruction), points_done(instruction, response), strict=True)
    missing = [f"It does not do this: {point}" for point, is_done in done if not is_done]
    return "Faults:\n" + (_numbered(missing) or "None")


def _respond(instruction: str) -> str:
    points = sentences(instruction) or [instruction.strip()]
    return f"{len(points)} points.\n" + "\n".join(f"- done: {point}" for point in points)


class Scripted:
    """The same model as a `Generator`, which answers in an order that differs from call to call.

    Args:
      change: what becomes of an answer: a text, or a whole completion of the request.
      seconds: to wait before each list of answers.
      stop_after: answers of its life, then a UserError as of a server that went away.

    Attributes:
      requests, samplings: all that was asked.
    """

    def __init__(self, change=lambda text, asked: text, seconds: float = 0.0, stop_after: int | None = None):
        self.change, self.seconds, self.stop_after = change, seconds, stop_after
        self.requests, self.samplings = [], []

    def generate(self, requests, sampling):
        self.samplings.append(sampling)
        left = random.sample(list(requests), len(requests))
        while left:
            time.sleep(self.seconds)
            taken, left = left[: (n := random.randint(1, 4))], left[n:]
            yield [self._answer(request, sampling) for request in taken]
            if self.stop_after is not None and len(self.requests) >= self.stop_after:
                raise UserError("the server went away")

    def _answer(self, request, sampling) -> Completion:
        self.requests.append(request)
        name = "prompt" if isinstance(request.prompt, str) else "messages"
        given = request.prompt if name == "prompt" else split_arguments(request.prompt)[1]
        seed = int.from_bytes(hashlib.sha256(f"{sampling.seed} {request.id}".encode()).digest()[:4], "big")
        asked = Asked(len(self.requests), "", {}, {name: given, "seed": seed}, 0.0, 1)
        changed = self.change(answer(asked), asked)
        if isinstance(changed, str):
            return Completion(request.id, (Sample(changed, "stop", 3),))
        return dataclasses.replace(changed, id=request.id)


def cut(text: str) -> Completion:
    """An answer that ran into the limit of tokens."""
    return Completion("", (Sample(text, "length", 3),))


def failed(error: str = "HTTP 400: no") -> Completion:
    """No answer."""
    return Completion("", (), error)


def manners() -> dict[str, Callable[[str, Asked], str | Completion]]:
    """Ten ways to answer badly, each a `change`."""
    return {
        "empty": lambda text, asked: "  \n",
        "refusal": lambda text, asked: "I'm sorry, but I can't help with that request.",
        "no list": lambda text, asked: "That is a good question, and there is much to be said about it.",
        "truncated": lambda text, asked: cut(text[: len(text) // 2]),
        "rambling": lambda text, asked: (
            f"{'Well, let me think about it for a while. ' * 30}\n\n{text}\n\nAnd so on. " * 2
        ),
        "JSON": lambda text, asked: json.dumps({"answer": text.split("\n"), "confidence": 0.9}),
        "wrong language": lambda text, asked: (
            "1. 这个回答是否使用了中文？\n2. 这个回答是否不超过五十个字？\n3. 语气是否友好？"
        ),
        "repeated": lambda text, asked: "1. Is it good? 2. Is it good? " * 20,
        "echo": lambda text, asked: question_of(asked),
        "HTTP 400": lambda text, asked: failed(),
    }
