"""Where else a run's metrics go: Weights & Biases, trackio, MLflow. The project and the server are theirs to know.

A logger is a function (step, metrics) -> None. What a run is called there is kept in its directory, so that a run which
goes on does so there too. A logger that fails is left alone from then on: metrics.jsonl has everything.
"""

import contextlib
import dataclasses
import importlib.util
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from lm_jax.checkpoints.settings import flat_settings, read_settings
from lm_jax.config import split_names
from lm_jax.console import say
from lm_jax.data.rows import write_text
from lm_jax.errors import UserError
from lm_jax.strict_json import dumps
from lm_jax.training.metrics import Log

_IDS = "loggers.json"


@dataclasses.dataclass(frozen=True)
class _Service:
    """How one of them is spoken to.

    Attributes:
      package: what pip installs.
      new: run directory -> what the run is called there.
      open: (that, settings, run directory) -> (log, close).
    """

    package: str
    new: Callable[[str], str]
    open: Callable[[str, Mapping[str, Any], str], tuple[Log, Callable[[], None]]]


def _open_wandb(run_id, settings, run):
    import wandb

    there = wandb.init(id=run_id, name=run, config=settings, dir=run, resume="allow")

    def log(step, metrics):
        if step >= there.step:  # what is there already, from before a kill, is the same
            there.log(metrics, step=step)

    return log, there.finish


def _open_trackio(run_id, settings, run):
    import trackio

    trackio.init(project="lm_jax", name=run_id, config=settings, resume="allow")
    return lambda step, metrics: trackio.log(metrics, step=step), trackio.finish


def _new_mlflow(run):
    import mlflow

    with mlflow.start_run(run_name=run) as there:
        return there.info.run_id


def _open_mlflow(run_id, settings, run):
    import mlflow

    mlflow.start_run(run_id=run_id)
    if not mlflow.active_run().data.params:  # they may be set once
        mlflow.log_params(settings)
    return lambda step, metrics: mlflow.log_metrics(metrics, step=step), mlflow.end_run


_SERVICES = {
    "wandb": _Service("wandb", lambda run: uuid.uuid4().hex[:16], _open_wandb),
    "trackio": _Service("trackio", lambda run: f"{run}-{uuid.uuid4().hex[:8]}", _open_trackio),
    "mlflow": _Service("mlflow", _new_mlflow, _open_mlflow),
}


def check_loggers(names: str) -> None:
    """Raises UserError for one that is unknown or not installed. `names`: commas between."""
    for name in split_names(names):
        if name not in _SERVICES:
            raise UserError(f"config.loggers: unknown {name!r}; choose from {', '.join(_SERVICES)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"config.loggers: {name} is not installed; pip install {_SERVICES[name].package}")


@contextlib.contextmanager
def open_loggers(names: str, run: str) -> Iterator[Sequence[Log]]:
    """The loggers of a run directory, closed when the block ends; process 0 has them, the others have none."""
    guarded = [] if jax.process_index() else [_Guarded(name) for name in split_names(names)]
    for logger in guarded:
        logger.open(run)
    try:
        yield guarded
    finally:
        for logger in guarded:
            logger.close()


class _Guarded:
    """A logger whose failure is said once and stops nothing."""

    def __init__(self, name: str):
        self._name = name
        self._log: Log | None = None
        self._close: Callable[[], None] | None = None

    def open(self, run: str) -> None:
        with self._guard("it could not be opened"):
            service = _SERVICES[self._name]
            run_id = _kept_id(run, self._name, service.new)
            self._log, self._close = service.open(run_id, flat_settings(read_settings(run)["config"]), run)

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        if self._log is not None:
            with self._guard(f"step {step} could not be logged"):
                self._log(step, metrics)

    def close(self) -> None:
        if self._log is not None and self._close is not None:
            with self._guard("it could not be closed"):
                self._close()

    @contextlib.contextmanager
    def _guard(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of another's code and of the network
            self._log = None
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            say(f"{self._name}: {what} ({reason}); training goes on without it, metrics.jsonl has everything")


def _kept_id(run: str, name: str, new: Callable[[str], str]) -> str:
    path = epath.Path(run) / _IDS
    ids = json.loads(path.read_text()) if path.exists() else {}
    if name not in ids:
        ids[name] = new(run)
        write_text(str(path), dumps(ids) + "\n")
    return ids[name]
