"""Starting a run of many processes: who is there, then `jax.distributed`.

By flags or JAX's environment variables, or as found on a TPU pod, on GKE, under Slurm or Open MPI. One process is no
run of many: then nothing here touches JAX.
"""

import contextlib
import ctypes
import dataclasses
import os
import signal
import socket
import time
from collections.abc import Callable

from lm_jax.distributed import launchers
from lm_jax.distributed.hub import Hub
from lm_jax.distributed.launchers import CURE
from lm_jax.distributed.link import Link
from lm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Processes:
    """Which process this is; None where neither a flag nor the environment says so.

    Attributes:
      coordinator_address: HOST:PORT of process 0.
      start_timeout: seconds until all processes must have come.
      timeout: seconds of silence or idleness until a process counts as lost.
    """

    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None
    start_timeout: float
    timeout: float


def start(settings: Processes, end: Callable[[str], None]) -> Callable[[str | None], None] | None:
    """Joins the other processes; returns at once, with None, where there are none.

    Args:
      end: called in another thread with one line when the run must end, whatever this one is in; does not return.

    Returns:
      What to call when this process is done: with None once everything is, which waits for the others, or with the
      line of the error that it ends with.

    Raises:
      UserError: settings that do not fit each other; processes that did not come, by number.
    """
    address, number, process, local_devices = _settled(settings)
    if number is None or number == 1:
        return None
    needed = {"--coordinator_address": address, "--process_id": process}
    missing = [name for name, value in needed.items() if value is None]
    if address is None or process is None:
        raise UserError(f"--num_processes={number} needs {' and '.join(missing)} too; {CURE}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator_address={address!r}: not of the form HOST:PORT; {CURE}")
    if not 0 <= process < number:
        raise UserError(f"--process_id={process}: must lie between 0 and --num_processes - 1 = {number - 1}; {CURE}")
    begin = time.monotonic()
    if process == 0:
        Hub(_listen(int(port)), number, settings.start_timeout, settings.timeout)
    link = _join((host.strip("[]"), int(port)), process, number, settings, end)
    left = settings.start_timeout - (time.monotonic() - begin)
    try:
        _initialize(address, number, process, local_devices, left, settings.timeout)
    except UserError as error:
        link.fail(str(error))
        raise

    from lm_jax.distributed import processes

    processes.link = link

    def done(fault: str | None) -> None:
        if fault is not None:
            link.fail(fault)
        else:
            import jax

            link.finish()
            jax.distributed.shutdown()

    return done


def _settled(settings: Processes) -> tuple[str | None, int | None, int | None, list[int] | None]:
    """What was given; what was not, as the launcher has it."""
    given = settings.coordinator_address, settings.num_processes, settings.process_id
    if settings.num_processes == 1:
        return *given, None
    place = None
    with contextlib.suppress(*() if None in given else (UserError,)):  # what is given is the cure
        place = launchers.find(os.environ, settings.start_timeout if None in given else None)
    if place is not None:
        address, number, process = given
        return (
            place.address if address is None else address,
            place.number if number is None else number,
            place.process if process is None else process,
            place.local_devices,
        )
    if settings.num_processes is None and given != (None, None, None):
        raise UserError(f"--num_processes: not set, but --coordinator_address or --process_id is; {CURE}")
    return *given, None


def _listen(port: int) -> socket.socket:
    """On the coordinator's own port, which JAX's service takes over when all processes are there."""
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True)
        return socket.create_server(("", port), backlog=4096)
    except OSError as error:
        raise UserError(
            f"--coordinator_address: port {port} cannot be listened at ({error.strerror}); end what uses it, or give "
            "every process another port"
        ) from error


def _join(address: tuple[str, int], process: int, number: int, settings: Processes, end: Callable) -> Link:
    from lm_jax.distributed import stopping

    return Link(address, process, number, settings.start_timeout, settings.timeout, end, stopping.asked)


def _initialize(
    address: str, number: int, process: int, local_devices: list[int] | None, start_timeout: float, timeout: float
) -> None:
    import jax

    # The hub sees at once who is gone, and by name. JAX's service would wait for its heartbeats, then abort with a
    # stack trace, and when process 0 is gone it does so without waiting: abort() then sleeps (its signal's number, 6,
    # of seconds) before it ends the process, in which time the link's thread ends it with one line.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
    jax.config.update("jax_enable_preemption_service", False)  # would take SIGTERM away from the command
    if jax.config.jax_platforms == "cpu":  # type: ignore[attr-defined]  # JAX declares its options as it runs
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            address,
            number,
            process,
            local_devices,
            cluster_detection_method="deactivate",  # else JAX gives one GPU to a process that is alone on its host
            initialization_timeout=max(10, int(start_timeout)),
            shutdown_timeout_seconds=max(1, min(60, int(timeout))),
        )
    except RuntimeError as error:
        raise UserError(f"process {process}: jax.distributed did not start: {str(error).splitlines()[0]}") from error
