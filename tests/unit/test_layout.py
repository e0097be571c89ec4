"""The arrows between the rooms (DESIGN section 1), read from the imports."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator

import pytest

PACKAGES = ("lm_jax", "musc_jax", "main_jax", "lab", "launch")
# Each room may import those on earlier lines and itself, never its neighbours
LAYERS = (
    ("lm_jax.errors",),
    ("lm_jax.strict_json",),
    ("lm_jax.config",),
    ("lm_jax.distributed",),
    ("lm_jax.console", "lm_jax.sharding"),
    ("lm_jax.models",),
    ("lm_jax.checkpoints",),
    ("lm_jax.data",),
    ("lm_jax.scoring",),
    ("lm_jax.training",),
    ("lm_jax.generation",),
    ("lm_jax.library",),
    ("lm_jax.evaluation", "lm_jax.planning"),
    ("musc_jax", "main_jax"),
    ("lab",),
    ("launch",),
)
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
ONLY_IN = {"tensorstore": "lm_jax/data/score_store.py", "orbax": "lm_jax/checkpoints/orbax.py"}
PEERS = {"lab/bench/peers.py": {"torch", "trl"}}  # a process of its own, for a row that asks for it
# With runpy a config file reads its neighbours, which no package holds, from wherever they lie
IN_CONFIGS = {"ml_collections", "runpy"}
# Formats that run code when they are read, and the oracles of the tests
BANNED = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "torch", "trl", "peft"}
MUST_BE_FALSE = {"trust_remote_code", "allow_pickle"}
MAX_LINES = 400
# transformers imports it when a chat template is rendered
DECLARED_FOR_OTHERS = {"jinja2"}


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, wherever it stands; a relative one begins with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}") for alias in node.names)


def room_of(name: str) -> str:
    """The room that a dotted name lies in: two parts of it under lm_jax, else one."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "lm_jax" else 1])


def violations(path: str, source: str) -> list[str]:
    """Everything in one file that the layout forbids. `path` is relative to the checkout, with slashes."""
    tree = ast.parse(source)
    own = room_of(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    found = []
    if own not in (*RANK, "lm_jax", "configs"):
        found.append(f"{path}: {own} is no room of the layout")
    for line, name in imports(tree):
        top, room = name.split(".")[0], room_of(name)
        if own == "configs":
            wrong = "configs import only ml_collections" if top not in IN_CONFIGS else None
        elif name.startswith("."):
            wrong = "relative import: this check reads absolute ones"
        elif top in ("configs", "tests"):
            wrong = f"nothing imports {top}"
        elif top in BANNED - PEERS.get(path, set()):
            wrong = f"{top} stays out of the packages"
        elif top in ONLY_IN and path != ONLY_IN[top]:
            wrong = f"{top} is imported in {ONLY_IN[top]} alone"
        elif top in PACKAGES and room != own and RANK.get(room, len(LAYERS)) >= RANK.get(own, 0):
            wrong = f"{own} may not import {room}"
        else:
            wrong = None
        if wrong:
            found.append(f"{path}:{line}: {wrong}")
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in MUST_BE_FALSE:
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.append(f"{path}:{node.value.lineno}: {node.arg} must be False")
    if own != "configs" and (lines := len(source.splitlines())) > MAX_LINES:
        found.append(f"{path}: {lines} lines, more than {MAX_LINES}")
    return found


@pytest.fixture(scope="module")
def sources(repo_root) -> dict[str, str]:
    return {
        str(file.relative_to(repo_root).as_posix()): file.read_text()
        for top in (*PACKAGES, "configs")
        for file in sorted((repo_root / top).rglob("*.py"))
    }


def test_every_file_keeps_to_the_layout(sources):
    assert {path.split("/")[0] for path in sources} == {*PACKAGES, "configs"}  # none was missed
    assert [] == [problem for path, source in sources.items() for problem in violations(path, source)]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("lm_jax/models/decoder.py", "from lm_jax.data import packing"),
        ("lm_jax/models/decoder.py", "def f():\n    import lm_jax.training.loop"),  # late imports count
        ("lm_jax/errors.py", "from lm_jax import config"),
        ("lm_jax/data/text.py", "from lm_jax.scoring.scoring import score"),
        ("lm_jax/scoring/scoring.py", "from lm_jax.training import loop"),
        ("lm_jax/scoring/scoring.py", "import lab"),
        ("lm_jax/config.py", "from lm_jax import nowhere"),
        ("lm_jax/nowhere.py", "import jax"),
        ("lm_jax/__init__.py", "from lm_jax.config import MeshConfig"),
        ("lm_jax/config.py", "from . import errors"),
        ("musc_jax/training/command.py", "from main_jax.training.losses import nll"),
        ("main_jax/training/command.py", "import musc_jax.training.losses as losses"),
        ("musc_jax/training/command.py", "from launch import cli"),
        ("launch/score.py", "from configs.score import get_config"),
        ("launch/score.py", "import tests.checkpoints"),
        ("configs/score.py", "from lm_jax.config import MeshConfig"),
        ("configs/score.py", "import os"),
        ("configs/score.py", "from configs import generate"),
        ("configs/score.py", "import runpy, pathlib"),
        ("lm_jax/data/text.py", "import tensorstore as ts"),
        ("lm_jax/training/loop.py", "from orbax.checkpoint import v1 as ocp"),
        ("lm_jax/data/text.py", "import pickle"),
        ("lm_jax/models/llama.py", "from torch import nn"),
        ("lab/bench/ours.py", "import torch"),
        ("lab/bench/peers.py", "import pickle"),
        ("lm_jax/evaluation/tasks.py", "from musc_jax.training.command import train"),
        ("lm_jax/data/text.py", "load(path, trust_remote_code=True)"),
        ("lm_jax/data/text.py", "load(path, trust_remote_code=flag)"),
        ("lm_jax/data/rows.py", "np.load(path, allow_pickle=True)"),
        ("lm_jax/data/rows.py", "x = 1\n" * (MAX_LINES + 1)),
    ],
)
def test_a_violation_is_seen(path, source):
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("lm_jax/models/decoder.py", "import jax\nfrom lm_jax import sharding\nfrom lm_jax.models import rope"),
        ("lm_jax/training/loop.py", "from lm_jax.data.packing import pack\nfrom lm_jax.checkpoints import hf"),
        ("lm_jax/checkpoints/orbax.py", "from orbax.checkpoint import v1 as ocp"),
        ("lm_jax/data/score_store.py", "import tensorstore as ts"),
        ("lm_jax/data/text.py", "load(path, trust_remote_code=False)\n" * MAX_LINES),
        ("musc_jax/training/command.py", "from lm_jax.training import loop\nfrom musc_jax import losses"),
        ("launch/score.py", "from lm_jax.scoring.command import score_rows\nimport main_jax.training.command"),
        ("configs/score.py", "from ml_collections.config_dict import placeholder"),
    ],
)
def test_what_is_allowed_passes(path, source):
    assert violations(path, source) == []


def test_dependencies_are_those_imported(repo_root, sources):
    def canonical(name):
        return re.sub(r"[-_.]+", "-", name).lower()

    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    declared, optional = (
        {canonical(re.match(r"[\w.-]+", line)[0]) for line in lines}
        for lines in (project["dependencies"], sum(project["optional-dependencies"].values(), []))
    )
    ours = {*PACKAGES, "configs", *sys.stdlib_module_names}
    modules = {name.split(".")[0] for source in sources.values() for _, name in imports(ast.parse(source))} - ours
    distributions = importlib.metadata.packages_distributions()
    imported = {module: {canonical(name) for name in distributions.get(module, [module])} for module in modules}
    assert [] == [module for module, names in imported.items() if not names & (declared | optional)]
    assert declared - DECLARED_FOR_OTHERS - set().union(*imported.values()) == set()
