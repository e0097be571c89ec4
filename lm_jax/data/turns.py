"""What generation is given for a conversation, and the model's turn after it as the chat template writes turns.

A template may show a conversation otherwise once it goes on: R1's generation prompt opens `<think>`, which finished
turns do not show, nor the thoughts; Mistral's shows the system message before the user's last turn alone; Qwen3's drops
earlier thoughts. What is learnt follows on what generation is given, whatever finished conversations look like.
"""

import re
from collections.abc import Callable, Sequence

from lm_jax.data.messages import Message

Render = Callable[[Sequence[Message], bool], str]  # (messages, whether the prompt of generation ends it) -> text

_MARK = "Qx7vResponseVx7q"  # a text that no template changes and no conversation has
_REACH = 64  # characters by which the end of a generation prompt and the beginning of a written turn may differ
_SEEN = 256  # characters before these that tell where the one ends in the other
# Thoughts without a word, which templates write where a turn has none
_NO_THOUGHTS = re.compile(r"(\s*)([<\[](\w+)[>\]])\s*[<\[]/\3[>\]]\s*")
_OPENED = re.compile(r"[<\[](?:think|thought|reason)\w*[>\]]\s*\Z", re.IGNORECASE)
_KEPT_APART = ("reasoning_content", "thinking", "reasoning")  # a message's thoughts, as transformers knows them


class NotShown(Exception):
    """What of a turn a template leaves out."""


def write_turn(render: Render, before: Sequence[Message], turn: Message) -> tuple[str, str]:
    """(what generation is given for the messages `before`, the turn after it).

    The turn is its own text between what the template sets around one, its end token included. Thoughts that a template
    leaves out of finished turns are in it, those that the generation prompt has opened already are not opened again,
    and thoughts without a word, which a template adds, are left out.

    Raises:
      NotShown: the template leaves the turn out, or its calls.
    """
    start, whole = render(before, True), render([*before, turn], False)
    own = _own_text(turn, start)
    written = whole[len(start) :] if whole.startswith(start) else None
    if written is None or not _has(start[-_REACH:] + written, own):
        written = _framed(render, before, turn, start, own, whole)
    calls = (call.get("function", call) for call in turn.get("tool_calls") or () if isinstance(call, dict))
    if not all(str(call.get("name", "")) in written for call in calls if isinstance(call, dict)):
        raise NotShown("the tool calls")
    added = _NO_THOUGHTS.match(written)
    if added and not own.lstrip().startswith(added[2]):
        written = added[1] + written[added.end() :]
    return start, written


def _own_text(turn: Message, start: str) -> str:
    """What the model wrote; with the thoughts that a row keeps apart where generation begins with thoughts."""
    content = turn.get("content") or ""
    thoughts = next((turn[name] for name in _KEPT_APART if turn.get(name)), None)
    tag = opening_of_thoughts(start)
    if not isinstance(thoughts, str) or not tag:
        return content
    return f"{thoughts.strip()}\n{tag[0]}/{tag[1:]}\n\n{content}"


def _framed(render: Render, before: Sequence[Message], turn: Message, start: str, own: str, whole: str) -> str:
    """The turn where the conversation with it, `whole`, does not go on from `start`, or lacks a part of its text."""
    frame = {name: value for name, value in turn.items() if name not in _KEPT_APART} | {"content": _MARK}
    head, mark, end = render([*before, frame], False).partition(_MARK)
    if not mark and turn.get("tool_calls"):  # the template shows calls alone, whatever was said with them
        own = ""
        head, mark, end = render([*before, {"role": turn["role"], "content": _MARK}], False).partition(_MARK)
    if not mark or _MARK in end:
        raise NotShown("the text")
    lead, opened = _lead(start, head)
    begin = head.removesuffix(lead)
    written = whole[len(begin) :]
    if whole.startswith(begin) and _has(opened + written, own):
        return _without_opening(written, opened)
    return lead + _without_opening(own, opened) + end


def _lead(start: str, head: str) -> tuple[str, str]:
    """(what of `head`, the conversation up to a turn's text, belongs to the turn, what `start` has beyond `head`).

    Where one ends in the other is where the longest text before it agrees. A turn may begin with white space or with
    thoughts without a word; `start` may open thoughts.
    """
    best, lead, opened = 0, "", ""
    for more in range(_REACH):
        for beyond, ahead in ((more, 0), (0, more)):
            a, b = (x[max(len(x) - n - _SEEN, 0) : max(len(x) - n, 0)] for x, n in ((start, beyond), (head, ahead)))
            pairs = enumerate(zip(reversed(a), reversed(b), strict=False))
            same = next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
            if same > best:
                best, lead, opened = same, head[len(head) - ahead :], start[len(start) - beyond :]
    return lead if not lead.strip() or _NO_THOUGHTS.fullmatch(lead) else "", opened


def _without_opening(text: str, opened: str) -> str:
    """`text` without the opening of thoughts that `opened`, which stands before it, ends with."""
    tag, bare = opening_of_thoughts(opened), text.lstrip()
    return bare.removeprefix(tag).lstrip("\n") if tag and bare.startswith(tag) else text


def opening_of_thoughts(text: str) -> str:
    """The `<think>` or its like that a text ends with, or nothing."""
    found = _OPENED.search(text[-_REACH:])
    return found[0].strip() if found else ""


def _has(written: str, text: str) -> bool:
    """Whether a template, which may trim, wrote all of `text`."""
    return "".join(text.split()) in "".join(written.split())
