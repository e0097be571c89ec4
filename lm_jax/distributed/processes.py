"""What the processes of one run know of each other; for a run of one process there is nothing to do.

All of them make the same calls in the same order. A process that does not come, is gone or hangs ends the run of all,
with its name, within the time-out that `start` was given.
"""

import contextlib
import json
import re
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from lm_jax.distributed import stopping
from lm_jax.distributed.hub import AGAIN
from lm_jax.distributed.link import Link
from lm_jax.distributed.wire import PERIOD
from lm_jax.errors import UserError

T = TypeVar("T")

_LITTLE = 1 << 16  # bytes that a process reads and writes even where it does nothing
_SMALL = 1 << 20  # bytes that go through the hub; more goes from device to device
_GATHERED = 1 << 22  # int32 of all processes together that a device holds at a time in `gather`

link: Link | None = None  # of a run of many processes, set by `start`


def everywhere(value: Callable[[], Any], what: str = "what process 0 makes known") -> Any:
    """What `value` gives in process 0 (JSON), in every process.

    Args:
      what: names the point in the error where a process does not come to it; so below.
    """
    if link is None:
        return value()
    here, text = None, b""
    if jax.process_index() == 0:
        with at_work():
            here = value()
        text = json.dumps(here).encode()
        given = {"value": here} if len(text) <= _SMALL else {"size": len(text)}
        link.give(what, given)
    else:
        given = link.take(what)
    return given["value"] if "value" in given else _over_devices(text, given["size"])


@contextlib.contextmanager
def at_work() -> Iterator[None]:
    """Within, the others wait for as long as it takes: for an upload, for a server's answers."""
    with _beside(worked):
        yield


@contextlib.contextmanager
def moving(what: str) -> Iterator[None]:
    """Within, the others wait for as long as this process reads and writes files, in whichever of its threads.

    A disk that does not answer ends the run of all, even where every process waits for it.

    Args:
      what: names the files in that error.
    """
    moved, since = _moved(), time.monotonic()

    def look() -> None:
        nonlocal moved, since
        now = _moved()
        if now is None or moved is None or now - moved > _LITTLE:
            moved, since = now, time.monotonic()
            worked()
        elif link is not None and time.monotonic() - since > link.timeout:
            link.end(
                f"{what}: nothing was read or written within {link.timeout:.0f} s (--process_timeout); look at the "
                f"disk or the network, then {AGAIN}"
            )

    with _beside(look):
        yield


@contextlib.contextmanager
def _beside(do: Callable[[], None]) -> Iterator[None]:
    """Within, a thread calls `do` again and again; where there are no other processes, nothing does."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(PERIOD):
            do()

    if link is not None:
        threading.Thread(target=run, name="at work", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _moved() -> int | None:
    """Bytes that this process has read and written, mapped files too; None where the system does not say."""
    try:
        counted = re.findall(r"[rw]char: (\d+)", Path("/proc/self/io").read_text())
    except OSError:
        return None
    mapped = resource.getrusage(resource.RUSAGE_SELF).ru_majflt * resource.getpagesize()
    return sum(map(int, counted)) + mapped


def _over_devices(text: bytes, size: int) -> Any:
    from jax.experimental import multihost_utils

    padded = 1 << (size - 1).bit_length()  # few shapes to compile
    return json.loads(multihost_utils.broadcast_one_to_all(np.frombuffer(text.ljust(padded), np.uint8)).tobytes())


def gather(part: np.ndarray, what: str) -> list[np.ndarray]:
    """The int32 arrays [N] of all processes, in every process and in their order. They may differ in length."""
    if link is None:
        return [part]
    from jax.experimental import multihost_utils

    reached(what)
    heads = multihost_utils.process_allgather(np.array([jax.process_index(), len(part)], np.int32))
    longest = max(1, int(heads[:, 1].max()))
    # Every device comes to hold a piece of each process; of few lengths, since each one is compiled
    size = min(1 << (longest - 1).bit_length(), _GATHERED // len(heads))
    found: list[list[np.ndarray]] = [[] for _ in heads]
    for start in range(0, longest, size):
        own = part[start : start + size]
        pieces = multihost_utils.process_allgather(np.pad(own, (0, size - len(own))))
        for (process, length), piece in zip(heads, pieces, strict=True):  # JAX does not say in which order they come
            found[process].append(piece[: max(length - start, 0)])
    return [np.concatenate(pieces) for pieces in found]


def check_alike(digest: bytes, what: str, cure: str) -> None:
    """Raises UserError, in every process, where one of them has another digest (4 n bytes) of `what` than process 0."""
    if link is None:
        return
    digests = gather(np.frombuffer(digest, np.int32), what)
    for process, its in enumerate(digests):
        if not np.array_equal(its, digests[0]):
            raise UserError(f"process {process} reads other {what} than process 0; {cure}")


def process_0_first(make: Callable[[], T], what: str) -> T:
    """What `make` gives in each process, made in process 0 before the others: of a file that the first one makes."""
    made = make() if jax.process_index() == 0 else None
    barrier(what)
    return make() if made is None else made


def barrier(what: str) -> None:
    """Waits until every process is here."""
    if link is not None:
        link.meet(what)


def reached(what: str) -> None:
    """Says that this process came here, without waiting: before what waits for the others by itself, as a step does."""
    if link is not None:
        link.reached(what)


def worked() -> None:
    """Says that this process is at work, however long the others have to wait for it."""
    if link is not None:
        link.worked()


def fail(error: Exception) -> None:
    """Ends the run of all, this process too, with the error as its line; for a thread whose error none may wait for."""
    outlast(error)
    if link is not None:
        link.end(str(error))


def outlast(error: BaseException) -> None:
    """Where the error may come of another process's end or halt, waits for the line that names that one."""
    if link is not None and _of_another(error):
        time.sleep(link.timeout + 4 * PERIOD)


def _of_another(error: BaseException | None) -> bool:
    """A collective breaks then, or gives up waiting; what a user can mend comes of it where its cause does."""
    sign = r"Gloo|NCCL|\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED): "
    if error is None:
        return False
    own = not isinstance(error, UserError) and bool(re.search(sign, str(error)))
    return own or _of_another(error.__cause__ or error.__context__)


def stops_before(what: str) -> bool:
    """Whether the run was asked to stop and does so here; every process gets the same answer."""
    return stopping.asked() if link is None else link.stops_before(what)
