"""Documents cut into segments that read like a response: whole sentences and lists, no page furniture.

Rules alone, so that the same text always gives the same segments. A line is judged first, since furniture (menus,
share buttons, "Posted by") comes in lines; what is left between two dropped lines is cut at headings and paragraphs; a
segment is judged last.
"""

import collections
import dataclasses
import enum
import html
import re
from collections.abc import Callable, Iterator, Sequence

from lm_jax.data.similarity import tokens
from lm_jax.errors import UserError

HEADING_WORDS = 12  # a longer line without a sentence's end is a cut sentence
FURNITURE_LENGTH = 200  # characters
LANGUAGE_WORDS = 15  # of fewer the share of stop words says little
LAST_WORDS = 8  # a last line that is as short is mostly the title of something else


class LineFault(enum.StrEnum):
    """Why a line is left out; what stands before and after it is never joined."""

    BOILERPLATE = "boilerplate"
    LINKS = "links"
    SYMBOLS = "symbols"
    UPPER_CASE = "upper_case"
    GARBLED = "garbled"  # characters of a wrong encoding
    LANGUAGE = "language"  # a long line in another language than asked for
    REPEATED = "repeated"  # stands in several documents, or before in this one
    FRAGMENT = "fragment"  # neither sentence, list item nor heading of something


class SegmentFault(enum.StrEnum):
    """Why a segment is left out."""

    TOO_SHORT = "too_short"
    LANGUAGE = "language"
    NUMBERS = "numbers"  # tables, results, price lists
    DANGLING = "dangling"  # begins in the middle, or refers to what is not there: earlier text, a picture, a link
    PROMOTION = "promotion"  # sells, or asks for a call
    CONVERSATION = "conversation"  # comments, greetings, much that is exclaimed
    PERSONAL = "personal"  # tells of its writer
    NEAR_DUPLICATE = "near_duplicate"


@dataclasses.dataclass(frozen=True)
class SegmentConfig:
    """`configs/main_prepare.py` says what each key is for."""

    min_words: int
    max_words: int
    max_symbols: float
    max_upper: float
    stop_words: tuple[str, ...]
    min_stop_words: float
    dangling_words: tuple[str, ...]
    personal_words: tuple[str, ...]
    max_personal_words: float
    max_numbers: float
    max_exclamations: float

    def __post_init__(self):
        if not 1 <= self.min_words <= self.max_words:
            raise UserError(
                f"config.segments.min_words={self.min_words}: must lie between 1 and config.segments.max_words="
                f"{self.max_words}"
            )
        for name in (
            "max_symbols",
            "max_upper",
            "min_stop_words",
            "max_personal_words",
            "max_numbers",
            "max_exclamations",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"config.segments.{name}={getattr(self, name)}: must lie between 0 and 1")


@dataclasses.dataclass(frozen=True)
class Piece:
    """A segment, kept or not."""

    text: str
    fault: SegmentFault | None


_DIGIT = re.compile(r"\d")
_END = re.compile(r"[.!?…。！？][\"'”’»)\]*_]*$")
_BREAK = re.compile(  # between two sentences of a line
    r"(?<=[.!?…])[\"'”’»)\]]*\s+(?=[\"'“‘«(\[]*[^\W_a-z])|(?<=[。！？])(?=\S)"
)
_ABBREVIATED = re.compile(
    r"(?:\b(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|Mt|Rev|Gen|Col|Capt|Sgt|Lt|vs|etc|approx|no|No|Nos|vol|Vol|pp|p|fig|Fig"
    r"|Inc|Ltd|Co|Corp|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Sept|Oct|Nov|Dec)|\b(?:[A-Za-z]\.)+[A-Za-z])\.$"
)
_ITEM = re.compile(
    r"(?:[-*+•‣◦·▪●–—►✓✔]|\(?\d{1,3}[.):]|\(?[a-zA-Z][.)]|step \d+[.:)]?)\s|\d+(?:[./]\d+)?\s", re.IGNORECASE
)
_LINK = re.compile(r"https?://|www\.|\b[\w-]+\.(?:com|org|net|co\.uk|info|html?)\b|\S+@\S+\.\w+", re.IGNORECASE)
_BOILERPLATE = re.compile(
    r"©|\(c\) ?\d{4}|copyright|all rights reserved|terms (?:of|and|&) |privacy policy|cookies?\b|disclaimer"
    r"|^(?:posted|published|written|submitted|uploaded|filed|tagged|updated|added)\b.{0,40}\b(?:by|on|in|under|at)\b"
    r"|this entry was posted|^tags?:|^categor(?:y|ies):|^(?:next|previous|prev|older|newer)\b.{0,60}$"
    r"|click (?:here|on|the|below)|(?:read|learn|see|view|show|find out) more\b|continue reading"
    r"|leave a (?:reply|comment)"
    r"|\bcomments?\b.{0,20}$|trackback|pingback|rss feed|subscribe|newsletter|sign[- ]?up\b|log[- ]?in\b"
    r"|register(?:ed)? (?:now|here)"
    r"|(?:share|follow|like|find|join) (?:this|us|me)\b|facebook|twitter|instagram|pinterest|e-?mail (?:us|me|address)"
    r"|add to (?:cart|basket|wish)|free shipping|in stock|out of stock|check ?out\b|your (?:order|cart|browser)"
    r"|javascript|lorem ipsum|photo(?:s|graph)? (?:by|credit|courtesy)|image (?:by|credit|source)|advertisement"
    r"|^(?:reply|report|quote|share|print|home|menu|search|skip to)\b.{0,20}$|\b(?:am|pm) (?:est|pst|gmt|utc)\b"
    r"|opens in a new (?:window|tab)"
    r"|(?:above|below|this) (?:post|article|page|blog|site|website|video|link|picture|photo)\b",
    re.IGNORECASE,
)
_PROMOTION = re.compile(
    r"\+?\(?\d{3}\)?[-. ]\d{3}[-. ]\d{4}|\b(?:call|contact|visit|e-?mail|reach|ask|book with|shop with) (?:us|our|me)\b"
    r"|\b(?:call|order|book|buy|shop|apply|enquire|register|enroll|download) (?:now|today|online)\b|give us a call"
    r"|\bour (?:team|staff|experts?|clients?|customers?|products?|services?|company|store|shop|prices?|website"
    r"|range|technicians|professionals|showroom|catalogue?)\b|\bwe (?:offer|provide|speciali[sz]e|deliver|ship"
    r"|guarantee|accept|carry|stock|are proud|pride)\b|\bfree (?:quote|estimate|consultation|trial|delivery)\b"
    r"|money[- ]back|\bfor sale\b|limited time|special offer|\bdiscounts?\b|\bjoins? us\b|\btickets? (?:are|cost)\b"
    r"|\b(?:price|cost)s? (?:starts?|from)\b",
    re.IGNORECASE,
)
_GARBLED = re.compile(r"\ufffd|[ÂÃ][^a-zà-ÿ]|â€|&#?\w+;")
_SHOWN = "map|picture|image|photo|video|chart|link|table|graph|diagram|screenshot|form"
_POINTING = re.compile(
    rf"\b(?:below|above|attached|following) (?:{_SHOWN})s?\b|\b(?:{_SHOWN}|detail|instruction)s? (?:below|above)\b"
    r"|\b(?:available|listed|shown|seen|see|linked) (?:below|above)\b"
    r"|\bmy (?:last|previous|next) (?:article|post|entry)\b"
    r"|\bclick here\b|\b(?:read|view|see|download|visit)\b[^.!?]{0,60}\bhere[.!]"
    r"|\b(?:in|on) (?:this|the) (?:picture|image|photo|video|thread|episode)\b",
    re.IGNORECASE,
)
_CONVERSATION = re.compile(
    r"^(?:hi|hello|hey|dear|thanks?|thank you|congrat\w*|welcome|sorry|yes|no|lol|wow|ok(?:ay)?|great (?:post|article)"
    r"|good (?:morning|luck))\b(?! to\b)|^@\w|\bthis (?:blog|forum|thread|post)\b|\bmy (?:blog|channel|last post)\b"
    r"|\b(?:lol|imho|btw|xoxo)\b|[!?]{3}|!!|[:;]-?[)(]",
    re.IGNORECASE | re.MULTILINE,
)


def line_key(line: str) -> str:
    """What two lines must share to count as the same: their words."""
    return " ".join(tokens(line))


def cut(
    document: str,
    config: SegmentConfig,
    repeated: Callable[[str], bool] = lambda key: False,
    dropped: collections.Counter[str] | None = None,
) -> Iterator[Piece]:
    """The segments of a document, in their order, with what is wrong with each.

    A segment has `min_words` to `max_words` words. It ends with a sentence or a list's item, begins at a line or, where
    a paragraph is longer than a segment, at a sentence; a heading stays with what follows it and a list with the line
    that announces it.

    Args:
      repeated: whether a line, by its `line_key`, stands in several documents.
      dropped: counts left-out lines by reason, if given.
    """
    dropped = collections.Counter() if dropped is None else dropped
    whole = True  # no text of the document stands before
    for run in _runs(document, config, repeated, dropped):
        for segment, headed in _packed(_blocks(run, config.max_words), config):
            yield Piece(segment, _segment_fault(segment, config, whole or headed))
            whole = False


def line_fault(line: str, config: SegmentConfig) -> LineFault | None:
    """What is wrong with a line by itself, or None."""
    letters = sum(map(str.isalpha, line))
    spaces = sum(map(str.isspace, line))
    if not letters or (len(line) - letters - spaces) / (len(line) - spaces) > config.max_symbols:
        return LineFault.SYMBOLS
    if _GARBLED.search(line):
        return LineFault.GARBLED
    if _LINK.search(line):
        return LineFault.LINKS
    if sum(map(str.isupper, line)) / letters > config.max_upper and letters > 10:
        return LineFault.UPPER_CASE
    words = tokens(line)
    if len(words) >= LANGUAGE_WORDS and _share(words, config.stop_words.__contains__) < config.min_stop_words / 2:
        return LineFault.LANGUAGE
    # Furniture is short; a long paragraph may well speak of cookies
    if (len(line) < FURNITURE_LENGTH or not _END.search(line)) and _BOILERPLATE.search(line):
        return LineFault.BOILERPLATE
    return None


def _runs(
    document: str, config: SegmentConfig, repeated: Callable[[str], bool], dropped: collections.Counter[str]
) -> Iterator[list[str]]:
    """Stretches of good lines; "" stands for a blank line between them."""
    run: list[str] = []
    seen: set[str] = set()
    for line in [" ".join(line.split()) for line in re.split(r"\r\n?|\n", html.unescape(document))] + [None]:
        if line == "":
            run.append("")
            continue
        if line is None:
            fault = None
        else:
            key = line_key(line)
            fault = LineFault.REPEATED if key in seen or repeated(key) else line_fault(line, config)
            seen.add(key)
        if line is not None and fault is None:
            run.append(line)
            continue
        if fault:
            dropped[fault] += 1
        if good := _without_fragments(run, dropped):
            yield good
        run = []


def _without_fragments(run: list[str], dropped: collections.Counter[str]) -> list[str]:
    """The lines that are sentences, list items, or headings of what follows; a cut line loses its last words."""
    kept: list[str] = []
    for line in reversed(run):
        following = next((other for other in reversed(kept) if other), "")
        if line and not following and len(tokens(line)) <= LAST_WORDS and not _is_item(line):
            dropped[LineFault.FRAGMENT] += 1
        elif not line or _END.search(line) or _is_item(line) or _announces(line, following):
            kept.append(line)
        elif sentences := _sentences(line)[:-1]:
            kept.append(" ".join(sentences))
            dropped[LineFault.FRAGMENT] += 1
        else:
            dropped[LineFault.FRAGMENT] += 1
    return kept[::-1] if any(kept) else []


def _is_item(line: str) -> bool:
    return bool(_ITEM.match(line))


def _announces(line: str, following: str) -> bool:
    """Whether a line that is no sentence is the heading of the next one, or announces it with a colon."""
    if not following:
        return False
    return line.endswith((":", "：")) or (len(tokens(line)) <= HEADING_WORDS and not _is_heading(following))


def _is_heading(line: str) -> bool:
    return not _END.search(line) and not _is_item(line)


def _blocks(run: list[str], max_words: int) -> list[tuple[str, bool]]:
    """(text, begins a section) of what should stay together, each at most `max_words` long where that can be."""
    groups: list[list[str]] = []
    for line in run:
        if not line:
            continue
        last = groups[-1][-1] if groups else ""
        # A heading or an announcement goes with the next line, an item with the items before it
        together = groups and (_is_heading(last) or (_is_item(line) and (_is_item(last) or last.endswith((":", "：")))))
        (groups[-1].append if together else lambda new: groups.append([new]))(line)
    blocks = []
    for group in groups:
        opens = _is_heading(group[0])
        for text in _shortened(group, max_words):
            blocks.append((text, opens))
            opens = False
    return blocks


def _shortened(group: list[str], max_words: int) -> Iterator[str]:
    """The group's lines as one text, or as several of at most `max_words` words, cut at lines, else at sentences."""
    if _words("\n".join(group)) <= max_words:
        yield "\n".join(group)
        return
    parts = [(line, "\n") for line in group]
    if max(_words(line) for line in group) > max_words:
        parts = [(sentence, " " if i else "\n") for line in group for i, sentence in enumerate(_sentences(line))]
    text, words = "", 0
    for part, separator in parts:
        count = _words(part)
        if text and words + count > max_words:
            yield text
            text, words = "", 0
        text, words = f"{text}{separator}{part}" if text else part, words + count
    yield text


def _packed(blocks: list[tuple[str, bool]], config: SegmentConfig) -> Iterator[tuple[str, bool]]:
    """(text, begins a section) of segments of about equal size; a section begins one where the last is long enough."""
    counts = [_words(text) for text, _ in blocks]
    target = sum(counts) / max(-(-sum(counts) // config.max_words), 1)
    parts: list[str] = []
    words, headed = 0, False
    for (text, opens), count in zip(blocks, counts, strict=True):
        full = words + count > config.max_words or words >= target or (opens and words >= config.min_words)
        if parts and full:
            yield "\n".join(parts), headed
            parts, words = [], 0
        if not parts:
            headed = opens
        parts.append(text)
        words += count
    if parts:
        yield "\n".join(parts), headed


def _segment_fault(text: str, config: SegmentConfig, begins: bool) -> SegmentFault | None:
    """What is wrong with a segment; `begins` says whether a document or a section begins with it."""
    words = tokens(text)
    if not config.min_words <= len(words) <= config.max_words:
        return SegmentFault.TOO_SHORT
    if _share(words, config.stop_words.__contains__) < config.min_stop_words:
        return SegmentFault.LANGUAGE
    if _share(words, _DIGIT.search) > config.max_numbers:
        return SegmentFault.NUMBERS
    first = next((c for c in text if c.isalnum()), "")
    if not begins or first.islower() or words[0] in config.dangling_words or _POINTING.search(text):
        return SegmentFault.DANGLING
    exclaimed = _share(_sentences(text.replace("\n", " ")), lambda sentence: sentence.endswith(("!", "！")))
    if exclaimed > config.max_exclamations or _CONVERSATION.search(text):
        return SegmentFault.CONVERSATION
    if _PROMOTION.search(text):
        return SegmentFault.PROMOTION
    personal = _share(words, config.personal_words.__contains__)
    return SegmentFault.PERSONAL if personal > config.max_personal_words else None


def _share(items: Sequence[str], is_one: Callable[[str], object]) -> float:
    return sum(map(bool, map(is_one, items))) / len(items)


def _sentences(line: str) -> list[str]:
    parts: list[str] = []
    start = 0
    for gap in _BREAK.finditer(line):
        end = len(line[: gap.end()].rstrip())
        if not _ABBREVIATED.search(line[start:end]):
            parts.append(line[start:end])
            start = gap.end()
    return [*parts, line[start:]]


def _words(text: str) -> int:
    return len(tokens(text))
