r"""Answers prompts: adds `response` and `finish_reason` to rows with a `prompt`.

    python -m launch.generate --config=configs/generate.py --config.model=DIR --config.input=prompts.jsonl \
        --config.output=answers.jsonl
"""

from launch import cli


def command():
    from lm_jax.generation.command import GenerateConfig, generate_rows

    return GenerateConfig, generate_rows


if __name__ == "__main__":
    cli.run(command)
