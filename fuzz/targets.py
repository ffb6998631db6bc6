"""What is fuzzed: everything that takes bytes from a peer. A target is given bytes and must take
them, or refuse them by an error of edgeml's own tree; any other exception is a find.
"""

from __future__ import annotations

import socket
import threading
import time
import tracemalloc
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import seeds
from spelling import respell

from edgeml import EdgemlError, InferenceServer, Malformed
from edgeml.core import Message, Url, load_codec, load_transport, unframe, wire
from edgeml.core.client import Client
from edgeml.core.frames import frame
from edgeml.core.pieces import PREFIX
from edgeml.images import ImageCodec

__all__ = ["TARGETS", "Target"]

_SLACK = 1 << 20  # bytes that a decoding may take beyond its input
_MEASURED = 64  # one decoding of so many is measured, for it takes ten times as long
_WATCHED = 500  # after so many inputs a good client's call is answered ...
_PATIENCE = 10.0  # ... within so many seconds, however busy this machine is besides


class Target(ABC):
    """Something that is given bytes."""

    @abstractmethod
    def messages(self) -> list[Message]:
        """Messages as they really come, to begin with."""

    def wrap(self, message: Message) -> bytes:
        """A message as the bytes that `take` takes; by default a frame."""
        return frame(message)

    @abstractmethod
    def take(self, data: bytes) -> None:
        """Give it bytes; raises what is a find."""

    def close(self) -> None:  # noqa: B027 - most have nothing to end
        """End what was started; raises what is a find."""


class Decoder(Target):
    """The msgpack codec, bare and around images, given frames.

    What is decoded must encode to the same bytes, but for what docs/wire.md leaves to a writer.
    """

    def __init__(self) -> None:
        self._codec = load_codec("msgpack")
        self._images = ImageCodec(self._codec)
        self._count = 0

    def messages(self) -> list[Message]:
        return [*seeds.payloads(), *seeds.hostile_payloads()]

    def take(self, data: bytes) -> None:
        self._count += 1
        try:
            message = unframe(data)
        except Malformed:
            return
        writable = bool(len(data) & 1)
        with suppress(Malformed):
            self._images.decode(message, writable=writable)
        try:
            if self._count % _MEASURED:
                value = self._codec.decode(message, writable=writable)
            else:
                value = self._measure(message)
        except Malformed:
            return
        again = self._codec.encode(value)
        right = respell(message)
        assert again.header == right.header, f"{message.header!r} became {again.header!r}"
        assert list(map(bytes, again.buffers)) == list(map(bytes, right.buffers)), "buffers differ"
        assert self._codec.encode(self._codec.decode(again)).header == again.header

    def _measure(self, message: Message) -> Any:
        tracemalloc.start()
        try:
            value = self._codec.decode(message)
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert most < 64 * message.nbytes + _SLACK, f"{most} bytes for {message.nbytes}"
        return value


class Envelope(Target):
    """Every envelope and body, from either end."""

    KINDS = (
        *(wire.Request, wire.Answer, wire.Result, wire.Hello, wire.Welcome, wire.Pong),
        wire.Credit,
    )

    def messages(self) -> list[Message]:
        return [Message(header) for header in seeds.envelopes()]

    def wrap(self, message: Message) -> bytes:
        return message.header

    def take(self, data: bytes) -> None:
        for kind in self.KINDS:
            with suppress(Malformed):
                found = wire.unpack(kind, data)
                again = wire.unpack(kind, wire.pack(found))
                # NaN is equal to nothing; a map's unknown keys are passed over, and so is its rest.
                assert repr(again) == repr(found)
                if isinstance(found, wire.Answer):
                    error = wire.error_of(found)
                    assert isinstance(error, EdgemlError)
                    wire.pack_error(error)


class Entry(Target):
    """A server's entry over one transport, whose good client is answered all the time."""

    transport = "inproc"

    def __init__(self) -> None:
        self.server = InferenceServer(0, transport=self.transport)
        self.server.register_interface("echo", lambda payload: payload)
        self.server.register_interface("zeros", lambda payload: np.zeros(100_000, np.uint8))
        self.server.start(threaded=True)
        self.url = Url.parse(self.server.url)
        self._good = Client("inference", [self.url])
        self._requester = load_transport(self.transport).connect(self.url, 5.0)
        self._session = b""
        self._count = 0
        self._greet()

    def _greet(self) -> None:
        """Have a session: the one before may have got a goodbye, or a thousand credits."""
        if self._session:
            self._ask(wire.Request(wire.GOODBYE, self._session, "", 5.0, b""))
        hello = wire.Hello(wire.PROTOCOL, "inference", "fuzzer", "", "msgpack", {})
        answer = self._ask(wire.Request(wire.HELLO, b"", "", 5.0, wire.pack(hello)))
        assert answer.status == wire.OK, wire.error_of(answer)
        self._session = wire.unpack(wire.Welcome, answer.body).session

    def _ask(self, request: wire.Request) -> wire.Answer:
        reply = self._requester.call(Message(wire.pack(request)), 5.0)
        return wire.unpack(wire.Answer, reply.header)

    def messages(self) -> list[Message]:
        return list(seeds.requests())

    def take(self, data: bytes) -> None:
        self._count += 1
        self.send(data.replace(seeds.SESSION, self._session))
        if self._count % _WATCHED == 0:
            self.watch()
            self._greet()

    def send(self, data: bytes) -> None:
        """Send what may be a message of the session; by default a frame."""
        with suppress(Malformed):
            self._requester.request(unframe(data))

    def watch(self) -> None:
        """See that a good client is answered."""
        began = time.monotonic()
        assert self._good.call("echo", self._count, timeout=_PATIENCE) == self._count
        took = time.monotonic() - began
        assert took < _PATIENCE, f"a good client's call took {took:.2f} s"

    def close(self) -> None:
        self.watch()
        self._requester.close()
        self._good.close()
        self.server.stop()


class ZmqEntry(Entry):
    """Frames from a plain DEALER."""

    transport = "zmq"

    def __init__(self) -> None:
        import zmq

        super().__init__()
        self._zmq = zmq
        self._context = zmq.Context()
        self._open()

    def _open(self) -> None:
        self._dealer = self._context.socket(self._zmq.DEALER)
        self._dealer.linger = 0
        self._dealer.sndtimeo = 5000
        self._dealer.connect(f"tcp://127.0.0.1:{self.url.port}")

    def wrap(self, message: Message) -> bytes:
        return seeds.CUT.join([bytes(8) + message.header, *map(bytes, message.buffers)])

    def send(self, data: bytes) -> None:
        self._dealer.send_multipart(data.split(seeds.CUT))
        while self._dealer.poll(0):
            self._dealer.recv_multipart()
        if self._count % 1000 == 0:  # a peer may be cut off, and a new one comes
            self._dealer.close()
            self._open()

    def close(self) -> None:
        self._dealer.close()
        self._context.term()
        super().close()


class GrpcEntry(Entry):
    """Bytes from a plain channel, to each method."""

    transport = "grpc"

    def __init__(self) -> None:
        import grpc

        super().__init__()
        self._grpc = grpc
        self._channel = grpc.insecure_channel(f"127.0.0.1:{self.url.port}")
        path = "/edgeml.Transport/"
        self._request = self._channel.unary_unary(path + "Request")
        self._fetch = self._channel.unary_stream(path + "Fetch")
        self._stream = self._channel.stream_stream(path + "Stream")
        self._left: list[Any] = []

    def wrap(self, message: Message) -> bytes:
        framed = frame(message)
        return PREFIX.pack(0, len(framed)) + framed

    def send(self, data: bytes) -> None:
        if data[:1] == b"\x01":
            left = self._fetch(data[:64], timeout=5.0)
        elif data[:1] == b"\x02":
            left = self._stream(iter(data.split(seeds.CUT)), timeout=5.0)
        else:
            left = self._request.future(data, timeout=5.0)
        self._left.append(left)
        if len(self._left) == 100:
            self._wait()

    def _wait(self) -> None:
        for left in self._left:
            left.cancel()
            with suppress(self._grpc.RpcError, self._grpc.FutureCancelledError):
                left.result(5.0) if hasattr(left, "result") else list(left)
        self._left.clear()

    def close(self) -> None:
        self._wait()
        self._channel.close()
        super().close()


class ShmEntry(Entry):
    """Records on the Unix socket."""

    transport = "shm"

    def __init__(self) -> None:
        super().__init__()
        self._socket: socket.socket | None = None

    def wrap(self, message: Message) -> bytes:
        from edgeml.transports.shm.channel import _DESCRIPTOR, _HEAD, _HELLO, _MAGIC, _MESSAGE

        hello = _HEAD.pack(_HELLO, 0, 0, 0, 0, 1) + _MAGIC + (1 << 30).to_bytes(8, "little")
        hello += bytes(16)
        sizes = [buffer.nbytes for buffer in message.buffers]
        record = _HEAD.pack(_MESSAGE, 0, 0, len(sizes), len(message.header), 1)
        record += b"".join(_DESCRIPTOR.pack(0, 0, 0, size) for size in sizes)
        record += message.header + b"".join(map(bytes, message.buffers))
        return seeds.CUT.join([hello, record])

    def send(self, data: bytes) -> None:
        # Each input is a connection, which is cut off at the first record that is none.
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(f"\0edgeml/{self.url.port}")  # waits where many are not accepted yet
            sock.settimeout(5.0)
            with suppress(OSError):
                for record in data.split(seeds.CUT):
                    sock.send(record[: 1 << 16])


class WebSocketEntry(Entry):
    """Messages on a WebSocket."""

    transport = "ws"

    def __init__(self) -> None:
        super().__init__()
        from websockets.exceptions import ConnectionClosed
        from websockets.sync.client import connect

        self._lost = ConnectionClosed
        self._connect: Callable[[], Any] = lambda: connect(
            f"ws://127.0.0.1:{self.url.port}", max_size=None, compression=None, proxy=None
        )
        self._link = self._connect()

    def wrap(self, message: Message) -> bytes:
        framed = frame(message)
        return PREFIX.pack(self._count, len(framed)) + framed

    def send(self, data: bytes) -> None:
        try:
            self._link.send(data)
            while True:
                self._link.recv(timeout=0)
        except TimeoutError:
            return
        except self._lost:
            self._link = self._connect()

    def close(self) -> None:
        self._link.close()
        super().close()


class Handshake(Target):
    """Hellos, each of which is answered or refused, and whose clients leave again."""

    def __init__(self) -> None:
        self._entry = Entry()
        self._requester = self._entry._requester
        self._count = 0

    def wrap(self, message: Message) -> bytes:
        return message.header

    def messages(self) -> list[Message]:
        hellos = [wire.Hello(wire.PROTOCOL, "inference", "a", "b", "msgpack", {})]
        hellos += [
            wire.Hello(
                wire.PROTOCOL, "inference", "a", "b", codec, {"x": [1, {"y": None}]}, extensions
            )
            for codec in ("msgpack", "cloudpickle")
            for extensions in (
                {"resume": bytes(16)},
                {"token": "secret"},
                {"images": {"decodes": ["jpeg"], "encodes": ["png"]}},
                {"contracts": {"echo": {"rate": 5.0}}},
            )
        ]
        return [Message(each) for each in (*map(wire.pack, hellos), *seeds.envelopes())]

    def take(self, data: bytes) -> None:
        self._count += 1
        request = wire.Request(wire.HELLO, b"", "", 5.0, data)
        reply = self._requester.call(Message(wire.pack(request)), 5.0)
        answer = wire.unpack(wire.Answer, reply.header)
        if answer.status == wire.OK:
            session = wire.unpack(wire.Welcome, answer.body).session
            goodbye = wire.Request(wire.GOODBYE, session, "", 5.0, b"")
            self._requester.call(Message(wire.pack(goodbye)), 5.0)
        else:
            assert isinstance(wire.error_of(answer), EdgemlError)
        if self._count % _WATCHED == 0:
            self._entry.watch()

    def close(self) -> None:
        self._entry.close()


TARGETS: dict[str, Callable[[], Target]] = {
    "decoder": Decoder,
    "envelope": Envelope,
    "handshake": Handshake,
    "inproc": Entry,
    "zmq": ZmqEntry,
    "grpc": GrpcEntry,
    "shm": ShmEntry,
    "ws": WebSocketEntry,
}

_raised: list[threading.ExceptHookArgs] = []


def watch_threads() -> list[threading.ExceptHookArgs]:
    """Note what ends a thread; returns where it is noted."""
    threading.excepthook = _raised.append
    return _raised


CORPUS = Path(__file__).with_name("corpus")
"""Inputs that once were a find, by target; they are tried before all others."""
