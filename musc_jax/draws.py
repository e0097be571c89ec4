"""Random numbers that are functions of names: no state, so a row's draw depends on no other row, order or restart."""

import hashlib
import json
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def uniform(*key: str | int) -> float:
    """A number in [0, 1) that depends on `key` alone, as (seed, row id, purpose), alike on every machine."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)


def shuffled(items: Sequence[T], *key: str | int) -> list[T]:
    """All of `items` in an order that depends on `key` and their number alone."""
    return [items[i] for i in sorted(range(len(items)), key=lambda i: uniform(*key, i))]
