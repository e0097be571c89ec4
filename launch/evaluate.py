r"""Evaluates models on lm-eval's tasks, responses on IFEval, or responses with a judge.

    python -m launch.evaluate --config=configs/evaluate.py --config.models=DIR --config.tasks=NAME \
        --config.output=results
"""

from launch import cli


def command():
    from lm_jax.evaluation.command import HarnessConfig, IfevalConfig, JudgedConfig, evaluate

    return HarnessConfig | IfevalConfig | JudgedConfig, evaluate


if __name__ == "__main__":
    cli.run(command)
