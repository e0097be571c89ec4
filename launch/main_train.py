r"""Tunes a model on supervised rows; seed and synthetic ones are weighed against each other.

    python -m launch.main_train --config=configs/main_train.py --config.model=DIR --config.input=rows.jsonl \
        --config.output=runs/main
"""

from launch import cli


def command():
    from main_jax.train import MainTrainConfig, train

    return MainTrainConfig, train


if __name__ == "__main__":
    cli.run(command)
