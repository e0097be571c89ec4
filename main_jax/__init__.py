"""MAIN (arXiv 2504.12913): `filter_pairs`, `train`. See docs/library.md."""

import importlib
from typing import Any

__all__ = ["filter_pairs", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("main_jax.library"), name)
