import os
import subprocess
import sys

import pytest

_STEPS = """
import resource, sys
from lm_jax.host_memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: ((x @ x.T) @ x).sum())
x = jnp.ones((4096, 16))
for _ in range(10):
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(how: str) -> int:
    command, env = [sys.executable, "-c", _STEPS, how], os.environ | {"JAX_PLATFORMS": "cpu"}
    return int(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None, reason="not glibc")
def test_pages_of_temporaries_are_not_mapped_anew_in_every_step():
    kept, given_back = _faults("kept"), _faults("given_back")
    assert given_back > 5 * (64 << 20) / os.sysconf("SC_PAGE_SIZE")  # a temporary of 64 MiB a step
    assert kept < given_back / 4, (kept, given_back)  # a free block may just be too small for the next alignment


def test_nothing_changes_beside_an_accelerator():
    code = "import ctypes; ctypes.CDLL = None; from lm_jax.host_memory import keep_freed_memory as k; k()"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"JAX_PLATFORMS": "cuda,cpu"}, check=True)
