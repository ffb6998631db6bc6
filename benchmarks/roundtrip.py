"""Time round trips to a policy server, side by side with the peers, in one run.

    python benchmarks/roundtrip.py [--work 0.002] [--hz 50] [--json FILE]

Rounds of the peers are interleaved, so that a noisy moment hits all of them; what is printed are
medians over rounds, and ratios to the faster of raw pyzmq over tcp and over ipc, and for grpc to
the faster of its raw servers as well. Read the ratios: times are this machine's. With --hz the
client sleeps between calls, as a robot does. With --work the policy takes so many seconds, and the
times are what a call takes beyond that.

Every client has a process of its own, because edgeml's grpc makes malloc keep large blocks, from
which everything else in its process would gain.
"""

from __future__ import annotations

import contextlib
import os
import time
from multiprocessing.connection import Connection
from statistics import median

import numpy as np

from common import PAGE, Array, Child, Row, Table, add_ratios, interleaved, medians, parser, save
from links import workspace
from peers import CHUNK, GRPC_REFERENCES, REFERENCES, WORK, Peer, find

SIZES = {
    "56 B": 56,
    "301 KB": 2 * 224 * 224 * 3,  # two cameras
    "2.8 MB": 2 * 680 * 680 * 3 + 24_000,
    "25 MB": 25_000_000,
}
_MOST_CALLS = 5000  # in a round


def one_round(peer: Peer, observation: Array, calls: int, hz: float | None = None) -> list[float]:
    """Times of ``calls`` round trips, in seconds; they begin ``hz`` times a second."""
    times = []
    tick = time.perf_counter()
    for number in range(calls):
        observation[0] = number % 256
        if hz:
            tick = max(tick + 1 / hz, time.perf_counter())
            time.sleep(max(0.0, tick - time.perf_counter()))
        began = time.perf_counter()
        result = peer.call(observation)
        took = time.perf_counter() - began
        chunk = peer.answer(result)
        times.append(took - float(chunk[0, 1]))  # the seconds that the policy worked
        if chunk.shape != CHUNK.shape or chunk[0, 0] != np.float32(observation[::PAGE].sum()):
            raise AssertionError(f"{peer.name} gave a wrong answer")
    return times


def client(pipe: Connection, kind: type[Peer], address: object) -> None:
    """Run as a child: on each (size, calls, hz) that comes, make a round, and send its times."""
    peer = kind(address)
    peer.rest()  # so that those to come start undisturbed
    pipe.send("ready")
    observation = np.empty(0, np.uint8)
    with contextlib.suppress(EOFError):
        while True:
            size, calls, hz = pipe.recv()
            if size != len(observation):
                observation = np.random.default_rng(0).integers(0, 256, size, np.uint8)
            peer.wake()
            times = one_round(peer, observation, calls, hz)
            peer.rest()
            pipe.send(times)
    peer.close()


class Running:
    """A peer's server and a client of it, each in a process of its own."""

    def __init__(self, kind: type[Peer]) -> None:
        self._kind = kind
        self._server = Child(kind.serve)
        self._client = Child(client, kind, self._server.receive())
        self._client.receive()
        if kind.busy:
            self._server.pause()

    def one_round(self, size: int, calls: int, hz: float | None = None) -> list[float]:
        if self._kind.busy:
            self._server.resume()
        self._client.pipe.send((size, calls, hz))
        times: list[float] = self._client.receive(timeout=600)
        if self._kind.busy:
            self._server.pause()
        return times

    def close(self) -> None:
        self._client.close(self._kind.patience)
        self._server.close(self._kind.patience)


def measure(
    peers: dict[str, Running],
    size: int,
    rounds: int,
    seconds: float,
    hz: float | None,
    work: float,
) -> dict[str, Row]:
    """Medians over rounds of p50 and p99 in microseconds, and of calls per second, by peer."""
    calls = {}
    for name, peer in peers.items():
        peer.one_round(size, 20)  # connections, pages and branch predictors
        took = median(peer.one_round(size, 20))
        fitting = int(seconds * hz if hz else seconds / (took + work))
        calls[name] = min(_MOST_CALLS, max(20, fitting))
    kept: dict[str, list[Row]] = {name: [] for name in peers}
    for name in interleaved(peers, rounds):
        times = peers[name].one_round(size, calls[name], hz)
        p50, p99 = np.percentile(times, (50, 99)) * 1e6
        rate = len(times) / max(sum(times), 1e-9)  # with --work: were there no work
        kept[name].append({"p50_us": p50, "p99_us": p99, "calls_per_s": rate})
    rows = {name: medians(kept[name]) for name in peers}
    add_ratios(rows, REFERENCES, "p50_us", "p99_us")
    grpc = {name: row for name, row in rows.items() if "grpc" in name}
    add_ratios(grpc, GRPC_REFERENCES, "p50_us", suffix="grpc_ratio")
    for name, row in rows.items():
        row["mb_per_s"] = row["calls_per_s"] * size / 1e6
        row["calls"] = calls[name] * rounds
    return rows


def main() -> None:
    known = find()
    options = parser(__doc__, known, rounds=5)
    options.add_argument("--sizes", nargs="*", choices=list(SIZES), metavar="SIZE")
    options.add_argument("--seconds", type=float, default=0.25, help="length of a round")
    options.add_argument(
        "--work", type=float, help="seconds that the policy works; times are what is taken beyond"
    )
    options.add_argument(
        "--how", choices=["compute", "sleep"], default="compute", help="computes without the GIL"
    )
    options.add_argument("--hz", type=float, help="begin so many calls a second, and sleep between")
    given = options.parse_args()
    results = {}
    if given.work:
        os.environ[WORK] = f"{given.how} {given.work}"
    with workspace(), contextlib.ExitStack() as stack:
        peers = {}
        for name in given.peers:
            peers[name] = Running(known[name])
            stack.callback(peers[name].close)
        table = Table(
            *(8, 14),
            p50_us="9.1",
            p50_us_ratio="6.2",
            p50_us_grpc_ratio="10.2",
            p99_us="9.1",
            p99_us_ratio="6.2",
            calls_per_s="11.0",
            mb_per_s="9.0",
        )
        for label in given.sizes or (list(SIZES)[:2] if given.hz else SIZES):
            work = given.work or 0.0
            rows = measure(peers, SIZES[label], given.rounds, given.seconds, given.hz, work)
            results[label] = rows
            for name, row in rows.items():
                table.add(label, name, row=row)
    for note in sorted({known[name].note for name in given.peers if known[name].note}):
        print(f"note: {note}")
    save(given, results)


if __name__ == "__main__":
    main()
