"""Other people's clients beside native ones, and openpi's client beside openpi's own server.

    python benchmarks/doors.py [--fixed 0.005] [--clients 32] [--json FILE]

First, calls a second of ``--clients`` in closed loop, from ``--processes`` processes, of a function
that is called in batches and sleeps for ``--fixed`` + rows x ``--each`` seconds:

- **native**: by thirds over zmq, grpc and shm, by `InferenceClient`.
- **mixed**: by sixths over these, and by the doors of openpi, GR00T and vla-eval.
- all of one kind, with ``--alone``.

The machine is to be the server's, as where clients are robots: other people's clients are as little
as can be, sockets that send the same bytes again and again (a WebSocket's are masked with zeros,
which the server can't know) and look at an answer's last bytes. A round has its own server and
clients. ``of native`` is the rate as a share of native clients', and ``cpu us`` what a call costs
the server, all threads together.

Then (if openpi-client is there) one client of openpi's, unmodified, and a policy that touches every
page of two cameras: served by **openpi**'s own loop (an asyncio server of websockets that decodes,
calls, encodes and sends, one after the other), and by our **door**. ``p50 ratio`` is to openpi's.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib
import importlib.util
import io
import socket
import struct
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, ClassVar
from urllib.parse import urlsplit

import msgspec
import numpy as np

from common import (
    PAGE,
    Array,
    Child,
    Row,
    Table,
    call_together,
    interleaved,
    medians,
    parser,
    save,
    time_together,
    transports,
)
from edgeml.core.plugins import find
from edgeml.services import InferenceClient, InferenceServer
from edgeml.services.batching import Batching

CHUNK = (50, 14)
SIZES = {"56 B": 0, "301 KB": 2}
"""Cameras of 224 x 224 x 3 in an observation, beside 14 joints."""

Settings = dict[str, Any]


def make_observation(number: int, cameras: int) -> dict[str, Array]:
    observation: dict[str, Array] = {"state": np.full(CHUNK[1], number, np.float32)}
    if cameras:
        rng = np.random.default_rng(number)
        observation["image"] = rng.integers(0, 256, (cameras, 224, 224, 3), np.uint8)
    return observation


# Clients that send the same again and again ---------------------------------------------------


class Robot(ABC):
    """A client with one observation of its own."""

    def __init__(self, url: str, number: int, cameras: int) -> None:
        self.number = number

    @abstractmethod
    def call(self) -> float:
        """Send the observation; returns the number that came back."""

    @abstractmethod
    def close(self) -> None: ...


class Native(Robot):
    def __init__(self, url: str, number: int, cameras: int) -> None:
        super().__init__(url, number, cameras)
        self._observation = make_observation(number, cameras)
        self._client = InferenceClient(url=url, wait_for_server=300)

    def call(self) -> float:
        return float(self._client.call("policy", self._observation)["number"][0])

    def close(self) -> None:
        self._client.stop()


class _WebSocket(Robot):
    def __init__(self, url: str, number: int, cameras: int) -> None:
        super().__init__(url, number, cameras)
        address = urlsplit(url)
        self._socket = socket.create_connection(("127.0.0.1", address.port or 0), 60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rb")
        key = base64.b64encode(bytes(16)).decode()
        self._socket.sendall(
            f"GET / HTTP/1.1\r\nHost: {address.netloc}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        if b" 101 " not in self._file.readline():
            raise ConnectionRefusedError(url)
        while self._file.readline() != b"\r\n":
            pass
        self._request = self._framed(self.greet(make_observation(number, cameras)))

    @abstractmethod
    def greet(self, observation: dict[str, Array]) -> bytes:
        """Do what comes first; returns the request."""

    @staticmethod
    def _framed(data: bytes) -> bytes:
        return struct.pack("!BBQ4x", 0x82, 0x80 | 127, len(data)) + data

    def send(self, data: bytes) -> None:
        self._socket.sendall(self._framed(data))

    def receive(self) -> Any:
        while True:
            kind, length = self._file.read(2)
            if length >= 126:
                size = 2 if length == 126 else 8
                length = int.from_bytes(self._file.read(size), "big")
            data = self._file.read(length)
            if kind == 0x82:
                return msgspec.msgpack.decode(data)
            if kind != 0x89:  # but for pings, which need no answer here
                raise ConnectionError(f"a frame {kind:x}: {data!r:.300}")

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class Openpi(_WebSocket):
    def greet(self, observation: dict[str, Array]) -> bytes:
        self.receive()
        return pack(
            lambda array: {
                b"__ndarray__": True,
                b"data": array.tobytes(),
                b"dtype": array.dtype.str,
                b"shape": array.shape,
            },
            observation,
        )

    def call(self) -> float:
        self._socket.sendall(self._request)
        return last(self.receive()["number"][b"data"])


class Vla(_WebSocket):
    def greet(self, observation: dict[str, Array]) -> bytes:
        message = {"type": "hello", "seq": 1, "timestamp": 0.0}
        self.send(pack(None, {**message, "payload": {"protocol_version": 1}}))
        self.receive()
        return pack(
            lambda array: {
                "__ndarray__": True,
                "data": array.tobytes(),
                "dtype": array.dtype.str,
                "shape": array.shape,
            },
            {**message, "type": "observation", "payload": observation},
        )

    def call(self) -> float:
        self._socket.sendall(self._request)
        return last(self.receive()["payload"]["number"]["data"])


class Groot(Robot):
    def __init__(self, url: str, number: int, cameras: int) -> None:
        import zmq

        super().__init__(url, number, cameras)
        self._socket: Any = zmq.Context.instance().socket(zmq.REQ)
        self._socket.connect(url.replace("groot:", "tcp:"))

        def mark(array: Array) -> Any:
            file = io.BytesIO()
            np.save(file, array, allow_pickle=False)
            return {"__ndarray_class__": True, "as_npy": file.getvalue()}

        data = make_observation(number, cameras)
        self._request = pack(mark, {"endpoint": "get_action", "data": data})

    def call(self) -> float:
        self._socket.send(self._request)
        return last(msgspec.msgpack.decode(self._socket.recv())["number"]["as_npy"])

    def close(self) -> None:
        self._socket.close(linger=0)


def pack(mark: Any, value: Any) -> bytes:
    return msgspec.msgpack.encode(value, enc_hook=mark)


def last(data: bytes) -> float:
    return float(np.frombuffer(data[-4:], "<f4")[0])


DOORS: dict[str, type[Robot]] = {"openpi": Openpi, "groot": Groot, "vla-eval": Vla}


def doors() -> list[str]:
    """Those that are installed."""
    return [each.name for each in find("door") if each.name in DOORS]


# Many clients of one server -------------------------------------------------------------------


def serve(pipe: Connection, settings: Settings, kinds: list[str], cameras: int) -> None:
    fixed, each = settings["fixed"], settings["each"]

    def policy(batch: Any) -> Any:
        state = batch["state"]
        time.sleep(fixed + each * len(state))
        return {"actions": np.zeros((len(state), *CHUNK), np.float32), "number": state[:, :1]}

    hosts = {"grpc": "127.0.0.2"}  # as all have the same port
    native = ",".join(
        f"{kind}://{hosts.get(kind, '127.0.0.1')}:0" for kind in kinds if kind not in DOORS
    )
    doors = [f"{kind}://127.0.0.1:0" for kind in kinds if kind in DOORS]
    server = InferenceServer(url=native or "zmq://127.0.0.1:0", doors=doors)
    server.register_interface("policy", policy, batching=Batching(max_size=settings["clients"]))
    server.warmup("policy", make_observation(0, cameras))
    with server:
        server.start(threaded=True)
        urls = [*server.urls(), *server.doors()]
        pipe.send({url.partition(":")[0]: url for url in urls})
        with suppress(EOFError):
            pipe.recv()


def call_on(pipe: Connection, cameras: int, addresses: list[tuple[int, str]]) -> None:
    """Run as a child: clients of the kinds that the addresses name."""

    @contextmanager
    def client_of(number: int, url: str) -> Iterator[Callable[[], None]]:
        kind = DOORS.get(url.partition(":")[0], Native)
        with closing(kind(url, number, cameras)) as robot:

            def call() -> None:
                if robot.call() != number:
                    raise ValueError(f"client {number} got another's answer")

            yield call

    call_together(pipe, [partial(client_of, *each) for each in addresses], patience=60)


def crowd(settings: Settings, kinds: list[str], cameras: int) -> Row:
    """One round of clients of these kinds, in turn."""
    clients = settings["clients"]
    processes = min(clients, settings["processes"])
    with closing(Child(serve, settings, kinds, cameras)) as server:
        urls = server.receive(timeout=60)
        addresses = [(n, urls[kinds[n * len(kinds) // clients]]) for n in range(clients)]
        children = [Child(call_on, cameras, addresses[n::processes]) for n in range(processes)]
        return time_together(server, children, settings["seconds"], patience=60)


# openpi's client, and two servers of it -------------------------------------------------------


class Served(ABC):
    """A server for openpi's client."""

    name: ClassVar[str]

    @staticmethod
    @abstractmethod
    def serve(pipe: Connection) -> None: ...


def touch(observation: dict[str, Array]) -> dict[str, Array]:
    """Touch every page, and answer with the sum."""
    chunk = np.zeros(CHUNK, np.float32)
    for key in ("observation/image", "observation/wrist_image"):
        chunk[0, 0] += observation[key].reshape(-1)[::PAGE].sum()
    return {"actions": chunk}


class OwnLoop(Served):
    """What openpi publishes for a server, after its description."""

    name = "openpi"

    @staticmethod
    def serve(pipe: Connection) -> None:
        coding = importlib.import_module("openpi_client.msgpack_numpy")
        from websockets.asyncio.server import ServerConnection
        from websockets.asyncio.server import serve as listen
        from websockets.exceptions import ConnectionClosed

        async def answer(connection: ServerConnection) -> None:
            packer, whole = coding.Packer(), 0.0
            await connection.send(packer.pack({"robot": "two cameras"}))
            while True:
                try:
                    began = time.monotonic()
                    observation = coding.unpackb(await connection.recv())
                    asked = time.monotonic()
                    result = touch(observation)
                    timing = {"infer_ms": (time.monotonic() - asked) * 1e3}
                    if whole:
                        timing["prev_total_ms"] = whole * 1e3
                    await connection.send(packer.pack({**result, "server_timing": timing}))
                    whole = time.monotonic() - began
                except ConnectionClosed:
                    return
                except Exception:
                    await connection.send(traceback.format_exc())
                    await connection.close(1011)
                    raise

        async def run() -> None:
            async with listen(answer, "127.0.0.1", 0, compression=None, max_size=None) as server:
                pipe.send(next(iter(server.sockets)).getsockname()[1])
                await asyncio.get_running_loop().run_in_executor(None, pipe.poll, None)

        asyncio.run(run())


class OurDoor(Served):
    name = "edgeml door"

    @staticmethod
    def serve(pipe: Connection) -> None:
        server = InferenceServer(0, doors=["openpi://127.0.0.1:0"])
        server.register_interface("policy", touch)
        with server:
            server.start(threaded=True)
            (url,) = server.doors()
            pipe.send(urlsplit(url).port)
            pipe.poll(None)


def infer_on(pipe: Connection, port: int) -> None:
    """Run as a child: for each number of seconds that comes, call, and send how long each took."""
    published = importlib.import_module("openpi_client.websocket_client_policy")
    client = published.WebsocketClientPolicy("127.0.0.1", port)
    cameras = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    observation = {
        "observation/image": cameras[0],
        "observation/wrist_image": cameras[1],
        "observation/state": np.zeros(14, np.float32),
        "prompt": "fold the towel",
    }
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            seconds, times = pipe.recv(), list[float]()
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                cameras[:, 0, 0] = len(times) % 256
                began = time.perf_counter()
                result = client.infer(observation)
                times.append(time.perf_counter() - began)
                if result["actions"][0, 0] != touch(observation)["actions"][0, 0]:
                    raise AssertionError("a wrong answer")
            pipe.send(times)


def compare_servers(rounds: int, seconds: float) -> dict[str, Row]:
    """p50 and p99 of a call of openpi's client, by server."""
    kept: dict[str, list[Row]] = {each.name: [] for each in (OwnLoop, OurDoor)}
    with contextlib.ExitStack() as stack:
        clients = {}
        for each in (OwnLoop, OurDoor):
            server = stack.enter_context(closing(Child(each.serve)))
            clients[each.name] = client = Child(infer_on, server.receive())
            stack.callback(client.close)
            client.receive()
        for name in [*clients, *interleaved(clients, rounds)]:
            clients[name].pipe.send(seconds)
            times = clients[name].receive()
            p50, p99 = np.percentile(times, (50, 99)) * 1e6
            kept[name].append({"p50_us": p50, "p99_us": p99, "calls_per_s": len(times) / seconds})
    rows = {name: medians(each[1:]) for name, each in kept.items()}  # the first warms up
    for row in rows.values():
        row["p50_us_ratio"] = row["p50_us"] / rows[OwnLoop.name]["p50_us"]
        row["p99_us_ratio"] = row["p99_us"] / rows[OwnLoop.name]["p99_us"]
    return rows


def main() -> None:
    native = transports()
    options = parser(__doc__, [*native, *doors()], rounds=5)
    options.add_argument("--sizes", nargs="*", choices=list(SIZES), default=list(SIZES))
    options.add_argument("--alone", action="store_true", help="crowds of one kind each as well")
    options.add_argument("--fixed", type=float, default=0.005, help="seconds of a batch")
    options.add_argument("--each", type=float, default=0.0, help="seconds of a row more")
    options.add_argument("--clients", type=int, default=32)
    options.add_argument("--processes", type=int, default=4)
    options.add_argument("--seconds", type=float, default=2.0, help="length of a round")
    given = options.parse_args()
    settings = vars(given)
    results: dict[str, Any] = {}
    cases = {"native": [kind for kind in given.peers if kind in native], "mixed": given.peers}
    if given.alone:
        cases |= {kind: [kind] for kind in given.peers}
    cases = {name: kinds for name, kinds in cases.items() if kinds}
    columns = {"p50_ms": "8.2", "p99_ms": "8.2", "cpu_us": "8.0"}
    table = Table(8, 10, calls_per_s="11.0", of_native="9.3", **columns) if given.sizes else None
    for label in given.sizes:
        kept: dict[str, list[Row]] = {name: [] for name in cases}
        for case in interleaved(cases, given.rounds):
            kept[case].append(crowd(settings, cases[case], SIZES[label]))
        rows = results[label] = {name: medians(each) for name, each in kept.items()}
        for name, row in rows.items():
            if "native" in rows:
                row["of_native"] = row["calls_per_s"] / rows["native"]["calls_per_s"]
            assert table is not None
            table.add(label, name, row=row)
    if importlib.util.find_spec("openpi_client") is None:
        print("openpi-client is not here, so its client is left out")
    elif "openpi" in given.peers:
        results["openpi's client"] = compare_servers(given.rounds, given.seconds / 4)
        columns = {"p99_us": "9.1", "p99_us_ratio": "6.2", "calls_per_s": "11.0"}
        table = Table(19, p50_us="9.1", p50_us_ratio="6.2", **columns)
        for name, row in results["openpi's client"].items():
            table.add(name, row=row)
    save(given, results)


if __name__ == "__main__":
    main()
