r"""Evaluates models on lm-eval's tasks, or responses on IFEval.

    python -m launch.evaluate --config=configs/evaluate.py --config.models=DIR --config.tasks=NAME \
        --config.output=results
"""

from launch import cli


def command():
    from lm_jax.commands.evaluate import HarnessConfig, IfevalConfig, evaluate

    return HarnessConfig | IfevalConfig, evaluate


if __name__ == "__main__":
    cli.run(command)
