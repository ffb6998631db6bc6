"""Count what one server answers to N clients in closed loop, side by side with the peers.

    python benchmarks/fanin.py [--json FILE]

The work is that of the round trips, at 56 B. Each client is an object (and a socket) of its own, in
a thread of its own; the threads are spread over at most 8 processes. ``slowest`` is the share of
the median client's calls that the slowest client got: 1 is fair.
"""

from __future__ import annotations

import contextlib
import threading
import time
from multiprocessing.connection import Connection

import numpy as np

from common import Child, Row, Table, add_ratios, interleaved, medians, parser, save
from links import workspace
from peers import REFERENCES, Peer, find

CLIENTS = (1, 8, 64)
PROCESSES = 8
NAMES = ("pyzmq tcp", "pyzmq ipc", "edgeml zmq", "edgeml shm")


def clients(pipe: Connection, kind: type[Peer], address: object, threads: int) -> None:
    """Run as a child: on each (begin, end) that comes, call until then; send every count."""
    peers = [kind(address) for _ in range(threads)]
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            begin, end = pipe.recv()
            counts = [0] * threads

            def loop(
                number: int, begin: float = begin, end: float = end, counts: list[int] = counts
            ) -> None:
                observation = np.full(56, number, np.uint8)
                time.sleep(max(0.0, begin - time.monotonic()))
                while time.monotonic() < end:
                    if peers[number].call(observation)[0, 0] != number:
                        return  # and be counted as the slowest
                    counts[number] += 1

            workers = [threading.Thread(target=loop, args=(n,)) for n in range(threads)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            pipe.send(counts)
    for peer in peers:
        peer.close()


class Crowd:
    """A peer's server, and N clients of it."""

    def __init__(self, kind: type[Peer], count: int) -> None:
        self._kind = kind
        self._server = Child(kind.serve)
        address = self._server.receive()
        processes = min(count, PROCESSES)
        self._children = [
            Child(clients, kind, address, count // processes) for _ in range(processes)
        ]
        for child in self._children:
            child.receive()

    def one_round(self, seconds: float) -> Row:
        begin = time.monotonic() + 0.05  # one clock for all processes (Linux)
        for child in self._children:
            child.pipe.send((begin, begin + seconds))
        counts = [count for child in self._children for count in child.receive()]
        if min(counts) == 0:
            raise AssertionError(f"{self._kind.name}: a client got a wrong answer, or none")
        slowest = min(counts) / float(np.median(counts))
        return {"calls_per_s": sum(counts) / seconds, "slowest": slowest}

    def close(self) -> None:
        for child in self._children:
            child.pipe.close()
        for child in self._children:
            child.close(self._kind.patience)
        self._server.close(self._kind.patience)


def main() -> None:
    known = {name: kind for name, kind in find().items() if name in NAMES}
    options = parser(__doc__, known, rounds=5)
    options.add_argument("--clients", nargs="*", type=int, default=list(CLIENTS))
    options.add_argument("--seconds", type=float, default=0.5, help="length of a round")
    given = options.parse_args()
    results = {}
    with workspace():
        table = Table(*(6, 14), calls_per_s="11.0", calls_per_s_ratio="6.2", slowest="8.2")
        for count in given.clients:
            kept: dict[str, list[Row]] = {name: [] for name in given.peers}
            with contextlib.ExitStack() as stack:
                crowds = {}
                for name in given.peers:
                    crowds[name] = Crowd(known[name], count)
                    stack.callback(crowds[name].close)
                    crowds[name].one_round(0.2)
                for name in interleaved(crowds, given.rounds):
                    kept[name].append(crowds[name].one_round(given.seconds))
            rows = {name: medians(kept[name]) for name in given.peers}
            add_ratios(rows, REFERENCES, "calls_per_s")
            results[f"N={count}"] = rows
            for name, row in rows.items():
                table.add(f"N={count}", name, row=row)
    save(given, results)


if __name__ == "__main__":
    main()
