"""Warnings of a run's curves, on curves whose answer is known: they come once, and not where all is well."""

import json
import math
import random

import pytest

from lm_jax.training.watches import CollapseWatch, SpikeWatch, Warnings


def said(watch, records):
    """{step: warning}"""
    found = ((step, watch.look(step, record)) for step, record in enumerate(records, 1))
    return {step: warning for step, warning in found if warning}


# The loss jumps. With 1 and 3 in turn, of an even number of steps, the mean is 2 and the deviation sqrt(N / (N - 1)).


def losses(*values):
    return [{"loss": v} for v in values]


TURNS = [1.0, 3.0] * 20


def test_a_jump_by_hand():
    deviation = math.sqrt(40 / 39)
    high = 2 + 6 * deviation
    assert said(SpikeWatch(), losses(*TURNS, high - 0.01)) == {}
    ((step, line),) = said(SpikeWatch(), losses(*TURNS, high + 0.01)).items()
    assert step == 41 and "step 41: loss 8.0" in line and "of the 40 steps before, 2 +- 1;" in line
    assert "The loss jumps" in line and "docs/troubleshooting.md" in line


def test_the_first_steps_are_quiet():
    assert said(SpikeWatch(), losses(*[1.0] * 29, 100.0)) == {}
    assert [*said(SpikeWatch(), losses(*[1.0] * 30, 100.0))] == [31]


def test_a_loss_that_hardly_moves():
    """The deviation is 0 then: 2% of the mean stand in for it."""
    assert said(SpikeWatch(), losses(*[1.0] * 50, 1.119)) == {}
    assert [*said(SpikeWatch(), losses(*[1.0] * 50, 1.121))] == [51]


def test_again_only_where_it_is_clearly_worse():
    """Three times as far above the mean; and a jump does not hide the next one."""
    quiet = [1.0] * 20
    jumps = losses(*[1.0] * 40, 3.0, *quiet, 3.5, *quiet, 6.5, *quiet, 8.0, *quiet, 20.0)
    assert [*said(SpikeWatch(), jumps)] == [41, 104]


@pytest.mark.parametrize("seed", range(5))
def test_no_jump_in_healthy_losses(seed):
    """Falling to nothing, noisy, rising slowly, with more high ones than low ones as in small batches, and in waves."""
    rng = random.Random(seed)
    falling = [3 * math.exp(-i / 200) + 0.05 * rng.gauss(0, 1) for i in range(1000)]
    noisy = [2 + 0.7 * rng.gauss(0, 1) for _ in range(1000)]
    rising = [1 + i / 500 + 0.1 * rng.gauss(0, 1) for i in range(1000)]
    skewed = [0.1 * rng.gammavariate(16, 1) for _ in range(1000)]
    cosine = [1 + 0.5 * math.cos(i / 50) for i in range(1000)]
    for curve in (falling, noisy, rising, skewed, cosine):
        assert said(SpikeWatch(), losses(*curve)) == {}


def test_divergence_is_told_a_few_times():
    diverging = losses(*[0.7] * 60, *(0.7 * 1.2**i for i in range(40)))
    assert 1 <= len(said(SpikeWatch(), diverging)) <= 10


# Chosen responses become less likely. The first 20 steps are compared with the last 20.


def rewards(chosen, margins):
    return [
        {"loss": 0.5, "rewards/chosen": c, "rewards/margins": m, "logps/chosen": 10 * c - 40}
        for c, m in zip(chosen, margins, strict=True)
    ]


def line(to, steps=100):
    return [to * i / steps for i in range(steps)]


def test_a_collapse_by_hand():
    """Chosen -0.01 a step, margins 0.0039, from 0: the last 20 steps begin k after the first with k times that between.

    The gain exceeds 0.1 at k = 26, so at step 46, with 0.26 lost; thrice that is k = 78, of the last steps here.
    """
    found = said(CollapseWatch(), rewards(line(-1.0), line(0.39)))
    (first, text), (second, _) = found.items()
    assert first == 46 and second in (98, 99)
    for part in ("step 46", "rewards/chosen -0.095 -> -0.355", "rewards/margins 0.037 -> 0.138", "logps/chosen -4"):
        assert part in text, text
    assert "`logps/chosen` falls while margins grow" in text and "docs/troubleshooting.md" in text


@pytest.mark.parametrize(
    ("chosen", "margins"),
    [
        (line(1.0), line(2.0)),  # what one hopes for
        (line(-0.9), line(1.0)),  # usual: less than the margin gained
        (line(-1.0), line(0.0)),  # nothing is learnt
        (line(-1.0), line(-0.5)),  # the rejected are preferred: the accuracies show it
        (line(0.0), line(0.0)),
        (line(-0.01), line(0.009)),  # the first steps of a warm-up
    ],
)
def test_no_collapse(chosen, margins):
    assert said(CollapseWatch(), rewards(chosen, margins)) == {}


@pytest.mark.parametrize("seed", range(5))
def test_no_collapse_in_noise(seed):
    """Curves that go nowhere, with as much noise as batches of few pairs have."""
    rng = random.Random(seed)
    chosen, margins = ([rng.gauss(mean, 1) for _ in range(1000)] for mean in (0, 0.3))
    assert said(CollapseWatch(), rewards(chosen, margins)) == {}


def test_a_collapse_is_seen_through_noise():
    rng = random.Random(0)
    chosen = [v + rng.gauss(0, 0.3) for v in line(-5.0, 300)]
    margins = [v + rng.gauss(0, 0.3) for v in line(3.0, 300)]
    found = [*said(CollapseWatch(), rewards(chosen, margins))]
    assert 41 <= found[0] < 100 and len(found) <= 4


def test_runs_without_rewards():
    assert said(CollapseWatch(), losses(*[1.0] * 100)) == {}
    assert said(SpikeWatch(), [{"eval_loss": v} for v in [1.0] * 50 + [99.0]]) == {}


def test_what_was_told_is_not_told_again(tmp_path, capsys):
    """A run that goes on looks at its metrics first; one that begins has none."""
    before = rewards(line(-1.0)[:60], line(0.5)[:60])
    lines = [json.dumps({"step": i, **record}) for i, record in enumerate(before, 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, json.dumps({"step": 60, "eval_loss": 1.0})]) + "\n")
    again = rewards(line(-1.0)[60:], line(0.5)[60:])
    whole, goes_on, told = said(CollapseWatch(), before + again), Warnings(str(tmp_path), 60), set()
    for step, record in enumerate(again, 61):
        goes_on.on_metrics(step, record, None)
        told |= {step} if "become less likely" in capsys.readouterr().err else set()
    assert told == {step for step in whole if step > 60} != {*whole}
    Warnings(str(tmp_path / "new"), 0)  # there are no metrics to look at yet
