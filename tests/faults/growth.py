"""No fault: work that goes on for long."""

from tests.faults.bench import Bench
from tests.footprint import assert_steady


def growth(bench: Bench, number: int) -> str:
    """Training and generation in turn."""
    if number % 2:
        before, after = bench.work().generate(2000, [(400, 500), (1900, 2000)])
    else:
        seldom = ("checkpoints.every=100", "eval_every=100")  # as by default
        before, after = bench.work().train(1000, [(200, 250), (950, 1000)], *seldom)
    assert_steady(before, after, 0.02)
    return f"{'generation' if number % 2 else 'training'}: {before} -> {after}"
