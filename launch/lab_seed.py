r"""Fits a seed model for a world of the lab, on which every method can be run and measured within minutes.

    python -m launch.lab_seed --config=configs/lab_seed.py --config.output=runs/lab_seed
"""

from launch import cli


def command():
    from lab.seed import LabSeedConfig, fit_seed
    from lab.worlds.seed_data import Tasks
    from musc_jax.pairs.conversations import decomposing, recombining, task_texts

    return LabSeedConfig, lambda config: fit_seed(config, Tasks(decomposing, recombining), task_texts())


if __name__ == "__main__":
    cli.run(command)
