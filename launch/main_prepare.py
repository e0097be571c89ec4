r"""Cuts documents into segments that read like responses, for MAIN to write instructions for.

    python -m launch.main_prepare --config=configs/main_prepare.py --config.input=documents.jsonl \
        --config.output=responses.jsonl
"""

from launch import cli


def command():
    from main_jax.texts.command import PrepareConfig, prepare

    return PrepareConfig, prepare


if __name__ == "__main__":
    cli.run(command)
