"""Rows that point at a store of token weights: what `launch.musc_token_weights` writes and `launch.musc_train` reads.

A row's column `token_weights` is {"store": where it lies, "key": which store it was, "row": the pair's number in it,
"rule": whose weights to use unless another rule is asked for, "tokens": what they were made for}. Pair i has the
store's rows 2i (chosen) and 2i + 1 (rejected).
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm_jax.data.messages import Text
from lm_jax.data.score_store import ScoreStore
from lm_jax.data.text import attempt
from lm_jax.errors import UserError
from musc_jax.weights.rules import FROM_STORE, WEIGHING_RULES

COLUMN = "token_weights"
_KINDS = {"store": str, "key": str, "row": int, "rule": str, "tokens": str}


def pair_fingerprint(prompt: Text, chosen: np.ndarray, rejected: np.ndarray) -> str:
    """Of what weights are made for: the prompt's text and the token ids of both responses. 16 hex digits.

    The prompt's text and not its ids: what matters of the template is in the store's own key.
    """
    digest = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode())
    for ids in (chosen, rejected):
        digest.update(np.array([len(ids), *ids], "<i4").tobytes())
    return digest.hexdigest()[:16]


def key_digest(key: Mapping[str, Any]) -> str:
    """Which store it is: 16 hex digits of the key that it was made with."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def store_as_written(store: str, rows_path: str) -> str:
    """How rows at `rows_path` name `store`: relative where it lies beside or below them, so that both can be moved."""
    store, base = _absolute(store), _base(rows_path)
    return store.removeprefix(base) if store.startswith(base) else store


def stored_fields(
    columns: Sequence[Mapping[str, Any]],
    fingerprints: Sequence[str],
    lengths: Sequence[tuple[int, int]],
    names: Sequence[str],
    path: str,
    weights: str,
) -> list[dict[str, tuple[np.ndarray, np.ndarray]] | UserError]:
    """All that the stores hold of each pair: field -> (chosen [R], rejected [R]) float32, first the rule asked for.

    In a pair's place what is wrong with it: it points nowhere, at another store than there is, at one without the rule,
    or at weights that were made for other tokens.

    Args:
      columns: the rows as read from `path`.
      fingerprints: of the pairs, as this run encodes them.
      lengths: tokens of chosen and rejected.
      names: of the rows, for errors.
      path: the file that the rows are from; their stores' paths are relative to it.
      weights: `store`, or `store:RULE`.

    Raises:
      UserError: no such store.
    """
    asked = weights.removeprefix(FROM_STORE).removeprefix(":") or None
    pointers = [attempt(_pointer, row.get(COLUMN), name, weights) for row, name in zip(columns, names, strict=True)]
    found: list[Any] = list(pointers)
    for where in dict.fromkeys(pointer["store"] for pointer in pointers if isinstance(pointer, Mapping)):
        store = ScoreStore.open(where if "://" in where or os.path.isabs(where) else _base(path) + where)
        digest = key_digest(store.key)
        mine: list[tuple[int, Mapping[str, Any]]] = []
        for i, pointer in enumerate(pointers):
            if isinstance(pointer, Mapping) and pointer["store"] == where:
                fault = _pointer_fault(pointer, store, digest, asked, fingerprints[i], tuple(lengths[i]))
                if fault is None:
                    mine.append((i, pointer))
                else:
                    found[i] = UserError(f"{names[i]}: {fault}")
        values = store.read([2 * pointer["row"] + side for _, pointer in mine for side in (0, 1)])
        for k, (i, pointer) in enumerate(mine):
            first = asked or pointer["rule"]
            found[i] = {f: (values[f][2 * k], values[f][2 * k + 1]) for f in dict.fromkeys((first, *values))}
    return found


def _pointer_fault(
    pointer: Mapping[str, Any], store: ScoreStore, digest: str, asked: str | None, tokens: str, lengths: tuple[int, ...]
) -> str | None:
    rule = asked or pointer["rule"]
    if pointer["key"] != digest or not 0 <= pointer["row"] < len(store.lengths) // 2:
        return (
            f"the store {store.path} is not the one that the row's weights were written to; run "
            "launch.musc_token_weights again"
        )
    if rule not in store.fields:
        has = [field for field in store.fields if field in WEIGHING_RULES]
        return (
            f"the store {store.path} has no weights of {rule}; it has {', '.join(has)}: choose "
            f"config.weights={FROM_STORE} or {FROM_STORE}:RULE of these, or weigh with config.rules={rule}"
        )
    there = tuple(int(n) for n in store.lengths[2 * pointer["row"] : 2 * pointer["row"] + 2])
    if pointer["tokens"] != tokens or there != lengths:
        return (
            f"its weights in {store.path} were made for other texts, another tokenizer or another config.max_length "
            f"({there[0]} and {there[1]} tokens there, {lengths[0]} and {lengths[1]} here); run "
            "launch.musc_token_weights again on these rows with this model and max_length"
        )
    return None


def _pointer(value: Any, name: str, weights: str) -> Mapping[str, Any]:
    if value is None:
        raise UserError(
            f"{name}: no column {COLUMN!r}, which config.weights={weights} needs; run launch.musc_token_weights and "
            "give its output as config.input"
        )
    if not isinstance(value, Mapping) or any(type(value.get(k)) is not kind for k, kind in _KINDS.items()):
        raise UserError(
            f"{name}: {COLUMN} is not what launch.musc_token_weights writes ({', '.join(_KINDS)}); run it again"
        )
    return value


def _absolute(path: str) -> str:
    return path.rstrip("/") if "://" in path else os.path.abspath(os.path.expanduser(path))


def _base(path: str) -> str:
    """The directory that a file, or a directory of rows, lies in, with a slash."""
    return os.path.dirname(_absolute(path)) + "/"
