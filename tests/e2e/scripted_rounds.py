"""`launch.musc_rounds` whose pairs come from a scripted model, which takes its time.

What it compiles it keeps beside its output, for the next run there: only a run that nobody kills may be the first,
since JAX does not write these files at once.
"""

from pathlib import Path

import jax

from launch import cli
from tests.strong_model import Scripted


def command():
    from musc_jax.rounds.command import RoundsConfig, run_rounds

    def main(config):
        jax.config.update("jax_compilation_cache_dir", str(Path(config.output).with_name("compiled")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        run_rounds(config, Scripted(seconds=0.02))

    return RoundsConfig, main


if __name__ == "__main__":
    cli.run(command)
