"""An answer's labelled sections."""

import dataclasses
import re

from musc_jax.pairs.prompts import SEPARATOR

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
    found: list[tuple[str | None, int, int]] = [(None, 0, 0)]
    for line in _LINE.finditer(text):
        if _SEPARATOR.fullmatch(line[0]):
            found.append(("separator", line.start(), line.end()))
        elif label := _LABEL.match(text, line.start(), line.end()):
            found.append((label.lastgroup, line.start(), label.end()))
    ends = [start for _, start, _ in found[1:]] + [len(text)]
    return [Section(label, text[body:end], body) for (label, _, body), end in zip(found, ends, strict=True)]
