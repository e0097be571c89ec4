"""The ablation's short form, from the quickstart's seed model to its report: it fails if training stops helping."""

import json
import os
import subprocess

import pytest

from tests.conftest import ROOT
from tests.e2e.common import arguments, start

FITTED = ROOT / "runs" / "quickstart" / "seed"

pytestmark = [
    pytest.mark.slow,  # .ci/run names this file, after make quickstart
    pytest.mark.skipif(not (FITTED / "gate.json").exists(), reason="make quickstart was not run in this checkout"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of `configs/lab_ablation.py:short`."""
    output = tmp_path_factory.mktemp("lab")
    # Optimised code, as a user's: what is compiled here runs for minutes
    environment = {name: value for name, value in os.environ.items() if name != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    flags = arguments("lab_ablation", f"output={output}", f"fitted={FITTED}", preset="short")
    process = start("lab_ablation", *flags, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    shown, _ = process.communicate(timeout=1800)  # a busy machine takes several times as long as a quiet one
    assert process.returncode == 0, shown[-4000:]
    return json.loads((output / "report.json").read_text())


def test_dpo_on_pairs_that_the_model_made_itself_helps(report):
    arms = report["musc"]["arms"]
    # 17.5 points were measured; a difference of 768 answers is good to 3.4, at 95%
    assert arms["dpo_nll"]["all_met"]["mean"] - arms["seed"]["all_met"]["mean"] >= 0.05


def test_the_mutual_filter_tells_real_pairs_from_shuffled_ones(report):
    assert report["main"]["extras"]["auroc"]["mutual"]["mean"] >= 0.90


def test_what_the_filter_keeps_is_truer_than_as_many_at_random(report):
    truth = report["main"]["extras"]["truth"]
    assert truth["mutual_gain"]["mean"] - truth["random"]["mean"] >= 0.10
