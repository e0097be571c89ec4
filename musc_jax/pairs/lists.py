"""A list that a model wrote, in whatever manner of numbering, as the texts of its items."""

import dataclasses
import re
import unicodedata

from lm_jax.generation.answer_text import CLOSING, unquoted

_HAN = {digit: number for number, digit in enumerate("一二三四五六七八九十", 1)}
_NAMES = (  # what stands before an item's number, as in "Constraint 1:"
    r"constraints?|requirements?|criteri(?:on|a)|conditions?|questions?|rules?|points?|contraintes?|restricci[oó]n"
    r"|bedingung|anforderung|ограничение|约束条件|约束|限制条件|限制|条件|要求|问题|制約"
)
_NUMBER = r"(?P<{0}>\d{{1,3}})"
_ITEM = re.compile(
    "|".join(
        (
            rf"(?:{_NAMES})[ ]?(?:no\.?|#|№)?[ ]?{_NUMBER.format('named')}[*_]*(?:[ ]?[.:)、：）．–—-]+|$)",
            r"(?-i:[CQR])(?P<initial>\d{1,3})[.:)]",
            rf"(?:第)?(?:{_NAMES})?(?P<han>[一二三四五六七八九十]{{1,3}})[条点项]?[*_]*[、.:)．：）]",
            rf"第{_NUMBER.format('ordinal')}[条点项][、.:)．：），,]?",
            r"(?P<dotted>\d{1,3}(?:\.\d{1,2})+)[.)]?(?=\s)",
            rf"[(（\[]\s?{_NUMBER.format('enclosed')}\s?[)）\]][.:、]?(?!\d)",
            rf"{_NUMBER.format('plain')}(?:\\?[.)）．、:：]+(?![\d])|[ ][-–—](?=\s))",
            r"(?P<keycap>\d)\ufe0f?\u20e3[.:)、]?",
            r"(?P<circled>[\u2460-\u249b\u24f5-\u24fe\u24eb-\u24f4\u2776-\u2793\u3251-\u325f\u32b1-\u32bf])[.:)、]?",
            r"[(（]?(?P<letter>[a-zA-Z])[.)）](?=\s)",
            r"(?P<bullet>[-*+–—](?=\s|$)|[•‣◦·▪▫■□●○➢➤✓✔✅☐☑❖][\ufe0f]?)(?:\s*\[[ xX]?\](?=\s))?",
        )
    ),
    re.IGNORECASE,
)
_DECORATION = re.compile(r"(?:>\s*)*(?:#+\s*)?(?P<bold>\*\*|__)?\s*")
_HEADING = re.compile(r"\s*(?:#{1,6}\s.*|(\*\*|__)(?:(?!\1).)+\1\s*[:：]?\s*)")
_FENCE = re.compile(r"\s*(?:```|~~~)\w*\s*")
_RULE = re.compile(r"\s*(?:[-*_=]\s?){3,}")
_TABLE = re.compile(r"\s*\|.*\|\s*|\s*\|?(?:\s*:?-{2,}:?\s*\|)+[\s:|-]*")
_BOLD_LEAD = re.compile(r"(\*\*|__)\s*((?:(?!\1).)*?)\s*\1")


@dataclasses.dataclass
class _Item:
    indent: int
    kind: str  # number, letter or bullet
    number: int | None
    lines: list[str]
    children: list["_Item"]


def list_items(text: str) -> list[str]:
    """The items of the list in `text`, in their order, each on one line; [] where there is none.

    Numbers in any form (1. 1) (1) １． 1、 ① 一、 1️⃣ Constraint 1:), letters and bullets begin an item. Lines after it
    belong to it, up to a blank line and text that is not indented. Items below an item belong to it, or stand in its
    place where it is a mere title ("1. Format" with bullets below). Headings, fences, closing remarks and text before
    the first item are left out; a table makes the answer no list. Without any marker, lines that end with a question
    mark are the items, where there are at least 2.
    """
    found: list[_Item] = []
    loose: list[str] = []  # lines before the first item or after the end of one
    current, blank = None, False
    for line in text.expandtabs(4).split("\n"):
        indent = len(line) - len(line.lstrip())
        if not line.strip():
            blank = True
        elif _TABLE.fullmatch(line):
            return []
        elif _FENCE.fullmatch(line) or _RULE.fullmatch(line):
            continue
        elif item := _begin(line, indent, current):
            found.append(item)
            current, blank = item, False
        elif _HEADING.fullmatch(line) or CLOSING.match(line):
            current = None
        elif current and (not blank or indent >= current.indent + 2 or not current.lines[0]):
            current.lines.append(line)
            blank = False
        else:
            current = None
            loose.append(line)
    if not found:
        questions = [_clean([line]) for line in loose if line.rstrip(" *_\"'").endswith(("?", "？"))]
        return questions if len(questions) >= 2 else []
    texts = [text for item in _nested(found) for text in _texts(item)]
    return _split_inline(texts[0]) if len(texts) == 1 and found[0].number == 1 else texts


def unbold(text: str) -> str:
    """Without the emphasis that `text` begins with: all of it, or a title before the rest."""
    if lead := _BOLD_LEAD.match(text):
        rest = text[lead.end() :]
        return (lead[2] + rest if not lead[2] or not rest or rest[0] in " :：,.?!" else f"{lead[2]} {rest}").strip()
    return text


def _begin(line: str, indent: int, previous: _Item | None) -> _Item | None:
    """The item that a line begins, or None."""
    body = line.strip()
    lead = _DECORATION.match(body)
    mark = _ITEM.match(body, lead.end()) if lead else None
    if lead is None or mark is None:
        return None
    kind, number = _kind(mark)
    if mark["letter"]:
        # "A. Smith" is no item unless A is the first or the next in turn
        expected = (previous.number or 0) + 1 if previous and previous.kind == "letter" else 1
        if number != expected and number != 1:
            return None
    if mark["dotted"] and (previous is None or previous.kind not in ("number", "dotted")):
        return None
    rest = body[mark.end() :]
    if lead["bold"]:
        rest = lead["bold"] + rest
    if rest and not rest[0].isspace() and mark["bullet"] is None and _glued(mark, rest):
        return None
    inner = _ITEM.match(rest.lstrip())
    if inner and not inner["bullet"] and not inner["letter"]:
        # A number behind a bullet, a name behind a number; a number behind a number is part of the text
        if kind == "bullet" or (inner["named"] and not mark["named"]):
            inner_kind, number = _kind(inner)
            kind = inner_kind if kind == "bullet" else kind
            rest = rest.lstrip()[inner.end() :]
    return _Item(indent, kind, number, [rest.strip()], [])


def _kind(mark: re.Match[str]) -> tuple[str, int | None]:
    name = mark.lastgroup or ""
    value = mark[name]
    if name == "bullet":
        return "bullet", None
    if name == "letter":
        return "letter", ord(value.lower()) - ord("a") + 1
    if name == "dotted":
        return "dotted", int(value.rsplit(".", 1)[1])
    if name == "circled":
        return "number", int(unicodedata.numeric(value))
    if name == "han":
        tens, ten, ones = value.rpartition("十")
        return "number", (_HAN.get(tens, 1) * 10 if ten else 0) + _HAN.get(ones, 0)
    return "number", int(value)


def _glued(mark: re.Match[str], rest: str) -> bool:
    """Whether marker and text are one word, as in "3:1" or "e.g.": only Latin letters count, others need no space."""
    return bool(mark["plain"] and mark[0][-1] in ":：" and rest[0].isascii() and not rest.startswith(("*", "_")))


def _nested(items: list[_Item]) -> list[_Item]:
    top: list[_Item] = []
    for item in items:
        parent = top[-1] if top else None
        if parent is None:
            top.append(item)
            continue
        last = parent.children[-1] if parent.children else None
        deeper = item.indent >= parent.indent + 2
        continues_parent = item.kind == parent.kind == "number" and item.number == (parent.number or 0) + 1
        continues_child = last is not None and item.kind == last.kind and item.indent >= last.indent
        below = (
            item.kind == "dotted"
            or (deeper and (continues_child or not continues_parent))
            or (item.kind != parent.kind and (item.kind == "letter" or _is_title(parent)))
        )
        (parent.children if below else top).append(item)
    return top


def _is_title(item: _Item) -> bool:
    """Whether an item only names the ones below it."""
    bold = _BOLD_LEAD.fullmatch(" ".join(item.lines).strip().rstrip(" :："))
    bare = _clean(item.lines)
    return not bare.endswith(("?", "？", ".", "。")) and (bool(bold) or (len(bare.split()) <= 3 and len(bare) <= 24))


def _is_whole(text: str) -> bool:
    """Whether a text can stand by itself as a constraint; the single words of an enumeration cannot."""
    return len(text.split()) >= 3 or text.endswith(("?", "？")) or sum(c > "\u2e7f" for c in text) >= 6


def _texts(item: _Item) -> list[str]:
    own, children = _clean(item.lines), [text for child in item.children for text in _texts(child)]
    if not children:
        return [own] if own else []
    if not own or (_is_title(item) and all(map(_is_whole, children))):
        return children
    return [f"{own}{'' if own.endswith(tuple('?？:：.。')) else ':'} {'; '.join(children)}"]


def _clean(lines: list[str]) -> str:
    return unquoted(unbold(" ".join(" ".join(lines).split())))


def _split_inline(text: str) -> list[str]:
    """The items of a list written in one line: "Is it short? 2. Is it true? 3. ..."."""
    parts, rest, number = [], text, 2
    while found := re.search(rf"\s[(（#]*{number}\s?[.)）、:．]+(?!\d)", rest):
        parts.append(rest[: found.start()])
        rest, number = rest[found.end() :], number + 1
    return [part for part in (_clean([p]) for p in (*parts, rest)) if part]
