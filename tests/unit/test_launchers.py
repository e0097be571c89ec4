"""Which process this is, by the variables that launchers set: as srun, salloc, sbatch and mpirun have them."""

import pytest

from lm_jax.distributed import launchers
from lm_jax.distributed.launchers import Place
from lm_jax.distributed.start import Processes, _settled
from lm_jax.errors import UserError

# What sbatch gives the batch script of a job of 4 nodes
BATCH = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "gpu[07-10]",
    "SLURM_NODELIST": "gpu[07-10]",
    "SLURM_NTASKS": "4",
    "SLURM_TASKS_PER_NODE": "1(x4)",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
# And what srun adds for the task on the third of them
STEP = {
    **BATCH,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-10]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "2",
}
PORT = 65536 - 4096 + 4711 % 4096
MPI = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


def find(environment: dict[str, str], **more: str) -> Place | None:
    return launchers.find(environment | more, None)


def test_a_task_of_srun():
    assert find(STEP) == Place(f"gpu07:{PORT}", 4, 2)  # and all GPUs of its node


def test_a_batch_script_and_a_shell_are_alone():
    assert find(BATCH) is None
    # salloc's shell is a step of one task with the job's variables
    assert find(STEP, SLURM_STEP_NUM_TASKS="1", SLURM_STEP_TASKS_PER_NODE="1", SLURM_PROCID="0") is None
    assert find({}) is None


@pytest.mark.parametrize("lost", ["SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_ID"])
def test_a_step_that_lacks_a_variable(lost):
    assert find({k: v for k, v in STEP.items() if k != lost}) == Place(f"gpu07:{PORT}", 4, 2)


def test_steps_of_one_job_listen_at_ports_of_their_own():
    assert len({find(STEP, SLURM_STEP_ID=str(i)).address for i in range(8)}) == 8
    assert find(STEP, JAX_COORDINATOR_PORT="1234").address == "gpu07:1234"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-015],host2", "node001"),
        ("node[001,007-015]", "node001"),
        ("node[5]", "node5"),
        ("rack[0-1]node[03-15].lan,x", "rack0node03.lan"),
        ("a-b[2-3]", "a-b2"),
    ],
)
def test_the_first_of_a_node_list(nodes, first):
    assert find(STEP, SLURM_STEP_NODELIST=nodes).address == f"{first}:{PORT}"


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_LOCALID": "2"}, [2]),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),1", "SLURM_LOCALID": "0"}, None),  # alone on its node
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x4)", "SLURM_LOCALID": "2", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [2]),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x4)", "SLURM_LOCALID": "2", "CUDA_VISIBLE_DEVICES": "0"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x4)", "SLURM_LOCALID": "2", "SLURM_GPUS_PER_TASK": "2"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x4)", "SLURM_LOCALID": "2", "JAX_LOCAL_DEVICE_IDS": "3"}, None),
    ],
)
def test_the_gpus_of_a_task(variables, devices):
    assert find(STEP, **variables).local_devices == devices


def test_a_step_that_does_not_say_which():
    with pytest.raises(UserError, match="which process this is: no 'SLURM_PROCID'; give every process"):
        find({k: v for k, v in STEP.items() if k != "SLURM_PROCID"})
    with pytest.raises(UserError, match="no host in the node list ''"):
        find({k: v for k, v in STEP.items() if "NODELIST" not in k})


def test_open_mpi_4_gives_the_address():
    uri = {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
    assert find(MPI, **uri) == Place(f"10.96.0.1:{65536 - 4096 + 1531576320 // 4096 % 4096}", 8, 5, [1])
    six = {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b:ac5d,2620:10d::2]:43370"}
    assert find(MPI, **uri | six).address.startswith("[fe80::b9b:ac5d]:")


def test_open_mpi_5_does_not():
    assert find(MPI, OMPI_COMM_WORLD_LOCAL_SIZE="4") == Place(None, 8, 5, [1])
    here = find(MPI, OMPI_COMM_WORLD_LOCAL_SIZE="8", PMIX_NAMESPACE="prterun-host-1234@1")
    assert here == Place(f"localhost:{65536 - 4096 + 12341 % 4096}", 8, 5, [1])
    assert find({**BATCH, **MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}).address == f"gpu07:{PORT}"
    assert find(MPI, OMPI_COMM_WORLD_SIZE="1") is None


def test_what_is_given_counts(monkeypatch):
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_PROCID")  # so that the launcher's own answer is an error
    assert _settled(Processes("a:1", 3, 1, 9, 9)) == ("a:1", 3, 1, None)
    with pytest.raises(UserError, match="no 'SLURM_PROCID'"):
        _settled(Processes("a:1", None, None, 9, 9))
    monkeypatch.setenv("SLURM_PROCID", "2")
    assert _settled(Processes("a:1", None, None, 9, 9)) == ("a:1", 4, 2, None)
