"""Loggers: what they are told, that a run goes on in the same place, and that their failures stop nothing.

wandb, trackio and mlflow are stood in for by modules that record calls in the shape of the real ones; where the real
ones are installed they are run too, without a network.
"""

import functools
import importlib.util
import json
import sqlite3
import sys
import types
from pathlib import Path

import pytest

from lm_jax.errors import UserError
from lm_jax.training.loggers import check_loggers, open_loggers
from lm_jax.training.metrics import MetricsWriter


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    settings = {"command": "musc_train", "config": {"seed": 3, "optim": {"learning_rate": 1e-3}}}
    (path / "config.json").write_text(json.dumps(settings))
    return str(path)


class Service:
    """What a server would hold, over several sittings; `fails` names the calls that raise."""

    def __init__(self):
        self.calls, self.fails, self.step = [], set(), 0

    def call(self, name, /, *args, **kwargs):
        self.calls.append((name, args, kwargs))
        if name in self.fails:
            raise ConnectionError("the server\nis away")

    def named(self, name):
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]

    def wandb(self):
        def log(metrics, step):
            self.call("log", metrics, step=step)
            self.step = step

        def init(**kwargs):
            self.call("init", **kwargs)
            return types.SimpleNamespace(log=log, finish=lambda: self.call("finish"), step=self.step)

        return types.SimpleNamespace(init=init)

    def trackio(self):
        return types.SimpleNamespace(**{name: functools.partial(self.call, name) for name in ("init", "log", "finish")})

    def mlflow(self):
        service = self

        class ActiveRun:
            def __init__(self, run_id=None, run_name=None):
                service.call("start_run", run_id=run_id, run_name=run_name)
                self.info = types.SimpleNamespace(run_id=run_id or "abc")

            def __enter__(self):
                return self

            def __exit__(self, *exc):
                service.call("end_run")

        params = dict(self.named("log_params")[0][0][0]) if self.named("log_params") else {}
        return types.SimpleNamespace(
            start_run=ActiveRun,
            active_run=lambda: types.SimpleNamespace(data=types.SimpleNamespace(params=params)),
            log_params=lambda values: self.call("log_params", values),
            log_metrics=lambda values, step: self.call("log", values, step=step),
            end_run=lambda: self.call("end_run"),
        )


@pytest.fixture
def service(monkeypatch):
    def stand_in(name):
        monkeypatch.setitem(sys.modules, name, getattr(made, name)())

    made = Service()
    made.stand_in = stand_in
    return made


def sit(run, names, steps, resume_step=0):
    with open_loggers(names, run) as loggers, MetricsWriter(run, resume_step, loggers) as metrics:
        for step in steps:
            metrics.write(step, {"loss": step / 4, "loss/seed": float("nan")})


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_what_it_is_told(run, service, name):
    service.stand_in(name)
    sit(run, name, (1, 2))
    assert service.named("log") == [(({"loss": 0.25},), {"step": 1}), (({"loss": 0.5},), {"step": 2})]
    told = service.named("log_params")[0][0][0] if name == "mlflow" else service.named("init")[0][1]["config"]
    assert told == {"seed": 3, "optim.learning_rate": 1e-3}
    assert service.calls[-1][0] in ("finish", "end_run")


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_run_goes_on_where_it_was(run, service, name):
    service.stand_in(name)
    sit(run, name, (1, 2, 3))
    kept = json.loads(open(f"{run}/loggers.json").read())[name]
    service.stand_in(name)  # another process
    sit(run, name, (3, 4), resume_step=2)
    if name == "mlflow":
        ids = [kwargs["run_id"] for _, kwargs in service.named("start_run")]
        assert ids == [None, "abc", "abc"] and kept == "abc" and len(service.named("log_params")) == 1
    else:
        key = "id" if name == "wandb" else "name"
        opened = [kwargs for _, kwargs in service.named("init")]
        assert [o[key] for o in opened] == [kept, kept] and {o["resume"] for o in opened} == {"allow"}
    assert [kwargs["step"] for _, kwargs in service.named("log")][-1] == 4


@pytest.mark.parametrize(("where", "logged"), [("init", 0), ("log", 1), ("finish", 2)])
def test_an_outage_is_said_once_and_stops_nothing(run, service, capsys, where, logged):
    service.fails.add(where)
    service.stand_in("wandb")
    service.stand_in("trackio")
    sit(run, "wandb", (1, 2))
    said = capsys.readouterr().err
    assert said.count("wandb: ") == 1 and "the server is away" in said and "metrics.jsonl has everything" in said
    assert len(service.named("log")) == logged
    assert [json.loads(line)["step"] for line in open(f"{run}/metrics.jsonl")] == [1, 2]


def test_one_that_fails_leaves_the_others(run, service, capsys):
    service.stand_in("trackio")
    bad = types.SimpleNamespace()  # without init: whatever goes wrong in another's code
    sys.modules["wandb"], before = bad, sys.modules.get("wandb")
    try:
        sit(run, "wandb, trackio", (1,))
    finally:
        sys.modules.pop("wandb") if before is None else sys.modules.update(wandb=before)
    assert capsys.readouterr().err.count("training goes on without it") == 1
    assert len(service.named("log")) == 1


def test_what_is_refused(monkeypatch):
    check_loggers("")
    with pytest.raises(UserError, match="config.loggers: unknown 'tensorboard'; choose from wandb, trackio, mlflow"):
        check_loggers("tensorboard")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="config.loggers: mlflow is not installed; pip install mlflow"):
        check_loggers("mlflow")


# --- the real ones ---------------------------------------------------------------------------------------------------


def test_wandb_offline(run, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    sit(run, "wandb", (1, 2))
    sit(run, "wandb", (2, 3), resume_step=1)
    files = sorted(Path(run, "wandb").glob("offline-run-*/run-*.wandb"))
    kept = json.loads(open(f"{run}/loggers.json").read())["wandb"]
    assert [f.name for f in files] == [f"run-{kept}.wandb"] * len(files) and files
    assert all(b"loss" in f.read_bytes() and b"learning_rate" in f.read_bytes() for f in files)


def test_mlflow_in_a_directory(run, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    sit(run, "mlflow", (1, 2))
    sit(run, "mlflow", (3,), resume_step=2)
    client = mlflow.MlflowClient()
    (found,) = client.search_runs(["0"])
    assert found.data.params["optim.learning_rate"] == "0.001" and found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 0.25), (2, 0.5), (3, 0.75)]


def test_trackio_in_a_directory(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    sit(run, "trackio", (1, 2))
    sit(run, "trackio", (3,), resume_step=2)
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    assert [step for _, step, _ in rows] == [1, 2, 3] and len({name for name, *_ in rows}) == 1
    assert [json.loads(metrics)["loss"] for *_, metrics in rows] == [0.25, 0.5, 0.75]
