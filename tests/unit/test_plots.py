"""The pictures of a run: one for each kind of metric and of data that it has, and none of what it has not."""

import json

import matplotlib.image
import numpy as np
import pytest

from lm_jax.checkpoints.settings import training_records
from lm_jax.data.packing import Segment
from lm_jax.training import plots
from lm_jax.training.plots import plot_run


def segment(prompt, weights):
    return Segment(np.ones(prompt, np.int32), np.ones(len(weights), np.int32), {"weights": np.array(weights)})


PAIRS = [(segment(3, [0.5, 1.5]), segment(3, [2.0, 2.0, 0.25])), (segment(4, [1.0]), segment(4, [1.0, 1.0]))]
UNIFORM = [(segment(2, [1.0, 1.0]),), (segment(5, [1.0]),)]


@pytest.fixture
def drawn(monkeypatch):
    """What every picture shows: name -> {legend label: x values of the line, or the counts of the histogram}."""
    found, save = {}, plots._save

    def keep(figure, path):
        axis = figure.axes[0]
        lines = {line.get_label(): np.array(line.get_xydata()) for line in axis.lines}
        found[path.rpartition("/")[2]] = lines or [text.get_text() for text in figure.legends[0].get_texts()]
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return found


def written(tmp_path, records):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return training_records(str(tmp_path))


def test_preferences(tmp_path, drawn):
    names = ("loss", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
    records = [{"step": i, **{name: i + 0.5 for name in names}} for i in (1, 2, 3)]
    records.insert(2, {"step": 2, "eval_loss": 0.25})
    records[-1]["rewards/margins"] = float("nan")
    plot_run(f"{tmp_path}/plots", written(tmp_path, records), PAIRS, ("chosen", "rejected"))
    assert sorted(drawn) == ["lengths.png", "logps.png", "loss.png", "margins.png", "token_weights.png"]
    assert sorted(drawn) == sorted(p.name for p in (tmp_path / "plots").iterdir())
    np.testing.assert_array_equal(drawn["loss.png"]["loss"], [(1, 1.5), (2, 2.5), (3, 3.5)])
    np.testing.assert_array_equal(drawn["loss.png"]["loss, held-out"], [(2, 0.25)])
    np.testing.assert_array_equal(drawn["margins.png"]["rewards/margins"], [(1, 1.5), (2, 2.5)])
    assert drawn["token_weights.png"] == ["chosen (3, median 1)", "rejected (5, median 1)"]
    assert drawn["lengths.png"] == [
        "chosen (2, median 1.5)",
        "rejected (2, median 2.5)",
        "prompt and response (4, median 5.5)",
    ]
    for path in (tmp_path / "plots").iterdir():
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[:2] == (480, 840) and pixels.std() > 0.05  # something is on it


def test_supervised(tmp_path, drawn):
    records = [{"step": i, "loss": 1.0, "alpha": 0.5, "loss/seed": 2.0, "grad_norm": 1.0} for i in range(1, 5)]
    plot_run(f"{tmp_path}/plots", written(tmp_path, records), UNIFORM, ("response",))
    assert sorted(drawn) == ["alpha.png", "grad_norm.png", "lengths.png", "loss.png"]  # uniform weights are no picture
    assert set(drawn["loss.png"]) == {"loss", "loss/seed"}


def test_long_runs_are_smoothed(tmp_path, drawn):
    values = np.random.default_rng(0).standard_normal(200)
    records = [{"step": i, "loss": float(v)} for i, v in enumerate(values, 1)]
    plot_run(f"{tmp_path}/plots", written(tmp_path, records), UNIFORM, ("response",))
    smooth = drawn["loss.png"]["loss, mean of 10 steps"]
    assert smooth.shape == (200, 2)
    # Five before and four after, and at the ends what there is
    assert smooth[100, 1] == pytest.approx(values[95:105].mean())
    assert smooth[0, 1] == pytest.approx(values[:5].mean()) and smooth[-1, 1] == pytest.approx(values[-6:].mean())


def test_the_same_run_gives_the_same_files(tmp_path):
    """A finished run that is started again stays as it is, byte for byte."""
    records = [{"step": i, "loss": i / 3} for i in range(1, 5)]
    for name in ("a", "b"):
        plot_run(f"{tmp_path}/{name}", records, PAIRS, ("chosen", "rejected"))
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
