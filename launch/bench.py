"""Measures training, generation, scoring and loading beside TRL and transformers, and how time and memory grow.

python -m launch.bench --config=configs/bench.py --config.output=runs/bench
"""

from launch import cli


def command():
    from lab.bench.bench import BenchConfig, bench

    return BenchConfig, bench


if __name__ == "__main__":
    cli.run(command)
