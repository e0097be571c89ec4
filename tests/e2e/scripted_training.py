"""`launch.musc_train` or `launch.main_train`, disturbed from inside: no signal from outside comes at the right moment.

--command=main_train
--sigterm_in=save|evaluation   of the last step
--stop_after=N                 steps
--leak                         memory, a thread and a file in every step, a process in every tenth
"""

import os
import signal
import subprocess
import threading
import time

from absl import flags

from launch import cli

_COMMAND = flags.DEFINE_enum("command", "musc_train", ["musc_train", "main_train"], "")
_STOP_AFTER = flags.DEFINE_integer("stop_after", None, "")
_SIGTERM_IN = flags.DEFINE_string("sigterm_in", None, "")
_LEAK = flags.DEFINE_bool("leak", False, "")
_BYTES = 1 << 20


def command():
    from lm_jax.checkpoints.orbax import Checkpoints
    from lm_jax.training import loop
    from lm_jax.training.skipping import Skips
    from lm_jax.training.trainer import Trainer
    from main_jax.training import command as main_train
    from musc_jax.training import command as musc_train

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

        def ask(where):
            if where == f"step {(_STOP_AFTER.value or -1) + 1}":
                os.kill(os.getpid(), signal.SIGTERM)

        made, Trainer._evaluation = Trainer._evaluation, evaluation
        within(loop, "stops_before", ask)
        within(Skips, "on_metrics", step)
        within(Checkpoints, "save", lambda *_: stop("save"))
        module.train(config)

    module = {"musc_train": musc_train, "main_train": main_train}[_COMMAND.value]
    return {musc_train: musc_train.MuscTrainConfig, main_train: main_train.MainTrainConfig}[module], main


if __name__ == "__main__":
    cli.run(command)
