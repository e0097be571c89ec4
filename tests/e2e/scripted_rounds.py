"""`launch.musc_rounds` whose pairs come from a scripted model, which takes its time."""

from launch import cli
from tests.strong_model import Scripted


def command():
    from musc_jax.rounds import RoundsConfig, run_rounds

    return RoundsConfig, lambda config: run_rounds(config, Scripted(seconds=0.02))


if __name__ == "__main__":
    cli.run(command)
