r"""Trains a policy on preference rows with token-aware DPO.

    python -m launch.musc_train --config=configs/musc_train.py --config.model=DIR --config.input=pairs.jsonl \
        --config.output=runs/musc

With --preview=5 it prints the first 5 pairs as the model would see them, and trains and writes nothing.
"""

from launch import cli


def command():
    from musc_jax.training.command import MuscTrainConfig, train

    return MuscTrainConfig, train


def preview():
    from musc_jax.training.preview import preview

    return preview


if __name__ == "__main__":
    cli.run(command, preview)
