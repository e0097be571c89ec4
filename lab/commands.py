"""What commands share that run other commands: a step that shows its command line, and a model to begin with."""

import contextlib
import contextvars
import functools
import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lm_jax.checkpoints import hf as hf_io
from lm_jax.checkpoints.lock import locked
from lm_jax.config import ComputeConfig, ModelConfig
from lm_jax.distributed import processes
from lm_jax.errors import UserError
from lm_jax.models.decoder import Decoder

# On a CPU XLA maps a step's temporaries anew in every step: with huge pages the kernel has 512 times fewer to bring in.
# glibc reads this when a process starts, so that it can only be given to others.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

_LOCKS: list[int] = []  # of `alone_in`, in every thread
_LOG: contextvars.ContextVar[Path | None] = contextvars.ContextVar("log", default=None)


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """Steps of this thread write to the end of a file, their command lines too; the console gets one line for each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = _LOG.set(path)
    try:
        yield
    finally:
        _LOG.reset(before)


def run_step(module: str, *arguments: str) -> None:
    """Prints the command line and runs it; see `logged`. It holds the locks of `alone_in` too.

    Raises:
      UserError: it failed; its own error stands above, or is the last line of its log. Of a run of many processes none
        can start others in the same way.
    """
    if processes.link is not None:
        raise UserError(f"this command runs python -m {module} and others; start it in one process")
    shown = f"$ python -m {module} \\\n    " + " \\\n    ".join(map(shlex.quote, arguments))
    command, log = [sys.executable, "-m", module, *arguments], _LOG.get()
    run = functools.partial(subprocess.run, command, env=HUGE_PAGES | os.environ, pass_fds=tuple(_LOCKS))
    if log is None:
        print(shown, flush=True)
        if run().returncode:
            raise UserError(f"python -m {module} failed; its error stands above")
        return
    print(f"{module}: see {log}\n", end="", flush=True)  # one write: threads share the console
    with open(log, "ab") as out:
        out.write(f"{shown}\n".encode())
        out.flush()
        if not run(stdout=out, stderr=subprocess.STDOUT).returncode:
            return
    error = (log.read_text(errors="replace").splitlines() or [""])[-1]
    raise UserError(f"python -m {module} failed: {error.removeprefix('error: ')}; see {log}")


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """A lock on a directory that the steps run there inherit: a step whose command was killed still holds it.

    Raises:
      UserError: another process has it.
    """
    descriptor = locked(
        directory, "another process is at work there, or a step that outlived its command; wait for its end"
    )
    if descriptor is None:
        yield
        return
    _LOCKS.append(descriptor)
    try:
        yield
    finally:
        _LOCKS.remove(descriptor)
        os.close(descriptor)


def changed_flags(config_file: str, settings: Mapping[str, Any]) -> list[str]:
    """The flags that give a command `settings`: --config.KEY=VALUE of each value that differs from its file's.

    Args:
      config_file: as configs/main_train.py, without a preset.
      settings: nested; keys that lack keep the file's values.
    """
    defaults = runpy.run_path(config_file)["get_config"]().to_dict()
    return [f"--config={config_file}", *_changed(defaults, settings, "--config")]


def _changed(defaults: Mapping[str, Any], settings: Mapping[str, Any], name: str) -> Iterator[str]:
    for key, value in settings.items():
        before = defaults[key]
        if isinstance(value, Mapping):
            yield from _changed(before, value, f"{name}.{key}")
        elif value != (list(before) if isinstance(before, tuple) and isinstance(value, list) else before):
            yield f"{name}.{key}={tuple(value) if isinstance(value, list) else value}"


def make_random_model(directory: Path, tokenizer: Path, config: ModelConfig, seed: int) -> None:
    """Writes a randomly initialised model in Hugging Face format, with the tokenizer of `tokenizer` beside it."""
    tokens = jnp.ones((1, 8), jnp.int32)
    decoder = Decoder(config, ComputeConfig(dtype="float32"))
    params = decoder.init(jax.random.key(seed), tokens, tokens, tokens)["params"]
    hf_io.export_hf(params, config, directory, source_dir=tokenizer, dtype="float32")
