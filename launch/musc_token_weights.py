"""Weighs the tokens of preference rows by what the seed model says of them under several instructions.

    python -m launch.musc_token_weights --config=configs/musc_token_weights.py --config.model=DIR \
        --config.input=pairs.jsonl --config.output=weighed.jsonl
"""

from launch import cli


def command():
    from musc_jax.weights.command import WeighConfig, weigh_rows

    return WeighConfig, weigh_rows


if __name__ == "__main__":
    cli.run(command)
