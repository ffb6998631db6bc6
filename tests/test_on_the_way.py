"""Somebody between a client and its server, who changes or repeats what passes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeml import EdgemlError, InferenceClient, InferenceServer
from edgeml.cli.keygen import make_client_keys, make_server_keys
from pairs import started

TRANSPORTS = ("grpc", "ws", "zmq")
PAYLOAD = np.arange(50_000, dtype=np.uint32)


class Between:
    """Passes on what a client and its server say to each other, by way of ``change(data)``.

    Attributes:
        change: what is done to each piece that the client sends.
        said: all that the client has sent, by connection.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.change: Callable[[bytes], bytes] = lambda data: data
        self.said: list[bytearray] = []
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                said = bytearray()
                self.said.append(said)
                self._sockets += [client, server]
                for pump in (
                    lambda c=client, s=server, b=said: self._pump(c, s, b),
                    lambda c=client, s=server: self._pump(s, c, None),
                ):
                    thread = threading.Thread(target=pump)
                    self._threads.append(thread)
                    thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, said: bytearray | None) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if said is not None:
                    said += data
                    data = self.change(data)
                sink.sendall(data)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in self._sockets:
            each.close()


@contextmanager
def between(server: InferenceServer) -> Iterator[Between]:
    made = Between(server.port)
    try:
        yield made
    finally:
        made.close()


def flipped(data: bytes) -> bytes:
    """Some bytes with one bit changed, in the middle of a long piece."""
    if len(data) < 30_000:
        return data
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    return bytes(changed)


@pytest.fixture
def keys(tmp_path):
    """A server's and a client's."""
    made = make_server_keys(tmp_path / "keys")
    return made, make_client_keys(made, "robot")


def what_arrives_changed(transport: str, server_keys: Path | None, robot: Path | None) -> list[Any]:
    """What a handler gets of what was changed on its way."""
    arrived: list[Any] = []
    server = InferenceServer(0, transport=transport, credentials=server_keys)
    server.register_interface("put", lambda payload: arrived.append(np.array(payload)))
    with started(server), between(server) as way:
        client = InferenceClient(
            url=f"{transport}://127.0.0.1:{way.port}", credentials=robot, timeout=5
        )
        with client:
            client.call("put", PAYLOAD)
            way.change = flipped
            with suppress(EdgemlError):
                client.call("put", PAYLOAD, timeout=1)
        way.change = lambda data: data
        with InferenceClient(url=server.url, credentials=robot, timeout=5) as client:
            client.call("put", PAYLOAD)
    assert len(arrived) >= 2
    return [payload for payload in arrived if not np.array_equal(payload, PAYLOAD)]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_without_keys_what_is_changed_on_the_way_arrives(transport):
    """So the other test can fail."""
    assert what_arrives_changed(transport, None, None)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_with_keys_what_is_changed_on_the_way_never_arrives(transport, keys):
    assert not what_arrives_changed(transport, *keys)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_is_said_again_by_somebody_else_counts_for_nothing(transport, keys):
    arrived: list[int] = []
    server = InferenceServer(0, transport=transport, credentials=keys[0])
    server.register_interface("put", arrived.append)
    with started(server), between(server) as way:
        url = f"{transport}://127.0.0.1:{way.port}"
        with InferenceClient(url=url, credentials=keys[1], timeout=5) as client:
            client.call("put", 1)
            for said in list(way.said):
                with socket.create_connection(("127.0.0.1", server.port)) as other:
                    other.settimeout(1)
                    with suppress(OSError):
                        other.sendall(said)
                        while other.recv(1 << 16):
                            pass
            client.call("put", 2)
    assert arrived == [1, 2]
