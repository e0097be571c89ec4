r"""Compiles what a command would run on a TPU pod, from its config and the model's shapes alone: does it fit, and how?

    python -m launch.plan --config=configs/musc_train.py:llama3_8b --topology=v5e:8x8 --output=plan.json

`--config` is that of `launch.musc_train`, `launch.main_train`, `launch.score` or `launch.generate`. Without --topology
the plan is for the devices that are here. --search tries other meshes, rows at a time and remat policies.
"""

from functools import partial
from typing import Any

from absl import flags

from launch import cli

_TOPOLOGY = flags.DEFINE_string("topology", None, "TPU generation and shape: v5e:8x8, v5p:4x4x4, v6e:16x16")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the plan")
_SEARCH = flags.DEFINE_boolean("search", False, "try meshes, rows at a time and remat policies; rank those that fit")


def command():
    from lm_jax.generation.command import GenerateConfig
    from lm_jax.planning.command import generate_programs, plan, read_config, score_programs
    from lm_jax.scoring.command import ScoreConfig
    from main_jax.training.command import MainTrainConfig, main_programs
    from musc_jax.training.command import MuscTrainConfig, musc_programs

    commands: dict[type, Any] = {
        MuscTrainConfig: musc_programs,
        MainTrainConfig: main_programs,
        ScoreConfig: score_programs,
        GenerateConfig: generate_programs,
    }
    return (
        partial(read_config, commands=commands),
        lambda config: plan(config, commands[type(config)], _TOPOLOGY.value, _OUTPUT.value, _SEARCH.value),
    )


if __name__ == "__main__":
    cli.run(command)
