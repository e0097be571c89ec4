"""Lines of JSON over a socket that is never waited for: what the processes of a run tell one another."""

import json
import socket
from typing import Any

PERIOD = 0.5  # seconds between two signs of life

Message = dict[str, Any]


class Lines:
    """One end of a connection. Every call returns at once; only one thread may receive and one send at a time."""

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self._in, self._out = bytearray(), bytearray()

    def receive(self) -> list[Message]:
        """What has come.

        Raises:
          OSError: the other end is gone, and whatever it sent was received before.
        """
        try:
            data = self.socket.recv(1 << 20)
        except BlockingIOError:
            return []
        if not data:
            raise ConnectionResetError("closed by the other end")
        *lines, self._in = (self._in + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def send(self, message: Message) -> None:
        """Takes the message; what the connection does not take at once goes out with `flush`."""
        self._out += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> bool:
        """Whether all is sent. A connection that broke shows when it is read."""
        try:
            while self._out:
                del self._out[: self.socket.send(self._out)]
        except BlockingIOError:
            return False
        except OSError:
            self._out.clear()
        return True

    def close(self) -> None:
        self.socket.close()
