"""A language model on any mesh: `load`, then `generate`, `score`, `train`, `save`. See docs/library.md."""

import importlib
from typing import Any

# Imported when they are first used, so that a command's --help need not wait for JAX
_HOMES = {
    "Model": "lm_jax.library",
    "load": "lm_jax.library",
    "train": "lm_jax.library",
    "Objective": "lm_jax.training.objective",
    "UserError": "lm_jax.errors",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
