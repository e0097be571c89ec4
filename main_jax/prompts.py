"""What the forward and the reverse model are asked (MAIN, arXiv 2504.12913); every word can be replaced.

Forward: instruction -> response. Reverse: response -> the instruction that it answers. A forward prompt carries a tag,
a system message of its own for seed rows and another one for synthetic rows, as in instruction backtranslation
(Humpback, arXiv 2308.06259, section 2.3): the model can tell the two kinds apart, and is used with the seed's tag.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from lm_jax.data.messages import TEMPLATE_KWARGS, Text, read_template_kwargs, split_arguments, with_arguments
from lm_jax.data.supervised import SEED, SYNTHETIC
from lm_jax.data.tokenizers import takes_system
from lm_jax.errors import UserError

FORMATS = ("auto", "messages", "text")
_MARKERS = {  # of each template, every one to stand there once
    "reverse_question": ("response",),
    "forward_text": ("system", "instruction"),
    "reverse_text": ("system", "response"),
}
_MARKER = re.compile(r"\{(system|instruction|response)\}")


def check_markers(key: str, template: str, expected: Sequence[str]) -> None:
    """Raises UserError unless the template that is the value of `key` has each of the markers once, and no other."""
    found = _MARKER.findall(template)
    if sorted(found) != sorted(expected):
        raise UserError(
            f"{key}: has the markers {', '.join(f'{{{m}}}' for m in found) or 'none'}; it must "
            f"have {' and '.join(f'{{{m}}}' for m in expected)}, each once"
        )


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """The words, and their form. `{instruction}` and the like are markers; other braces stand for themselves.

    What is filled in is never searched for markers, so texts come out as they went in.

    Attributes:
      format: messages | text | auto: messages where the model has a chat template.
      seed_system: tag of seed rows; empty: none.
      synthetic_system: tag of synthetic rows; empty: none.
      reverse_system: the reverse model's task; empty: none.
      reverse_question: what shows the response and asks for its instruction, as a user message.
      forward_text: the forward prompt in format text.
      reverse_text: the reverse prompt in format text.

    Raises:
      UserError: an unknown format; a template lacks a marker, has it twice, or has one that is not its own.
    """

    format: str = "auto"
    seed_system: str = "Answer as a helpful assistant does."
    synthetic_system: str = "Answer as a text found on the web does."
    reverse_system: str = ""
    reverse_question: str = (
        "Below is a response that an assistant gave. Write the one instruction, question or request that it answers, "
        "and nothing else.\n\nResponse:\n{response}"
    )
    forward_text: str = "{system}\n\nInstruction:\n{instruction}\n\nResponse:\n"
    reverse_text: str = "{system}\n\nResponse:\n{response}\n\nInstruction:\n"

    def __post_init__(self):
        if self.format not in FORMATS:
            raise UserError(f"config.prompts.format={self.format!r}: must be {', '.join(FORMATS[:-1])} or text")
        for name, expected in _MARKERS.items():
            check_markers(f"config.prompts.{name}", getattr(self, name), expected)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of one model; see `open_prompts`. `kwargs`: of a row's column `chat_template_kwargs`.

    Attributes:
      words: the config.
      format: messages or text.
      system: whether the chat template shows a system message; otherwise its text heads the user's.
    """

    words: PromptConfig
    format: str
    system: bool = True

    def forward(self, instruction: str, source: str, kwargs: Any = None) -> Text:
        """Asks for a response to `instruction`, under the tag of its `source` (seed or synthetic)."""
        system = {SEED: self.words.seed_system, SYNTHETIC: self.words.synthetic_system}[source]
        return self._prompt(kwargs, system, instruction, self.words.forward_text, instruction=instruction)

    def no_instruction(self, source: str, kwargs: Any = None) -> Text:
        """The forward prompt around an empty instruction.

        Frame and tag stay, so that a response's likelihoods with and without an instruction differ by that alone.
        """
        return self.forward("", source, kwargs)

    def reverse(self, response: str, kwargs: Any = None) -> Text:
        """Shows `response` and asks for the instruction that it answers; `instructions.read_instruction` reads it."""
        question = fill(self.words.reverse_question, response=response)
        return self._prompt(kwargs, self.words.reverse_system, question, self.words.reverse_text, response=response)

    def stop(self, direction: str) -> tuple[str, ...]:
        """Where to end what is sampled from raw text: a base model that runs on begins with the template's first label.

        Args:
          direction: forward or reverse.
        """
        if self.format == "messages":
            return ()
        template = {"forward": self.words.forward_text, "reverse": self.words.reverse_text}[direction]
        labels = [line.strip() for line in _MARKER.sub("\n", template).split("\n") if line.strip()]
        return (f"\n{labels[0]}",) if labels else ()

    def _prompt(self, kwargs: Any, system: str, question: str, template: str, **values: str) -> Text:
        if self.format == "text":
            return fill(template, system=system, **values).lstrip("\n")
        if not self.system:
            question, system = f"{system}\n\n{question}" if system else question, ""
        head = [{"role": "system", "content": system}] if system else []
        own = read_template_kwargs(kwargs, TEMPLATE_KWARGS)
        return with_arguments([*head, {"role": "user", "content": question}], own)


def open_prompts(config: PromptConfig, tokenizer: Any, model: str) -> Prompts:
    """The prompts in the form that a model's tokenizer takes.

    Args:
      model: its name, for errors.

    Raises:
      UserError: messages are asked for and there is no chat template.
    """
    template = bool(tokenizer.chat_template)
    if config.format == "messages" and not template:
        raise UserError(
            f"config.prompts.format='messages': the tokenizer of {model} has no chat template; set "
            "config.prompts.format=text, or chat_template in tokenizer_config.json"
        )
    format = ("messages" if template else "text") if config.format == "auto" else config.format
    return Prompts(config, format, format == "text" or takes_system(tokenizer))


def supervised_example(prompt: Text, response: str) -> dict[str, Any]:
    """The columns of a supervised row: `messages` and what their template takes besides, or `prompt` and `response`."""
    if isinstance(prompt, str):
        return {"prompt": prompt, "response": response}
    columns = prompt_columns(prompt)
    return {"messages": [*columns.pop("prompt"), {"role": "assistant", "content": response}], **columns}


def prompt_columns(prompt: Text) -> dict[str, Any]:
    """The columns of a row to generate from."""
    kwargs, shown = ({}, prompt) if isinstance(prompt, str) else split_arguments(prompt)
    return {"prompt": shown, **({TEMPLATE_KWARGS: kwargs} if kwargs else {})}


def fill(template: str, **values: str) -> str:
    """The template with its markers replaced, in one pass: markers inside a value are never seen."""
    return _MARKER.sub(lambda marker: values[marker[1]], template)
