"""`launch.main_controls` whose steps run in its own process, and whose texts and verdicts come from scripted writers.

What it compiles it keeps beside its output, for the next run there: only a run that nobody kills may be the first,
since JAX does not write these files at once.
"""

import importlib
import time
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from launch import cli
from lm_jax.config import from_config_dict
from lm_jax.generation.command import generate_rows
from lm_jax.generation.requests import Completion, Sample
from main_jax.rounds.command import run_rounds
from tests.main_writers import Writers

JUDGE = "Judge: "  # `judge_question` begins with it


class Judge:
    """The score of request n is n % 6, which none can read where it is 0."""

    def generate(self, requests, sampling):
        for request in requests:
            time.sleep(0.02)
            assert request.prompt[-1]["content"].startswith(JUDGE) and sampling.temperature == 0
            yield [Completion(request.id, (Sample(f"Score: {int(request.id) % 6}", "stop", 3),))]


def step(module: str, *arguments: str) -> None:
    """What the command line does, in this process."""
    print(f"$ {module}", flush=True)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=[module, *arguments])
    values([module, *arguments])
    config_class, main = importlib.import_module(module).command()
    config = from_config_dict(config_class, values.config.to_dict())
    if module == "launch.main_rounds":
        run_rounds(config, Writers(seconds=0.02))
    elif module == "launch.generate":
        generate_rows(config, Judge())
    else:
        main(config)


def command():
    from lab.controls import command as control_stages
    from lab.controls.config import ControlsConfig

    def main(config):
        jax.config.update("jax_compilation_cache_dir", str(Path(config.output).with_name("compiled")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        control_stages.run_step = step
        control_stages.run_controls(config)

    return ControlsConfig, main


if __name__ == "__main__":
    cli.run(command)
