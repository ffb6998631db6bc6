"""Put several equal servers behind one client, and see what that gives and what it costs.

    python benchmarks/replicas.py [--transports zmq shm grpc] [--rounds 5] [--json FILE]

*What it gives*: servers whose function takes 20 ms without the interpreter's lock (a sleep, which
stands for a GPU), four against one. Who asks is one client with several calls under way, or several
clients of which each waits for its answer before it asks again. `times` is the throughput of four
as a multiple of one's, both of the same round.

*What it costs*: a function that takes nothing, called by a client of one server (*direct*), by one
of that server in a list, by four clients of a server each, one of them chosen for each call (*4
direct*), and by one of the four in a list; in turns of a few calls each, in one process. `ratio` is
the median of each list as a multiple of the direct clients' of as many servers: processes that
are called less often take longer to wake, which is no list's doing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection

import numpy as np

from common import (
    Child,
    Row,
    Table,
    call_together,
    interleaved,
    medians,
    save,
    time_together,
    transports,
)

_TURN = 20  # calls in a row of one kind of client


def serve(pipe: Connection, transport: str, work: float) -> None:
    """Run as a child: a server."""
    import edgeml

    def policy(observation):  # type: ignore[no-untyped-def]
        time.sleep(work)
        return observation

    with edgeml.InferenceServer(0, transport=transport) as server:
        server.register_interface("policy", policy)
        server.register_interface("echo", lambda observation: observation)
        server.start(threaded=True)
        pipe.send(server.url)
        pipe.poll(None)


def ask(pipe: Connection, urls: Sequence[str], clients: int, calls: int) -> None:
    """Run as a child: clients, of which each has so many calls under way."""
    import edgeml

    observation = {"state": np.zeros(14, np.float32)}

    with contextlib.ExitStack() as stack:
        url = urls[0] if len(urls) == 1 else list(urls)
        made = [
            stack.enter_context(edgeml.InferenceClient(url=url, timeout=30)) for _ in range(clients)
        ]

        @contextlib.contextmanager
        def use(client: edgeml.InferenceClient) -> Iterator[Callable[[], None]]:
            def call() -> None:
                client.call("policy", observation)

            yield call

        makes = [functools.partial(use, client) for client in made for _ in range(calls)]
        call_together(pipe, makes, 30)


def measure_throughput(
    servers: Sequence[Child], urls: Sequence[str], clients: int, calls: int, seconds: float
) -> Row:
    """Have clients in two processes call these servers, which share the work."""
    parts = [part for part in (clients // 2, clients - clients // 2) if part]
    children = [Child(ask, urls, part, calls) for part in parts]
    return time_together(servers[0], children, seconds, 60)


def measure_latency(pipe: Connection, urls: Sequence[str], size: int, seconds: float) -> None:
    """Run as a child: call by each kind of client in turns; sends the median of each."""
    import edgeml

    payload = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    one, each, several = urls[0], f"{len(urls)} direct", f"list of {len(urls)}"
    rng = random.Random(0)
    with contextlib.ExitStack() as stack:

        def connect(url: str | list[str]) -> edgeml.InferenceClient:
            client = stack.enter_context(edgeml.InferenceClient(url=url, timeout=30))
            for _ in range(200):
                client.call("echo", payload)
            return client

        direct = [connect(url) for url in urls]
        clients = {"direct": direct[:1], "list of 1": [connect([one])]}
        clients |= {each: direct, several: [connect(list(urls))]}
        times: dict[str, list[float]] = {kind: [] for kind in clients}
        end = time.monotonic() + seconds
        order = list(clients)
        while time.monotonic() < end:
            for kind in order:
                took = times[kind]
                for _ in range(_TURN):
                    call = rng.choice(clients[kind]).call
                    began = time.perf_counter()
                    call("echo", payload)
                    took.append(time.perf_counter() - began)
            order.append(order.pop(0))
    pipe.send({kind: float(np.median(took)) for kind, took in times.items()})
    pipe.poll(None)


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--transports", nargs="*", default=transports())
    options.add_argument("--replicas", type=int, default=4)
    options.add_argument("--work", type=float, default=0.02, help="seconds of a run")
    options.add_argument(
        "--loads",
        nargs="*",
        default=["1x16", "1x64", "16x1", "64x1"],
        help="clients x calls that each has under way",
    )
    options.add_argument("--sizes", nargs="*", type=int, default=[56, 300_000])
    options.add_argument("--seconds", type=float, default=5.0)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--json", metavar="FILE", help="keep the figures in a file")
    given = options.parse_args()
    results: dict[str, Row] = {}
    for transport in given.transports:
        servers = [Child(serve, transport, given.work) for _ in range(given.replicas)]
        try:
            urls = [server.receive() for server in servers]
            results |= _throughput(given, transport, servers, urls)
            results |= _latency(given, transport, urls)
        finally:
            for server in servers:
                server.close()
    save(given, results)


def _throughput(
    given: argparse.Namespace, transport: str, servers: Sequence[Child], urls: Sequence[str]
) -> dict[str, Row]:
    results: dict[str, Row] = {}
    table = Table(6, 7, 10, calls_per_s="12.1", p50_ms="9.2", p99_ms="9.2", times="7.2")
    counts = {"one": 1, f"{len(urls)}": len(urls)}
    for load in given.loads:
        clients, calls = map(int, load.split("x"))
        rows: dict[str, list[Row]] = {name: [] for name in counts}
        for name in interleaved(counts, given.rounds):
            chosen = urls[: counts[name]]
            rows[name].append(measure_throughput(servers, chosen, clients, calls, given.seconds))
        for one, several in zip(*rows.values(), strict=True):
            several["times"] = several["calls_per_s"] / one["calls_per_s"]
            one["times"] = 1.0
        for name in counts:
            row = results[f"{transport} {load} {name}"] = medians(rows[name])
            table.add(transport, load, f"{name} server" + "s" * (name != "one"), row=row)
    return results


def _latency(given: argparse.Namespace, transport: str, urls: Sequence[str]) -> dict[str, Row]:
    results: dict[str, Row] = {}
    table = Table(6, 10, 10, p50_us="9.1", ratio="7.3")
    for size in given.sizes:
        rounds: dict[str, list[Row]] = {}
        for _ in range(given.rounds):
            child = Child(measure_latency, urls, size, given.seconds)
            try:
                medians_of = child.receive(timeout=given.seconds + 60)
            finally:
                child.close()
            for kind, seconds in medians_of.items():
                alike = "direct" if kind in ("direct", "list of 1") else f"{len(urls)} direct"
                row = {"p50_us": seconds * 1e6, "ratio": seconds / medians_of[alike]}
                rounds.setdefault(kind, []).append(row)
        for kind, rows in rounds.items():
            row = results[f"{transport} {size} {kind}"] = medians(rows)
            table.add(transport, f"{size} B", kind, row=row)
    return results


if __name__ == "__main__":
    main()
