"""`launch.plan` on small models: what it prints and writes, what it refuses, and the presets for pods."""

import importlib.util
import json
import math
import runpy
import subprocess
import sys

import pytest

from lm_jax.config import ModelConfig, RopeConfig
from lm_jax.models.registry import config_to_hf, weight_table
from lm_jax.planning.command import read_config
from lm_jax.planning.published import model_shape
from main_jax.training.command import MainTrainConfig
from musc_jax.training.command import MuscTrainConfig
from tests.conftest import ROOT
from tests.e2e.common import Done, arguments, fork

MODEL = ModelConfig("llama", 320, 2, 32, 48, 4, 2, 8, RopeConfig(1e4), 1e-5, 256)
PARAMETERS = 2 * 320 * 32 + 32 + 2 * (2 * 32 + 32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 48)
SMALL = ("max_length=16", "batch.rows_per_device=2")
# Published number of parameters, pod, its chips
PODS = {
    "llama3_8b": (8_030_261_248, "v5e:8x8", 64),
    "qwen2_5_32b": (32_763_876_352, "v5p:4x4x4", 64),
    "llama3_70b": (70_553_706_496, "v5p:8x8x8", 512),
    "llama3_70b_lora": (70_553_706_496, "v6e:8x8", 64),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A directory with config.json and nothing else."""
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(config_to_hf(MODEL)))
    return str(path)


def plan(name: str, *flags: str, preset: str = "") -> Done:
    return fork("plan", *arguments(name, *flags, preset=preset))


def test_a_training_command_on_this_machine(model, tmp_path):
    output = tmp_path / "new" / "plan.json"
    done = plan("musc_train", f"model={model}", *SMALL, "batch.pairs=2", f"--output={output}", preset="tiny").ok()
    found = json.loads(output.read_text())
    assert "train" in done.stdout and "score" in done.stdout and "yes" in done.stdout
    assert (found["topology"], found["chips"], found["parameters"]) == ("local", 1, PARAMETERS)
    train, score = found["programs"]["train"], found["programs"]["score"]
    # Parameters and two moments in fp32, the step and AdamW's counts; 4 arrays of int32, 3 of float32, a pair a row
    batch = 4 * 2 * (7 * 32 + 1)
    assert 12 * PARAMETERS + batch <= train["argument_bytes"] <= 12 * PARAMETERS + batch + 256
    assert score["argument_bytes"] >= 4 * PARAMETERS
    assert found["hbm_bytes_per_chip"] == max(train["hbm_bytes_per_chip"], score["hbm_bytes_per_chip"])
    assert train["hbm_bytes_per_chip"] >= train["argument_bytes"] + train["temporary_bytes"]
    assert found["fits"] is True and found["hbm_limit_bytes"] > 2**27
    assert found["collectives"] == {}
    # Four full sequences of 16 tokens: 2 FLOPs a weight and token, attention over (16 + 1) / 2 tokens on average
    weights = PARAMETERS - 320 * 32 - 5 * 32
    forward = 4 * (2 * weights * 16 + 2 * 4 * 32 * 16 * 17 / 2)
    assert found["model_flops"] == train["model_flops"] == 3 * forward and score["model_flops"] == forward
    # Layers keep what they need; the head makes its logits anew for the gradient
    head = 320 * 32
    assert found["recompute_factor"] == pytest.approx((3 * weights + head) / (3 * weights))
    assert score["recompute_factor"] == 1


def test_adapters_on_a_base_in_nf4(model, tmp_path):
    """Half a byte a weight of the projections and 4 for 32 (the blocks of so small a model; 16 before `down`)."""
    output = tmp_path / "plan.json"
    flags = (*SMALL, "batch.pairs=2", "lora.rank=1", "lora.targets=q_proj", f"--output={output}")
    plan("musc_train", f"model={model}", *flags, "lora.base=nf4", preset="tiny").ok()
    found = json.loads(output.read_text())["programs"]
    kernels, down = 2 * (32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 48), 2 * 32 * 48
    scales = (kernels - down) // 32 + down // 16
    frozen, adapters, batch = kernels // 2 + 4 * (scales + PARAMETERS - kernels), 2 * 2 * 32, 4 * 2 * (7 * 32 + 1)
    expected = frozen + 12 * adapters + batch
    assert expected <= found["train"]["argument_bytes"] <= expected + 256
    assert frozen <= found["score"]["argument_bytes"] <= frozen + batch


def test_full_remat_repeats_the_layers(model, tmp_path):
    output = tmp_path / "plan.json"
    flags = (*SMALL, "batch.examples=4", "train_on=last", "compute.remat=full", "compute.scan_unroll=1")
    flags += (f"--output={output}",)
    plan("main_train", f"model={model}", *flags, preset="tiny").ok()
    found = json.loads(output.read_text())
    # What is saved is each layer's input, so the last product of a layer is not needed again
    assert list(found["programs"]) == ["train"]
    assert 4 / 3 - 0.15 < found["recompute_factor"] <= 4 / 3


def test_scoring_and_generating(model, tmp_path):
    sizes = ("max_length=16", "batch.rows=2", "batch.row_length=32")
    plan("score", f"model={model}", *sizes, f"--output={tmp_path / 'score.json'}").ok()
    assert list(json.loads((tmp_path / "score.json").read_text())["programs"]) == ["score"]
    plan("generate", f"model={model}", "decode.slots=4", "decode.max_length=64", f"--output={tmp_path / 'g.json'}").ok()
    programs = json.loads((tmp_path / "g.json").read_text())["programs"]
    assert list(programs) == ["decode", "prefill"] and programs["decode"]["tokens"] == 4 * 8
    # Keys and values of 2 layers, 2 heads of 8, in fp32: 64 places a slot, which prefill has beside it
    assert programs["prefill"]["beside_bytes"] >= 4 * 64 * 2 * 2 * 2 * 8 * 4


@pytest.mark.slow
def test_search_ranks_what_fits(model, tmp_path):
    output = tmp_path / "plan.json"
    flags = (f"model={model}", "max_length=16", "batch.examples=8", "compute.scan_unroll=1")
    flags += ("--search", f"--output={output}")
    done = plan("main_train", *flags, preset="tiny").ok()
    found = json.loads(output.read_text())["search"]
    tried = [(c["remat"], c["batch"]["rows_per_device"]) for c in found]
    assert sorted(tried) == sorted((r, rows) for r in ("full", "save_matmuls", "none") for rows in (1, 2, 4))
    assert all(c["fits"] for c in found)
    assert done.stdout.count("--config.mesh.fsdp=1") == len(found)
    factors = {c["remat"]: c["recompute_factor"] for c in found}
    assert factors["none"] <= factors["save_matmuls"] < factors["full"]


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_a_topology_that_is_not_here(model, topology, tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, which compiles for TPUs, is not installed here (Linux on x86-64 alone has it)")
    output = tmp_path / "plan.json"
    flags = (*SMALL, "dtype=bfloat16", "lora.rank=4", f"--topology={topology}", f"--output={output}")
    plan("musc_train", f"model={model}", *flags, preset="tiny").ok()
    found = json.loads(output.read_text())
    assert found["chips"] == 4 and found["chip"].startswith("TPU v5") and found["fits"] is True
    assert found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert found["hbm_limit_bytes"] in (int(15.75 * 2**30), int(95.73 * 2**30))
    assert sum(kind["count"] for kind in found["collectives"].values()) > 0
    assert found["seconds_per_token_estimate"] > 0


@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("musc_train", ("--topology=v9:8x8",), "v9:8x8: not a TPU generation"),
        ("musc_train", ("--topology=v5e",), "v5e: not a TPU generation"),
        ("musc_train", ("--topology=v5e:2x2x2",), "v5e comes in 2 dimensions"),
        ("musc_train", ("--topology=v5e:64x64",), "at most 16 chips"),
        ("musc_train", ("model=org/unknown",), "nothing is downloaded for a plan; give a directory"),
        ("musc_train", (), "config.model: not set"),
        ("musc_train", ("mesh.fsdp=3",), "does not fit 1 cpu device"),
        ("report", (), "not the keys of a command that can be planned"),
        ("score", ("--search",), "--search: for a config that trains"),
        ("score", ("--output=.",), "is a directory"),
        ("musc_train", ("compute.remat=some",), "config.compute.remat: unknown 'some'"),
    ],
)
def test_what_is_wrong_is_one_line(model, name, flags, says):
    given = () if not flags and says.startswith("config.model") else (f"model={model}",)
    line = plan(name, *given, *flags).error()
    assert says in line


def test_without_libtpu(model):
    hide = (
        "import sys, runpy; sys.modules['libtpu'] = None; import importlib.util as u; f = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'libtpu' else f(name, *a)\n"
        "sys.argv = ['plan'] + sys.argv[1:]; runpy.run_module('launch.plan', run_name='__main__')"
    )
    flags = arguments("score", f"model={model}", "--topology=v5e:8x8")
    done = subprocess.run([sys.executable, "-c", hide, *flags], cwd=ROOT, capture_output=True, text=True)
    line = Done(done.returncode, done.stdout, done.stderr).error()
    assert "--topology needs libtpu" in line and "tpu-plan" in line


def test_help():
    """At once, without JAX."""
    command = [sys.executable, "-X", "importtime", "-m", "launch.plan", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "python -m launch.plan --config=configs/musc_train.py:llama3_8b --topology=v5e:8x8" in done.stdout
    for flag in ("topology", "output", "search"):
        assert f"--{flag}" in done.stdout or f"--[no]{flag}" in done.stdout
    assert "jax" not in {line.split("|")[-1].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize("preset", PODS)
@pytest.mark.parametrize(("name", "cls"), [("musc_train", MuscTrainConfig), ("main_train", MainTrainConfig)])
def test_the_presets_for_pods_fit_their_models_and_meshes(name, cls, preset):
    parameters, topology, chips = PODS[preset]
    path = ROOT / "configs" / f"{name}.py"
    values = runpy.run_path(str(path))["get_config"](preset).to_dict()
    config = read_config(values, {cls: None})
    model = model_shape(config.model)
    assert sum(math.prod(spec.shape(model)) for spec in weight_table(model)) == parameters
    assert f'"{preset}"' in (text := path.read_text()) and topology in text
    assert config.batch.size >= chips // config.mesh.tensor, "some would have nothing to do"
    assert bool(config.lora.rank) == preset.endswith("lora")
