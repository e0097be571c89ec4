"""Intervals and paired comparisons over seeds, against scipy's own tests and by hand."""

import numpy as np
import pytest
from scipy import stats

from lab.worlds.answers import Estimate
from lab.worlds.statistics import Comparison, compare_runs, mean_of_runs


def test_means_of_runs_have_wider_intervals_than_the_normal_distribution_gives():
    # Of 1, 2, 3: standard error 1 / sqrt(3), and t of two degrees of freedom is 4.303
    assert mean_of_runs([1.0, 2.0, 3.0]) == Estimate(2.0, pytest.approx(4.302653 / 3**0.5, rel=1e-6))
    low, high = stats.t.interval(0.95, 4, *(f([0.1, 0.4, 0.2, 0.3, 0.3]) for f in (np.mean, stats.sem)))
    assert mean_of_runs([0.1, 0.4, 0.2, 0.3, 0.3]).half_width == pytest.approx((high - low) / 2)
    assert mean_of_runs([1.0]) is None


def test_comparisons_pair_the_runs_that_both_have():
    these, base = {0: 0.5, 1: 0.61, 2: 0.7, 7: 0.9}, {2: 0.52, 1: 0.5, 0: 0.45, 8: 0.0}
    found = compare_runs(these, base)
    expected = stats.ttest_rel([0.5, 0.61, 0.7], [0.45, 0.5, 0.52])
    interval = expected.confidence_interval()
    assert found.pairs == 3
    assert found.p == pytest.approx(expected.pvalue)
    assert found.difference.mean == pytest.approx(0.34 / 3)
    assert found.difference.half_width == pytest.approx((interval.high - interval.low) / 2)
    assert compare_runs({0: 1.0, 1: 2.0}, {1: 1.0}) is None
    # Without any spread the test has nothing to divide by
    assert compare_runs({0: 0.5, 1: 0.5}, {0: 0.5, 1: 0.5}) == Comparison(Estimate(0.0, 0.0), 1.0, 2)
    assert compare_runs({0: 0.75, 1: 0.75}, {0: 0.5, 1: 0.5}) == Comparison(Estimate(0.25, 0.0), 0.0, 2)
