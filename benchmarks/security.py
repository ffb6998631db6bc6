"""Time what keys cost: raw pyzmq with CURVE and raw grpcio with mutual TLS beside edgeml's.

    python benchmarks/security.py [--sizes "56 B" "301 KB"] [--json FILE]

Each peer is measured without keys and with them, its client in a process of its own. What is
printed are medians over interleaved rounds: round trips; calls a second with four under way; and,
with the first size, connecting until the first answer has come. The first ratio of each is to the
raw peer with the same protection, for grpc the faster of its two servers; "keys" is the ratio to
the same peer without.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections import deque
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from common import PAGE, Array, Child, Row, Table, add_ratios, interleaved, medians, parser, save
from edgeml.cli.keygen import make_client_keys, make_server_keys
from links import socket_path, workspace
from peers import CHUNK, Edgeml, EdgemlGrpc, EdgemlZmq, GrpcAio, GrpcSync, Peer, RawGrpc, ZmqTcp
from roundtrip import SIZES, one_round

KEYS = "EDGEML_BENCHMARK_KEYS"
"""The environment variable with the directory of the server's keys."""

UNDER_WAY = 4
HANDSHAKES = 10  # in a round


def server_keys() -> Path:
    return Path(os.environ[KEYS])


def client_keys() -> Path:
    return server_keys() / "clients" / "client"


def read(path: Path) -> bytes:
    return path.read_bytes().strip()


# Peers with keys ----------------------------------------------------------------------------


class ZmqCurve(ZmqTcp):
    name = "pyzmq curve"

    @staticmethod
    def serve(pipe: Connection) -> None:
        def prepare(router: Any) -> None:
            router.curve_server = True
            router.curve_publickey = read(server_keys() / "curve.public")
            router.curve_secretkey = read(server_keys() / "curve.secret")

        ZmqTcp.serve_at("tcp://127.0.0.1:*", pipe, prepare)

    def prepare(self, socket: Any) -> None:
        socket.curve_serverkey = read(client_keys() / "server.public")
        socket.curve_publickey = read(client_keys() / "curve.public")
        socket.curve_secretkey = read(client_keys() / "curve.secret")


class _GrpcTls(RawGrpc):
    @staticmethod
    def serve_credentials() -> Any:
        home = server_keys()
        return importlib.import_module("grpc").ssl_server_credentials(
            [(read(home / "key.pem"), read(home / "cert.pem"))], read(home / "ca.pem"), True
        )

    def connect(self, target: str, options: list[tuple[str, Any]]) -> Any:
        grpc, home = importlib.import_module("grpc"), client_keys()
        credentials = grpc.ssl_channel_credentials(
            read(home / "ca.pem"), read(home / "key.pem"), read(home / "cert.pem")
        )
        name = ("grpc.ssl_target_name_override", "edgeml")
        return grpc.secure_channel(target, credentials, [*options, name])


class GrpcSyncTls(_GrpcTls):
    name = "grpc sync tls"

    @staticmethod
    def serve(pipe: Connection) -> None:
        RawGrpc.serve_sync(pipe, RawGrpc.answer_bytes, _GrpcTls.serve_credentials())


class GrpcAioTls(_GrpcTls):
    name = "grpc aio tls"

    @staticmethod
    def serve(pipe: Connection) -> None:
        RawGrpc.serve_aio(pipe, RawGrpc.answer_bytes, _GrpcTls.serve_credentials())


class _EdgemlKeys(Edgeml):
    def __init__(self, address: str) -> None:
        super().__init__(address, str(client_keys()))


class EdgemlZmqKeys(_EdgemlKeys):
    name = "edgeml zmq keys"

    @staticmethod
    def serve(pipe: Connection) -> None:
        Edgeml.serve_over("zmq", pipe, str(server_keys()))


class EdgemlGrpcKeys(_EdgemlKeys):
    name = "edgeml grpc keys"

    @staticmethod
    def serve(pipe: Connection) -> None:
        Edgeml.serve_over("grpc", pipe, str(server_keys()))


KINDS: tuple[type[Peer], ...] = (
    *(ZmqTcp, EdgemlZmq, ZmqCurve, EdgemlZmqKeys),
    *(GrpcSync, GrpcAio, EdgemlGrpc, GrpcSyncTls, GrpcAioTls, EdgemlGrpcKeys),
)
# References, and who is compared with them.
GROUPS = (
    ((ZmqTcp.name,), (ZmqTcp.name, EdgemlZmq.name)),
    ((ZmqCurve.name,), (ZmqCurve.name, EdgemlZmqKeys.name)),
    ((GrpcSync.name, GrpcAio.name), (GrpcSync.name, GrpcAio.name, EdgemlGrpc.name)),
    ((GrpcSyncTls.name, GrpcAioTls.name), (GrpcSyncTls.name, GrpcAioTls.name, EdgemlGrpcKeys.name)),
)
WITHOUT_KEYS = {
    ZmqCurve.name: ZmqTcp.name,
    EdgemlZmqKeys.name: EdgemlZmq.name,
    GrpcSyncTls.name: GrpcSync.name,
    GrpcAioTls.name: GrpcAio.name,
    EdgemlGrpcKeys.name: EdgemlGrpc.name,
}


# Measuring ----------------------------------------------------------------------------------


def throughput(peer: Any, observation: Array, seconds: float) -> float:
    """Calls a second, with several under way."""
    waiting: deque[Any] = deque()
    calls = 0
    began = now = time.perf_counter()
    while now < began + seconds:
        while len(waiting) < UNDER_WAY:
            waiting.append(peer.begin(observation))
        check(peer.end(waiting.popleft()), observation)
        calls += 1
        now = time.perf_counter()
    while waiting:
        peer.end(waiting.popleft())
    return calls / (now - began)


def handshakes(kind: type[Peer], address: object, observation: Array) -> list[float]:
    """Seconds from nothing to the first answer, of several connections one after the other."""
    times = []
    for _ in range(HANDSHAKES):
        began = time.perf_counter()
        peer = kind(address)
        chunk = peer.call(observation)
        times.append(time.perf_counter() - began)
        check(chunk, observation)
        peer.close()
    return times


def check(chunk: Array, observation: Array) -> None:
    if chunk.shape != CHUNK.shape or chunk[0, 0] != np.float32(observation[::PAGE].sum()):
        raise AssertionError("a wrong answer")


def client(pipe: Connection, kind: type[Peer], address: object) -> None:
    """Run as a child: on each (what, size, amount) that comes, measure and send the figures."""
    peer = kind(address)
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            what, size, amount = pipe.recv()
            observation = np.random.default_rng(0).integers(0, 256, size, np.uint8)
            if what == "round trips":
                pipe.send(one_round(peer, observation, amount))
            elif what == "throughput":
                pipe.send(throughput(peer, observation, amount))
            else:
                pipe.send(handshakes(kind, address, observation))
    peer.close()


class Running:
    """A peer's server and a client of it, each in a process of its own."""

    def __init__(self, kind: type[Peer]) -> None:
        self._patience = kind.patience
        self._server = Child(kind.serve)
        self._client = Child(client, kind, self._server.receive())
        self._client.receive()

    def measure(self, what: str, size: int, amount: float) -> Any:
        self._client.pipe.send((what, size, amount))
        return self._client.receive(timeout=600)

    def close(self) -> None:
        self._client.close(self._patience)
        self._server.close(self._patience)


def measure(
    peers: dict[str, Running], size: int, rounds: int, seconds: float, connects: bool
) -> dict[str, Row]:
    """Medians over rounds, by peer."""
    calls = {}
    for name, peer in peers.items():
        peer.measure("round trips", size, 20)
        took = np.median(peer.measure("round trips", size, 20))
        calls[name] = int(min(5000, max(20, seconds / took)))
    kept: dict[str, list[Row]] = {name: [] for name in peers}
    for name in interleaved(peers, rounds):
        times = peers[name].measure("round trips", size, calls[name])
        row = {"p50_us": float(np.median(times)) * 1e6}
        row["calls_per_s"] = peers[name].measure("throughput", size, seconds)
        if connects:
            row["connect_ms"] = float(np.median(peers[name].measure("connect", size, 0))) * 1e3
        kept[name].append(row)
    rows = {name: medians(kept[name]) for name in peers}
    keys = ("p50_us", "calls_per_s", *(("connect_ms",) if connects else ()))
    for references, members in GROUPS:
        group = {name: rows[name] for name in members if name in rows}
        add_ratios(group, references, *keys)
    for name, plain in WITHOUT_KEYS.items():
        for key in keys if name in rows and plain in rows else ():
            rows[name][f"{key}_keys"] = rows[name][key] / rows[plain][key]
    return rows


def main() -> None:
    known = {kind.name: kind for kind in KINDS}
    options = parser(__doc__, known, rounds=5)
    options.add_argument("--sizes", nargs="*", choices=list(SIZES), metavar="SIZE")
    options.add_argument("--seconds", type=float, default=0.25, help="length of a round")
    given = options.parse_args()
    results = {}
    with workspace(), contextlib.ExitStack() as stack:
        keys = make_server_keys(socket_path("keys"))
        make_client_keys(keys, "client")
        os.environ[KEYS] = str(keys)
        peers = {}
        for name in given.peers:
            peers[name] = Running(known[name])
            stack.callback(peers[name].close)
        columns: dict[str, str] = {}
        for key, width in (("p50_us", "9.1"), ("calls_per_s", "12.0"), ("connect_ms", "11.2")):
            columns |= {key: width, f"{key}_ratio": "6.2", f"{key}_keys": "6.2"}
        table = Table(*(8, 17), **columns)
        for number, label in enumerate(given.sizes or SIZES):
            rows = measure(peers, SIZES[label], given.rounds, given.seconds, number == 0)
            results[label] = rows
            for name, row in rows.items():
                table.add(label, name, row=row)
    save(given, results)


if __name__ == "__main__":
    main()
