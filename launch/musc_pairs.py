"""Makes preference pairs with a model alone, as MuSC or one of its baselines does: from your instructions or its own.

    python -m launch.musc_pairs --config=configs/musc_pairs.py --config.model=DIR --config.input=instructions.jsonl \
        --config.output=pairs.jsonl
"""

from launch import cli


def command():
    from musc_jax.pairs.command import PairsConfig, make_pairs

    return PairsConfig, make_pairs


if __name__ == "__main__":
    cli.run(command)
