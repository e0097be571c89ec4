r"""Tunes a model on supervised rows; seed and synthetic ones are weighed against each other.

    python -m launch.main_train --config=configs/main_train.py --config.model=DIR --config.input=rows.jsonl \
        --config.output=runs/main

With --preview=5 it prints the first 5 rows as the model would see them, and trains and writes nothing.
"""

from launch import cli


def command():
    from main_jax.training.command import MainTrainConfig, train

    return MainTrainConfig, train


def preview():
    from main_jax.training.preview import preview

    return preview


if __name__ == "__main__":
    cli.run(command, preview)
