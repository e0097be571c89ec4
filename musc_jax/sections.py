"""An answer's labelled sections, and what models put around an answer: thoughts, openings, closings, fences."""

import dataclasses
import re

from musc_jax.lists import CLOSING
from musc_jax.prompts import SEPARATOR

_LABELS = {
    "constraints": r"(?:decomposed |list of |numbered |yes/no |the )*(?:constraints?|requirements|questions"
    r"|decomposition|criteria)(?: list)?|约束条件|约束|限制条件|要求|问题|contraintes|restricciones"
    r"|einschränkungen|anforderungen|ограничения|制約(?:条件)?|제약(?: ?조건)?",
    "input": r"inputs?(?: text| data)?|输入|輸入|entrada|entrée|eingabe|ввод|入力|입력",
    "instruction": r"(?:new |final |combined |recombined |complete |full |the |original )*"
    r"(?:instructions?|tasks?|prompt)|指令|任务|instrucción|instrucciones|tarea|anweisung|aufgabe|tâche|инструкция|задание|指示|지시",
    "example": r"example ?#?\d*|示例 ?\d*|例子? ?\d*",
    "separator": r"number of constraints",  # how the next question begins when the model invents instructions
    "output": r"outputs?|responses?|answers?|回答|答案",
}
_LABEL = re.compile(
    r"[ \t>#*_\[【「]*(?:[-•][ ]+[*_]*)?(?:"
    + "|".join(f"(?P<{name}>{names})" for name, names in _LABELS.items())
    + r")[ \t*_\]】」]*(?:[(（][^()（）\n]{0,40}[)）])?[ \t]*(?:[:：][ \t*_]*|$)",
    re.IGNORECASE | re.MULTILINE,
)
_SEPARATOR = re.compile(rf"[ \t]*{SEPARATOR}[ \t]*$", re.MULTILINE)
_LINE = re.compile(r"^.*$", re.MULTILINE)
_FENCED = re.compile(r"(```|~~~)[^\n`]*\n(.*?)\n?\1", re.DOTALL)
_OPENING = re.compile(
    r"(?:(?:sure|certainly|of course|absolutely|okay|ok|great|here you go|got it|understood|好的|当然(?:可以)?|没问题)"
    r"[^\n:：.!。！]{0,40}[!.,。！，:：]\s*)?"
    r"(?:(?:here(?: is|'s|’s| are)|below (?:is|are)|this is|以下是|这是|下面是)[^\n:：]{0,100}[:：]\s*)?",
    re.IGNORECASE,
)
_ABOUT_ANSWER = re.compile(
    r"instruction|prompt|task|combin|constraint|sure|certainly|of course|指令|任务|约束", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class Section:
    """`label` is None for what stands before the first one; `body` begins behind the label, at `start` of the text."""

    label: str | None
    body: str
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.body)


def sections(text: str) -> list[Section]:
    """Cuts a text at lines that begin with a known label, or that are one ("**Constraints:**", "## Input", "指令：").

    Labels: constraints, input, instruction, example, output, and separator (a line that a base model puts between
    examples). Numbered lines never are labels.
    """
    found = [(None, 0, 0)]
    for line in _LINE.finditer(text):
        if _SEPARATOR.fullmatch(line[0]):
            found.append(("separator", line.start(), line.end()))
        elif label := _LABEL.match(text, line.start(), line.end()):
            found.append((label.lastgroup, line.start(), label.end()))
    ends = [start for _, start, _ in found[1:]] + [len(text)]
    return [Section(label, text[body:end], body) for (label, _, body), end in zip(found, ends, strict=True)]


def visible(answer: str) -> str | None:
    """The answer without a reasoning model's thoughts and with plain line ends; None where the thoughts never end."""
    text = answer.replace("\r\n", "\n").replace("\r", "\n").lstrip("\ufeff")
    if "</think>" in text:
        return text.rsplit("</think>", 1)[1]
    return None if "<think>" in text else text


def unfenced(text: str) -> str:
    """Without the code fence around the whole, if there is one."""
    fence = _FENCED.fullmatch(text.strip())
    return fence[2] if fence and fence[1] not in fence[2] else text


def without_opening(text: str) -> str:
    """Without "Sure! Here is the instruction:" and its like. "Here is a list: a, b. Sort it." stays whole."""
    stripped = text.lstrip()
    opening = _OPENING.match(stripped)
    first, _, below = stripped.partition("\n")
    if opening[0] and _ABOUT_ANSWER.search(opening[0]):
        rest = stripped[opening.end() :]
    else:
        rest = below if is_opening(first) else ""
    return rest if rest.strip() else text


def is_opening(text: str) -> bool:
    """Whether `text` is one line that only announces what follows."""
    line = text.strip().strip("*_ ")
    announces = bool(_OPENING.fullmatch(line)) or (line.endswith((":", "：")) and len(line) <= 150)
    return bool(line) and "\n" not in line and announces and bool(_ABOUT_ANSWER.search(line))


def without_closing(text: str) -> str:
    """Without a last paragraph like "Let me know if ..."."""
    head, _, last = text.rstrip().rpartition("\n\n")
    return head.rstrip() if head.strip() and "\n" not in last and CLOSING.match(last) else text
