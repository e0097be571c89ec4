"""Settings are read strictly: nothing unknown, nothing missing, nothing of another type."""

import dataclasses
import json

import pytest
from ml_collections import ConfigDict

from lm_jax.config import (
    ComputeConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RopeConfig,
    from_config_dict,
    to_dict,
)
from lm_jax.errors import UserError
from lm_jax.models.decoder import check_compute


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int
    share: float = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    flag: bool
    inner: Inner
    limit: int | None = None
    sizes: tuple[int | None, ...] = ()


GOOD = {"name": "a", "flag": True, "inner": {"size": 3}}


def build(**changes):
    return from_config_dict(Outer, {**GOOD, **changes})


def test_builds_nested():
    assert build() == Outer("a", True, Inner(3, 0.5), None, ())
    assert build(inner={"size": 1, "share": 0.25}, limit=7) == Outer("a", True, Inner(1, 0.25), 7, ())


def test_reads_a_config_dict():
    assert from_config_dict(Outer, ConfigDict(GOOD).to_dict()) == build()


def test_float_from_int_but_not_back():
    share = build(inner={"size": 1, "share": 2}).inner.share
    assert share == 2.0 and isinstance(share, float)


def test_none_where_it_may_be():
    assert build(limit=None).limit is None
    assert build(sizes=[4, None]).sizes == (4, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nmae": "b"}, r"^config\.nmae: unknown key; known keys: flag, inner, limit, name, sizes$"),
        ({"inner": {"size": 3, "sise": 4}}, r"^config\.inner\.sise: unknown key; known keys: share, size$"),
        ({"inner": {}}, r"^config\.inner\.size: missing key; set it in the config file or with --config\.inner\.size="),
        ({"name": None}, r"^config\.name: not set; give --config\.name=VALUE$"),
        ({"inner": None}, r"^config\.inner: not set"),
        ({"name": 3}, r"^config\.name: expected str, got 3$"),
        ({"flag": 1}, r"^config\.flag: expected bool, got 1$"),
        ({"flag": "true"}, r"^config\.flag: expected bool, got 'true'$"),
        ({"limit": 2.0}, r"^config\.limit: expected int or NoneType, got 2\.0$"),
        ({"limit": True}, r"^config\.limit: expected int or NoneType, got True$"),
        ({"inner": {"size": 3, "share": True}}, r"^config\.inner\.share: expected float, got True$"),
        ({"inner": {"size": 3, "share": "1e-3"}}, r"^config\.inner\.share: expected float, got '1e-3'$"),
        ({"inner": 3}, r"^config\.inner: expected Inner, got 3$"),
        ({"sizes": [1, "2"]}, r"^config\.sizes\[1\]: expected int or NoneType, got '2'$"),
        ({"sizes": 3}, r"^config\.sizes: expected .*, got 3$"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(UserError, match=message):
        build(**changes)


def test_missing_key():
    with pytest.raises(UserError, match=r"^settings\.flag: missing key"):
        from_config_dict(Outer, {"name": "a", "inner": {"size": 3}}, where="settings")


MODEL = ModelConfig(
    family="mistral",
    vocab_size=32,
    num_layers=2,
    d_model=8,
    d_ff=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    rope=RopeConfig(10_000.0, "yarn", factor=4.0, original_max_position=16),
    norm_eps=1e-5,
    max_position=64,
    layer_windows=(None, 6),
)
OPTIM = OptimConfig(5e-6, "cosine", 0.1, 0.0, 0.9, 0.999, 1e-8, 0.0, 1.0)


@pytest.mark.parametrize(
    "config",
    [
        MODEL,
        ComputeConfig("bfloat16"),
        MeshConfig(-1, 1, 1),
        OPTIM,
        Outer("a", False, Inner(1), None, (1, None)),
    ],
    ids=lambda c: type(c).__name__,
)
def test_round_trip_through_json(config):
    assert from_config_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


def test_configs_are_hashable():
    """They are static arguments of jitted functions."""
    assert hash(MODEL) == hash(dataclasses.replace(MODEL))


def test_windows_default_to_full_attention():
    assert dataclasses.replace(MODEL, layer_windows=()).layer_windows == (None, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dataclasses.replace(MODEL, layer_windows=(6,)), "1 layer windows for 2 layers; give one a layer"),
        (lambda: dataclasses.replace(MODEL, num_kv_heads=3), "4 query heads are no multiple of 3 key/value heads"),
        (lambda: ComputeConfig("float16"), "config.dtype: 'float16' is not a dtype to train in; choose float32 or"),
        (lambda: ComputeConfig("float32", logprob_chunk=0), "config.compute.logprob_chunk: must be at least 1, got 0"),
        (lambda: ComputeConfig("float32", scan_unroll=0), "config.compute.scan_unroll: must be at least 1, got 0"),
        (
            lambda: check_compute(ComputeConfig("float32", remat="ful")),
            "config.compute.remat: unknown 'ful'; choose from n",
        ),
        (
            lambda: check_compute(ComputeConfig("float32", attention="flsh")),
            "config.compute.attention: unknown 'flsh'; choose from auto, blockwise",
        ),
        (
            lambda: dataclasses.replace(OPTIM, schedule="cos"),
            "config.optim.schedule: unknown 'cos'; choose from cosine, l",
        ),
        (
            lambda: dataclasses.replace(OPTIM, warmup_ratio=1.5),
            r"config.optim.warmup_ratio: must lie in \[0, 1\], got 1.5",
        ),
        (
            lambda: dataclasses.replace(OPTIM, final_ratio=-0.1),
            r"config.optim.final_ratio: must lie in \[0, 1\], got -0.1",
        ),
        (lambda: dataclasses.replace(OPTIM, clip_norm=-1.0), "config.optim.clip_norm: must not be negative, got -1.0"),
        (lambda: dataclasses.replace(OPTIM, learning_rate=-1e-6), "config.optim.learning_rate: must not be negative"),
        (lambda: dataclasses.replace(OPTIM, weight_decay=-0.1), "config.optim.weight_decay: must not be negative"),
    ],
)
def test_values_that_cannot_be(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_of_several_classes_the_keys_choose():
    @dataclasses.dataclass(frozen=True)
    class Other:
        name: str
        file: str

    assert from_config_dict(Outer | Other, GOOD) == build()
    assert from_config_dict(Outer | Other, {"name": "a", "file": "b"}) == Other("a", "b")
    with pytest.raises(UserError, match="config.fil: unknown key; known keys: file, name"):
        from_config_dict(Outer | Other, {"name": "a", "file": "b", "fil": "c"})
