"""The peers that the benchmarks compare, all doing the same work in a server process of their own.

The work is that of a policy server: the client sends one observation, the server touches every page
of it and answers with an action chunk of 50 x 14 float32.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
from abc import ABC, abstractmethod
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, ClassVar

import numpy as np

Array = np.ndarray[Any, Any]

CHUNK = np.zeros((50, 14), np.float32)
PAGE = 4096


def policy(observation: Array) -> Array:
    """Touch every page, and answer with a chunk."""
    CHUNK[0, 0] = observation[::PAGE].sum()
    return CHUNK


class Peer(ABC):
    """One way of asking a server, with the server in another process."""

    name: ClassVar[str]
    note: ClassVar[str] = ""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()  # the server ends when this end is closed
        self._process = context.Process(target=type(self).serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self.connect(self._pipe.recv())

    @classmethod
    def available(cls) -> bool:
        return True

    @staticmethod
    @abstractmethod
    def serve(ready: Connection) -> None:
        """Run the server: send its address through ``ready``, then serve until killed."""

    @abstractmethod
    def connect(self, address: Any) -> None: ...

    @abstractmethod
    def call(self, observation: Array) -> Array: ...

    def close(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.join()


class Edgeml(Peer):
    """`InferenceClient.call` over a transport."""

    name = "edgeml zmq"
    transport: ClassVar[str] = "zmq"

    @staticmethod
    def serve(ready: Connection) -> None:
        Edgeml.serve_over("zmq", ready)

    @staticmethod
    def serve_over(transport: str, ready: Connection) -> None:
        import edgeml

        server = edgeml.InferenceServer(0, transport=transport)
        server.register_interface("policy", lambda payload: policy(payload["observation"]))
        server.start(threaded=True)
        ready.send(server.url)
        ready.poll(None)

    def connect(self, address: str) -> None:
        import edgeml

        self._client = edgeml.InferenceClient("", 0, transport=address, timeout=30)

    def call(self, observation: Array) -> Array:
        chunk: Array = self._client.call("policy", {"observation": observation})
        return chunk

    def close(self) -> None:
        self._client.stop()
        super().close()


class RawZmq(Peer):
    """A ROUTER and a DEALER, multipart, ``copy=False``: the least that pyzmq can do."""

    name = "pyzmq"

    @staticmethod
    def serve(ready: Connection) -> None:
        import zmq

        router = zmq.Context().socket(zmq.ROUTER)
        ready.send(f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}")
        while True:
            identity, header, frame = router.recv_multipart(copy=False)
            chunk = policy(np.frombuffer(frame.buffer, np.uint8))
            router.send_multipart([identity, header, chunk.data], copy=False)

    def connect(self, address: str) -> None:
        import zmq

        self._socket: zmq.Socket[bytes] = zmq.Context().socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.connect(address)

    def call(self, observation: Array) -> Array:
        self._socket.send_multipart([b"a header of 16 B", observation.data], copy=False)
        _, frame = self._socket.recv_multipart(copy=False)
        return np.frombuffer(frame.buffer, np.float32).reshape(50, 14)

    def close(self) -> None:
        self._socket.close()
        super().close()


class Agentlace(Peer):
    """agentlace as it comes."""

    name = "agentlace"
    note = "agentlace formats every message into a debug string, whether or not it is logged"

    @classmethod
    def available(cls) -> bool:
        return importlib.util.find_spec("agentlace") is not None

    @staticmethod
    def serve(ready: Connection) -> None:
        import socket

        from agentlace.inference import InferenceServer  # type: ignore[import-not-found]

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = InferenceServer(port_num=port)
        server.register_interface("policy", lambda payload: policy(payload["observation"]))
        server.start(threaded=True)
        ready.send(port)
        ready.poll(None)

    def connect(self, address: int) -> None:
        from agentlace.inference import InferenceClient

        self._client = InferenceClient("127.0.0.1", port_num=address)

    def call(self, observation: Array) -> Array:
        chunk: Array = self._client.call("policy", {"observation": observation})
        return chunk


PEERS: dict[str, Callable[[], Peer]] = {
    peer.name: peer for peer in (RawZmq, Edgeml, Agentlace) if peer.available()
}
"""Those that are installed, the one that ratios refer to first."""
