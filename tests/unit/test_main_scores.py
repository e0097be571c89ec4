"""The five scores, the selection, AUROC and the report, against numbers worked out by hand."""

import itertools
import json
import math

import numpy as np
import pytest

from lm_jax.errors import UserError
from main_jax.filter.auroc import auroc, midranks
from main_jax.filter.command import REASONS, select
from main_jax.filter.passes import FAULTS, NO_INSTRUCTION, TOO_LONG
from main_jax.filter.plots import plot_filter
from main_jax.filter.report import Measured, report_of, table
from main_jax.filter.scores import DEFAULT_SCORE, SCORES, CrossEntropies, best_fraction, best_of_each, check_selection
from main_jax.rounds.candidates import Candidates

NAN = math.nan


def test_the_five_scores():
    # Candidate 0: CE_f(r|i) 2, CE_r(i|r) 1, CE_f(r) 2.5; candidate 1 hinders: 3, 0.5, 2.5; candidate 2 was dropped
    ce = CrossEntropies(np.array([2.0, 3.0, NAN]), np.array([1.0, 0.5, NAN]), np.array([2.5, 2.5, NAN]))
    expected = {
        "forward": [2.0, 3.0, NAN],
        "reverse": [1.0, 0.5, NAN],
        "mutual": [3.0, 3.5, NAN],
        "forward_gain": [-0.5, 0.5, NAN],
        "mutual_gain": [0.5, 1.0, NAN],
    }
    assert SCORES.keys() == expected.keys() and DEFAULT_SCORE == "mutual_gain"
    for name, score in SCORES.items():
        np.testing.assert_array_equal(score(ce), expected[name], err_msg=name)


def test_the_best_of_each_response():
    scores = np.array([3.0, 1.0, 2.0, NAN, 5.0, 5.0, NAN, -1.0])
    response_of = np.array([0, 1, 0, 1, 2, 2, 3, 1])
    # Response 0: 2 before 3; 1: -1; 2: the first of two equals; 3: none is left
    np.testing.assert_array_equal(best_of_each(scores, response_of), [2, 4, 7])
    assert best_of_each(np.array([NAN]), np.array([0])).size == 0


@pytest.mark.parametrize(
    ("fraction", "clusters", "expected"),
    [
        (0.5, [0, 0, 0, 0], [0, 1, 1, 0]),
        (1.0, [0, 0, 0, 0], [1, 1, 1, 1]),
        (0.01, [0, 0, 0, 0], [0, 0, 1, 0]),  # never none
        (0.6, [0, 0, 0, 0], [0, 1, 1, 0]),  # 2.4
        (0.625, [0, 0, 0, 0], [1, 1, 1, 0]),  # 2.5; of the two with score 3 the earlier one
        (0.5, [0, 1, 1, 0], [1, 0, 1, 0]),  # a quota in each
        (0.1, [7, 8, 9, 9], [1, 1, 1, 0]),
    ],
)
def test_the_best_fraction(fraction, clusters, expected):
    kept = best_fraction(np.array([3.0, 2.0, 1.0, 3.0]), fraction, np.array(clusters))
    np.testing.assert_array_equal(kept, np.array(expected, bool))


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, NAN])
def test_fractions_outside_their_range(fraction):
    with pytest.raises(UserError, match=r"config.fraction=\S+: must lie in \(0, 1\]"):
        check_selection("mutual", fraction)


def test_unknown_scores():
    with pytest.raises(UserError, match="config.score: unknown score 'gain'; choose from forward, reverse, mutual"):
        check_selection("gain", 0.5)


def reasons(selection) -> list[str]:
    return ["kept" if r < 0 else REASONS[r] for r in selection.reason]


def test_what_becomes_of_each_candidate():
    scores = np.array([1.0, 2.0, NAN, 4.0, 3.0, NAN])
    fault = np.array([-1, -1, FAULTS.index(TOO_LONG), -1, -1, FAULTS.index(NO_INSTRUCTION)], np.int8)
    response_of, clusters = np.array([0, 0, 1, 2, 3, 3]), np.zeros(6, int)
    chosen = select(scores, fault, response_of, clusters, 0.67, None)
    assert reasons(chosen) == ["kept", "worse_candidate", "too_long", "beyond_fraction", "kept", "no_instruction"]
    np.testing.assert_array_equal(chosen.best, [True, False, False, True, True, False])
    # The threshold keeps what equals it, and is named where both would drop
    chosen = select(scores, fault, response_of, clusters, 0.67, 3.0)
    assert reasons(chosen)[3] == "over_threshold" and reasons(chosen)[4] == "kept"
    chosen = select(scores, fault, response_of, clusters, 0.67, 2.9)
    assert reasons(chosen)[4] == "over_threshold" and reasons(chosen)[0] == "kept"


def brute_auroc(lower, higher) -> tuple[float, float]:
    """The definition: all pairs; and DeLong's variance from the means over pairs of one score."""
    wins = np.array([[1.0 if a < b else 0.5 if a == b else 0.0 for b in higher] for a in lower])
    rows, columns = wins.mean(1), wins.mean(0)
    variance = sum((x - x.mean()) @ (x - x.mean()) / (len(x) - 1) / len(x) for x in (rows, columns))
    return wins.mean(), variance


def test_auroc_by_hand():
    # Pairs in order: 1 < 2, 1 < 3, 2 = 2 (half), 2 < 3: 3.5 of 4. Rows: 1 and 0.75; columns: 0.75 and 1.
    # Each part of the variance: 2 * 0.125^2 / 1 / 2 = 1/64; together 1/32, its root 0.17678
    found = auroc(np.array([1, 2]), np.array([2, 3]))
    assert found.value == 0.875 and found.low == pytest.approx(0.875 - 1.959964 * 32**-0.5) and found.high == 1
    assert auroc(np.array([1, 2]), np.array([3, 4])) == (1, 1, 1) and auroc(np.array([3, 4]), np.array([1, 2]))[0] == 0
    assert auroc(np.zeros(3), np.zeros(2)) == (0.5, 0.5, 0.5)


def test_auroc_equals_comparing_all_pairs():
    random = np.random.default_rng(0)
    for n, m, shift in itertools.product((2, 7, 40), (3, 25), (0.0, 0.7)):
        lower = random.normal(size=n).round(1)  # with ties
        higher = (random.normal(size=m) + shift).round(1)
        value, variance = brute_auroc(lower, higher)
        found = auroc(lower, higher)
        assert found.value == pytest.approx(value, abs=1e-12)
        assert found.low == pytest.approx(max(value - 1.959964 * variance**0.5, 0), abs=1e-6)
        assert found.high == pytest.approx(min(value + 1.959964 * variance**0.5, 1), abs=1e-6)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    random = np.random.default_rng(1)
    truth = 0.5 * math.erfc(-0.8 / 2)  # P(N(0, 1) < N(0.8, 1))
    found = [auroc(random.normal(size=60), random.normal(0.8, size=40)) for _ in range(1000)]
    assert 0.92 < np.mean([f.low <= truth <= f.high for f in found]) < 0.975


def test_auroc_of_too_little():
    for lower, higher in ((np.zeros(1), np.zeros(2)), (np.zeros(2), np.zeros(0)), (np.array([0, NAN]), np.zeros(2))):
        with pytest.raises(ValueError, match="at least 2 scores|NaN"):
            auroc(lower, higher)


def test_midranks():
    np.testing.assert_array_equal(midranks(np.array([5.0, 1.0, 5.0, 3.0])), [3.5, 1, 3.5, 2])


def measured() -> Measured:
    values = np.array([1.0, 2.0, 3.0, 4.0, NAN])
    ce = CrossEntropies(values, np.array([4.0, 9.0, 2.0, 1.0, NAN]), np.where(np.isnan(values), NAN, 2.0))
    return Measured(
        scores={name: score(ce) for name, score in SCORES.items()},
        alone=ce.alone,
        best=np.array([True, False, True, True, False]),
        reason=np.array([-1, REASONS.index("worse_candidate"), -1, REASONS.index("beyond_fraction"), 1], np.int8),
        reasons=REASONS,
        responses=4,
        words=np.array([10, 10, 120, 500, 3]),
        copied=np.array([0.5, 0.0, 0.0, 0.25, 0.0]),
    )


def test_the_report_by_hand(tmp_path):
    report = report_of(measured(), "mutual")
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    counted = {name: report[name] for name in ("candidates", "responses", "scored", "best", "kept")}
    assert counted == {"candidates": 5, "responses": 4, "scored": 4, "best": 3, "kept": 2}
    assert report["dropped"] == {"too_long": 1, "worse_candidate": 1, "beyond_fraction": 1}
    forward = report["scores"]["forward"]
    assert forward["scored"] == {
        "mean": 2.5,
        "sd": pytest.approx(1.25**0.5, abs=1e-6),
        "p5": 1.15,
        "p25": 1.75,
        "median": 2.5,
        "p75": 3.25,
        "p95": 3.85,
    }
    assert forward["kept"]["mean"] == 2 and report["scores"]["mutual"]["kept"]["mean"] == 5
    assert report["copy_rate"] == {"scored": 0.1875, "best": 0.25, "kept": 0.25}
    shares = {row["from"]: row["share"] for row in report["kept_by_length"]}
    assert shares == {0: 1.0, 50: None, 100: 1.0, 200: None, 400: 0.0}
    # Best: forward 1, 3, 4 and reverse 4, 2, 1 deviate from their means by -5/3, 1/3, 4/3 and 5/3, -1/3, -4/3
    assert report["forward_reverse_correlation"]["best"] == {"pearson": -1.0, "spearman": -1.0}
    # All: reverse 4, 9, 2, 1 has ranks 3, 4, 2, 1; squared differences to 1..4 are 4, 4, 1, 9: 1 - 6 * 18 / 60
    assert report["forward_reverse_correlation"]["scored"]["spearman"] == pytest.approx(-0.8, abs=1e-6)
    shown = table(report)
    assert "kept 2 of 4 responses (5 candidates) by mutual; dropped: 1 too_long, 1 worse_candidate" in shown
    plot_filter(measured(), str(tmp_path / "plots"), "mutual")
    found = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert found == ["copy_rate.png", "forward_reverse.png", "kept_by_length.png", "scores.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "plots").iterdir())


def candidates(tmp_path, rows, **options) -> Candidates:
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Candidates(str(path), **options)


def row(id, response="r", instruction="i", **more):
    return {"id": id, "response": response, "instruction": instruction, **more}


def test_candidates_are_grouped_by_id(tmp_path):
    rows = [
        row("b", "x", cluster="k"),
        row(7, "y", cluster=1),
        row("b", "x", None, cluster="k"),
        row("a", "x", cluster=1),
    ]
    found = candidates(tmp_path, rows, cluster="cluster")
    np.testing.assert_array_equal(found.response_of, [0, 1, 0, 2])
    np.testing.assert_array_equal(found.first, [0, 1, 3])
    assert len(found) == 4 and list(found.rows()) == rows and found.name(2) == "c.jsonl row 2"
    assert found.clusters[0] == found.clusters[2] != found.clusters[1] == found.clusters[3]
    assert set(candidates(tmp_path, rows).clusters) == {0}


def test_the_fingerprint_is_of_what_is_scored(tmp_path):
    first = candidates(tmp_path, [row("a"), row("b")]).fingerprint
    assert candidates(tmp_path, [row("a", other=1), row("b")]).fingerprint == first
    changed = [[row("a")], [row("b"), row("a")], [row("a"), row("b", "x")], [row("a"), row("b", instruction=None)]]
    assert len({candidates(tmp_path, rows).fingerprint for rows in changed} | {first}) == 5


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([row("a"), row("a", "other")], "row 1: has the id of row 0 but another response"),
        ([row("a"), {"id": "b", "response": "r"}], "row 1: column 'instruction' is missing"),
        ([row(None)], "row 0: id must be a string or a whole number, got None"),
        ([row("a", " ")], "row 0: response must be a text that is not empty"),
        ([row("a", None)], "row 0: response must be a text that is not empty"),
        ([row("a", instruction=["i", "j"])], "row 0: instruction must be a text or null, got list; give each"),
        ([row("a", cluster=1), row("b")], "row 1: column 'cluster' is missing"),
        ([row("a", cluster=None)], "row 0: cluster must be a string or a whole number, got None"),
        ([], "the file is empty"),
    ],
)
def test_faulty_candidates_are_named(tmp_path, rows, says):
    with pytest.raises(UserError) as caught:
        candidates(tmp_path, rows, cluster="cluster" if any("cluster" in r for r in rows) else None)
    assert says in str(caught.value) and "c.jsonl" in str(caught.value)
