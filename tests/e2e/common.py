"""Running the launchers, and the small inputs that they run on."""

import dataclasses
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.checkpoints import make_checkpoint, make_tokenizer
from tests.conftest import ROOT

# Sequences of at most 64 tokens, steps of several microbatches, a handful of them an epoch.
SMALL_TRAIN = ("max_length=64", "batch.pairs=5")
SMALL_TUNE = ("max_length=64", "batch.examples=7")
SMALL_SCORE = ("max_length=64", "batch.row_length=64", "batch.rows=2")
# Not the same on every machine and in every run.
TIMING = {"tokens_per_second", "data_wait_fraction", "model_flops_utilization", "num_compiles"}


@dataclasses.dataclass(frozen=True)
class Done:
    """A command that ended: its exit status (negative: the signal) and what it wrote."""

    status: int
    stdout: str
    stderr: str

    def ok(self) -> "Done":
        assert self.status == 0, f"exit status {self.status}; stderr ends with:\n{self.stderr[-4000:]}"
        return self

    def error(self, noise: bool = False) -> str:
        """The one line of a user's error, without its `error: `. `noise`: libraries may write before it."""
        assert self.status == 1, f"exit status {self.status}; stderr ends with:\n{self.stderr[-4000:]}"
        assert noise or "Traceback" not in self.stderr, self.stderr[-4000:]
        last = self.stderr.rstrip("\n").split("\n")[-1]
        assert last.startswith("error: ") and len(last) < 1000, self.stderr[-4000:]
        return last.removeprefix("error: ")


def arguments(name: str, *settings: object, preset: str = "") -> list[str]:
    """The flags of `python -m launch.NAME`. A setting is `key=value`; one that begins with `--` is taken as it is."""
    config = f"--config=configs/{name}.py{preset and f':{preset}'}"
    return [config, *(s if str(s).startswith("--") else f"--config.{s}" for s in map(str, settings))]


def start(name: str, *flags: str, **options) -> subprocess.Popen:
    """The command as a user starts it, in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", f"launch.{name}", *flags], cwd=ROOT, text=True, **options)


def run(name: str, *flags: str) -> Done:
    """`start`, then wait for the end."""
    process = start(name, *flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    stdout, stderr = process.communicate(timeout=300)
    return Done(process.returncode, stdout, stderr)


# Importing JAX and transformers takes longer than most commands here run, so many of them are forked from one process
# that has imported both, and computed nothing.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "lab.controls.command",
        "main_jax.rounds.command",
        "main_jax.training.command",
        "musc_jax.training.command",
        "musc_jax.weights.command",
        "main_jax.filter.command",
        "lm_jax.generation.command",
        "lm_jax.scoring.command",
        "lm_jax.checkpoints.export",
        "datasets",
        "transformers.modeling_utils",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
    ]
)


class Fork:
    """`start` without the imports: the same code, exit status and signals, forked from a process that has them.

    `name` may also be a module of the tests that runs as a launcher does. `cache`: where compiled programs are kept,
    for runs that nothing kills. `settings`: environment variables.
    """

    def __init__(
        self,
        name: str,
        *flags: str,
        devices: int = 1,
        cache: Path | None = None,
        settings: dict[str, str] | None = None,
    ):
        self._directory = tempfile.TemporaryDirectory()
        self._out, self._err = (Path(self._directory.name) / n for n in ("out", "err"))
        arguments = (name, flags, devices, cache, settings or {}, str(self._out), str(self._err))
        self.process = _FORKS.Process(target=_forked, args=arguments)
        self.process.start()

    def wait(self) -> Done:
        self.process.join(900)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        with self._directory:
            return Done(self.process.exitcode, *(p.read_text() if p.exists() else "" for p in (self._out, self._err)))


def fork(name: str, *flags: str, devices: int = 1, settings: dict[str, str] | None = None) -> Done:
    """`run` without the imports; see `Fork`."""
    return Fork(name, *flags, devices=devices, settings=settings).wait()


def _forked(name, flags, devices, cache, settings, out, err):
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(ROOT)
    os.environ.update(settings)
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    if cache is not None:
        import jax

        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    module = name if name.startswith("tests.") else f"launch.{name}"
    sys.argv = [f"{module.replace('.', '/')}.py", *flags]  # as Python has it
    runpy.run_module(module, run_name="__main__")


def make_model(path: Path, **overrides) -> str:
    """A tiny Llama with a tokenizer."""
    make_checkpoint(path, "llama", **overrides)
    make_tokenizer(path)
    return str(path)


def make_pairs(path: Path, number: int = 12, **columns) -> str:
    """Preference rows whose lengths differ, string prompts."""
    rows = [
        {
            "id": f"pair-{i}",
            "prompt": f"say that {i} cats sat",
            "chosen": f"{i} cats sat on the hat and the mat"[: 12 + 2 * i],
            "rejected": f"{i} dogs ran"[: 6 + i],
            **{name: value(i) for name, value in columns.items()},
        }
        for i in range(number)
    ]
    return write_rows(path, rows)


def write_rows(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_rows(path: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
