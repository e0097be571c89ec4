"""What the model is asked while pairs are made (MuSC, arXiv 2502.11541, section 3.2); every word can be replaced.

A prompt is a conversation: the task, in-context examples as turns already taken, and the question last. Rows that share
their examples share everything up to the question, so that a sampler can reuse the prefix; of a row's two
recombinations the input, which comes first, is shared too.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from lm_jax.data.messages import Message
from lm_jax.errors import UserError
from musc_jax.draws import uniform
from musc_jax.pairs.demonstrations import Demonstration, pick

NO_INPUT = "None"
SEPARATOR = "###"  # alone on a line between the examples of raw text; a base model that runs on writes it too
STOP = (f"\n{SEPARATOR}\n",)  # for sampling from raw text; the parsers cut there as well


@dataclasses.dataclass(frozen=True)
class Wording:
    """The words of one stage.

    Attributes:
      task: what to do. No markers.
      question: template of a user's turn.
      answer: template of an example's answer. What stands before its first marker opens the answer in raw text.
    """

    task: str
    question: str
    answer: str


_MARKERS = {  # stage -> the markers of question and answer, each to stand there once
    "decompose": (("instruction",), ("constraints", "input")),
    "self_instruct": (("count",), ("constraints", "instruction")),
    "recombine": (("input", "constraints"), ("instruction",)),
    "negate": (("constraint",), ("opposite",)),
    "check": (("constraints", "instruction"), ("verdicts",)),
    "score": (("instruction", "response"), ("reasons", "score")),
    "meets": (("instruction", "constraints", "response"), ("verdicts",)),
    "critique": (("instruction", "response"), ("faults",)),
    "revise": (("instruction", "response", "faults"), ("revision",)),
}
_NAMES = sorted({name for sides in _MARKERS.values() for side in sides for name in side})
_MARKER = re.compile(rf"\{{({'|'.join(_NAMES)})\}}")


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The words of all stages. `{instruction}` and the like are markers; other braces stand for themselves.

    What is filled in is never searched for markers, so texts come out as they went in. Keep section labels that
    `musc_jax.pairs.sections` knows (Constraints, Input, Instruction, and their names in some other languages).

    Raises:
      UserError: a template lacks a marker, has it twice, or has one of another stage.
    """

    decompose: Wording = Wording(
        task="You take instructions apart. Given an instruction, list the constraints that a response to it must "
        "meet, numbered, each as one question that can be answered with yes or no. The first one asks for the task "
        "itself, the others for one requirement each; together they leave out nothing and add nothing. If the "
        "instruction brings material to work on, such as a text, data or code, copy it unchanged after the list under "
        "Input; otherwise write None there. Write the list and the input, and nothing before or after them.",
        question="Instruction:\n{instruction}",
        answer="Constraints:\n{constraints}\n\nInput:\n{input}",
    )
    self_instruct: Wording = Wording(
        task="You invent instructions for an assistant. First list the constraints that the response shall meet, "
        "numbered, each as one question that can be answered with yes or no, beginning with the task itself. Then "
        "write the instruction that asks for exactly these, together with any material that it works on. Choose a "
        "subject, a kind of text and constraints unlike those of the instructions so far, and write nothing else.",
        question="Number of constraints: {count}",
        answer="Constraints:\n{constraints}\n\nInstruction:\n{instruction}",
    )
    recombine: Wording = Wording(
        task="You write instructions for an assistant. Given a numbered list of constraints, write the one "
        "instruction whose response must meet all of them: natural to read, asking for everything on the list and "
        "for nothing else. Where an input is given, the instruction refers to it without repeating it, since the "
        "input will be put below the instruction. Do not carry the instruction out; write nothing but the instruction.",
        question="Input:\n{input}\n\nConstraints:\n{constraints}",
        answer="Instruction:\n{instruction}",
    )
    negate: Wording = Wording(
        task="You turn constraints on a text around. Given a constraint, write one that contradicts it: a response "
        "that meets yours cannot meet the one given. Keep its form and language, change as few words as possible, and "
        "write nothing but the new constraint.",
        question="Constraint:\n{constraint}",
        answer="Opposite:\n{opposite}",
    )
    check: Wording = Wording(
        task="You check instructions. Given a numbered list of constraints and an instruction, decide for each "
        "constraint whether the instruction asks for it. Answer with the constraint's number and yes or no, one a "
        "line, and nothing else.",
        question="Constraints:\n{constraints}\n\nInstruction:\n{instruction}",
        answer="Answers:\n{verdicts}",
    )
    # Those of the baselines; `musc_jax.pairs.judge_prompts` asks them
    score: Wording = Wording(
        task="You judge how well a response follows an instruction. Weigh everything that the instruction asks for, "
        "name in a few sentences what the response does and what it fails to do, then give the whole response one "
        "score: 5 if it does all that is asked, and well; 4 if it falls short in something small; 3 if it does the "
        "main thing but misses a part; 2 if it misses most; 1 if it does not do what is asked. End with the line "
        "'Score: ' and one whole number from 1 to 5.",
        question="Instruction:\n{instruction}\n\nResponse:\n{response}",
        answer="Reasons:\n{reasons}\n\nScore: {score}",
    )
    meets: Wording = Wording(
        task="You check responses. Given an instruction, a numbered list of constraints and a response, decide for "
        "each constraint whether the response meets it. Answer with the constraint's number and yes or no, one a "
        "line, and nothing else.",
        question="Instruction:\n{instruction}\n\nConstraints:\n{constraints}\n\nResponse:\n{response}",
        answer="Answers:\n{verdicts}",
    )
    critique: Wording = Wording(
        task="You look for faults in responses. Given an instruction and a response, list what the instruction asks "
        "for and the response does not do, or does wrongly: numbered, one fault a line. If the response does all that "
        "is asked, write None. Write nothing else.",
        question="Instruction:\n{instruction}\n\nResponse:\n{response}",
        answer="Faults:\n{faults}",
    )
    revise: Wording = Wording(
        task="You correct responses. Given an instruction, a response and a list of the response's faults, write the "
        "response anew so that it has none of these faults and still does everything else that is asked. Write "
        "nothing but the new response.",
        question="Instruction:\n{instruction}\n\nResponse:\n{response}\n\nFaults:\n{faults}",
        answer="Revised response:\n{revision}",
    )

    def __post_init__(self):
        for stage, sides in _MARKERS.items():
            for side, expected in zip(("question", "answer"), sides, strict=True):
                found = _MARKER.findall(getattr(getattr(self, stage), side))
                if sorted(found) != sorted(expected):
                    listed = [f"{{{name}}}" for name in expected]
                    raise UserError(
                        f"prompts.{stage}.{side}: has the markers {', '.join(f'{{{m}}}' for m in found) or 'none'}; "
                        f"it must have {' and '.join(listed)}, each once"
                    )


DEFAULT = Prompts()

# Ours, for any row: what contradicts a constraint
_OPPOSITES = (
    ("Is the answer shorter than 50 words?", "Is the answer at least 50 words long?"),
    ("Does the story mention the weather?", "Does the story leave the weather unmentioned?"),
    ("语言是否通俗易懂？", "语言是否晦涩难懂？"),
    ("The reply avoids bullet points.", "The reply uses bullet points."),
)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One question to the model.

    Attributes:
      task: what to do.
      turns: (question, answer) of each in-context example.
      question: the row's own.
      opening: how the answer begins; raw text ends with it.
    """

    task: str
    turns: tuple[tuple[str, str], ...]
    question: str
    opening: str

    def messages(self, system: bool = True) -> list[Message]:
        """For any chat template. Without `system` the task heads the first user message, as some templates need."""
        contents = [text for turn in self.turns for text in turn] + [self.question]
        if not system:
            contents[0] = f"{self.task}\n\n{contents[0]}"
        head = [{"role": "system", "content": self.task}] if system else []
        return head + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]

    def text(self) -> str:
        """For base models: one raw string that the answer continues behind its opening label. Sample with `STOP`."""
        parts = [self.task, *(f"{question}\n\n{answer}" for question, answer in self.turns)]
        return f"\n\n{SEPARATOR}\n\n".join([*parts, f"{self.question}\n\n{self.opening}"])


def decompose(instruction: str, examples: Sequence[Demonstration], prompts: Prompts = DEFAULT) -> Prompt:
    """Asks for an instruction's constraints and its input; `constraints.parse_decomposition` reads the answer."""
    turns = (
        ({"instruction": e.task}, {"constraints": numbered(e.constraints), "input": e.input or NO_INPUT})
        for e in examples
    )
    return ask(prompts.decompose, turns, {"instruction": instruction})


def self_instruct(
    demonstrations: Sequence[Demonstration],
    seed: int,
    index: int,
    examples: int = 4,
    counts: tuple[int, int] = (4, 8),
    prompts: Prompts = DEFAULT,
) -> Prompt:
    """Asks for a task of the model's own; `constraints.parse_self_instructed` reads the answer.

    The examples and the number of constraints asked for (within `counts`, both ends included) depend on (seed, index)
    alone: rows differ in their examples, since a model asked the same would answer much the same.

    Raises:
      UserError: fewer demonstrations than examples.
    """
    turns = (
        ({"count": str(len(e.constraints))}, {"constraints": numbered(e.constraints), "instruction": e.task})
        for e in pick(demonstrations, examples, seed, "self_instruct", index)
    )
    low, high = counts
    count = low + int(uniform(seed, "count", index) * (high - low + 1))
    return ask(prompts.self_instruct, turns, {"count": str(count)})


def recombine(
    constraints: Sequence[str], input: str | None, examples: Sequence[Demonstration], prompts: Prompts = DEFAULT
) -> Prompt:
    """Asks for the instruction that a list of constraints makes; `instructions.parse_instruction` reads the answer.

    Both sides of a pair go through here: give both the same examples.
    """
    turns = (
        ({"input": e.input or NO_INPUT, "constraints": numbered(e.constraints)}, {"instruction": e.instruction})
        for e in examples
    )
    return ask(prompts.recombine, turns, {"input": input or NO_INPUT, "constraints": numbered(constraints)})


def negate(constraint: str, prompts: Prompts = DEFAULT) -> Prompt:
    """Asks for a constraint that contradicts the given one; `instructions.parse_constraint` reads the answer."""
    turns = (({"constraint": given}, {"opposite": opposite}) for given, opposite in _OPPOSITES)
    return ask(prompts.negate, turns, {"constraint": constraint})


def check(
    constraints: Sequence[str], instruction: str, examples: Sequence[Demonstration], prompts: Prompts = DEFAULT
) -> Prompt:
    """Asks which constraints an instruction asks for; `instructions.parse_verdicts` reads the answer.

    Every example carries a constraint of the next one's, which is answered with no; from fewer than 2 examples the
    model would learn that the answer is always yes.

    Raises:
      ValueError: fewer than 2 examples.
    """
    if len(examples) < 2:
        raise ValueError(f"check needs at least 2 examples, got {len(examples)}")
    turns = []
    for i, example in enumerate(examples):
        foreign = examples[(i + 1) % len(examples)].constraints[-1]
        at = 1 + i % len(example.constraints)
        asked = [*example.constraints[:at], foreign, *example.constraints[at:]]
        verdicts = numbered(["no" if number == at else "yes" for number in range(len(asked))])
        turns.append(({"constraints": numbered(asked), "instruction": example.task}, {"verdicts": verdicts}))
    return ask(prompts.check, turns, {"constraints": numbered(constraints), "instruction": instruction})


def numbered(texts: Sequence[str]) -> str:
    """One a line, from 1."""
    return "\n".join(f"{number}. {text}" for number, text in enumerate(texts, 1))


def ask(wording: Wording, turns: Iterable[tuple[Mapping, Mapping]], question: Mapping[str, str]) -> Prompt:
    """The prompt of a stage.

    Args:
      turns: of each in-context example what fills in the question and what fills in the answer, by marker.
      question: what fills in the row's own.
    """
    return Prompt(
        wording.task,
        tuple((_fill(wording.question, asked), _fill(wording.answer, answered)) for asked, answered in turns),
        _fill(wording.question, question),
        _MARKER.split(wording.answer)[0].rstrip(),
    )


def _fill(template: str, values: Mapping[str, str]) -> str:
    # One pass over the template: markers inside a value are never seen
    return _MARKER.sub(lambda marker: values[marker[1]], template)
