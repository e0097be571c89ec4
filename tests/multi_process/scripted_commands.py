"""Several commands one after the other in the same processes, which saves the start of each.

    --commands=FILE   JSON lines: [command, flags]

As in their launchers, but that pairs and rounds are written by scripted writers.
"""

import json
import sys
from pathlib import Path

from absl import flags

from launch import cli

_COMMANDS = flags.DEFINE_string("commands", None, "")


def command():
    from ml_collections import config_flags

    from lm_jax.checkpoints.export import ExportConfig, export
    from lm_jax.config import from_config_dict
    from lm_jax.generation.command import GenerateConfig, generate_rows
    from lm_jax.scoring.command import ScoreConfig, score_rows
    from main_jax.filter.command import FilterConfig, filter_candidates
    from main_jax.rounds.command import run_rounds
    from main_jax.rounds.config import RoundsConfig
    from main_jax.texts.command import PrepareConfig, prepare
    from musc_jax.pairs.command import PairsConfig, make_pairs
    from musc_jax.weights.command import WeighConfig, weigh_rows
    from tests.main_writers import Writers
    from tests.strong_model import Scripted

    commands = {
        "export_hf": (ExportConfig, export),
        "generate": (GenerateConfig, generate_rows),
        "main_filter": (FilterConfig, filter_candidates),
        "main_prepare": (PrepareConfig, prepare),
        "main_rounds": (RoundsConfig, lambda config: run_rounds(config, Writers())),
        "musc_pairs": (PairsConfig, lambda config: make_pairs(config, Scripted())),
        "musc_token_weights": (WeighConfig, weigh_rows),
        "score": (ScoreConfig, score_rows),
    }

    def main(_):
        for line in Path(_COMMANDS.value).read_text().splitlines():
            name, given = json.loads(line)
            sys.argv = [name, *given]  # where ml_collections looks for the settings
            values = flags.FlagValues()
            config = config_flags.DEFINE_config_file("config", flag_values=values)
            values(sys.argv)
            cls, run = commands[name]
            run(from_config_dict(cls, config.value.to_dict()))

    return ExportConfig, main


if __name__ == "__main__":
    cli.run(command)
