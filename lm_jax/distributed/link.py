"""A process's connection to the hub, and the thread that keeps it: signs of life out, what all agree on in."""

import json
import math
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_jax.distributed.hub import AGAIN
from lm_jax.distributed.wire import PERIOD, Lines, Message
from lm_jax.errors import UserError

_RELEASE = 8.0  # seconds to wait for the hub to have told the others


class Link:
    """Joins the run's other processes; returns when all are there.

    Args:
      address: (host, port) of the hub.
      process, processes: which of how many this is.
      start_timeout: seconds until all must have come.
      timeout: seconds of the hub's silence until it counts as gone.
      end: called in this thread with the reason when the run must end, whatever the main thread is in; does not return.
      leaving: whether this process has been asked to stop.

    Raises:
      UserError: not all came in time, naming those that did not.
    """

    def __init__(
        self,
        address: tuple[str, int],
        process: int,
        processes: int,
        start_timeout: float,
        timeout: float,
        end: Callable[[str], None],
        leaving: Callable[[], bool],
    ):
        self.timeout, self._end, self._leaving = timeout, end, leaving
        self._changed = threading.Condition(threading.RLock())  # of all below; a signal handler may come in between
        self._position, self._where, self._work = 0, "the start", 0
        self._passed, self._asked = 0, False
        self._values: dict[int, str] = {}
        self._held: int | None = None
        self._stop: int | None = None
        self._released, self._finished = False, False
        self._stuck, self._stuck_since = "", 0.0
        self._lines = self._join(address, process, processes, start_timeout)
        self._heard = time.monotonic()
        threading.Thread(target=self._run, name="link", daemon=True).start()

    def _join(self, address: tuple[str, int], process: int, processes: int, start_timeout: float) -> Lines:
        deadline, lines = time.monotonic() + start_timeout, None
        while time.monotonic() < deadline + PERIOD * 4:  # the hub says who is missing when it has waited as long
            try:
                if lines is None:
                    if time.monotonic() > deadline:
                        break
                    lines = Lines(socket.create_connection(address, timeout=5))
                    lines.send({"kind": "hello", "process": process, "processes": processes})
                for message in lines.receive():
                    if message["kind"] == "go":
                        return lines
                    raise UserError(message["line"])
            except (OSError, ValueError, KeyError):  # not there yet, or something else that listens there
                lines = None
            time.sleep(0.05)
        host, port = address
        raise UserError(
            f"process {process}: process 0 did not answer at {host}:{port} within {start_timeout:.0f} s "
            "(--start_timeout); check that it runs, that --coordinator_address is its address, and start all again"
        )

    def _run(self) -> None:
        beat = 0.0
        while True:
            time.sleep(0.01 if self._waiting() else PERIOD / 10)
            try:
                messages = self._lines.receive()
            except (OSError, ValueError):
                if self._finished:
                    return
                self._end(f"process 0 is gone: killed, crashed or cut off; its log may say why; {AGAIN}")
                return
            now = time.monotonic()
            if messages:
                self._heard = now
            elif now - self._heard > self.timeout and not self._finished:
                self._end(f"process 0 gave no sign of life within {self.timeout:.0f} s (--process_timeout); {AGAIN}")
                return
            with self._changed:
                for message in messages:
                    self._take(message)
                if self._leaving() and not self._asked:
                    self._asked = True
                    self._lines.send({"kind": "leaving"})
                if now - beat >= PERIOD:
                    beat = now
                    self._say_where()
                    self._look_at_disk(now)
                self._lines.flush()

    def _look_at_disk(self, now: float) -> None:
        """Ends the run of all where the main thread has waited for a disk for too long, in whatever it is."""
        if not (stuck := _waits_for_disk()) or stuck != self._stuck:
            self._stuck, self._stuck_since = stuck, now
        elif now - self._stuck_since > self.timeout:
            line = (
                f"after {self._where}: the disk has not answered within {self.timeout:.0f} s (--process_timeout); "
                f"look at it, then {AGAIN}"
            )
            threading.Thread(target=self.end, args=(line,), daemon=True).start()
            self._stuck_since = math.inf  # once

    def _waiting(self) -> bool:
        return self._passed < self._position

    def _take(self, message: Message) -> None:
        kind = message["kind"]
        if kind == "fault":
            self._end(message["line"])
        elif kind == "passed":
            self._passed = message["position"]
        elif kind == "value":
            self._values[message["position"]] = message["text"]
        elif kind == "hold" and self._held is None:
            self._held = self._position
            self._lines.send({"kind": "held", "position": self._held})
        elif kind == "stop":
            self._stop = message["position"]
        elif kind == "released":
            self._released = True
        self._changed.notify_all()

    def _say_where(self) -> None:
        self._lines.send({"kind": "at", "position": self._position, "where": self._where, "work": self._work})

    def reached(self, where: str) -> int:
        """Says that this process came to a point that every process comes to, in the same order; its number."""
        with self._changed:
            self._position, self._where = self._position + 1, where
            return self._position

    def worked(self) -> None:
        """Says that this process is at work, though the others may be waiting for it."""
        self._work += 1

    def meet(self, where: str) -> None:
        """Waits until every process is here. Whoever does not come ends the run, with its name."""
        position = self.reached(where)
        with self._changed:
            self._say_where()
            self._changed.wait_for(lambda: self._passed >= position)

    def give(self, where: str, value: Any) -> None:
        """Makes a value (JSON) known to every process, which `take` it."""
        position = self.reached(where)
        with self._changed:
            self._lines.send({"kind": "value", "position": position, "text": json.dumps(value)})

    def take(self, where: str) -> Any:
        """The value that process 0 gives at this point."""
        position = self.reached(where)
        with self._changed:
            self._say_where()
            self._changed.wait_for(lambda: position in self._values)
            return json.loads(self._values.pop(position))

    def stops_before(self, where: str) -> bool:
        """Whether the run ends before this point, in every process or in none.

        Once one is asked to leave, the hub asks for the position of all of them, which hold here, and lets the run end
        at the first such point that none has passed: so none waits for another inside of a step.
        """
        with self._changed:
            if self._held is not None:
                self._changed.wait_for(lambda: self._stop is not None)
                if self._stop is not None and self._position >= self._stop:
                    return True
            self.reached(where)
            return False

    def fail(self, line: str) -> None:
        """Lets the others know that this process ends, and why; returns when they do."""
        with self._changed:
            self._lines.send({"kind": "failed", "line": line})
            self._changed.wait_for(lambda: self._released, _RELEASE)

    def end(self, line: str) -> None:
        """Ends the run of all, this process too, from any thread."""
        self.fail(line)
        self._end(line)

    def finish(self) -> None:
        """Waits for all and takes this process out."""
        self.meet("the end")
        with self._changed:
            self._finished = True
            self._lines.send({"kind": "finished"})


def _waits_for_disk() -> str:
    """Empty, or, where the main thread waits in the kernel for a disk, the time that it has run so far."""
    thread = Path(f"/proc/self/task/{threading.main_thread().native_id}")
    try:
        state = (thread / "stat").read_text().rpartition(")")[2].split()[0]
        return (thread / "schedstat").read_text() if state == "D" else ""
    except OSError:  # another system than Linux
        return ""
