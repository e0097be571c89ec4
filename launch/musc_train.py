r"""Trains a policy on preference rows with token-aware DPO.

    python -m launch.musc_train --config=configs/musc_train.py --config.model=DIR --config.input=pairs.jsonl \
        --config.output=runs/musc
"""

from launch import cli


def command():
    from musc_jax.train import MuscTrainConfig, train

    return MuscTrainConfig, train


if __name__ == "__main__":
    cli.run(command)
