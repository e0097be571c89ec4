"""What models put around an answer: thoughts, openings, closings, fences, quotation marks; taken off again."""

import re

THINK_END = "</think>"
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
CLOSING = re.compile(
    r"[\s*_(]*(?:let me know|feel free|i hope|hope (?:this|that)|if you (?:need|have|want|would|'d|’d)"
    r"|please (?:let|note)|note(?: that|:)|these (?:are|constraints|questions)|is there anything|would you like|thank"
    r"|请告诉我|如果您|如果你|如有|如需|希望|以上|注[：:]|注意[：:]|faites-moi|n'hésitez|si (?:vous|necesitas|tienes)"
    r"|espero|lass(?:en)? (?:es )?mich|ich hoffe|falls )",
    re.IGNORECASE,
)
_QUOTES = {'"': '"', "“": "”", "「": "」", "『": "』", "«": "»", "„": "“", "'": "'", "‘": "’", "`": "`"}


def visible(answer: str) -> str | None:
    """The answer without a reasoning model's thoughts and with plain line ends; None where the thoughts never end."""
    return without_thoughts(answer.replace("\r\n", "\n").replace("\r", "\n").lstrip("\ufeff"))


def without_thoughts(text: str, end: str = THINK_END) -> str | None:
    """What follows the last `end` of a reasoning model's thoughts, where there are any; all of it for an empty `end`.

    None where thoughts are opened at the beginning of that and never end.
    """
    if end and end in text:
        text = text.rsplit(end, 1)[1].lstrip()
    return None if (opening := thoughts_opening(end)) and text.lstrip().startswith(opening) else text


def thoughts_opening(end: str) -> str:
    """`<think>` for `</think>`, and the like; empty where the end does not say."""
    return end.replace("/", "", 1) if "/" in end else ""


def unfenced(text: str) -> str:
    """Without the code fence around the whole, if there is one."""
    fence = _FENCED.fullmatch(text.strip())
    return fence[2] if fence and fence[1] not in fence[2] else text


def without_opening(text: str) -> str:
    """Without "Sure! Here is the instruction:" and its like. "Here is a list: a, b. Sort it." stays whole."""
    stripped = text.lstrip()
    opening = _OPENING.match(stripped)
    first, _, below = stripped.partition("\n")
    if opening and opening[0] and _ABOUT_ANSWER.search(opening[0]):
        rest = stripped[opening.end() :]
    else:
        rest = below if is_opening(first) else ""
    return rest if rest.strip() else text


def is_opening(text: str) -> bool:
    """Whether `text` is one line that only announces what follows."""
    line = text.strip().strip("*_ ")
    announces = bool(_OPENING.fullmatch(line)) or (line.endswith((":", "：")) and len(line) <= 150 and ". " not in line)
    return bool(line) and "\n" not in line and announces and bool(_ABOUT_ANSWER.search(line))


def without_closing(text: str) -> str:
    """Without a last paragraph like "Let me know if ..."."""
    head, _, last = text.rstrip().rpartition("\n\n")
    return head.rstrip() if head.strip() and "\n" not in last and CLOSING.match(last) else text


def unquoted(text: str) -> str:
    """Without the quotation marks around the whole, if there are any and none of the same inside."""
    text = text.strip()
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and not {text[0], text[-1]} & set(text[1:-1]):
        return text[1:-1].strip()
    return text
