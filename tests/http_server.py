"""A real HTTP server on a loopback port that answers as a test's function says, and remembers what it was asked."""

import dataclasses
import json
import select
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request as it arrived. `number` counts from 0, `at` is monotonic seconds, `in_flight` includes this one."""

    number: int
    path: str
    headers: dict[str, str]
    body: dict
    at: float
    in_flight: int

    @property
    def prompt(self) -> str:
        return self.body["prompt"] if "prompt" in self.body else self.body["messages"][-1]["content"]


@dataclasses.dataclass(frozen=True)
class Reply:
    """What goes back.

    Attributes:
      after: seconds that are waited first.
      between: seconds between one byte of the body and the next.
      cut: closes the connection halfway ("half") or before anything is sent ("all").
    """

    body: dict | bytes = b""
    status: int = 200
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    after: float = 0.0
    between: float = 0.0
    cut: str | None = None


def completion(asked: Asked, texts: list[str] | None = None, reason: str | None = "stop", tokens: int = 3) -> Reply:
    """What vLLM would answer: n choices, each with the prompt and its index, `tokens` tokens each."""
    texts = [f"{asked.prompt} -> {i}" for i in range(asked.body["n"])] if texts is None else texts
    chat = asked.path.endswith("/chat/completions")
    choices = [
        {"index": i, "finish_reason": reason}
        | ({"message": {"role": "assistant", "content": t}} if chat else {"text": t})
        for i, t in enumerate(texts)
    ]
    return Reply({"object": "x", "choices": choices, "usage": {"completion_tokens": tokens * len(texts)}})


class Server:
    """Answers with `script`; use as a context manager.

    Attributes:
      url: to give to a client, without a slash at the end.
      asked: all requests so far, in order of arrival.
      hung_up: connections that the client closed while their answer was being waited for.
    """

    def __init__(self, script: Callable[[Asked], Reply] = completion):
        self.script, self.asked, self.hung_up = script, [], 0
        self._lock, self._in_flight, self._closing = threading.Lock(), 0, threading.Event()
        self._http = _HTTPServer(("127.0.0.1", 0), _Handler)
        self._http.owner = self
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self) -> "Server":
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, name="server")
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def arrive(self, handler: BaseHTTPRequestHandler, body: dict) -> Asked:
        with self._lock:
            self._in_flight += 1
            headers = {name.lower(): value for name, value in handler.headers.items()}
            asked = Asked(len(self.asked), handler.path, headers, body, time.monotonic(), self._in_flight)
            self.asked.append(asked)
        return asked

    def leave(self) -> None:
        with self._lock:
            self._in_flight -= 1

    def wait(self, seconds: float, connection: socket.socket) -> bool:
        """Whether the client is still there after that time."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._closing.is_set():
            if select.select([connection], [], [], min(left, 0.02))[0] and not connection.recv(1, socket.MSG_PEEK):
                with self._lock:
                    self.hung_up += 1
                return False
        return True


class _HTTPServer(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True
    owner: Server

    def handle_error(self, request, client_address):
        pass  # a client that has gone


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):  # noqa: N802
        owner = self.server.owner
        asked = owner.arrive(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        try:
            reply = owner.script(asked)
            if not owner.wait(reply.after, self.connection):
                self.close_connection = True
                return
        finally:
            owner.leave()
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.close_connection = reply.cut is not None
        if reply.cut == "all":
            return
        self.send_response(reply.status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **reply.headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        body = body[: len(body) // 2] if reply.cut else body
        for part in [body[i : i + 1] for i in range(len(body))] if reply.between else [body]:
            self.wfile.write(part)
            if not owner.wait(reply.between, self.connection):
                self.close_connection = True
                return

    def log_message(self, *_):
        pass
