"""What the tests on real checkpoints share.

Commands run in processes of their own, as users start them, so that one model at a time is in memory.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import ROOT


@dataclasses.dataclass(frozen=True)
class Model:
    """A model's directory, as it was made."""

    directory: Path

    @functools.cached_property
    def tokenizer(self) -> Any:
        import transformers

        return transformers.AutoTokenizer.from_pretrained(self.directory)

    def torch(self, dtype: str = "float32", directory: Path | None = None) -> Any:
        """transformers' own, in eval mode."""
        import torch
        import transformers

        path, kind = directory or self.directory, getattr(torch, dtype)
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=kind).eval()

    def chat(self, prompt: str) -> list[int]:
        """The ids that a model is given to answer a user."""
        messages = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def launch(name: str, *settings: str, preset: str = "") -> str:
    """`python -m launch.NAME` with `key=value` settings; what it wrote to stderr. Optimised, as a user's is."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    config = f"--config=configs/{name}.py{preset and f':{preset}'}"
    flags = [setting if setting.startswith("--") else f"--config.{setting}" for setting in settings]
    command = [sys.executable, "-m", f"launch.{name}", config, *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode}; stderr ends with:\n{done.stderr[-4000:]}"
    return done.stderr
