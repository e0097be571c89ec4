"""What comes to the hub's port from elsewhere does not end the run."""

import socket
import threading

import pytest

from lm_jax.distributed.hub import Hub
from lm_jax.distributed.link import Link


@pytest.mark.parametrize("noise", [b"1\n", b"[]\n", b'{"kind": "at"}\n', b'{"kind": "hello"}\n', b"GET / HTTP/1.1\n"])
def test_noise_before_the_start(noise):
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    Hub(listener, 2, 30.0, 30.0)
    stranger = socket.create_connection(address)
    stranger.sendall(noise)
    joined = []

    def join(number):
        joined.append(Link(address, number, 2, 20.0, 30.0, end=lambda line: None, leaving=lambda: False))

    threads = [threading.Thread(target=join, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(25)
    assert len(joined) == 2
    stranger.close()
    for link in joined:
        threading.Thread(target=link.finish, daemon=True).start()
