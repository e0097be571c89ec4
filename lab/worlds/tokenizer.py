"""A word tokenizer with the closed vocabulary of a world, in Hugging Face format.

A word is one token wherever it stands, so that a model copies it from an instruction as it is; what is glued to the
word before it (a comma, a colon) has a token of its own, marked as in WordPiece. Chat turns are `<|role|>`, a
newline, the text and `<|end|>`: behind a newline no space is set, so that an answer is decoded as it was learnt.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lab.worlds.forms import Form
from lab.worlds.world import World, tokens
from lm_jax.data.rows import write_text

UNKNOWN, PAD, TEXT, END = "<|unknown|>", "<|pad|>", "<|text|>", "<|end|>"
ROLES = ("system", "user", "assistant")
_GLUED = "##"
_NEWLINE = "\u23ce"  # stands for a newline inside the vocabulary, since pieces are cut at white space
_CHAT = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def make_tokenizer(world: World, phrases: Sequence[str] = (), texts: Iterable[str] = ()) -> Any:
    """The transformers tokenizer of a world; `decode(encode(text)) == text` for every text of it.

    Texts are words separated by single spaces, with newlines. A raw text begins with `<|text|>`.

    Args:
      world: its words, marks and sentences.
      phrases: texts of other makers that stay whole, each one token, as a method's long task description.
      texts: further texts whose words the vocabulary gets, as a method's prompts; phrases in them are left out.
    """
    specials = [UNKNOWN, PAD, TEXT, END, *(f"<|{role}|>" for role in ROLES)]
    known = list(
        dict.fromkeys(piece for text in [*world_texts(world), *_without(phrases, texts)] for piece in pieces(text))
    )
    vocabulary = {token: i for i, token in enumerate([*specials, _NEWLINE, *known])}
    # Longest first would take the continuation of a word apart; a word is in the vocabulary whole or not at all
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN, continuing_subword_prefix=_GLUED))
    tokenizer.normalizer = normalizers.Replace("\n", f" {_NEWLINE} ")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix=_GLUED, cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(f" ?{_NEWLINE} ?"), "\n"),
            decoders.Replace(Regex(r" (?=<\|)"), ""),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{TEXT} $A", special_tokens=[(TEXT, vocabulary[TEXT])]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    tokenizer.add_tokens([AddedToken(phrase, normalized=False, special=False) for phrase in phrases])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        pad_token=PAD,
        bos_token=TEXT,
        eos_token=END,
        chat_template=_CHAT,
        clean_up_tokenization_spaces=False,
    )


def write_tokenizer(directory: str | Path, *arguments: Any, **options: Any) -> int:
    """Saves `make_tokenizer` of the same arguments in Hugging Face format; the size of its vocabulary.

    A generation config beside it says where an answer ends: without one transformers goes on to the longest.
    """
    tokenizer = make_tokenizer(*arguments, **options)
    tokenizer.save_pretrained(directory)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    write_text(str(Path(directory) / "generation_config.json"), json.dumps(ends) + "\n")
    return len(tokenizer)


def pieces(text: str) -> list[str]:
    """The tokens of a text as the vocabulary spells them, newlines left out."""
    return [
        f"{_GLUED}{token}" if number else token for word in text.split() for number, token in enumerate(tokens(word))
    ]


def world_texts(world: World) -> list[str]:
    """Texts that together hold every piece of a world's instructions, questions, lists of those and responses."""
    values = [value for kind in world.kinds for value, _ in kind.values]
    words = [word for group in world.groups for word in group.words]
    names = [*words, *values, *world.halves, *(group.name for group in world.groups)]
    sentences = [*world.task, world.copying, *(text for kind in world.kinds for text in kind.phrasings)]
    asked = [world.task_question, *(kind.question for kind in world.kinds)]
    numbers = " ".join(f"{number}." for number in range(1, 10))
    return [
        *(sentence.replace("{}", f"{names[0]}") + "." for sentence in sentences),
        *(question.replace("{}", f"{names[0]}") for question in asked),
        *names,
        numbers,
        *_responses(world, words[:3]),
    ]


def _responses(world: World, words: Sequence[str]) -> list[str]:
    """A response for every mark."""
    plain = Form(tuple(words), world.separator)
    made = [plain.text()]
    for kind in world.kinds:
        for _, mark in kind.values if kind.rule == "mark" else ():
            parts: dict[str, Any] = {"separator": world.separator, kind.slot: mark}
            made.append(Form(words=tuple(words), **parts).text())
    # An item that ends with a mark of its own is followed by the separator all the same
    glued = [mark.strip() for mark in (world.separator, *_separators(world)) if not mark.startswith(" ")]
    return made + [f"{words[0]}{mark}{end}" for end in glued for mark in world.marks_of("after")]


def _separators(world: World) -> list[str]:
    return [mark for kind in world.kinds if kind.slot == "separator" for mark in kind.marks]


def _without(phrases: Sequence[str], texts: Iterable[str]) -> list[str]:
    cut = re.compile("|".join(map(re.escape, sorted(phrases, key=len, reverse=True)))) if phrases else None
    return [cut.sub(" ", text) if cut else text for text in texts]
