r"""Writes a page that shows preference pairs side by side, every token tinted by its weight.

    python -m launch.report --config=configs/report.py --config.model=DIR --config.input=weighed.jsonl \
        --config.output=page.html
"""

from launch import cli


def command():
    from musc_jax.report.command import ReportConfig, write_report

    return ReportConfig, write_report


if __name__ == "__main__":
    cli.run(command)
