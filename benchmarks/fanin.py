"""Count what one server answers to N clients in closed loop, side by side with the peers.

    python benchmarks/fanin.py [--clients 64 1000] [--json FILE]

The payload is that of the round trips, at 56 B, and everybody packs it alike: "raw zmq" (a ROUTER
and DEALERs, over tcp) and "raw grpc" (a grpc.aio server) use edgeml's own codec, so a ratio to them
is what edgeml itself costs. zmq and shm refer to the former, grpc to the latter. Each client is an
object with connections of its own, in a thread of its own; the threads are spread over at most 8
processes. A crowd lives for one round and has the machine to itself, since a thousand clients of
edgeml that only wait are a thousand heartbeats a second.

``slowest`` is the share of the median client's calls that the slowest client got: 1 is fair.
``vs 64`` compares calls a second with those of 64 clients. ``server kb`` and ``client kb`` are the
memory of one more client that waits, on either side: what the processes grow by from their first
client to their last.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import numpy as np

from common import Array, Child, Row, Table, add_ratios, interleaved, medians, parser, save
from edgeml.core import Message, load_codec
from links import installed, workspace
from peers import Peer, RawGrpc, find, policy

CLIENTS = (1, 8, 64, 1000)
PROCESSES = 8
SHARE = 0.012  # seconds of a round for each client, so that the slowest gets more than a few calls
REFERENCES = {"raw zmq": ("edgeml zmq", "edgeml shm"), "raw grpc": ("edgeml grpc",)}

_codec = load_codec("msgpack")
_frames = msgspec.msgpack.Decoder(list[bytes])


def ask(observation: Array) -> Message:
    return _codec.encode({"observation": observation})


def answer(request: Message) -> Message:
    return _codec.encode(policy(_codec.decode(request)["observation"]))


def message(header: bytes, *buffers: bytes) -> Message:
    return Message(header, [memoryview(buffer) for buffer in buffers])


def join(message: Message) -> bytes:
    return msgspec.msgpack.encode([message.header, *message.buffers])


def split(joined: bytes) -> Message:
    return message(*_frames.decode(joined))


class RawZmq(Peer):
    """A message is a multipart one; the clients of a process share a context."""

    name = "raw zmq"

    @staticmethod
    def serve(pipe: Connection) -> None:
        import zmq

        router = zmq.Context().socket(zmq.ROUTER)
        router.bind("tcp://127.0.0.1:*")
        pipe.send(router.getsockopt_string(zmq.LAST_ENDPOINT))
        while True:
            identity, *frames = router.recv_multipart()
            reply = answer(message(*frames))
            router.send_multipart([identity, reply.header, *reply.buffers])

    def __init__(self, address: str) -> None:
        import zmq

        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        context.set(zmq.MAX_SOCKETS, context.get(zmq.SOCKET_LIMIT))
        self._socket = context.socket(zmq.DEALER)
        self._socket.rcvtimeo = 30_000
        self._socket.connect(address)

    def call(self, observation: Array) -> Array:
        request = ask(observation)
        self._socket.send_multipart([request.header, *request.buffers])
        chunk: Array = _codec.decode(message(*self._socket.recv_multipart()))
        return chunk


class RawGrpcPacked(RawGrpc):
    """A message is joined into one."""

    name = "raw grpc"

    @staticmethod
    def serve(pipe: Connection) -> None:
        RawGrpc.serve_aio(pipe, lambda request: join(answer(split(request))))

    def call(self, observation: Array) -> Array:
        chunk: Array = _codec.decode(split(self._ask(join(ask(observation)), timeout=30)))
        return chunk


class Client(threading.Thread):
    """Connects, then calls from a begin to an end; in one thread, since edgeml's zmq and shm give
    every thread that calls a socket of its own.
    """

    def __init__(self, kind: type[Peer], address: object, number: int) -> None:
        super().__init__(daemon=True)
        self._kind, self._address = kind, address
        self._observation = np.full(56, number % 256, np.uint8)
        self.connected = threading.Event()
        self.turn: queue.SimpleQueue[tuple[float, float]] = queue.SimpleQueue()
        self.calls = self.errors = 0

    def run(self) -> None:
        peer = self._kind(self._address)
        peer.call(self._observation)
        self.connected.set()
        begin, end = self.turn.get()
        while (now := time.monotonic()) < end:
            try:
                right = peer.call(self._observation)[0, 0] == self._observation[0]
            except Exception as error:
                print(f"{self._kind.name}: {error}", flush=True)
                right = False
            if not right:
                self.errors += 1
            elif now >= begin:
                self.calls += 1


def clients(pipe: Connection, kind: type[Peer], address: object, count: int) -> None:
    """Run as a child: connect one client, on a word the others, and call on another."""
    crowd = [Client(kind, address, number) for number in range(count)]
    for some in (crowd[:1], crowd[1:]):
        for client in some:  # one after another, for this is no test of connecting
            client.start()
            while not client.connected.wait(1):
                if not client.is_alive():
                    raise ConnectionError(f"{kind.name}: a client could not connect")
        pipe.send("connected")
        turn = pipe.recv()
    for client in crowd:
        client.turn.put(turn)
    for client in crowd:
        client.join()
    pipe.send([(client.calls, client.errors) for client in crowd])


class Crowd:
    """A server, and its clients in a few processes."""

    def __init__(self, kind: type[Peer], count: int) -> None:
        self._server = Child(kind.serve)
        address = self._server.receive()
        processes = min(count, PROCESSES)
        shares = [len(range(n, count, processes)) for n in range(processes)]
        self._children = [Child(clients, kind, address, share) for share in shares]
        self._receive()
        first = self._rss()
        self._send("go on")
        self._receive()
        time.sleep(1)  # what connecting took is given back
        grown = [after - before for before, after in zip(first, self._rss(), strict=True)]
        self.memory: Row = {}
        if more := count - processes:
            self.memory = {
                "server_kb": grown[0] / more / 1e3,
                "client_kb": sum(grown[1:]) / more / 1e3,
            }

    def _receive(self) -> list[Any]:
        return [child.receive(timeout=300) for child in self._children]

    def _send(self, word: object) -> None:
        for child in self._children:
            child.pipe.send(word)

    def _rss(self) -> list[int]:
        return [child.rss() for child in (self._server, *self._children)]

    def one_round(self, seconds: float) -> Row:
        begin = time.monotonic() + seconds / 4  # one clock for all processes (Linux)
        self._send((begin, begin + seconds))
        calls, errors = np.array([pair for pairs in self._receive() for pair in pairs]).T
        return {
            "calls_per_s": calls.sum() / seconds,
            "slowest": calls.min() / np.median(calls),
            "errors": errors.sum(),
            **self.memory,
        }

    def close(self) -> None:
        for child in (*self._children, self._server):
            child.close()


def main() -> None:
    ours = ("edgeml zmq", "edgeml shm", "edgeml grpc")
    known: dict[str, type[Peer]] = {"raw zmq": RawZmq}
    known |= {"raw grpc": RawGrpcPacked} if installed("grpc") else {}
    known |= {name: kind for name, kind in find().items() if name in ours}
    options = parser(__doc__, known, rounds=3)
    options.add_argument("--clients", nargs="*", type=int, default=list(CLIENTS))
    options.add_argument("--seconds", type=float, default=1.0, help="length of a round, at least")
    given = options.parse_args()
    results: dict[int, dict[str, Row]] = {}
    with workspace():
        table = Table(
            *(6, 12),
            calls_per_s="11.0",
            calls_per_s_ratio="6.2",
            vs_64="6.2",
            slowest="8.2",
            errors="6.0",
            server_kb="10.0",
            client_kb="10.0",
        )
        for count in given.clients:
            kept: dict[str, list[Row]] = {name: [] for name in given.peers}
            for name in interleaved(given.peers, given.rounds):
                with contextlib.closing(Crowd(known[name], count)) as crowd:
                    kept[name].append(crowd.one_round(max(given.seconds, count * SHARE)))
            results[count] = rows = {name: medians(kept[name]) for name in given.peers}
            for raw, same in REFERENCES.items():
                family = {name: rows[name] for name in (raw, *same) if name in rows}
                add_ratios(family, [raw], "calls_per_s")
            for name, row in rows.items():
                if count > 64 and 64 in results:
                    row["vs_64"] = row["calls_per_s"] / results[64][name]["calls_per_s"]
                table.add(f"N={count}", name, row=row)
    save(given, results)


if __name__ == "__main__":
    main()
