r"""MAIN in rounds: a forward and a reverse model write for each other and are trained towards real text.

    python -m launch.main_rounds --config=configs/main_rounds.py --config.model=DIR --config.seeds=seeds.jsonl \
        --config.unlabelled=responses.jsonl --config.output=runs/main_rounds
"""

from launch import cli


def command():
    from main_jax.rounds.command import run_rounds
    from main_jax.rounds.config import RoundsConfig

    return RoundsConfig, run_rounds


if __name__ == "__main__":
    cli.run(command)
