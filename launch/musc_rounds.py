r"""MuSC in rounds: pairs, token weights and training, each round with the model that the one before trained.

    python -m launch.musc_rounds --config=configs/musc_rounds.py --config.model=DIR --config.input=instructions.jsonl \
        --config.output=runs/rounds
"""

from launch import cli


def command():
    from musc_jax.rounds.command import RoundsConfig, run_rounds

    return RoundsConfig, run_rounds


if __name__ == "__main__":
    cli.run(command)
