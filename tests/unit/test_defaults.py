"""The dataclasses' defaults are the values that configs/*.py show, key by key."""

import dataclasses
import importlib
import runpy

import pytest

from lm_jax.config import OptimConfig, from_config_dict, from_settings, to_dict
from lm_jax.errors import UserError
from lm_jax.scoring.command import ScoreConfig
from musc_jax.training.command import MuscTrainConfig
from tests.conftest import ROOT

# Those of the methods' parts and of the library; rounds and experiments hold the settings of other commands
NAMES = (
    *("musc_pairs", "musc_token_weights", "musc_train", "main_filter", "main_train"),
    *("generate", "score", "export_hf"),
)


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_those_of_the_config_file(name):
    cls, _ = importlib.import_module(f"launch.{name}").command()
    shown = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]().to_dict()
    fields = {f.name: f for f in dataclasses.fields(cls)}
    assert fields.keys() == shown.keys()
    required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    assert all(shown[n] is None for n in required), "a key that has a value in the file has it here too"
    for key, field in fields.items():
        if key not in required:
            default = to_dict(field.default) if dataclasses.is_dataclass(field.default) else field.default
            if key == "perturb":
                default.pop("seed")  # the command's own
            assert to_plain(default) == to_plain(shown[key]), f"config.{key}"


def to_plain(value):
    if isinstance(value, dict):
        return {k: to_plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple | list) else value


def test_what_is_given_of_a_nested_config_changes_that_alone():
    config = from_settings(MuscTrainConfig, model="m", input="i", output="o", optim={"weight_decay": 0.1})
    assert config.optim == OptimConfig(learning_rate=5e-7, warmup_ratio=0.1, weight_decay=0.1)
    with pytest.raises(UserError, match=r"config\.optim\.decay: unknown key"):
        from_settings(MuscTrainConfig, model="m", input="i", output="o", optim={"decay": 0.1})
    with pytest.raises(UserError, match=r"config\.output: missing key"):
        from_config_dict(MuscTrainConfig, {"model": "m", "input": "i"})


def test_matmuls_are_made_in_the_dtype_that_is_given():
    given = {"model": "m", "input": "i", "output": "o.jsonl", "dtype": "bfloat16"}
    assert from_settings(ScoreConfig, **given).compute.dtype == "bfloat16"
    assert from_settings(ScoreConfig, **given, compute={"dtype": "float32"}).compute.dtype == "float32"
