"""Where a response ends, and its text."""

from collections.abc import Sequence
from typing import Any

from lm_jax.data.pieces import Ids
from lm_jax.data.tokenizers import token_ids
from lm_jax.errors import UserError
from lm_jax.generation.answer_text import thoughts_opening

_CONTEXT = 8  # prompt tokens that are decoded with a response: enough for a character cut into bytes and for its space


def resolve_stops(
    stop: Sequence[str | int], tokenizer: Any, end_ids: Sequence[int]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Splits stops into token ids (the model's own end tokens first) and texts. The text of a special token is its id.

    Raises:
      UserError: an id, or what is written like a special token, that the tokenizer does not have.
    """
    ids, texts = list(end_ids), []
    specials = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    for item in stop:
        if isinstance(item, int):
            if item not in (known := token_ids(tokenizer)):
                raise UserError(f"config.stop: no token has the id {item}; the tokenizer's ids end with {known[-1]}")
            ids.append(item)
        elif item in specials:
            ids.append(specials[item])
        elif item.startswith("<|") and item.endswith("|>"):
            raise UserError(
                f"config.stop: unknown stop token {item!r}; the tokenizer has {', '.join(sorted(specials)) or 'none'}"
            )
        else:
            texts.append(item)
    return tuple(dict.fromkeys(ids)), tuple(texts)


def response_text(tokenizer: Any, prompt_ids: Ids, ids: Sequence[int]) -> str:
    """The text that `ids` add to the prompt's; special tokens leave none.

    Decoded alone, the first token would lose its leading space with a sentencepiece-like tokenizer.
    """
    head = list(prompt_ids[-_CONTEXT:])
    before, whole = (tokenizer.decode(x, skip_special_tokens=True) for x in (head, [*head, *ids]))
    if whole.startswith(before):
        return whole[len(before) :]
    return tokenizer.decode(list(ids), skip_special_tokens=True)


class Stops:
    """The stop texts of one response, looked for as its tokens come.

    Args:
      tokenizer: of the model.
      prompt_ids: [P] the prompt.
      texts: any of them ends the response.
      think_end: see `requests.Request`.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Ids, texts: Sequence[str], think_end: str = ""):
        self._tokenizer, self._prompt, self._texts = tokenizer, prompt_ids, texts
        self._end, self._opening = think_end, thoughts_opening(think_end)
        # (token, character) of the response from which stop texts count; None: it may be thinking
        self._from: tuple[int, int] | None = None if think_end else (0, 0)

    def find(self, ids: Sequence[int], new: int) -> tuple[int, str] | None:
        """Looks for a stop text that the last `new` tokens completed.

        Returns:
          (how many of `ids` it took, the response up to the first stop text), or None.
        """
        if not self._texts or not ids:
            return None
        new = len(ids) if self._from is None and self._has_thought(ids, new) else new  # none was looked for before
        if self._from is None:
            return None
        token, begin = self._from
        start = max(self._reach(ids, new, self._texts), token)
        tail = response_text(self._tokenizer, [*self._prompt[-_CONTEXT:], *ids[:start]], ids[start:])
        if not any(text in tail for text in self._texts):
            return None
        for count in range(max(1, start), len(ids) + 1):
            text = response_text(self._tokenizer, self._prompt, ids[:count])
            found = [at for stop in self._texts if (at := text.find(stop, begin)) >= 0]
            if found:
                return count, text[: min(found)]
        return None

    def _reach(self, ids: Sequence[int], new: int, texts: Sequence[str]) -> int:
        """The token from which on all of a text stands that the last `new` tokens completed.

        A text of n bytes is spelt by at most n tokens, so it ends in the new ones and begins at most n before them.
        """
        return max(0, len(ids) - new - max(len(text.encode()) for text in texts))

    def _has_thought(self, ids: Sequence[int], new: int) -> bool:
        """Whether thoughts are over, or there are none; sets where stop texts count from."""
        start = self._reach(ids, new, [self._end])
        if not self._opened(ids):
            self._from = 0, 0
        elif self._end in self._tokenizer.decode(ids[start:]):
            ended = (n for n in range(start + 1, len(ids) + 1) if self._end in self._tokenizer.decode(ids[start:n]))
            token = next(ended)
            self._from = token, len(response_text(self._tokenizer, self._prompt, ids[:token]))
        return self._from is not None

    def _opened(self, ids: Sequence[int]) -> bool:
        """Whether thoughts are open, or may be about to be; of an end that does not say how they begin, always."""
        most = len(self._opening.encode()) + _CONTEXT
        before, first = (self._tokenizer.decode(list(x)) for x in (self._prompt[-most:], ids[:most]))
        first = first.lstrip()
        return (
            before.rstrip().endswith(self._opening)
            or first.startswith(self._opening)
            or self._opening.startswith(first)
        )
