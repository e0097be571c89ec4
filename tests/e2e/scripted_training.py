"""`launch.musc_train`, disturbed from inside, where no signal from outside comes at the right moment.

--sigterm_in=save|evaluation   of the last step
--leak                         memory, a thread and a file in every step, a process in every tenth
"""

import os
import signal
import subprocess
import threading
import time

from absl import flags

from launch import cli

_SIGTERM_IN = flags.DEFINE_string("sigterm_in", None, "")
_LEAK = flags.DEFINE_bool("leak", False, "")
_BYTES = 1 << 20


def command():
    from lm_jax.checkpoints.orbax import Checkpoints
    from lm_jax.training.skipping import Skips
    from lm_jax.training.trainer import Trainer
    from musc_jax.training.command import MuscTrainConfig, train

    def within(owner, name, does):
        """The function, which does something before its own work."""
        original = getattr(owner, name)
        setattr(owner, name, lambda *args, **given: (does(*args), original(*args, **given))[1])

    def main(config):
        done, kept = [0], []

        def stop(where):
            if where == _SIGTERM_IN.value and done[0] == config.max_steps:
                os.kill(os.getpid(), signal.SIGTERM)

        def leak():
            kept.extend((os.urandom(_BYTES), open(os.devnull)))
            threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()
            if done[0] % 10 == 0:
                kept.append(subprocess.Popen(["cat"], stdin=subprocess.PIPE))

        def step(_, number, *given):
            done[0] = number
            if _LEAK.value:
                leak()

        def evaluation(*args):
            evaluate = made(*args)
            return lambda trained: (stop("evaluation"), evaluate(trained))[1]

        made, Trainer._evaluation = Trainer._evaluation, evaluation
        within(Skips, "on_metrics", step)
        within(Checkpoints, "save", lambda *_: stop("save"))
        train(config)

    return MuscTrainConfig, main


if __name__ == "__main__":
    cli.run(command)
