"""What tests share: the CPU by default, processes of their own, and the real data where it is at hand."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

# The same examples in every run: a change breaks a test, not chance
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")

# Before any test imports JAX or transformers: accelerators only where asked for, and never the network. No persistent
# compilation cache: JAX does not write it atomically, and tests that kill processes would leave torn entries behind.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# At these sizes most of the time goes into compiling, and a third of that into optimisations. See `optimized`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# Processes that tests start inherit it, and a job that a shell has put in the background is deaf to Ctrl-C
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data beside the checkout; skips where it is absent."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no real data: {path} does not exist")
    return path


@pytest.fixture(scope="module")
def optimized():
    """Compiles in this process as a user's does, for tests of what depends on it: bits, and what is kept in memory."""
    import jax

    def disable(most: bool) -> None:
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", most)

    disable(False)
    yield
    disable(os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """`run_python(*arguments, devices=1, timeout=300)`: see `run_interpreter`."""
    return run_interpreter


def run_interpreter(*arguments: str, devices: int = 1, timeout: float = 300) -> str:
    """Runs `python *arguments` in the checkout, in a process of its own, and returns its stdout.

    Args:
      arguments: `"-c", SNIPPET` or `"-m", MODULE, ...`.
      devices: fake CPU devices that JAX sees there; 1 leaves the environment as it is.
      timeout: seconds.

    Raises:
      AssertionError: the exit status is not 0; shows the end of stderr.
    """
    environment = dict(os.environ)
    if devices > 1:
        flag = f"--xla_force_host_platform_device_count={devices}"
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"exit status {done.returncode}; stderr ends with:\n{done.stderr[-4000:]}"
    return done.stdout
