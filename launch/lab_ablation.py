r"""The arms of MuSC and MAIN measured on a small verifiable world: means over seeds, intervals, paired tests.

    python -m launch.lab_ablation --config=configs/lab_ablation.py --config.output=runs/lab_musc
    python -m launch.lab_ablation --config=configs/lab_ablation.py:short --config.output=runs/lab_short
"""

from launch import cli


def command():
    from lab.ablation import LabAblationConfig, ablate

    return LabAblationConfig, ablate


if __name__ == "__main__":
    cli.run(command)
