"""Rows to the texts that a tokenizer gets: raw text as it stands, messages through the chat template."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lm_jax.data.chat import render_chat
from lm_jax.data.messages import TOOLS, Message, Text, is_learnt, messages_fault, split_arguments, tidy_message
from lm_jax.data.tokenizers import first_line
from lm_jax.data.turns import NotShown, write_turn
from lm_jax.errors import UserError


class Rendered(NamedTuple):
    """Texts of one row, each the beginning of the next.

    Attributes:
      raw: raw text, which gets the tokenizer's own leading special tokens.
      texts: the prompt, it with its response, all before the next response, all with it, ...
    """

    raw: bool
    texts: tuple[str, ...]


class Renderer:
    """Renders rows for one tokenizer. `where` names the row in errors.

    Raises:
      UserError: naming the row and the cure.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def prompt(self, prompt: Text, where: str) -> Rendered:
        """What generation is given."""
        if isinstance(prompt, str):
            return Rendered(True, (_valid(prompt, where),))
        _check_messages(prompt, "prompt", where)
        return Rendered(False, (_valid(self._apply_template(prompt, where, add_generation_prompt=True), where),))

    def row(self, prompt: Text, response: Text, where: str) -> list[Rendered]:
        """A prompt with its whole response, which may be several messages."""
        response = self._response(prompt, response, where, each=False)
        raw, (start,) = self.prompt(prompt, where)
        if isinstance(prompt, str) or isinstance(response, str):
            return [Rendered(raw, (start, _valid(f"{start}{response}", where)))]
        messages = [*prompt, *response]
        if messages[-1]["role"] == "assistant":
            whole = "".join(self._write_turn(messages[:-1], messages[-1], where))
        else:
            whole = self._apply_template(messages, where, add_generation_prompt=False)
        if not whole.startswith(start):
            raise UserError(
                f"{where}: {_difference(start, whole)}; give the last turn alone as the response, with those before it "
                "in the prompt, or use a chat template that leaves earlier turns as they are"
            )
        return [Rendered(raw, (start, _valid(whole, where)))]

    def turns(self, prompt: Text, response: Text, where: str) -> list[Rendered]:
        """Each of the response's turns that are learnt after what generation is given for the messages before it.

        Turns that the template shows one after the other share an item.
        """
        if isinstance(prompt, str) or isinstance(response, str):
            return self.row(prompt, response, where)
        _check_messages(prompt, "prompt", where)
        messages, found = [*prompt, *self._response(prompt, response, where, each=True)], list[list[str]]()
        for i in range(len(prompt), len(messages)):
            if is_learnt(messages[i]):
                start, written = self._write_turn(messages[:i], messages[i], where)
                if not found or not start.startswith(found[-1][-1]):
                    found.append([])
                found[-1] += [start, start + written]
        return [Rendered(False, (*texts[:-1], _valid(texts[-1], where))) for texts in found]

    def _response(self, prompt: Text, response: Text, where: str, each: bool) -> Any:
        """The response in the prompt's form, a string with its end token.

        Args:
          each: every turn of the assistant must say something, else one.

        Raises:
          UserError: it is no response, or empty.
        """
        if isinstance(response, str):
            contents = [response]
        else:
            _check_messages(response, "response", where)
            said = [m for m in response if is_learnt(m) or not each]
            contents = [m.get("content") or str(m.get("tool_calls") or "") for m in said]
        if not (all if each and contents else any)(content.strip() for content in contents):
            raise UserError(f"{where}: the response is empty, so its mask would be; drop the row")
        if isinstance(prompt, str):
            if not isinstance(response, str):
                raise UserError(f"{where}: the prompt is a string but the response is messages; make them alike")
            return response if response.endswith(self._tokenizer.eos_token) else response + self._tokenizer.eos_token
        return [{"role": "assistant", "content": response}] if isinstance(response, str) else response

    def _write_turn(self, before: Sequence[Message], turn: Message, where: str) -> tuple[str, str]:
        """See `turns.write_turn`."""
        try:
            return write_turn(lambda messages, start: self._apply_template(messages, where, start), before, turn)
        except NotShown as error:
            raise UserError(
                f"{where}: the chat template does not show {error} of the assistant's turn; mend it, or drop the row"
            ) from error

    def _apply_template(self, messages: Sequence[Message], where: str, add_generation_prompt: bool) -> str:
        if not self._tokenizer.chat_template:
            raise UserError(
                f"{where}: messages were given but the tokenizer has no chat template; give strings, or set "
                "chat_template in tokenizer_config.json"
            )
        arguments, messages = split_arguments(messages)
        if arguments.get(TOOLS) and TOOLS not in str(self._tokenizer.chat_template):
            raise UserError(
                f"{where}: has tools, which the chat template does not show; use a tokenizer whose template does, or "
                "leave the column out"
            )
        try:
            return render_chat(
                self._tokenizer,
                [tidy_message(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **arguments,
            )
        except Exception as error:  # a template can raise anything
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"{where}: the chat template refuses the messages with roles {roles} ({first_line(error)}); mend the "
                "row's roles and order, or the template"
            ) from error


def _check_messages(value: Any, name: str, where: str) -> None:
    if fault := messages_fault(value):
        raise UserError(f"{where}: {name} {fault}; give a string or a list of {{'role': ..., 'content': ...}}")


def _difference(shorter: str, longer: str) -> str:
    common = next((i for i, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(longer))
    return (
        "the chat template shows the prompt otherwise once several turns follow: alone it goes on with "
        f"{shorter[common : common + 40]!r}, then with {longer[common : common + 40]!r}"
    )


def _valid(text: str, where: str) -> str:
    """`text`, if the tokenizer can take it: JSON can carry half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: half a surrogate pair at character {error.start}; remove it from the text"
        ) from error
    return text
