"""`launch.musc_pairs` with a model that is scripted, takes its time, and answers in another order every time."""

from launch import cli
from tests.strong_model import Scripted, careless


def command():
    from musc_jax.pairs.command import PairsConfig, make_pairs

    def main(config):
        change = [] if config.method == "musc" else [careless]  # a judge needs responses that differ
        make_pairs(config, Scripted(*change, seconds=0.02))

    return PairsConfig, main


if __name__ == "__main__":
    cli.run(command)
