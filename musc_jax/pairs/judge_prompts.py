"""What the model is asked about its own responses: a score, yes or no for each constraint, faults, a revision.

Those are the baselines that MuSC (arXiv 2502.11541, section 4) is compared with. The wordings stand in
`musc_jax.pairs.prompts`, the in-context examples here: three responses, one good, one middling, one that misses
the task.
"""

import dataclasses
from collections.abc import Sequence

from musc_jax.pairs.prompts import DEFAULT, Prompt, Prompts, ask, numbered

NO_FAULTS = "None"


@dataclasses.dataclass(frozen=True)
class _Judged:
    """A response with all that can be said about it; `constraints` with whether it meets them."""

    instruction: str
    response: str
    constraints: dict[str, bool]
    reasons: str
    score: int
    faults: tuple[str, ...]
    revision: str


_EXAMPLES = (
    _Judged(
        "Explain in one sentence why the tides rise and fall. Do not use the word 'gravity'.",
        "The gravity of the moon pulls at the sea. As the earth turns, each coast passes through the two bulges that "
        "this makes.",
        {
            "Does the response explain why the tides rise and fall?": True,
            "Is the response one sentence long?": False,
            "Does the response avoid the word 'gravity'?": False,
        },
        "The explanation is right. But it takes two sentences where one was asked for, and it uses the word that it "
        "was to avoid.",
        3,
        ("It has two sentences instead of one.", "It uses the word 'gravity'."),
        "The moon pulls at the sea, and as the earth turns each coast passes through the two bulges that this makes.",
    ),
    _Judged(
        "Name three fruits, one a line, in alphabetical order.",
        "apple\nbanana\ncherry",
        {
            "Does the response name three fruits?": True,
            "Does each fruit stand on a line of its own?": True,
            "Are the fruits in alphabetical order?": True,
        },
        "It names three fruits, each on a line of its own, and their order is alphabetical. Nothing is missing.",
        5,
        (),
        "apple\nbanana\ncherry",
    ),
    _Judged(
        "写一句生日祝福，不超过二十个字，不用感叹号。",
        "早晨的街道空空荡荡，只有面包店亮着灯。",
        {"是否写了一句生日祝福？": False, "是否不超过二十个字？": True, "是否没有用感叹号？": True},
        "字数和标点符合要求，但写的是街景，没有写生日祝福，没有完成任务。",
        1,
        ("写的是街景，不是生日祝福。",),
        "祝你生日快乐，岁岁平安。",
    ),
)


def score(instruction: str, response: str, prompts: Prompts = DEFAULT) -> Prompt:
    """Asks for one score of the whole response (Self-Rewarding LMs, arXiv 2401.10020); see `judgements.parse_score`."""
    turns = (
        ({"instruction": e.instruction, "response": e.response}, {"reasons": e.reasons, "score": str(e.score)})
        for e in _EXAMPLES
    )
    return ask(prompts.score, turns, {"instruction": instruction, "response": response})


def meets(instruction: str, constraints: Sequence[str], response: str, prompts: Prompts = DEFAULT) -> Prompt:
    """Asks which constraints a response meets (Branch-Solve-Merge, arXiv 2310.15123).

    `instructions.parse_verdicts` reads the answer.
    """
    turns = (
        (
            {"instruction": e.instruction, "constraints": numbered([*e.constraints]), "response": e.response},
            {"verdicts": numbered(["yes" if met else "no" for met in e.constraints.values()])},
        )
        for e in _EXAMPLES
    )
    asked = {"instruction": instruction, "constraints": numbered(constraints), "response": response}
    return ask(prompts.meets, turns, asked)


def critique(instruction: str, response: str, prompts: Prompts = DEFAULT) -> Prompt:
    """Asks for a response's faults; `judgements.parse_critique` reads the answer."""
    turns = (
        ({"instruction": e.instruction, "response": e.response}, {"faults": numbered(e.faults) or NO_FAULTS})
        for e in _EXAMPLES
    )
    return ask(prompts.critique, turns, {"instruction": instruction, "response": response})


def revise(instruction: str, response: str, faults: str, prompts: Prompts = DEFAULT) -> Prompt:
    """Asks for the response without these faults; `judgements.parse_revision` reads the answer."""
    turns = (
        (
            {"instruction": e.instruction, "response": e.response, "faults": numbered(e.faults)},
            {"revision": e.revision},
        )
        for e in _EXAMPLES
        if e.faults
    )
    return ask(prompts.revise, turns, {"instruction": instruction, "response": response, "faults": faults})
