r"""Scores responses: per-token log-probs and entropies of `response` under `prompt`.

    python -m launch.score --config=configs/score.py --config.model=DIR --config.input=rows.jsonl \
        --config.output=scored.jsonl
"""

from launch import cli


def command():
    from lm_jax.scoring.command import ScoreConfig, score_rows

    return ScoreConfig, score_rows


if __name__ == "__main__":
    cli.run(command)
