"""Real checkpoints: every directory with a config.json in the folder that LM_JAX_REAL_MODELS names."""

import os
from pathlib import Path

import pytest

from tests.real.common import Model

VARIABLE = "LM_JAX_REAL_MODELS"


def _directories() -> list[Path]:
    folder = os.environ.get(VARIABLE)
    return sorted(p.parent for p in Path(folder).glob("*/config.json")) if folder else []


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.real)


def pytest_generate_tests(metafunc):
    if "model" in metafunc.fixturenames:
        why = f"{VARIABLE} names no folder that holds model directories"
        found = _directories() or [pytest.param(None, id="none", marks=pytest.mark.skip(reason=why))]
        name = lambda path: path.name if path else None  # noqa: E731
        metafunc.parametrize("model", found, ids=name, indirect=True, scope="module")


@pytest.fixture(scope="module")
def model(request) -> Model:
    return Model(request.param)
