"""Where a response ends, and its text."""

from collections.abc import Sequence
from typing import Any

from lm_jax.data.pieces import Ids
from lm_jax.data.tokenizers import token_ids
from lm_jax.errors import UserError

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


def find_stop(
    tokenizer: Any, prompt_ids: Ids, ids: Sequence[int], new: int, texts: Sequence[str]
) -> tuple[int, str] | None:
    """Looks for a stop text that the last `new` tokens completed.

    Returns:
      (how many of `ids` it took, the response up to the first stop text), or None.
    """
    if not texts or not ids:
        return None
    # A text of n bytes is spelt by at most n tokens, so it ends in the new ones and begins at most n before them
    reach = max(len(text.encode()) for text in texts)
    start = max(0, len(ids) - new - reach)
    tail = response_text(tokenizer, [*prompt_ids[-_CONTEXT:], *ids[:start]], ids[start:])
    if not any(text in tail for text in texts):
        return None
    for count in range(max(1, start), len(ids) + 1):
        text = response_text(tokenizer, prompt_ids, ids[:count])
        found = [text.find(stop) for stop in texts if stop in text]
        if found:
            return count, text[: min(found)]
    return None
