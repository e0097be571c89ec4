"""JSON that every reader takes alike: no NaN in what is written, no key twice in what is read."""

import collections
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lm_jax.errors import UserError


def dumps(value: Any, **options: Any) -> str:
    """JSON text of what was computed: NaN and infinities are null, NumPy's scalars and arrays numbers and lists.

    What a user's rows hold is not to be changed without a word: `lm_jax.data.rows.write_jsonl` refuses it.

    >>> dumps({"loss": float("nan"), "steps": [1, np.float32("inf")]})
    '{"loss": null, "steps": [1, null]}'
    """
    return json.dumps(finite(value), allow_nan=False, **options)


def finite(value: Any) -> Any:
    """`value` in plain Python values, None for every number in it that is NaN or infinite."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
      UserError: the file is missing, no JSON, or another JSON value; a key stands twice.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_doubled_keys)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a directory in Hugging Face format") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); download or export it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}; download or export it again")
    return value


def no_doubled_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object_pairs_hook of json: readers differ in which of two equal keys counts.

    Raises:
      ValueError: a key stands twice.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        raise ValueError(f"{counts.most_common(1)[0][0]!r} stands twice")
    return value
