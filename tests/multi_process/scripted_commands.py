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

    from lm_jax.commands.export import ExportConfig, export
    from lm_jax.commands.generate import GenerateConfig, generate_rows
    from lm_jax.commands.score import ScoreConfig, score_rows
    from lm_jax.config import from_config_dict
    from main_jax.mutual_filter import FilterConfig, filter_candidates
    from main_jax.prepare import PrepareConfig, prepare
    from main_jax.rounds import run_rounds
    from main_jax.rounds_config import RoundsConfig
    from musc_jax.pairs import PairsConfig, make_pairs
    from musc_jax.weigh import WeighConfig, weigh_rows
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
