"""Processes that give each other arrays of different lengths, in several pieces. Then a round of two parts: process 0
takes its time to write the file that every process reads in the second.

--file=PATH
"""

import contextlib
import time
from pathlib import Path

from absl import flags

from launch import cli

_FILE = flags.DEFINE_string("file", None, "")


def command():
    import jax
    import numpy as np

    from lm_jax.checkpoints.export import ExportConfig
    from lm_jax.distributed import processes
    from lm_jax.generation.rounds import do_parts

    def main(_):
        processes._GATHERED = 16
        for lengths in ((3, 21), (0, 0), (40, 1)):
            found = processes.gather(np.arange(lengths[jax.process_index()], dtype=np.int32), "the arrays")
            assert [part.tolist() for part in found] == [list(range(length)) for length in lengths]
        path = Path(_FILE.value)

        def write():
            if jax.process_index() == 0:
                time.sleep(1)
                path.write_text("whole")

        parts = {"write": write, "read": lambda: print(path.read_text())}
        do_parts(1, parts, lambda _: contextlib.nullcontext())

    return ExportConfig, main


if __name__ == "__main__":
    cli.run(command)
