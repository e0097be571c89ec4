"""What is written is JSON to every reader: NaN and infinities are null, counted where a run has them."""

import ast
import json

import numpy as np
import pytest

from lm_jax.checkpoints.settings import training_records
from lm_jax.strict_json import dumps, finite
from lm_jax.training.metrics import MetricsWriter
from lm_jax.training.watches import Warnings
from musc_jax.rounds.report import summary

BAD = [float("nan"), float("inf"), -float("inf"), np.float32("nan"), np.array(np.inf, np.float16)]


def strictly(text: str):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("bad", BAD)
def test_dumps(bad):
    value = {"a": bad, "b": [1, (bad, 2.5)], "c": {"d": np.array([1.0, bad])}, "e": "NaN", "f": None, "g": True}
    expected = {"a": None, "b": [1, [None, 2.5]], "c": {"d": [1.0, None]}, "e": "NaN", "f": None, "g": True}
    assert strictly(dumps(value)) == finite(value) == expected


def write(run, *records, resume_step=0) -> list[dict]:
    boards = []
    with MetricsWriter(str(run), resume_step, [lambda step, metrics: boards.append((step, metrics))]) as metrics:
        for step, record in records:
            metrics.write(step, record)
    return boards


def test_metrics(tmp_path):
    told = write(
        tmp_path,
        (1, {"loss": 2.0, "loss/seed": float("nan"), "grad_norm": 1.0}),
        (2, {"loss": float("nan"), "grad_norm": float("inf"), "num_tokens": 10}),
        (2, {"eval_loss": float("nan"), "eval_loss/seed": float("nan"), "eval_pairs": 3.0}),
        (3, {"loss": 1.0, "grad_norm": 0.5}),
    )
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [strictly(line) for line in lines] == [
        {"step": 1, "loss": 2.0, "grad_norm": 1.0},  # a part that the step lacks is left out
        {"step": 2, "loss": None, "grad_norm": None, "num_tokens": 10, "num_nonfinite": 2},
        {"step": 2, "eval_loss": None, "eval_pairs": 3.0, "num_nonfinite": 1},
        {"step": 3, "loss": 1.0, "grad_norm": 0.5},
    ]
    assert told[1] == (2, {"num_tokens": 10, "num_nonfinite": 2})
    # Readers find what is not finite absent
    records = training_records(str(tmp_path))
    assert records[1] == {"step": 2, "num_tokens": 10, "num_nonfinite": 2} and "eval_loss" not in records[2]
    Warnings(str(tmp_path), 3)  # looks at them all
    write(tmp_path, (3, {"loss": 4.0}), resume_step=2)
    assert [record["step"] for record in training_records(str(tmp_path))] == [1, 2, 2, 3]


def test_a_line_that_is_being_written_is_not_read(tmp_path):
    write(tmp_path, (1, {"loss": 2.0}))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert training_records(str(tmp_path)) == [{"step": 1, "loss": 2.0}]


def test_a_round_with_a_skipped_step(tmp_path):
    (tmp_path / "pairs.jsonl.counts.json").write_text('{"input": 4, "pairs": 4, "stages": []}\n')
    names = ("loss", "rewards/margins", "rewards/accuracies")
    steps = [(n, {"pairs": 2.0, **dict.fromkeys(names, value)}) for n, value in ((1, 1.0), (2, 3.0), (3, np.nan))]
    (tmp_path / "train").mkdir()
    write(tmp_path / "train", *steps)
    found = summary(str(tmp_path))
    assert found["loss"] == 2.0 and found["rewards/margins"] == 2.0


# Digests, what travels between processes, and users' rows, in which NaN is a fault to name
OF_THEIR_OWN = {
    "lm_jax/checkpoints/buckets.py",
    "lm_jax/checkpoints/checksums.py",
    "lm_jax/checkpoints/mirror.py",
    "lm_jax/data/journal.py",
    "lm_jax/data/messages.py",
    "lm_jax/data/rows.py",
    "lm_jax/data/score_store.py",
    "lm_jax/data/tokenizers.py",
    "lm_jax/distributed/link.py",
    "lm_jax/distributed/processes.py",
    "lm_jax/distributed/wire.py",
    "lm_jax/evaluation/tasks.py",
    "lm_jax/generation/endpoint_wire.py",
    "lm_jax/generation/endpoints.py",
    "lm_jax/strict_json.py",
    "musc_jax/draws.py",
    "musc_jax/report/command.py",
    "musc_jax/weights/command.py",
    "musc_jax/weights/stored.py",
    "main_jax/rounds/candidates.py",
}


def test_what_is_computed_is_written_through_one_function(repo_root):
    found = set()
    for top in ("lm_jax", "musc_jax", "main_jax", "launch"):
        for file in (repo_root / top).rglob("*.py"):
            calls = (n.func for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call))
            if any(ast.unparse(call) in ("json.dumps", "json.dump") for call in calls):
                found.add(file.relative_to(repo_root).as_posix())
    assert found - OF_THEIR_OWN == set()
