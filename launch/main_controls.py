r"""MAIN beside what it is compared with: other pairs, other filters, other rules of alpha, more and fewer rounds.

    python -m launch.main_controls --config=configs/main_controls.py --config.model=DIR --config.seeds=seeds.jsonl \
        --config.unlabelled=responses.jsonl --config.output=runs/main_controls
"""

from launch import cli


def command():
    from main_jax.control_stages import run_controls
    from main_jax.controls_config import ControlsConfig

    return ControlsConfig, run_controls


if __name__ == "__main__":
    cli.run(command)
