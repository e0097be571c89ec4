"""What README.md and docs/ say is so: commands, keys, defaults, files, links, and the patches of docs/extending.md.

Every documented command is read here as its launcher reads it. RUN_BY says which tests run each launcher; the sequences
of README.md, docs/musc.md and docs/main.md run as they stand in tests/e2e/test_docs.py.
"""

import ast
import functools
import importlib
import re
import runpy
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from lm_jax.config import from_config_dict
from tests.conftest import ROOT
from tests.documents import PAGES, Command, all_commands, page_text

# launcher -> tests that run it as a user does, with the keys of the documented commands at small sizes
RUN_BY = {
    "bench": ("tests/e2e/test_bench.py",),
    "evaluate": ("tests/e2e/test_evaluate.py", "tests/e2e/test_judged.py", "tests/parity/test_lm_eval.py"),
    "export_hf": ("tests/e2e/test_docs.py", "tests/e2e/test_musc_train.py", "tests/e2e/test_lora.py"),
    "generate": ("tests/e2e/test_generate.py",),
    "lab_ablation": ("tests/e2e/test_lab_ablation.py",),
    "lab_seed": ("tests/e2e/test_commands.py",),  # its flags; the fit takes minutes, in make quickstart
    "main_controls": ("tests/e2e/test_main_controls.py",),
    "main_filter": ("tests/e2e/test_docs.py", "tests/e2e/test_main_filter.py"),
    "main_prepare": ("tests/e2e/test_docs.py", "tests/e2e/test_main_filter.py"),
    "main_rounds": ("tests/e2e/test_main_rounds.py",),
    "main_train": ("tests/e2e/test_docs.py", "tests/e2e/test_main_train.py"),
    "musc_pairs": ("tests/e2e/test_docs.py", "tests/e2e/test_musc_pairs.py"),
    "musc_rounds": ("tests/e2e/test_musc_rounds.py",),
    "musc_token_weights": ("tests/e2e/test_docs.py", "tests/e2e/test_musc_token_weights.py"),
    "musc_train": ("tests/e2e/test_docs.py", "tests/e2e/test_musc_train.py", "tests/e2e/test_lora.py"),
    "plan": ("tests/e2e/test_plan.py",),
    "report": ("tests/e2e/test_docs.py", "tests/e2e/test_report.py"),
    "score": ("tests/e2e/test_commands.py",),
}
RUN_BY_CI = {"quickstart"}  # make quickstart, in .ci/run
COMMANDS = all_commands()
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py"))
PRESETS = {"evaluate": ("", "ifeval_files", "cfbench")}  # those with keys of their own
CODE = re.compile(r"`([^`\n]+)`")
KEY = re.compile(r"[a-z][a-z_0-9]*(\.[a-z][a-z_0-9]*)*")


# --- commands --------------------------------------------------------------------------------------------------------


def test_every_launcher_is_documented_and_run():
    launchers = {path.stem for path in (ROOT / "launch").glob("*.py")} - {"__init__", "cli"}
    assert launchers == RUN_BY.keys() | RUN_BY_CI
    assert {command.name for command in COMMANDS} == RUN_BY.keys() and len(COMMANDS) > 35
    assert "make quickstart" in page_text("README.md") and "make quickstart" in page_text(".ci/run")
    for name, files in RUN_BY.items():
        assert all((ROOT / file).exists() for file in files)
        assert any(re.search(rf'"{name}"|scripted_{name.removeprefix("musc_")}', page_text(f)) for f in files), name


def read_command(command: Command, monkeypatch) -> object:
    """The launcher's config, read as launch.cli does: the flags, then the strict class.

    Raises whatever a flag, a key, a value or the class refuses.
    """
    module = importlib.import_module(f"launch.{command.name}")
    values = flags.FlagValues()
    monkeypatch.setattr(sys, "argv", [command.name, *command.flags])  # where ml_collections looks for overrides
    flag = config_flags.DEFINE_config_file("config", None, lock_config=True, flag_values=values)
    if hasattr(module, "preview"):
        flags.DEFINE_integer("preview", None, "", flag_values=values)
    for own in flags.FLAGS.flags_by_module_dict().get(module.__name__, []):
        values[own.name] = own
    assert values(sys.argv) == [command.name]
    read, _ = module.command()
    given = flag.value.to_dict()
    return read(given) if isinstance(read, functools.partial) else from_config_dict(read, given)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.where)
def test_a_command_is_read_by_its_launcher(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    read_command(command, monkeypatch)


@pytest.mark.parametrize(
    "wrong", ["--config.batch.row=2", "--config.epochs=many", "--config.model=", "--surprise", "--config=configs/no.py"]
)
def test_a_wrong_command_would_be_seen(wrong, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags_ = ["--config=configs/musc_train.py", "--config.model=m", "--config.input=i", "--config.output=o"]
    read_command(Command("", "musc_train", tuple(flags_)), monkeypatch)
    left = flags_[:1] + flags_[2:] if wrong == "--config.model=" else [*flags_, wrong]
    with pytest.raises(Exception, match="row|many|not set|surprise|no.py"):
        read_command(Command("", "musc_train", tuple(left)), monkeypatch)


# --- keys and defaults -----------------------------------------------------------------------------------------------


@functools.cache
def keys_of(name: str, preset: str = "") -> dict[str, tuple[object, type]]:
    """Dotted key -> (value, type) of configs/NAME.py; a group is its own value."""

    def walk(config: ConfigDict, prefix: str) -> dict[str, tuple[object, type]]:
        found = {}
        for key, value in config.items():
            found[prefix + key] = value, config.get_type(key)
            if isinstance(value, ConfigDict):
                found |= walk(value, f"{prefix}{key}.")
        return found

    get = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]
    return walk(get(preset) if preset else get(), "")


def accepts(name: str, key: str, value: str | None) -> bool:
    """Whether configs/NAME.py has the key, and a value of this form fits its type."""
    for preset in PRESETS.get(name, ("",)):
        known, kind = keys_of(name, preset).get(key, (None, None))
        if kind is None:
            continue
        if value is None or kind in (str, tuple) or (kind is bool and value.lower() in ("true", "false")):
            return True
        try:
            return kind is not bool and kind(value) is not None
        except (ValueError, AttributeError):  # the latter of a group, which has no value
            continue
    return False


def tables(page: str):
    """(the config files that the text before a table names its keys of, header, rows) of each table."""
    before, rows = [], []
    for line in [*page_text(page).splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
            continue
        if rows:
            # The paragraph before, or for a table of keys without one the command that was spoken of last
            said = [part for part in "\n".join(before).split("\n\n") if part.strip()]
            named = re.findall(r"`configs/(\w+)\.py`", said[-1]) if re.search(r"[Kk]eys of", said[-1]) else []
            if not named and rows[0][0] == "key":
                named = re.findall(r"launch\.(\w+)", "\n".join(before))[-1:]
            yield named, rows[0], rows[2:]
            before, rows = [], []
        before.append(line)


def named_keys(cell: str) -> list[str]:
    """The keys that a cell names in code, `.drop` after `perturb.ratio` as perturb.drop."""
    found = []
    for code in CODE.findall(cell):
        name = code.partition("=")[0]
        if name.startswith("."):
            name = found[-1].rpartition(".")[0] + name
        if KEY.fullmatch(name) and not name.endswith((".jsonl", ".json")):
            found.append(name)
    return found


def default_shown(value: object) -> str:
    return "none" if value is None else str(value)


def same_default(said: str, value: object) -> bool:
    if said == default_shown(value):
        return True
    try:
        return float(said) == value
    except ValueError:
        return False


def test_keys_and_defaults_in_tables():
    checked = []
    for page in PAGES:
        for named, header, rows in tables(page):
            column = next((i for i, title in enumerate(header) if title in ("key", "here")), None)
            if column is None or not named:
                continue
            for row in rows:
                for key in named_keys(row[column]):
                    if key.startswith("launch."):
                        assert key.removeprefix("launch.") in RUN_BY, (page, key)
                        continue
                    assert any(key in keys_of(name) for name in named), f"{page}: no key {key} in {named}"
                    checked.append(key)
                if "default" in header:
                    (key,) = named_keys(row[column])
                    for name in named:
                        value, said = keys_of(name)[key][0], row[header.index("default")]
                        assert same_default(said, value), f"{page}: {key} is {value!r} in configs/{name}.py, not {said}"
    assert len(checked) > 120


def test_keys_in_running_text():
    """`--config.key=value`, wherever it stands, is a key of some config file and has a value of its type."""
    found = 0
    for page in PAGES:
        for key, value in re.findall(r"--config\.(?!key=value)([\w.]*\w)(?:=([^\s`]+))?", page_text(page)):
            found += 1
            value = value.rstrip(",.;:)") or None
            assert any(accepts(name, key, value) for name in CONFIGS), f"{page}: --config.{key}={value}"
    assert found > 150


def test_a_wrong_key_would_be_seen():
    assert accepts("musc_train", "loss.beta", "0.2") and accepts("export_hf", "adapter", "true")
    assert not accepts("musc_train", "loss.bta", "0.2") and not accepts("musc_train", "epochs", "2.5")
    assert not same_default("5e-6", 5e-7) and same_default("none", None) and not same_default("none", 3)


def test_errors_and_metrics_that_are_quoted_exist():
    """What the troubleshooting page quotes of an error stands in the code."""
    sources = "".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text())  # messages cut over lines
        for package in ("lm_jax", "musc_jax", "main_jax")
        for path in sorted((ROOT / package).rglob("*.py"))
    )
    section = page_text("docs/troubleshooting.md")
    quoted = re.findall(r"^\| ([a-z][a-zA-Z' ]+) \| ", section.split("## The chat template")[1], re.M)
    quoted += re.findall(r"\*([a-z][a-z_' ]{12,}?)[*=:]", section)
    assert len(quoted) >= 11
    assert [] == [words for words in quoted if words != "the error says" and words not in sources]


# --- files and links -------------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_exist(page):
    text = page_text(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in [slug(h) for h in re.findall(r"^#+ (.*)$", linked.read_text(), re.M)], f"{page}: {target}"
    said = re.sub(r"```diff.*?```", "", text, flags=re.S)
    for path in re.findall(r"(?<![\w/.])(?:lm_jax|musc_jax|main_jax|launch|configs|tests)/[\w./-]*\w", said):
        if "NAME" not in path:
            assert (ROOT / path).exists(), f"{page}: {path}"


# --- docs/extending.md -----------------------------------------------------------------------------------------------


CHECK = """
import sys, types
import numpy as np, jax.numpy as jnp, torch
from tests import checkpoints
from lm_jax.config import ComputeConfig
from lm_jax.checkpoints.hf import load_params
from lm_jax.models.decoder import Decoder, output_embedding
from lm_jax.models.registry import config_from_hf, config_to_hf, read_model_config
from main_jax.filter.scores import SCORES, CrossEntropies, check_selection
from musc_jax.training.losses import LossConfig, preference_loss
from musc_jax.weights.rules import ONLINE_RULES, WEIGHING_RULES, ResponseScores, check_rule

checkpoints.FAMILY_TINY["seed_oss"] = {"head_dim": 8, "attention_out_bias": True}
model = checkpoints.make_checkpoint(sys.argv[1], "seed_oss")
config = read_model_config(sys.argv[1])
assert config.qkv_bias and config.o_bias and not config.mlp_bias
assert config_from_hf(config_to_hf(config)) == config
tokens, params = np.arange(1, 33)[None], load_params(sys.argv[1], config, None)
where = jnp.arange(32)[None], jnp.ones((1, 32), int)
hidden = Decoder(config, ComputeConfig("float32")).apply({"params": params}, jnp.array(tokens), *where)
logits = np.einsum("btd,vd->btv", hidden, output_embedding(params, config))
with torch.no_grad():
    np.testing.assert_allclose(logits, model(torch.tensor(tokens)).logits.numpy(), atol=1e-4)

loss = LossConfig("apo_zero", 0.5, 0.0, 0.5, 0.0)
sums, counts = jnp.array([[0.0, 0.0], [2.0, -4.0]]), jnp.ones((2, 2))
sigmoid = lambda x: 1 / (1 + np.exp(-x))
np.testing.assert_allclose(preference_loss(loss, sums, sums, counts), [1, 1 - sigmoid(1) + sigmoid(-2)], rtol=1e-6)

full, perturbed = np.log([0.5, 0.2, 0.4], dtype="f4"), np.log([0.25, 0.4, 0.1], dtype="f4")
scores = ResponseScores({"full": full, "perturbed": perturbed}, {}, None, None, True)
weights = WEIGHING_RULES["constraint_pmi"].weigh(scores)
np.testing.assert_allclose(weights, [np.log(2) / np.log(2), 0, 2], atol=1e-6)  # ln 2, 0, ln 4 by their mean, ln 2
check_rule("store:constraint_pmi"), check_rule("online:constraint_pmi")
assert "constraint_pmi" in ONLINE_RULES

check_selection("forward_ratio", 0.5)
found = SCORES["forward_ratio"](CrossEntropies(np.array([1.0, np.nan]), np.ones(2), np.array([2.0, 2.0])))
np.testing.assert_array_equal(found, [0.5, np.nan])
print("all four run")
"""


@pytest.mark.slow
def test_the_patches_of_extending_apply_and_run(tmp_path):
    for top in ("lm_jax", "musc_jax", "main_jax"):
        for path in (ROOT / top).rglob("*.py"):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(path.read_text())
    patches = re.findall(r"```diff\n(.*?)```", page_text("docs/extending.md"), re.S)
    assert len(patches) == 4
    for patch in patches:
        apply = ["git", "apply", "-C0", "-"]
        subprocess.run(apply, input=patch, text=True, cwd=tmp_path, check=True)
    # From the copy alone, with the checkout's tests
    path = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
    done = subprocess.run(
        [sys.executable, "-c", path + CHECK, str(tmp_path / "checkpoint")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.endswith("all four run\n"), done.stderr[-3000:]


def test_python_blocks_are_python():
    for page in PAGES:
        for block in re.findall(r"```python\n(.*?)```", page_text(page), re.S):
            ast.parse(block)
