"""FollowBench's instructions whose answers a rule checks (arXiv 2310.20410): no judge is asked about them.

Sources with a target text, summaries whose constraints can be counted, and the example category, whose answer must
have the form of the last of its examples. The rules are the benchmark's own; white space around a response is ignored.
"""

import ast
import re
import string
from collections.abc import Callable

Check = Callable[[str], bool]

_SUMMARIES: dict[str, tuple[Check, ...]] = {  # what each level adds
    "cnn_dailymail": (
        lambda text: len(_sentences(text)) == 3,
        lambda text: all(len(s.split()) < 15 for s in _sentences(text)),
        lambda text: all(_in_sentence(text, i, word) for i, word in enumerate(("Potter", "actor", "films"))),
        lambda text: not _in_sentence(text, 1, "lavish"),
        lambda text: bool(re.search(r"\b(?:has|have)\s+\w+", (_sentences(text) + [""] * 3)[2])),
    ),
    "xsum": (
        lambda text: len(_sentences(text)) == 1,
        lambda text: len(text.split()) < 20,
        lambda text: not _has(text, "Newton Stewart"),
        lambda text: bool(re.search(r"\b(?:am|is|are)\s+\w+ing\b", text)),
        lambda text: _has(text, "operation"),
    ),
    "samsum": (
        lambda text: len(_sentences(text)) == 1,
        lambda text: len(text.split()) < 15,
        lambda text: _has(text, "stuff"),
        lambda text: "procrast" not in text.lower(),
        lambda text: sum(c in string.punctuation for c in text) == 1,
    ),
    "gigaword": (
        lambda text: len(text.split()) == 8,
        lambda text: not set(text) & set(string.punctuation),
        lambda text: text.islower(),
        lambda text: not _has(text, "bus"),
        lambda text: _has(text, "in"),
    ),
    "arxiv": (
        lambda text: len(_sentences(text)) == 1,
        lambda text: len(text.split()) <= 20,
        lambda text: text.startswith("We"),
        lambda text: _has(text, "activations"),
        lambda text: not _has(text, "transformer"),
    ),
}
_TARGETS: dict[str, Callable[[str, str], bool]] = {  # (response, target)
    "E2E": lambda text, target: text == target,
    "text_editing": lambda text, target: text == target,
    "WIKIEVENTS": lambda text, target: set(text.split("\n")) <= set(target.split("\n")),
    "CONLL2003": lambda text, target: text in _listed(target),
    "BBH_logical": lambda text, target: _last(r"\([A-Z]\)", text) == target,
    "BBH_time": lambda text, target: _last(r"\d{2}/\d{2}/\d{4}", text) == target,
    "self_made_space": lambda text, target: target in text,
    "gsm_8k": lambda text, target: _last(r"\$\d+", text) == target,
}

RULED = frozenset({*_SUMMARIES, *_TARGETS})


def follows(source: str, level: int, target: str, response: str) -> bool:
    """Whether a response meets the constraints of a level (1 to 5) of an instruction whose source is in RULED.

    Raises:
      ValueError: a target that is not as this source has it.
    """
    text = response.strip()
    if source in _SUMMARIES:
        return all(check(text) for check in _SUMMARIES[source][:level])
    try:
        return _TARGETS[source](text, target)
    except SyntaxError as error:
        raise ValueError("no list of texts") from error


def has_form(template: str, answer: str, response: str) -> bool:
    """Whether a response has the form that the last example of its instruction has.

    Args:
      template: as "{instruction}\\n{{'Answer': '{answer}'}}".
      answer: the reference; a response may have several lines where this has.
    """
    form = template.replace("{instruction}\n", "").replace("{{", "{").replace("}}", "}")
    pattern = ".*".join(map(re.escape, form.split("{answer}")))
    return bool(re.fullmatch(pattern, response.strip(), re.DOTALL if "\n" in answer else 0))


def _listed(target: str) -> list[str]:
    value = ast.literal_eval(target)
    if not isinstance(value, list):
        raise ValueError(f"no list: {target!r}")
    return value


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(r"[.!?]", text) if part.strip()]


def _has(text: str, word: str) -> bool:
    return bool(re.search(rf"\b{re.escape(word)}\b", text))


def _in_sentence(text: str, index: int, word: str) -> bool:
    sentences = _sentences(text)
    return index < len(sentences) and _has(sentences[index], word)


def _last(pattern: str, text: str) -> str | None:
    found = re.findall(pattern, text)
    return found[-1] if found else None
