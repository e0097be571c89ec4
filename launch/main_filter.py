r"""Keeps the candidate instructions that a forward and a reverse model find likely (MAIN's mutual filter).

    python -m launch.main_filter --config=configs/main_filter.py --config.forward=runs/forward \
        --config.reverse=runs/reverse --config.input=candidates.jsonl --config.output=kept.jsonl
"""

from launch import cli


def command():
    from main_jax.filter.command import FilterConfig, filter_candidates

    return FilterConfig, filter_candidates


if __name__ == "__main__":
    cli.run(command)
