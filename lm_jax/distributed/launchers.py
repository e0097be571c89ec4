"""Which process this is, as its launcher says: Slurm, Open MPI, TPU pods, GKE.

JAX finds these too. Under Slurm and Open MPI its answers do not fit several of the ways in which runs are started there
(DESIGN section 9), so the variables of these two are read here; of pods on Google Cloud it knows best.
"""

import dataclasses
import os
import re
from collections.abc import Mapping

from lm_jax.errors import UserError

CURE = "give every process the same --coordinator_address=HOST:PORT and --num_processes, and its own --process_id"
_PORTS = 4096  # as many as JAX takes its own choice from: the last ones


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among those of the run.

    Attributes:
      address: HOST:PORT of process 0; None where the launcher does not say.
      local_devices: the GPUs of this process, by number on its host; None: all that it sees.
    """

    address: str | None
    number: int
    process: int
    local_devices: list[int] | None = None


def find(environment: Mapping[str, str], timeout: float | None) -> Place | None:
    """The place of this process; None where nothing says that there are others.

    Args:
      timeout: seconds until a pod's host of process 0 must be known by name; None: only Slurm and Open MPI are asked.

    Raises:
      UserError: a launcher that says that there are others, but not where or which.
    """
    try:
        place = _open_mpi(environment) or _slurm(environment)
        if place is None and timeout is not None:
            place = _google_cloud(environment, timeout)
    except KeyError as error:
        raise UserError(f"this cluster's environment does not say which process this is: no {error}; {CURE}") from error
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"this cluster's environment does not say which process this is: {error}; {CURE}") from error
    return place if place is not None and place.number > 1 else None


def _slurm(environment: Mapping[str, str]) -> Place | None:
    # A batch script and the shell of `salloc` have the job's variables, and the number of its tasks, with no other
    # task at work. Only what srun starts has a step, and the step's own count where its shell has the job's.
    if "SLURM_STEP_ID" not in environment and "SLURM_STEP_NODELIST" not in environment:
        return None
    number = int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"])
    if number == 1:
        return None
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    host = _first_host(next((environment[name] for name in names if name in environment), ""))
    # Steps of one job may run at the same time, also on one host
    step = int(environment.get("SLURM_STEP_ID") or 0)
    address = f"{host}:{_port(environment, int(environment['SLURM_JOB_ID']) + 61 * step)}"
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    here = _tasks_of_node(tasks, int(environment.get("SLURM_NODEID") or 0))
    devices = _devices(environment, int(environment["SLURM_LOCALID"]), here)
    return Place(address, number, int(environment["SLURM_PROCID"]), devices)


def _open_mpi(environment: Mapping[str, str]) -> Place | None:
    number = int(environment.get("OMPI_COMM_WORLD_SIZE") or 1)
    if number == 1:
        return None
    local, here = (environment.get(f"OMPI_COMM_WORLD_LOCAL_{name}") for name in ("RANK", "SIZE"))
    devices = None if local is None else _devices(environment, int(local), int(here or 0))
    # Open MPI 4 gives the address of mpirun, which is where rank 0 runs unless a host file says otherwise; Open MPI 5
    # gives none, and then all ranks are on one host, or in an allocation of Slurm's, or the address must be given.
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    job, _, rest = uri.partition(".")
    found = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", rest)
    nodes = environment.get("SLURM_JOB_NODELIST")
    if found:
        host = found[1] or f"[{found[2]}]"
    elif here == str(number):
        host = "localhost"
    else:
        host = nodes and _first_host(nodes)
    name = re.sub(r"\D", "", environment.get("PMIX_NAMESPACE", "") or environment.get("SLURM_JOB_ID", ""))
    seed = int(job) // 4096 if job.isdigit() else int(name or 0)
    address = host and f"{host}:{_port(environment, seed)}"
    return Place(address, number, int(environment["OMPI_COMM_WORLD_RANK"]), devices)


def _google_cloud(environment: Mapping[str, str], timeout: float) -> Place | None:
    on_tpu = "tpu" in environment.get("JAX_PLATFORMS", "tpu")
    tpu = on_tpu and any(os.path.exists(f"/dev/{name}") for name in ("accel0", "vfio/0"))
    if not tpu and "JOBSET_NAME" not in environment and "MEGASCALE_COORDINATOR_ADDRESS" not in environment:
        return None
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize() calls; it has no public form

    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(timeout))
    address, number, process, devices = found
    if number is None or process is None:
        return None
    return Place(address, number, process, None if devices is None else list(devices))


def _first_host(nodes: str) -> str:
    """The first of Slurm's list: `a`, `a,b`, `a[01-16,20],b`, `rack[0-3]node[00-15].lan`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise ValueError(f"no host in the node list {nodes!r}")
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def _tasks_of_node(tasks: str, node: int) -> int:
    """How many tasks a node has, of Slurm's list `4(x2),3`; 0: not known."""
    counts = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        counts += [int(count)] * int(times or 1)
    return counts[node] if node < len(counts) else 0


def _devices(environment: Mapping[str, str], local: int, here: int) -> list[int] | None:
    """The GPUs of a process that is number `local` of `here` on its host: all of them where it is alone there."""
    visible = environment.get("CUDA_VISIBLE_DEVICES") or environment.get("ROCR_VISIBLE_DEVICES") or ""
    # Where each got its own by the launcher, these count from 0 in every process
    bound = "SLURM_GPUS_PER_TASK" in environment or visible != "" and "," not in visible
    return None if here == 1 or bound or "JAX_LOCAL_DEVICE_IDS" in environment else [local]


def _port(environment: Mapping[str, str], seed: int) -> str:
    return environment.get("JAX_COORDINATOR_PORT") or str(65536 - _PORTS + seed % _PORTS)
