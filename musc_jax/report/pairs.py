"""A preference pair as the report page shows it: plain values, ready for JSON.

Axes: R tokens of a response.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm_jax.data.messages import Text
from lm_jax.data.pieces import token_pieces
from lm_jax.data.preference import PreferenceRow
from lm_jax.data.text import checked
from lm_jax.errors import UserError
from musc_jax.pairs.perturb import Kind
from musc_jax.report.word_diff import KEPT, word_diff
from musc_jax.training.examples import Pairs, perturbed_prompt
from musc_jax.weights.rules import CHOSEN, FROM_STORE, REJECTED

_STEPS = 65535  # of a packed number: weights in [0, 2] are exact to 2e-5


def pair_record(row: PreferenceRow, columns: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`id`, `row`, `prompt`, `constraints`, and the responses under `chosen` and `rejected` as their `text`.

    `prompt` is a list of messages {"role", "parts"}, a raw string having one without a role. A part is (what became of
    it, text), as `word_diff` has it; "rewritten" in place of "parts" is the (full, perturbed) text where they share too
    little. `constraints` are {"text", "kind", "new"}.

    Raises:
      UserError: columns of another form than `launch.musc_pairs` writes.
    """
    name = f"{where} row {row.row}"
    other = columns.get("perturbed_prompt")
    return {
        "id": row.id,
        "row": row.row,
        "prompt": prompt_parts(row.prompt, row.prompt if other is None else perturbed_prompt(row.prompt, other, name)),
        "perturbed": other is not None,
        "constraints": constraint_records(columns, name),
        CHOSEN: {"text": _plain(row.chosen)},
        REJECTED: {"text": _plain(row.rejected)},
    }


def prompt_parts(full: Text, perturbed: Text) -> list[dict[str, Any]]:
    """Message by message, what became of the prompt; see `pair_record`."""
    old, new = ([{"role": "", "content": t}] if isinstance(t, str) else t for t in (full, perturbed))
    if [m["role"] for m in old] != [m["role"] for m in new]:
        old, new = ([{"role": "", "content": _plain(t)}] for t in (full, perturbed))
    shown = []
    for before, after in zip(old, new, strict=True):
        a, b = before["content"], after["content"]
        parts = [(KEPT, a)] if a == b else word_diff(a, b)
        shown.append({"role": before["role"], **({"rewritten": (a, b)} if parts is None else {"parts": parts})})
    return shown


def constraint_records(columns: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """{"text", "kind": a Kind, "new": what stands in its place or None} for each constraint, in order.

    By `perturbations` where the row has them, else by which of `constraints` are not among `perturbed_constraints`.
    """
    constraints, left = (_texts(columns, key, name) for key in ("constraints", "perturbed_constraints"))
    edits = columns.get("perturbations")
    if edits:
        try:
            return [{"text": e["old"], "kind": Kind(e["kind"]).value, "new": e["new"]} for e in edits]
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"{name}: perturbations are not what launch.musc_pairs writes; drop the column") from error
    if columns.get("perturbed_constraints") is None:
        return [{"text": text, "kind": Kind.KEPT.value, "new": None} for text in constraints]
    kinds = [Kind.KEPT if text in left else Kind.DROPPED for text in constraints]
    new = [text for text in left if text not in constraints]
    if len(left) == len(constraints):  # nothing was taken out, so what is new stands in its place
        spare = iter(new)
        kinds = [kind if kind is Kind.KEPT else Kind.SUBSTITUTED for kind in kinds]
        replaced = [None if kind is Kind.KEPT else next(spare, None) for kind in kinds]
    else:
        replaced = [None] * len(constraints)
        constraints, kinds = [*constraints, *[""] * len(new)], [*kinds, *[Kind.SUBSTITUTED] * len(new)]
        replaced += new
    return [
        {"text": text, "kind": kind.value, "new": other}
        for text, kind, other in zip(constraints, kinds, replaced, strict=True)
    ]


def token_records(pairs: Pairs, tokenizer: Any) -> list[dict[str, dict[str, Any]]]:
    """For each pair: side -> the tokens that training sees and what is known of them.

    `pieces`: texts; `parts`: [piece, tokens] where a piece is several tokens; `special`: pieces that are special
    tokens; `tokens`: R; `full_length`: R before truncation; `fields`: name -> numbers as `packed` writes them, the
    weights that training takes first.
    """
    special = set(tokenizer.all_special_ids)
    stored = checked(pairs.stored()) if pairs.rule.startswith(FROM_STORE) else None
    records = []
    for i in range(len(pairs)):
        sides = {}
        for k, side in enumerate((CHOSEN, REJECTED)):
            segment = pairs.segments[2 * i + k]
            if stored is not None:
                fields = {field: values[k] for field, values in stored[i].items()}
            else:
                fields = {pairs.rule: segment.values["weights"]} if segment.values else {}
            sides[side] = {
                **_pieces(tokenizer, segment.prompt, segment.response, special),
                "tokens": len(segment.response),
                "full_length": pairs.full_lengths[2 * i + k],
                "fields": {field: packed(values) for field, values in fields.items()},
            }
        records.append(sides)
    return records


def _pieces(tokenizer: Any, prompt: np.ndarray, response: np.ndarray, special: set[int]) -> dict[str, Any]:
    pieces = token_pieces(tokenizer, response, prompt)
    starts = np.cumsum([0] + [count for _, count in pieces])
    return {
        "pieces": [text for text, _ in pieces],
        "parts": [(k, count) for k, (_, count) in enumerate(pieces) if count > 1],
        "special": [k for k, (_, count) in enumerate(pieces) if count == 1 and int(response[starts[k]]) in special],
    }


def packed(values: np.ndarray) -> tuple[float, float, str]:
    """[R] -> (lowest, step, base64 of little-endian uint16): value i is lowest + step * number i; short as JSON."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    step = (high - low) / _STEPS
    numbers = np.rint((values.astype(np.float64) - low) / (step or 1.0)).astype("<u2")
    return low, step, base64.b64encode(numbers.tobytes()).decode()


def _plain(text: Text) -> str:
    """Messages as one text; the roles where there are several."""
    if isinstance(text, str):
        return text
    return text[0]["content"] if len(text) == 1 else "\n\n".join(f"{m['role']}: {m['content']}" for m in text)


def _texts(columns: Mapping[str, Any], key: str, name: str) -> list[str]:
    value = columns.get(key)
    value = [] if value is None else value
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(v, str) for v in value):
        raise UserError(f"{name}: {key} must be a list of texts; mend the row or drop the column")
    return list(value)
