"""Stopping on request, as a preemption or Ctrl-C makes it: where there is something to save, after it is saved."""

import contextlib
from collections.abc import Iterator


class Stopped(Exception):
    """A run ended early because it was asked to, with everything saved; the message says where."""


_asked = _deferring = False


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within, a request to stop waits until the run asks for it, with `processes.stops_before`."""
    global _deferring
    _deferring = True
    try:
        yield
    finally:
        _deferring = False


def ask() -> bool:
    """A request, from a signal handler. False: nobody will heed it, or it is the second; the process should end now."""
    global _asked
    first, _asked = not _asked, True
    return first and _deferring


def asked() -> bool:
    """Whether this process was asked, and the run will heed it."""
    return _asked and _deferring
