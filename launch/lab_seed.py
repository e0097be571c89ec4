r"""Fits a seed model for a world of the lab, on which every method can be run and measured within minutes.

    python -m launch.lab_seed --config=configs/lab_seed.py --config.output=runs/lab_seed
"""

from launch import cli


def command():
    from lab.seed import LabSeedConfig, fit_seed

    return LabSeedConfig, fit_seed


if __name__ == "__main__":
    cli.run(command)
