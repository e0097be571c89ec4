"""The recipes in launch/pods: sound scripts, manifests of the right form, and one command that this project has."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from absl import flags
from ml_collections import config_flags

from tests.conftest import ROOT

PODS = ROOT / "launch" / "pods"
SCRIPTS = ("tpu_ssh.sh", "xpk.sh", "slurm.sbatch")
MANIFESTS = ("gke_jobset.yaml", "skypilot.yaml")
KEYS = {"model", "input", "output"}


def manifest(name: str) -> dict:
    return yaml.safe_load((PODS / name).read_text())


def container() -> dict:
    (job,) = manifest("gke_jobset.yaml")["spec"]["replicatedJobs"]
    (one,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return one


def scripts_of(name: str) -> list[str]:
    """The shell scripts in a recipe."""
    if name == "gke_jobset.yaml":
        return container()["args"]
    if name == "skypilot.yaml":
        return [manifest(name)["setup"], manifest(name)["run"]]
    return [(PODS / name).read_text()]


def commands(text: str) -> list[list[str]]:
    """Every `python -m launch.X` in a text, as words, without what the shell does."""
    found = re.findall(r"-m (launch\.\w+(?:\\\n|[^\n`])*)", text)
    return [shlex.split(re.sub(r"\\\n", " ", line).split(" && ")[0].rstrip('" )')) for line in found if "--" in line]


def values(words: list[str]) -> dict:
    """What the flags make of the config file; an unknown key raises."""
    assert (ROOT / f"{words[0].replace('.', '/')}.py").exists(), words[0]
    given = [w for w in words[1:] if w.startswith("--config")]
    settings, argv = flags.FlagValues(), sys.argv
    config = config_flags.DEFINE_config_file("config", flag_values=settings)
    sys.argv = [words[0], *given]  # where ml_collections looks for the settings
    try:
        settings(sys.argv)
    finally:
        sys.argv = argv
    return config.value.to_dict()


def test_none_is_missing():
    assert {p.name for p in PODS.iterdir()} == {*SCRIPTS, *MANIFESTS}


@pytest.mark.parametrize("name", SCRIPTS + MANIFESTS)
def test_scripts_are_sound(name, tmp_path):
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    for i, script in enumerate(scripts_of(name)):
        file = tmp_path / f"{i}.sh"
        file.write_text(script)
        subprocess.run(["bash", "-n", file], check=True)
        if shellcheck is None:
            pytest.skip("no shellcheck; `bash -n` found nothing")
        done = subprocess.run([shellcheck, "--shell=bash", file], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SCRIPTS + MANIFESTS)
def test_one_command_that_there_is(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    (words,) = [c for script in scripts_of(name) for c in commands(script)]
    config = values(words)
    assert words[0] == "launch.musc_train" and config["batch"]["pairs"] == 128  # the preset is read
    assert {w.split("=")[0] for w in words[2:]} == {*(f"--config.{key}" for key in KEYS), "--stopped_status"}
    assert "--stopped_status=75" in words
    for key in KEYS:  # variables, set once at the top
        variable = key.upper()
        assert re.fullmatch(rf"\$\{{?{variable}\}}?", config[key])
        text = (PODS / name).read_text()
        assert len(re.findall(rf"^{variable}=|name: {variable},|^  {variable}: ", text, re.M)) == 1


@pytest.mark.parametrize("name", SCRIPTS + MANIFESTS)
def test_the_cache_and_restarts(name):
    text = (PODS / name).read_text()
    assert "JAX_COMPILATION_CACHE_DIR" in text and "jax-cache" in text and len(text.splitlines()) < 90
    sign = {
        "tpu_ssh.sh": "RESTARTS",
        "xpk.sh": "--max-restarts",
        "slurm.sbatch": "#SBATCH --requeue",
        "gke_jobset.yaml": "maxRestarts",
        "skypilot.yaml": "recover_on_exit_codes",
    }
    assert sign[name] in text


def fields(value: dict, required: set[str], optional: set[str] = frozenset()) -> dict:
    assert required <= value.keys() <= required | optional, value.keys()
    return value


def test_the_jobset():
    """By the reference of jobset.x-k8s.io/v1alpha2 and batch/v1."""
    top = fields(manifest("gke_jobset.yaml"), {"apiVersion", "kind", "metadata", "spec"})
    assert (top["apiVersion"], top["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    name = top["metadata"]["name"]
    spec = fields(top["spec"], {"failurePolicy", "replicatedJobs"}, {"network", "successPolicy", "suspend"})
    policy = fields(spec["failurePolicy"], {"maxRestarts"}, {"rules", "restartStrategy"})
    assert isinstance(policy["maxRestarts"], int)
    for rule in policy["rules"]:
        fields(rule, {"action"}, {"name", "onJobFailureReasons", "targetReplicatedJobs"})
        assert rule["action"] in {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}
        reasons = {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded"}
        assert {*rule["onJobFailureReasons"]} <= reasons | {"PodFailurePolicy"}
    (replicated,) = spec["replicatedJobs"]
    fields(replicated, {"name", "template"}, {"replicas", "dependsOn"})
    batch = fields(
        replicated["template"]["spec"],
        {"template", "parallelism", "completions", "completionMode", "backoffLimit"},
        {"podFailurePolicy", "activeDeadlineSeconds", "ttlSecondsAfterFinished"},
    )
    assert batch["completionMode"] == "Indexed" and batch["parallelism"] == batch["completions"]
    assert batch["backoffLimit"] == 0 and replicated["replicas"] == 1
    for rule in batch["podFailurePolicy"]["rules"]:
        fields(rule, {"action"}, {"onExitCodes", "onPodConditions"})
        assert rule["action"] in {"FailJob", "FailIndex", "Ignore", "Count"} and len(rule) == 2
    (codes, conditions) = batch["podFailurePolicy"]["rules"]
    assert fields(codes["onExitCodes"], {"operator", "values"}, {"containerName"})["values"] == [75]
    assert conditions["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    pod = fields(
        batch["template"]["spec"],
        {"restartPolicy", "containers", "volumes", "nodeSelector", "terminationGracePeriodSeconds"},
        {"tolerations", "serviceAccountName"},
    )
    assert pod["restartPolicy"] == "Never"  # what a podFailurePolicy asks for
    one = fields(
        container(), {"name", "image", "command", "args", "env", "resources", "volumeMounts"}, {"ports", "workingDir"}
    )
    assert {m["name"] for m in one["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert all(isinstance(v, str) for v in pod["nodeSelector"].values())
    chips = one["resources"]["limits"]["google.com/tpu"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert int(rows) * int(columns) == chips * batch["parallelism"]
    # `JOBSET-REPLICATEDJOB-JOBINDEX-PODINDEX.SUBDOMAIN`, the subdomain being the JobSet's name
    environment = {e["name"]: fields(e, {"name"}, {"value", "valueFrom"}) for e in one["env"]}
    assert all(isinstance(e.get("value", ""), str) for e in environment.values())
    address = environment["JAX_COORDINATOR_ADDRESS"]["value"]
    assert re.fullmatch(rf"{name}-{replicated['name']}-0-0\.{name}:\d+", address)
    assert environment["JAX_NUM_PROCESSES"]["value"] == str(batch["parallelism"])
    index = environment["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def test_the_skypilot_task():
    """By SkyPilot's YAML reference."""
    required = {"name", "resources", "num_nodes", "setup", "run", "envs"}
    task = fields(manifest("skypilot.yaml"), required, {"workdir", "file_mounts", "secrets", "volumes"})
    assert isinstance(task["num_nodes"], int) and all(isinstance(v, str) for v in task["envs"].values())
    resources = fields(task["resources"], {"accelerators", "use_spot", "job_recovery"}, {"infra", "cpus", "memory"})
    assert re.fullmatch(r"[\w-]+:\d+", resources["accelerators"]) and resources["use_spot"] is True
    recovery = fields(resources["job_recovery"], {"recover_on_exit_codes"}, {"strategy", "max_restarts_on_errors"})
    assert recovery["recover_on_exit_codes"] == [75]


def test_the_variables_of_skypilot():
    """Its `run`, with what SkyPilot sets on the second of three nodes."""
    run = manifest("skypilot.yaml")["run"].split("exec ")[0] + "env"
    given = {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8\n10.0.0.9", "SKYPILOT_NUM_NODES": "3", "SKYPILOT_NODE_RANK": "1"}
    environment = {"PATH": "/usr/bin:/bin", **given}
    done = subprocess.run(["bash", "-c", run], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    wanted = {"JAX_COORDINATOR_ADDRESS=10.0.0.7:8482", "JAX_NUM_PROCESSES=3", "JAX_PROCESS_ID=1"}
    assert wanted <= {*done.stdout.splitlines()}


def test_the_guide_has_commands_that_there_are(monkeypatch):
    monkeypatch.chdir(ROOT)
    guide = (ROOT / "docs" / "pods.md").read_text()
    found = commands(guide)
    assert found
    for words in found:
        values(words)
    assert {*re.findall(r"launch/pods/([\w.]+)", guide)} == {*SCRIPTS, *MANIFESTS}
