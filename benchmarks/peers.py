"""The peers of the round trips, all doing the same work, with the server in another process.

The work is that of a policy server: the client sends one observation, the server touches every page
of it and answers with an action chunk of 50 x 14 float32.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import importlib
import os
import socket
import struct
import time
import timeit
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, ClassVar

import numpy as np

from common import PAGE, Array, transports
from links import Iceoryx, Zenoh, installed, socket_path

CHUNK = np.zeros((50, 14), np.float32)
_LENGTH = struct.Struct("<Q")


WORK = "EDGEML_BENCHMARK_WORK"
"""The environment variable that says how a policy works, and for how long: ``compute 0.002``."""


def policy(observation: Array) -> Array:
    """Touch every page, work, and answer with a chunk that has the sum and the seconds taken."""
    began = time.perf_counter()
    CHUNK[0, 0] = observation[::PAGE].sum()
    if WORK in os.environ:
        _work()()
        CHUNK[0, 1] = time.perf_counter() - began
    return CHUNK


@functools.cache
def _work() -> Callable[[], object]:
    """What takes the time: sleep, or a computation in C without the GIL."""
    how, seconds = os.environ[WORK].split()
    if how == "sleep":
        return functools.partial(time.sleep, float(seconds))
    took = min(timeit.repeat(lambda: hashlib.sha256(bytes(1 << 20)), number=1, repeat=20))
    return functools.partial(hashlib.sha256, bytes(int(float(seconds) / took * (1 << 20))))


def _chunk(buffer: Any) -> Array:
    return np.frombuffer(buffer, np.float32).reshape(CHUNK.shape)


class Peer(ABC):
    """One way of asking a server: this is the client, and ``serve`` the server."""

    name: ClassVar[str]
    note: ClassVar[str] = ""
    busy: ClassVar[bool] = False
    """Whether the server uses the CPU while nobody asks, so that it must be stopped meanwhile."""
    patience: ClassVar[float] = 0.0
    """Seconds that the server may take to end by itself."""

    @staticmethod
    @abstractmethod
    def serve(pipe: Connection) -> None:
        """Run the server: send its address, then serve until killed, or the pipe is closed."""

    @abstractmethod
    def __init__(self, address: Any) -> None: ...

    @abstractmethod
    def call(self, observation: Array) -> Array: ...

    def answer(self, result: Array) -> Array:
        """The chunk, of what `call` gave; not timed."""
        return result

    def wake(self) -> None:  # noqa: B027 - for those whose client uses the CPU, too
        """Begin a turn."""

    def rest(self) -> None:  # noqa: B027
        """End a turn."""

    def close(self) -> None:  # noqa: B027 - several have nothing to close
        """End the client."""


class Edgeml(Peer):
    """`InferenceClient.call` over a transport."""

    patience = 2.0

    @staticmethod
    def serve_over(transport: str, pipe: Connection, keys: str | None = None) -> None:
        import edgeml

        with edgeml.InferenceServer(0, transport=transport, credentials=keys) as server:
            server.register_interface("policy", lambda payload: policy(payload["observation"]))
            server.start(threaded=True)
            pipe.send(server.url)
            pipe.poll(None)

    def __init__(self, address: str, keys: str | None = None) -> None:
        import edgeml

        self._client = edgeml.InferenceClient(url=address, timeout=30, credentials=keys)

    def call(self, observation: Array) -> Array:
        chunk: Array = self._client.call("policy", {"observation": observation})
        return chunk

    def begin(self, observation: Array) -> Any:
        """Ask, and don't wait for the answer, which `end` gives."""
        return self._client.call_async("policy", {"observation": observation})

    def end(self, begun: Any) -> Array:
        chunk: Array = begun.result(30)
        return chunk

    def close(self) -> None:
        self._client.stop()


class EdgemlZmq(Edgeml):
    name = "edgeml zmq"

    @staticmethod
    def serve(pipe: Connection) -> None:
        Edgeml.serve_over("zmq", pipe)


class EdgemlShm(Edgeml):
    name = "edgeml shm"

    @staticmethod
    def serve(pipe: Connection) -> None:
        Edgeml.serve_over("shm", pipe)


class EdgemlGrpc(Edgeml):
    name = "edgeml grpc"

    @staticmethod
    def serve(pipe: Connection) -> None:
        Edgeml.serve_over("grpc", pipe)


class RawZmq(Peer):
    """A ROUTER and a DEALER, multipart, and no copy where that pays: the least pyzmq can do."""

    @staticmethod
    def serve_at(url: str, pipe: Connection, prepare: Callable[[Any], None] | None = None) -> None:
        import zmq

        router = zmq.Context().socket(zmq.ROUTER)
        if prepare is not None:
            prepare(router)
        router.bind(url)
        pipe.send(router.getsockopt_string(zmq.LAST_ENDPOINT))
        while True:
            identity, header, frame = router.recv_multipart(copy=False)
            chunk = policy(np.frombuffer(frame.buffer, np.uint8))
            router.send_multipart([identity, header, chunk.data], copy=False)

    def __init__(self, address: str) -> None:
        import zmq

        # Below the threshold a copy is cheaper, as measured.
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._socket = context.socket(zmq.DEALER, copy_threshold=512 << 10)
        self.prepare(self._socket)
        self._socket.connect(address)

    def prepare(self, socket: Any) -> None:
        """Set what a socket needs before it connects."""

    def call(self, observation: Array) -> Array:
        self.begin(observation)
        return self.end()

    def begin(self, observation: Array) -> None:
        self._socket.send_multipart([b"a header of 16 B", observation.data], copy=False)

    def end(self, begun: None = None) -> Array:
        _, frame = self._socket.recv_multipart(copy=False)
        return _chunk(frame.buffer)

    def close(self) -> None:
        self._socket.close(linger=0)


class ZmqTcp(RawZmq):
    name = "pyzmq tcp"

    @staticmethod
    def serve(pipe: Connection) -> None:
        RawZmq.serve_at("tcp://127.0.0.1:*", pipe)


class ZmqIpc(RawZmq):
    name = "pyzmq ipc"

    @staticmethod
    def serve(pipe: Connection) -> None:
        RawZmq.serve_at(f"ipc://{socket_path('zmq')}", pipe)


class RawGrpc(Peer):
    """Unary calls, bytes there and bytes back, of any size."""

    _unlimited: ClassVar = [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
    ]

    @staticmethod
    def answer_bytes(request: bytes) -> bytes:
        return policy(np.frombuffer(request, np.uint8)).tobytes()

    @staticmethod
    def add_to(server: Any, answer: Callable[[bytes, Any], Any], credentials: Any = None) -> int:
        """Have a server give answers; returns its port."""
        grpc = importlib.import_module("grpc")
        methods = {"call": grpc.unary_unary_rpc_method_handler(answer)}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("policy", methods)])
        port: int = (
            server.add_insecure_port("127.0.0.1:0")
            if credentials is None
            else server.add_secure_port("127.0.0.1:0", credentials)
        )
        return port

    @staticmethod
    def serve_sync(
        pipe: Connection, answer: Callable[[bytes], bytes], credentials: Any = None
    ) -> None:
        grpc = importlib.import_module("grpc")
        server = grpc.server(ThreadPoolExecutor(), options=RawGrpc._unlimited)
        port = RawGrpc.add_to(server, lambda request, context: answer(request), credentials)
        server.start()
        pipe.send(port)
        server.wait_for_termination()

    @staticmethod
    def serve_aio(
        pipe: Connection, answer: Callable[[bytes], bytes], credentials: Any = None
    ) -> None:
        aio = importlib.import_module("grpc.aio")

        async def answer_soon(request: bytes, context: Any) -> bytes:
            return answer(request)

        async def run() -> None:
            server = aio.server(options=RawGrpc._unlimited)
            port = RawGrpc.add_to(server, answer_soon, credentials)
            await server.start()
            pipe.send(port)
            await server.wait_for_termination()

        asyncio.run(run())

    def __init__(self, address: int) -> None:
        # Without the last, all channels of a process share one connection.
        options = [*self._unlimited, ("grpc.use_local_subchannel_pool", 1)]
        self._channel = self.connect(f"127.0.0.1:{address}", options)
        self._ask = self._channel.unary_unary("/policy/call")

    def connect(self, target: str, options: list[tuple[str, Any]]) -> Any:
        """Make a channel."""
        return importlib.import_module("grpc").insecure_channel(target, options)

    def call(self, observation: Array) -> Array:
        return _chunk(self._ask(observation.tobytes(), timeout=30))

    def begin(self, observation: Array) -> Any:
        return self._ask.future(observation.tobytes(), timeout=30)

    def end(self, begun: Any) -> Array:
        return _chunk(begun.result())

    def close(self) -> None:
        self._channel.close()


class GrpcSync(RawGrpc):
    name = "grpc sync"

    @staticmethod
    def serve(pipe: Connection) -> None:
        RawGrpc.serve_sync(pipe, RawGrpc.answer_bytes)


class GrpcAio(RawGrpc):
    name = "grpc aio"

    @staticmethod
    def serve(pipe: Connection) -> None:
        RawGrpc.serve_aio(pipe, RawGrpc.answer_bytes)


class UnixSocket(Peer):
    """A stream socket; what is sent follows its length, and is received into kept memory."""

    name = "unix socket"

    @staticmethod
    def serve(pipe: Connection) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(socket_path("unix"))
        listener.listen()
        pipe.send(listener.getsockname())
        stream = _Stream(listener.accept()[0])
        with contextlib.suppress(EOFError):
            while True:
                stream.send(policy(stream.receive()))

    def __init__(self, address: str) -> None:
        client = socket.socket(socket.AF_UNIX)
        client.connect(address)
        self._stream = _Stream(client)

    def call(self, observation: Array) -> Array:
        self._stream.send(observation)
        return _chunk(self._stream.receive())

    def close(self) -> None:
        self._stream.socket.close()


class _Stream:
    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)  # or what is allowed
        self._kept = np.empty(1 << 16, np.uint8).data

    def send(self, array: Array) -> None:
        data = array.data.cast("B")
        sent = self.socket.sendmsg([_LENGTH.pack(len(data)), data]) - _LENGTH.size
        if sent < len(data):
            self.socket.sendall(data[sent:])

    def receive(self) -> Array:
        """What was sent, in memory that the next call overwrites."""
        got = self.socket.recv_into(self._kept)  # small messages whole
        if got < _LENGTH.size:
            raise EOFError("the other side has gone")
        end = _LENGTH.size + _LENGTH.unpack_from(self._kept)[0]
        if end > len(self._kept):
            larger = np.empty(end, np.uint8).data
            larger[:got] = self._kept[:got]
            self._kept = larger
        while got < end:
            part = self.socket.recv_into(self._kept[got:end])
            if not part:
                raise EOFError("the other side has gone")
            got += part
        return np.frombuffer(self._kept[_LENGTH.size : end], np.uint8)


class _InProcess(Peer):
    """No server at all: the bound."""

    @staticmethod
    def serve(pipe: Connection) -> None:
        pipe.send(None)
        pipe.poll(None)

    def __init__(self, address: None) -> None:
        self._kept = np.empty(0, np.uint8)

    def _copy(self, observation: Array) -> None:
        if len(self._kept) != len(observation):
            self._kept = np.empty_like(observation)
        np.copyto(self._kept, observation)


class Memcpy(_InProcess):
    name = "memcpy"
    note = "memcpy and 'copy, touch' work in one process: one copy into kept memory, a bound"

    def call(self, observation: Array) -> Array:
        self._copy(observation)
        return self._kept

    def answer(self, result: Array) -> Array:
        return policy(result)


class CopyAndTouch(_InProcess):
    name = "copy, touch"

    def call(self, observation: Array) -> Array:
        self._copy(observation)
        return policy(self._kept)


class IceoryxBusy(Peer):
    """Two publish-subscribe services of iceoryx2, both sides polling without a pause."""

    name = "iceoryx2 busy"
    busy = True
    polls: ClassVar[bool] = True

    @staticmethod
    def serve(pipe: Connection) -> None:
        _serve_iceoryx(pipe, polls=True)

    def __init__(self, address: str) -> None:
        self._address, self._size = address, 0
        self._node = Iceoryx()
        self._from = self._node.subscriber(f"{address}/chunk")
        if not self.polls:
            self._wait = self._node.listener(f"{address}/chunk").blocking_wait
            self._notify = self._node.notifier(f"{address}/observation").notify

    def call(self, observation: Array) -> Array:
        if len(observation) > self._size:  # once a size, and in the calls that warm up
            self._size = len(observation)
            self._to = None
            self._to = self._node.publisher(f"{self._address}/observation", self._size)
        self._node.put(self._to, [observation])
        if not self.polls:
            self._notify()
            self._wait()
        while (sample := self._from.receive()) is None:
            if not self.polls:
                self._wait()
        chunk: np.ndarray[Any, Any] = _chunk(Iceoryx.view(sample)).copy()
        sample.delete()
        return chunk


class IceoryxEvent(IceoryxBusy):
    """The same, both sides sleeping until its event service wakes them."""

    name = "iceoryx2 event"
    busy = False
    polls = False

    @staticmethod
    def serve(pipe: Connection) -> None:
        _serve_iceoryx(pipe, polls=False)


def _serve_iceoryx(pipe: Connection, polls: bool) -> None:
    node, address = Iceoryx(), f"policy/{os.getpid()}"
    come = node.subscriber(f"{address}/observation")
    go = node.publisher(f"{address}/chunk", CHUNK.nbytes)
    if not polls:
        wait = node.listener(f"{address}/observation").blocking_wait
        notify = node.notifier(f"{address}/chunk").notify
    pipe.send(address)
    while True:
        if not polls:
            wait()
        while (sample := come.receive()) is not None:
            chunk = policy(Iceoryx.view(sample))
            sample.delete()
            node.put(go, [chunk])
            if not polls:
                notify()


class Portal(Peer):
    """portal as it comes."""

    name = "portal"
    busy = True

    @staticmethod
    def serve(pipe: Connection) -> None:
        portal = importlib.import_module("portal")
        port = portal.free_port()
        server = portal.Server(port, logging=False)
        server.bind("policy", policy)
        pipe.send(port)
        server.start()

    def __init__(self, address: int) -> None:
        self._address = address
        self.wake()

    def wake(self) -> None:
        portal = importlib.import_module("portal")
        self._client = portal.Client(f"127.0.0.1:{self._address}", logging=False)
        self.call(np.zeros(1, np.uint8))

    def rest(self) -> None:
        self._client.close()  # its thread wakes up thousands of times a second

    def call(self, observation: Array) -> Array:
        chunk: Array = self._client.call("policy", observation).result()
        return chunk


class ZenohShm(Peer):
    """Two publishers and subscribers of zenoh, with its shared memory; the server in a callback."""

    name = "zenoh"
    note = "zenoh's Python API copies once more on each side, to bytes and from them"
    patience = 2.0

    @staticmethod
    def serve(pipe: Connection) -> None:
        path = socket_path("zenoh")
        link = Zenoh(listen=path)
        publisher = link.publisher("chunk")

        def answer(sample: Any) -> None:
            publisher.put(policy(np.frombuffer(sample.payload.to_bytes(), np.uint8)).tobytes())

        subscriber = link.session.declare_subscriber("observation", answer)
        pipe.send(path)
        pipe.poll(None)
        subscriber.undeclare()
        link.session.close()

    def __init__(self, address: str) -> None:
        self._link = Zenoh(connect=address)
        self._from = self._link.session.declare_subscriber("chunk")
        self._to = self._link.publisher("observation", readers=True)

    def call(self, observation: Array) -> Array:
        self._link.put(self._to, [observation])
        return _chunk(self._from.recv().payload.to_bytes())

    def close(self) -> None:
        self._link.session.close()


class Agentlace(Peer):
    """agentlace as it comes."""

    name = "agentlace"
    note = "agentlace formats every message into a debug string, whether or not it is logged"

    @staticmethod
    def serve(pipe: Connection) -> None:
        inference = importlib.import_module("agentlace.inference")

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = inference.InferenceServer(port_num=port)
        server.register_interface("policy", lambda payload: policy(payload["observation"]))
        server.start(threaded=True)
        pipe.send(port)
        pipe.poll(None)

    def __init__(self, address: int) -> None:
        inference = importlib.import_module("agentlace.inference")
        self._client = inference.InferenceClient("127.0.0.1", port_num=address)

    def call(self, observation: Array) -> Array:
        chunk: Array = self._client.call("policy", {"observation": observation})
        return chunk


def find() -> dict[str, type[Peer]]:
    """Those that are installed, by name."""
    found: list[type[Peer]] = [ZmqTcp, ZmqIpc, UnixSocket, Memcpy, CopyAndTouch]
    ours = (EdgemlZmq, EdgemlShm, EdgemlGrpc)
    found += [peer for peer in ours if peer.name.split()[1] in transports()]
    found += [GrpcSync, GrpcAio] * installed("grpc")
    found += [IceoryxBusy, IceoryxEvent] * installed("iceoryx2")
    found += [Portal] * installed("portal") + [ZenohShm] * installed("zenoh")
    found += [Agentlace] * installed("agentlace")
    return {peer.name: peer for peer in found}


REFERENCES = (ZmqTcp.name, ZmqIpc.name)
"""Ratios refer to the faster of these."""

GRPC_REFERENCES = (GrpcSync.name, GrpcAio.name)
"""Those of grpc's rows refer to the faster of these as well."""
