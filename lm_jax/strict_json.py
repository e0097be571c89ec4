"""JSON of others: one object a file, and no key twice."""

import collections
import json
from pathlib import Path
from typing import Any

from lm_jax.errors import UserError


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
