"""The recipes in launch/pods, run here: the processes that they start, with the variables that their launchers set.

Stand-ins take the place of the clusters' tools; two processes on this machine take that of a pod's hosts.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.e2e import common
from tests.multi_process.common import assert_close, assert_same, free_port, logged, newest
from tests.unit.test_pods import PODS, container, manifest

pytestmark = pytest.mark.slow

STEPS = 12
SETTINGS = (*common.SMALL_TRAIN, "epochs=9", f"max_steps={STEPS}", "checkpoints.every=50")
SRUN = """
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!); done
echo "${pids[@]}" > pids
for p in "${pids[@]}"; do wait "$p"; s=$?; (( s > status )) && status=$s; done
exit "${status:-0}"
"""
# A slice that is preempted before the first try, and during it
GCLOUD = """
echo "$4" >> calls
[[ $4 == describe ]] && { grep -q create calls && echo READY || echo PREEMPTED; }
[[ $4 == ssh ]] || exit 0
command=${@: -1}
[[ $command != *launch.musc* || $(grep -c trained calls) -gt 0 ]] || { echo trained >> calls; exit 75; }
bash -c "${command#--command=}"
"""
XPK = """
for word in "$@"; do
  case $word in
    --env=*) export "${word#--env=}" ;;
    --command=*) command=${word#--command=} ;;
  esac
done
bash -c "$command"
"""


class Cluster:
    """A checkout as the recipes find it, with an environment of their own, shared storage, and the stand-ins."""

    def __init__(self, directory: Path):
        self.shared, self.tools, self.home = (directory / n for n in ("shared", "tools", "home"))
        self.checkout = self.home / "lm-jax"
        for path in (self.shared / "models", self.shared / "data", self.tools, self.checkout / ".venv" / "bin"):
            path.mkdir(parents=True)
        for name in ("lm_jax", "musc_jax", "main_jax", "launch", "configs"):
            (self.checkout / name).symlink_to(ROOT / name)
        common.make_model(self.shared / "models" / "Meta-Llama-3-8B-Instruct")
        common.make_pairs(self.shared / "data" / "pairs.jsonl", 40)
        python = f'exec {shlex.quote(sys.executable)} "$@"'
        stubs = {"python": python, "srun": SRUN, "gcloud": GCLOUD, "xpk": XPK, "scontrol": 'echo "$@" >> scontrol'}
        stubs |= dict.fromkeys(("pip", "sudo", "sleep", "mountpoint", "stub-pkill"), "exit 0")
        stubs["stub-pgrep"] = "exit 1"
        for name, text in stubs.items():
            for place in (self.tools, self.checkout / ".venv" / "bin"):
                (place / name).write_text(f"#!/bin/bash\n{text}\n")
                (place / name).chmod(0o755)
        self.output = self.shared / "runs" / "musc"

    def here(self, text: str) -> str:
        """A recipe for this cluster: its storage, a small model, and nobody else's processes."""
        assert text.count("musc_train.py:llama3_8b") == text.count("--stopped_status=75") == 1
        text = text.replace("musc_train.py:llama3_8b", "musc_train.py:tiny").replace("/mnt/shared", str(self.shared))
        settings = " ".join(f"--config.{s}" for s in SETTINGS)
        text = text.replace("--stopped_status=75", f"--stopped_status=75 {settings}")
        return text.replace("pkill", "stub-pkill").replace("pgrep", "stub-pgrep")

    def start(self, text: str, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", "-c", text, "recipe", *arguments],
            cwd=cwd or self.checkout,
            env=os.environ | {"PATH": f"{self.tools}:{os.environ['PATH']}", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def move(self, name: str) -> Path:
        """The run, out of the way of the next one."""
        return self.output.rename(self.output.with_name(name))


def ended(process: subprocess.Popen, status: int = 0) -> None:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == status, said[-4000:]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Cluster:
    return Cluster(tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def expected(cluster) -> Path:
    """By GKE's recipe."""
    address = f"localhost:{free_port()}"
    text = cluster.here(container()["args"][0])
    assert container()["command"] == ["bash", "-c"]
    processes = []
    for i in range(2):
        environment = {
            e["name"]: e["value"].replace("/mnt/shared", str(cluster.shared)) if "value" in e else str(i)
            for e in container()["env"]
        }
        environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": str(i)}
        environment |= {"TPU_WORKER_ID": str(i), "TPU_WORKER_HOSTNAMES": "musc-slice-0-0.musc,musc-slice-0-1.musc"}
        processes.append(cluster.start(text, **environment))
    for process in processes:
        ended(process)
    return cluster.move("expected")


def test_jobset(expected):
    assert newest(expected)[0] == logged(expected) == STEPS


def test_slurm_stops_as_the_time_is_up_and_goes_on(cluster, expected):
    text = cluster.here((PODS / "slurm.sbatch").read_text())
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost", "SLURM_NODELIST": "localhost"}
    job |= {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    process = cluster.start(text, **job)
    while not (cluster.output / "metrics.jsonl").exists() or logged(cluster.output) < 2:
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.002)
    for pid in map(int, (cluster.checkout / "pids").read_text().split()):
        os.kill(pid, signal.SIGTERM)
    ended(process, 75)
    assert (cluster.checkout / "scontrol").read_text() == f"requeue {os.getpid()}\n"
    assert newest(cluster.output)[0] < STEPS
    ended(cluster.start(text, **job))
    assert (cluster.checkout / "scontrol").read_text().count("requeue") == 1
    assert_same(cluster.move("slurm"), expected)


def test_skypilot(cluster, expected):
    task = manifest("skypilot.yaml")
    given = {name: value.replace("/mnt/shared", str(cluster.shared)) for name, value in task["envs"].items()}
    given |= {"SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2", "SKYPILOT_NUM_NODES": "2"}
    text = cluster.here(task["run"]).replace(":8482", f":{free_port()}")
    for process in [cluster.start(text, SKYPILOT_NODE_RANK=str(i), **given) for i in range(2)]:
        ended(process)
    assert_same(cluster.move("skypilot"), expected)


def test_open_mpi_5(cluster, expected):
    """Slurm's recipe with `mpirun` for `srun`."""
    text = (PODS / "slurm.sbatch").read_text().split('"$PYTHON" ')[1].split("\nstatus")[0]
    places = {"MODEL": "models/Meta-Llama-3-8B-Instruct", "INPUT": "data/pairs.jsonl", "OUTPUT": "runs/musc"}
    given = {name: str(cluster.shared / path) for name, path in places.items()}
    given |= {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    given["PMIX_NAMESPACE"] = f"prterun-host-{os.getpid()}@1"
    ranks = [{"OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i)} for i in range(2)]
    for process in [cluster.start(cluster.here(f"exec python {text}"), **given, **rank) for rank in ranks]:
        ended(process)
    assert_same(cluster.move("mpi"), expected)


def test_tpu_ssh_after_preemptions(cluster, expected):
    text = cluster.here((PODS / "tpu_ssh.sh").read_text())
    ended(cluster.start(text, cwd=cluster.home))
    calls = (cluster.home / "calls").read_text().split()
    assert calls[:3] == ["describe", "delete", "create"] and calls.count("create") == 1 and "trained" in calls
    assert_close(cluster.move("tpu"), expected)


def test_xpk(cluster, expected):
    ended(cluster.start(cluster.here((PODS / "xpk.sh").read_text())))
    assert_close(cluster.move("xpk"), expected)
