"""Turns a run's checkpoint into a Hugging Face directory.

python -m launch.export_hf --config=configs/export_hf.py --config.model=runs/musc --config.output=runs/musc-hf
"""

from launch import cli


def command():
    from lm_jax.checkpoints.export import ExportConfig, export

    return ExportConfig, export


if __name__ == "__main__":
    cli.run(command)
