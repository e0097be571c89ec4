"""A command whose processes meet, step and sum over their devices; one of them misbehaves as told.

    --fault=ID:WHAT:STEP   WHAT: error, crash, exit, hang, busy, memory, disk; of process ID or of all, before that step
    --alone=SECONDS        process 0 works by itself at first, and the others wait for what comes of it
    --pids=FILE            FILE.ID appears with that process's id, once it steps
    --steps=N --pause=SECONDS
"""

import os
import time
from pathlib import Path

from absl import flags

from launch import cli

_FAULT = flags.DEFINE_string("fault", "", "")
_PIDS = flags.DEFINE_string("pids", "", "")
_ALONE = flags.DEFINE_float("alone", 0.0, "")
_STEPS = flags.DEFINE_integer("steps", 20, "")
_PAUSE = flags.DEFINE_float("pause", 0.0, "")


def command():
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    from lm_jax.checkpoints.export import ExportConfig
    from lm_jax.distributed.processes import barrier, everywhere, moving, reached, worked
    from lm_jax.errors import UserError

    def misbehave(what: str) -> None:
        if what == "error":
            raise UserError("the input: row 3 is wrong; mend it")
        if what == "crash":
            raise ZeroDivisionError("by accident")
        if what == "memory":
            raise RuntimeError("RESOURCE_EXHAUSTED: 12 GB")
        if what == "exit":
            os._exit(9)
        if what == "disk":
            with moving("the file"):
                time.sleep(1e6)
        begin = time.monotonic()
        while what == "hang" or time.monotonic() < begin + 2.5 * flags.FLAGS.process_timeout:
            time.sleep(0.1)
            if what == "busy":
                worked()

    def main(_):
        me, total = jax.process_index(), 0
        everywhere(lambda: time.sleep(_ALONE.value))
        given = everywhere(lambda: {"from": os.getpid(), "large": "x" * 3_000_000})
        assert len(given["large"]) == 3_000_000
        if _PIDS.value:
            Path(f"{_PIDS.value}.{me}").write_text(str(os.getpid()))
        who, what, when = (_FAULT.value or "-1::0").split(":")
        for step in range(_STEPS.value):
            if who in (str(me), "all") and step == int(when):
                misbehave(what)
            time.sleep(_PAUSE.value)
            reached(f"step {step}")
            try:
                total += int(multihost_utils.process_allgather(np.int32(me + step)).sum())
            except Exception as error:
                raise UserError("the sum could not be written down; look at the disk") from error  # of another's end
        barrier("the last line")
        print(total)

    return ExportConfig, main


if __name__ == "__main__":
    cli.run(command)
