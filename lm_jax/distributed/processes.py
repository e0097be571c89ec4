"""What the processes of one run know of each other; for a run of one process there is nothing to do.

All of them make the same calls in the same order. A process that does not come, is gone or hangs ends the run of all,
with its name, within the time-out that `start` was given.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np

from lm_jax.distributed import stopping
from lm_jax.distributed.link import Link

T = TypeVar("T")

_AT_WORK = 0.5  # seconds between two words of it
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
    done = threading.Event()

    def say() -> None:
        while not done.wait(_AT_WORK):
            worked()

    threading.Thread(target=say, name="at work", daemon=True).start()
    try:
        yield
    finally:
        done.set()


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


def stops_before(what: str) -> bool:
    """Whether the run was asked to stop and does so here; every process gets the same answer."""
    return stopping.asked() if link is None else link.stops_before(what)
