"""Tokens as text that a person can read: characters that several tokens share stay whole."""

from collections.abc import Sequence
from typing import Any

import numpy as np

Ids = Sequence[int] | np.ndarray

_CONTEXT = 4  # tokens before the first one, decoded with it: some decoders strip the space that begins a text
_LONGEST = 8  # tokens of one piece; only bytes that are no text at all reach it
_UNFINISHED = "\ufffd"  # what a decoder sets for bytes that are no whole character


def token_pieces(tokenizer: Any, ids: Ids, before: Ids = ()) -> list[tuple[str, int]]:
    """(text, number of tokens) in order; the numbers sum to len(ids), the texts join to what `ids` say after `before`.

    Byte-level tokenizers cut characters of several bytes into tokens that are no text alone; such tokens make one
    piece. Special tokens show as they are written.

    Args:
      tokenizer: from `load_tokenizer`.
      ids: [R] tokens.
      before: [P] the tokens before them.
    """
    decode = tokenizer.backend_tokenizer.decode
    tokens = [int(i) for i in (*before[max(len(before) - _CONTEXT, 0) :], *ids)]
    start, done = 0, len(tokens) - len(ids)
    head = decode(tokens[:done], skip_special_tokens=False)
    pieces = []
    for end in range(done + 1, len(tokens) + 1):
        whole = decode(tokens[start:end], skip_special_tokens=False)
        if whole.endswith(_UNFINISHED) and end < len(tokens) and end - done < _LONGEST:
            continue
        pieces.append((whole[len(head) :], end - done))
        start, done = done, end
        head = decode(tokens[start:done], skip_special_tokens=False)
    return pieces
