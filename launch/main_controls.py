r"""MAIN beside what it is compared with: other pairs, other filters, other rules of alpha, more and fewer rounds.

    python -m launch.main_controls --config=configs/main_controls.py --config.model=DIR --config.seeds=seeds.jsonl \
        --config.unlabelled=responses.jsonl --config.output=runs/main_controls
"""

from launch import cli


def command():
    from lab.controls.command import run_controls
    from lab.controls.config import ControlsConfig

    return ControlsConfig, run_controls


if __name__ == "__main__":
    cli.run(command)
