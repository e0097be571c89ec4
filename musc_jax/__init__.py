"""MuSC (arXiv 2502.11541): `make_pairs`, `weigh`, `train`. See docs/library.md."""

import importlib
from typing import Any

__all__ = ["make_pairs", "train", "weigh"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("musc_jax.library"), name)
