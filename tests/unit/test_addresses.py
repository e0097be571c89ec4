"""No command takes gs:// or s3:// for a local path: what it cannot put there it says at once."""

import importlib
import os
import runpy

import pytest

from lm_jax.checkpoints.settings import flat_settings
from lm_jax.config import from_config_dict
from lm_jax.errors import UserError
from tests.conftest import ROOT

# Where a command's class is, and what of it may be in a bucket beside what is read
CLASSES = {
    "export_hf": ("lm_jax.checkpoints.export:ExportConfig", {"output"}),
    "generate": ("lm_jax.generation.command:GenerateConfig", set()),
    "main_filter": ("main_jax.filter.command:FilterConfig", set()),
    "main_prepare": ("main_jax.texts.command:PrepareConfig", set()),
    "main_train": ("main_jax.training.command:MainTrainConfig", set()),
    "musc_pairs": ("musc_jax.pairs.command:PairsConfig", set()),
    "musc_token_weights": ("musc_jax.weights.command:WeighConfig", {"output", "store"}),
    "musc_train": ("musc_jax.training.command:MuscTrainConfig", {"reference_cache"}),
    "report": ("musc_jax.report.command:ReportConfig", {"output"}),
    "score": ("lm_jax.scoring.command:ScoreConfig", {"output"}),
}


@pytest.mark.parametrize("command", CLASSES)
def test_an_output_is_put_in_a_bucket_or_refused(command, tmp_path, monkeypatch):
    where, remote = CLASSES[command]
    module, _, name = where.partition(":")
    cls = getattr(importlib.import_module(module), name)
    given = runpy.run_path(str(ROOT / f"configs/{command}.py"))["get_config"]().to_dict()
    monkeypatch.chdir(tmp_path)
    keys = {"output", "store", "reference_cache", "scores", "counts", "examples"} & given.keys()
    assert {key for key in keys if not refused(cls, given, key)} == remote
    assert not os.listdir(tmp_path)


def refused(cls, given, key) -> bool:
    try:
        from_config_dict(cls, {**given, key: "s3://bucket/name.jsonl"})
    except UserError as error:  # of another key, which has no value yet
        return str(error).startswith(f"config.{key}: s3://bucket/name.jsonl: give a local path")
    return False


def test_a_run_directory_is_local_and_its_copy_is_not():
    from musc_jax.training.command import MuscTrainConfig

    given = runpy.run_path(str(ROOT / "configs/musc_train.py"))["get_config"]()
    given.output = "gs://bucket/run"
    with pytest.raises(UserError, match="config.output: gs://bucket/run: give a local path.*checkpoints.remote"):
        from_config_dict(MuscTrainConfig, given.to_dict())


@pytest.mark.parametrize("name", ["musc_rounds", "main_rounds", "main_controls"])
def test_a_copy_is_of_one_run(name):
    """Several runs in one place would be refused only when the second one begins."""
    config = runpy.run_path(str(ROOT / f"configs/{name}.py"))["get_config"]()
    keys = flat_settings(config.to_dict())
    assert any(key.endswith("checkpoints.keep") for key in keys)
    assert not any(key.endswith("checkpoints.remote") for key in keys)
