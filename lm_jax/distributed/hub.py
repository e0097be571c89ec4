"""Process 0's thread that knows of every process where it is, and tells all when one is missing.

Every process, 0 too, is connected to it. It takes them in, passes on what process 0 makes known, lets them past a
point that all have reached, agrees on the step at which a run stops, and ends the run when a process is gone (its
connection closes at once), silent (stopped, or its machine is), or behind the others and idle (hanging).
"""

import dataclasses
import math
import selectors
import socket
import threading
import time

from lm_jax.distributed.wire import PERIOD, Lines, Message

_PARTING = 5.0  # seconds that the others have to read why a run ends
AGAIN = "run the same command again in every process to go on from what was saved"


@dataclasses.dataclass(eq=False)
class _Process:
    lines: Lines
    number: int | None = None  # before it has said who it is
    heard: float = dataclasses.field(default_factory=time.monotonic)
    position: int = 0
    where: str = "the start"
    work: int = 0
    moved: float = dataclasses.field(default_factory=time.monotonic)  # or was no longer waited for
    held: int | None = None
    finished: bool = False


class Hub:
    """A thread. Takes in `processes` connections, then watches over them until all are gone.

    Args:
      listener: bound and listening; closed as soon as all are there, so that its port is free again.
      start_timeout: seconds until all must have come.
      timeout: seconds of silence, or of idleness behind the others, until a process counts as missing.
    """

    def __init__(self, listener: socket.socket, processes: int, start_timeout: float, timeout: float):
        self._listener, self._processes, self._timeout = listener, processes, timeout
        self._start_timeout, self._deadline = start_timeout, time.monotonic() + start_timeout
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)
        self._connected: list[_Process] = []
        self._gathered, self._holding, self._passed = False, False, 0
        self._fault: str | None = None
        threading.Thread(target=self._run, name="hub", daemon=True).start()

    def _run(self) -> None:
        beat = 0.0
        while self._connected or not self._gathered:
            self._selector.select(PERIOD / 2)
            if not self._gathered:
                self._accept()
            for process in list(self._connected):
                self._read(process)
                process.lines.flush()
            now = time.monotonic()
            if not self._gathered:
                self._look_for_all(now)
            elif now - beat >= PERIOD:
                beat = now
                self._tell({"kind": "beat"})
                self._look_for_missing(now)
            if self._fault is not None:
                self._part(now)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            process = _Process(Lines(connection))
            self._connected.append(process)
            self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, process: _Process) -> None:
        try:
            messages = process.lines.receive()
        except (OSError, ValueError):  # ValueError: somebody else's connection
            return self._gone(process)
        for message in messages:
            if not isinstance(message, dict) or process.number is None and not _says_hello(message):
                return self._gone(process)  # somebody else's connection, too
            process.heard = time.monotonic()
            self._take(process, message)

    def _take(self, process: _Process, message: Message) -> None:
        kind = message.get("kind")
        if kind == "hello":
            self._welcome(process, message)
        elif kind == "at":
            if (message["position"], message["work"]) != (process.position, process.work):
                process.moved = process.heard
            process.position, process.where, process.work = message["position"], message["where"], message["work"]
            lowest = min(p.position for p in self._connected)
            if self._gathered and lowest > self._passed:
                self._passed = lowest
                self._tell({"kind": "passed", "position": lowest})
        elif kind == "value":
            for other in self._connected:
                if other.number != 0:
                    other.lines.send(message)
        elif kind == "leaving" and not self._holding:
            self._holding = True
            self._tell({"kind": "hold"})
        elif kind == "held":
            process.held = message["position"]
            held = [p.held for p in self._connected if p.held is not None]
            if len(held) == len(self._connected):
                self._tell({"kind": "stop", "position": max(held)})
        elif kind == "failed":
            process.finished = True
            if process.number != 0:
                process.lines.send({"kind": "released"})
            if self._fault is None:
                self._end(f"process {process.number} ended with an error: {message['line']}")
        elif kind == "finished":
            process.finished = True

    def _welcome(self, process: _Process, message: Message) -> None:
        number, ours = message["process"], {"processes": self._processes}
        if message["processes"] != ours["processes"]:
            why = f"was started as one of {message['processes']} processes, process 0 as one of {self._processes}"
        elif any(p.number == number for p in self._connected):
            why = "was started twice"
        else:
            process.number = number
            return
        self._end(f"process {number} {why}; give every process the same --num_processes and its own --process_id")

    def _look_for_all(self, now: float) -> None:
        there = {p.number for p in self._connected} - {None}
        if len(there) == self._processes:
            self._gathered = True
            for stranger in [p for p in self._connected if p.number is None]:
                self._gone(stranger)
            self._selector.unregister(self._listener)
            self._listener.close()
            for process in self._connected:
                process.heard = process.moved = now
            self._tell({"kind": "go"})
        elif now > self._deadline and self._fault is None:
            missing = sorted(set(range(self._processes)) - there)
            self._end(
                f"{_named(missing)} of {self._processes} did not start within {self._start_timeout:.0f} s "
                f"(--start_timeout); look at {'its' if len(missing) == 1 else 'their'} log and start all again"
            )

    def _look_for_missing(self, now: float) -> None:
        if self._fault is not None:
            return
        ahead = max(self._connected, key=lambda p: p.position)
        for process in self._connected:
            if process.position == ahead.position:
                process.moved = now
        within = f"within {self._timeout:.0f} s (--process_timeout)"
        silent = [p for p in self._connected if not p.finished and now - p.heard > self._timeout]
        behind = [p for p in self._connected if not p.finished and now - p.moved > self._timeout]
        if silent:
            self._end(
                f"{_named(p.number for p in silent)} gave no sign of life {within}: stopped, or its machine is gone; "
                f"{AGAIN}"
            )
        elif behind:
            last = min(behind, key=lambda p: p.position)
            self._end(
                f"{_named(p.number for p in behind if p.position == last.position)} did not come to {ahead.where} "
                f"{within}: it hangs after {last.where}; {AGAIN}"
            )

    def _gone(self, process: _Process) -> None:
        self._selector.unregister(process.lines.socket)
        process.lines.close()
        self._connected.remove(process)
        if self._gathered and process.number is not None and not process.finished and self._fault is None:
            self._end(f"process {process.number} is gone: killed, crashed or cut off; its log may say why; {AGAIN}")

    def _end(self, fault: str) -> None:
        """Tells all but process 0, which hears of it last: with it goes the connection of the others."""
        self._fault, self._parted = fault, time.monotonic() + _PARTING
        for process in self._connected:
            if process.number != 0 and not process.finished:
                process.lines.send({"kind": "fault", "line": fault})

    def _part(self, now: float) -> None:
        if self._parted == math.inf or now < self._parted and any(p.number != 0 for p in self._connected):
            return
        self._parted = math.inf  # once
        for process in self._connected:
            if process.number == 0:
                own = {"kind": "released"} if process.finished else {"kind": "fault", "line": self._fault}
                process.lines.send(own)

    def _tell(self, message: Message) -> None:
        for process in self._connected:
            process.lines.send(message)


def _says_hello(message: Message) -> bool:
    return message.get("kind") == "hello" and all(isinstance(message.get(k), int) for k in ("process", "processes"))


def _named(numbers) -> str:
    numbers = sorted(numbers)
    return f"process{'' if len(numbers) == 1 else 'es'} {', '.join(map(str, numbers))}"
