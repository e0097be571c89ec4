"""`launch.bench`: both sides run, agree, and what they took is written down; a peer that lacks is one line."""

import json

import pytest

from lab.bench import bench as module
from lab.bench.bench import ROWS, BenchConfig
from lab.bench.material import budgets
from lm_jax.errors import UserError
from tests.e2e.common import arguments, run


@pytest.fixture(autouse=True)
def compiled_as_for_a_user(monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")


def measured(path, *rows):
    done = run("bench", *arguments("bench", f"output={path}", f"rows={rows}", preset="tiny")).ok()
    report = json.loads((path / "bench.json").read_text())["rows"]
    assert list(report) == list(rows)
    for row in rows:
        assert (path / f"{row}.png").read_bytes().startswith(b"\x89PNG")
        for peer, found in report[row]["peers"].items():
            assert found["same"], found["compared"]
            assert found["ratio"]["seconds"] == pytest.approx(found["seconds"] / report[row]["ours"]["seconds"])
            assert any(line.startswith(f"{row} ") and f" of {peer}:" in line for line in done.stdout.splitlines())
    return report


@pytest.mark.slow
def test_scoring_beside_transformers(tmp_path):
    report = measured(tmp_path / "out", "score")
    peers = report["score"]["peers"]
    assert set(peers) == {"transformers", "transformers sorted"}
    assert all(report["score"]["ours"]["tokens"] == peer["tokens"] > 1000 for peer in peers.values())


@pytest.mark.slow
def test_training_beside_trl(tmp_path):
    report = measured(tmp_path / "out", "train")
    ours, peers = report["train"]["ours"], report["train"]["peers"]
    assert set(peers) == {"TRL float32", "TRL bfloat16"}
    for found in (ours, *peers.values()):
        assert found["process_seconds"] > found["seconds"]
    whole = peers["TRL float32"]["process_seconds"] / ours["process_seconds"]
    assert peers["TRL float32"]["ratio"]["process_seconds"] == pytest.approx(whole)


@pytest.mark.slow
def test_generation_and_loading_beside_transformers(tmp_path):
    report = measured(tmp_path / "out", "generate", "generate_ends", "load")
    for row in ("generate", "generate_ends"):
        assert set(report[row]["peers"]) == {"transformers", "transformers sorted"}
        assert all(report[row]["ours"]["tokens"] == peer["tokens"] for peer in report[row]["peers"].values())
    assert report["generate_ends"]["ours"]["tokens"] < report["generate"]["ours"]["tokens"]
    assert set(report["load"]["peers"]) == {"transformers", "transformers copied"}
    assert report["load"]["ours"]["parameters"] > 1e6


def test_answers_that_end_by_themselves_have_lengths_of_their_own():
    assert budgets(3, 64, ends=False) == [64, 64, 64]
    made = budgets(2000, 64, ends=True)
    assert made == budgets(2000, 64, ends=True) and min(made) >= 1 and max(made) == 64
    assert 14 < sum(made) / len(made) < 17  # 15.7: those that would be longer are cut


@pytest.mark.slow
def test_growth(tmp_path):
    points = measured(tmp_path / "out", "growth")["growth"]["ours"]["points"]
    at = {(p["axis"], p[p["axis"]]): p["bytes"] for p in points}
    assert at["length", 1024] < 2.5 * at["length", 512], "memory grows with the square of the length"


def test_what_differs_is_seen():
    epoch = {"tokens": 10, "first_loss": 0.6931}
    assert ROWS["train"].same(epoch, epoch)[1]
    assert not ROWS["train"].same(epoch, epoch | {"tokens": 11})[1]
    assert not ROWS["train"].same(epoch, epoch | {"first_loss": 0.7})[1]
    assert not ROWS["score"].same({"sum": -100.0}, {"sum": -100.1})[1]
    assert not ROWS["generate"].same({"texts": ["a", "b"]}, {"texts": ["a", "c"]})[1]


def test_a_missing_peer_is_a_clear_line(monkeypatch, tmp_path):
    find = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "trl" else find(name))
    config = BenchConfig(None, None, str(tmp_path / "out"), ("train", "growth"), "float32", 8, 64, 4, 2, 2, 1, (1,))
    with pytest.raises(UserError, match=r"train needs trl.*pip install.*--config.rows=.*growth"):
        module.bench(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"rows": ("trian",)}, "unknown 'trian'; choose from train, gen"), ({"dtype": "fp8"}, "unknown 'fp8'")],
)
def test_settings_that_make_no_sense(change, message):
    given = {"model": None, "input": None, "output": "o", "rows": ("load",), "dtype": "float32", "num_pairs": None}
    given |= {"batch_pairs": 8, "max_length": 64, "prompts": 2, "new_tokens": 2, "layers": 1, "growth": (1,)}
    with pytest.raises(UserError, match=message):
        BenchConfig(**given | change)


def test_input_needs_a_model(tmp_path):
    done = run("bench", *arguments("bench", f"output={tmp_path}", "input=pairs.jsonl", "rows=('growth',)"))
    assert done.error().startswith("config.model: not set")
