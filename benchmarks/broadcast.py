"""Time weights to all of N subscriber processes, side by side with the peers, in one run.

    python benchmarks/broadcast.py [--json FILE]

Eight arrays are published to N processes that touch every page of them; the time is from the call
until the last of them has. The bound, to which ratios refer, is one copy into memory that all N
have mapped from before, and a byte to each of them.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, ClassVar

import numpy as np

from common import (
    PAGE,
    Array,
    Child,
    Row,
    Table,
    add_ratios,
    interleaved,
    medians,
    parser,
    pipe,
    save,
    transports,
)
from links import Iceoryx, Zenoh, installed, socket_path, workspace

ARRAYS = 8
CASES = {
    "50 MB, N=1": (50_000_000, 1),
    "50 MB, N=8": (50_000_000, 8),
    "400 MB, N=1": (4 * 10**8, 1),
}


def touch(arrays: Sequence[Array]) -> int:
    """Read every page; the sum, modulo 256."""
    total = 0
    for array in arrays:
        total += int(array.reshape(-1).view(np.uint8)[::PAGE].sum())
    return total % 256


class Peer(ABC):
    """A publisher here, and N subscribers in processes of their own."""

    name: ClassVar[str]
    note: ClassVar[str] = ""
    patience: ClassVar[float] = 0.0
    """Seconds that a subscriber may take to end by itself."""

    def __init__(self, size: int, readers: int) -> None:
        """Open the publisher, and call `start` with what a subscriber needs to know."""
        self.size, self.readers = size, readers
        self.children: list[Child] = []
        self._done, self._theirs = pipe()

    def start(self, *address: Any) -> None:
        for _ in range(self.readers):
            self.children.append(Child(_subscriber, type(self), self._theirs, self.size, address))
        for child in self.children:
            child.receive()

    @staticmethod
    @abstractmethod
    def subscribe(
        pipe: Connection, touched: Callable[[Sequence[Array]], None], size: int, *address: Any
    ) -> None:
        """Send "ready", then call ``touched`` with all that is published, until killed."""

    @abstractmethod
    def publish(self, arrays: list[Array]) -> None: ...

    def wait(self, expected: int) -> None:
        """Until all subscribers have reported what they should."""
        got = b""
        while len(got) < self.readers:
            got += os.read(self._done.fileno(), self.readers)
        if got != bytes([expected]) * self.readers:
            raise AssertionError(f"{self.name} brought something else")

    def close(self) -> None:
        for child in self.children:
            child.pipe.close()
        for child in self.children:
            child.close(self.patience)
        self._done.close()
        self._theirs.close()


def _subscriber(
    ready: Connection, kind: type[Peer], done: Connection, size: int, address: tuple[Any, ...]
) -> None:
    def touched(arrays: Sequence[Array]) -> None:
        os.write(done.fileno(), bytes([touch(arrays)]))

    kind.subscribe(ready, touched, size, *address)


class OneCopy(Peer):
    """One copy into shared memory, and a byte through a pipe to each: the bound."""

    name = "one copy"

    def __init__(self, size: int, readers: int) -> None:
        super().__init__(size, readers)
        self._fd = os.memfd_create("bound")
        os.ftruncate(self._fd, size)
        self._map = np.frombuffer(mmap.mmap(self._fd, size), np.uint8)
        self.start(f"/proc/{os.getpid()}/fd/{self._fd}")

    @staticmethod
    def subscribe(
        pipe: Connection, touched: Callable[[Sequence[Array]], None], size: int, *address: Any
    ) -> None:
        with open(address[0], "rb") as file:
            mapped = np.frombuffer(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ), np.uint8)
        pipe.send("ready")
        while os.read(pipe.fileno(), 1):
            touched([mapped])

    def publish(self, arrays: list[Array]) -> None:
        at = 0
        for array in arrays:
            self._map[at : at + array.nbytes] = array.view(np.uint8)
            at += array.nbytes
        for child in self.children:
            os.write(child.pipe.fileno(), b"x")

    def close(self) -> None:
        super().close()
        os.close(self._fd)


class Edgeml(Peer):
    """`publish_network` to `recv_network_callback`, over a transport."""

    transport: ClassVar[str]
    patience = 2.0

    def __init__(self, size: int, readers: int) -> None:
        import edgeml

        super().__init__(size, readers)
        config = edgeml.TrainerConfig(0, None, transport=self.transport)
        self._server = edgeml.TrainerServer(config)
        self._server.start(threaded=True)
        self.start(self._server.url)

    @staticmethod
    def subscribe(
        pipe: Connection, touched: Callable[[Sequence[Array]], None], size: int, *address: Any
    ) -> None:
        import edgeml

        config = edgeml.TrainerConfig(0, None, transport=address[0])
        with edgeml.TrainerClient("actor", "", config) as client:
            client.recv_network_callback(lambda weights: touched(list(weights.values())))
            pipe.send("ready")
            with contextlib.suppress(EOFError):
                pipe.recv()

    def publish(self, arrays: list[Array]) -> None:
        self._server.publish_network({f"layer{n}": array for n, array in enumerate(arrays)})

    def close(self) -> None:
        super().close()
        self._server.stop()


class EdgemlZmq(Edgeml):
    name = "edgeml zmq"
    transport = "zmq"


class EdgemlShm(Edgeml):
    name = "edgeml shm"
    transport = "shm"


class RawZmq(Peer):
    """PUB and SUB, one frame for each array, no copies."""

    url: ClassVar[str]

    def __init__(self, size: int, readers: int) -> None:
        import zmq

        super().__init__(size, readers)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.XPUB)  # PUB that tells when it is subscribed
        self._socket.setsockopt(zmq.XPUB_VERBOSE, 1)  # by each
        url = self.url
        self._socket.bind(url if url.startswith("tcp") else f"ipc://{socket_path('pub')}")
        self.start(self._socket.getsockopt_string(zmq.LAST_ENDPOINT))
        for _ in range(readers):
            if not self._socket.poll(10_000):
                raise TimeoutError("nobody subscribes")
            self._socket.recv()

    @staticmethod
    def subscribe(
        pipe: Connection, touched: Callable[[Sequence[Array]], None], size: int, *address: Any
    ) -> None:
        import zmq

        subscriber = zmq.Context().socket(zmq.SUB)
        subscriber.subscribe(b"")
        subscriber.connect(address[0])
        pipe.send("ready")
        while True:
            frames = subscriber.recv_multipart(copy=False)
            touched([np.frombuffer(frame.buffer, np.uint8) for frame in frames])

    def publish(self, arrays: list[Array]) -> None:
        self._socket.send_multipart([array.data for array in arrays], copy=False)

    def close(self) -> None:
        super().close()
        self._context.destroy(linger=0)


class ZmqTcp(RawZmq):
    name = "pyzmq tcp"
    url = "tcp://127.0.0.1:*"


class ZmqIpc(RawZmq):
    name = "pyzmq ipc"
    url = "ipc"


class IceoryxEvent(Peer):
    """One sample that is loaned and shared, and an event that wakes the subscribers."""

    name = "iceoryx2"

    def __init__(self, size: int, readers: int) -> None:
        super().__init__(size, readers)
        node, topic = Iceoryx(), f"weights/{time.monotonic_ns()}"
        self._put = node.put
        self._publisher = node.publisher(topic, size, readers)
        self._notifier = node.notifier(topic, readers)
        self.start(topic, readers)

    @staticmethod
    def subscribe(
        pipe: Connection, touched: Callable[[Sequence[Array]], None], size: int, *address: Any
    ) -> None:
        node = Iceoryx()
        subscriber, listener = node.subscriber(*address), node.listener(*address)
        pipe.send("ready")
        while True:
            listener.blocking_wait()
            while (sample := subscriber.receive()) is not None:
                touched([Iceoryx.view(sample)])
                sample.delete()

    def publish(self, arrays: list[Array]) -> None:
        self._put(self._publisher, arrays)
        self._notifier.notify()


class ZenohShm(Peer):
    """A publisher of zenoh with its shared memory."""

    name = "zenoh"
    note = "zenoh's Python API copies once more on each side, to bytes and from them"
    patience = 2.0

    def __init__(self, size: int, readers: int) -> None:
        super().__init__(size, readers)
        path = f"{socket_path('zenoh')}-{time.monotonic_ns()}"
        self._link = Zenoh(listen=path)
        self.start(path)
        self._publisher = self._link.publisher("weights", readers=True)
        for child in self.children:  # which have seen one publication
            while not child.pipe.poll(0.05):
                self._publisher.put(b"are you there?")
            child.receive()

    @staticmethod
    def subscribe(
        pipe: Connection, touched: Callable[[Sequence[Array]], None], size: int, *address: Any
    ) -> None:
        link, there = Zenoh(connect=address[0]), queue.SimpleQueue[None]()

        def take(sample: Any) -> None:
            data = sample.payload.to_bytes()
            if len(data) == size:
                touched([np.frombuffer(data, np.uint8)])
            else:
                there.put(None)

        subscriber = link.session.declare_subscriber("weights", take)
        pipe.send("ready")
        there.get()
        pipe.send("there")
        with contextlib.suppress(EOFError):
            pipe.recv()
        subscriber.undeclare()
        link.session.close()

    def publish(self, arrays: list[Array]) -> None:
        self._link.put(self._publisher, arrays)

    def close(self) -> None:
        super().close()
        self._link.session.close()


def find() -> dict[str, type[Peer]]:
    """Those that are installed, by name, the bound first."""
    found: list[type[Peer]] = [OneCopy, ZmqTcp, ZmqIpc]
    found += [peer for peer in (EdgemlZmq, EdgemlShm) if peer.transport in transports()]
    found += [IceoryxEvent] * installed("iceoryx2") + [ZenohShm] * installed("zenoh")
    return {peer.name: peer for peer in found}


def measure(kinds: dict[str, type[Peer]], size: int, readers: int, rounds: int) -> dict[str, Row]:
    """Medians over rounds of the milliseconds until the last has touched everything."""
    arrays = [np.ones(size // ARRAYS // 4, np.float32) for _ in range(ARRAYS)]
    kept: dict[str, list[Row]] = {name: [] for name in kinds}
    with contextlib.ExitStack() as stack:
        peers = {}
        for name, kind in kinds.items():
            peers[name] = kind(size, readers)
            stack.callback(peers[name].close)
        warm = 3
        for number, name in enumerate(interleaved(peers, warm + rounds)):
            arrays[0].view(np.uint8)[0] = number % 256
            expected = touch(arrays)
            began = time.perf_counter()
            peers[name].publish(arrays)
            peers[name].wait(expected)
            kept[name].append({"ms": (time.perf_counter() - began) * 1e3})
    rows = {name: medians(kept[name][warm:]) for name in kinds}
    add_ratios(rows, [OneCopy.name], "ms")
    return rows


def main() -> None:
    known = find()
    options = parser(__doc__, known, rounds=9)
    options.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    given = options.parse_args()
    results: dict[str, dict[str, Row]] = {}
    with workspace():
        table = Table(*(12, 12), ms="9.1", ms_ratio="6.2", growth="7.2")
        for case in given.cases:
            size, readers = CASES[case]
            rows = measure({name: known[name] for name in given.peers}, size, readers, given.rounds)
            results[case] = rows
            one = results.get("50 MB, N=1") if readers > 1 else None
            for name, row in rows.items():
                if one:
                    row["growth"] = row["ms"] / one[name]["ms"]
                table.add(case, name, row=row)
    for note in sorted({known[name].note for name in given.peers if known[name].note}):
        print(f"note: {note}")
    save(given, results)


if __name__ == "__main__":
    main()
