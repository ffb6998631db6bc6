"""Measure what waiting costs, and what a client costs the thread beside it, next to raw pyzmq.

    python benchmarks/idle.py [--json FILE]

Three tables: CPU of processes that only wait, and of a loop at 50 Hz, in per cent of a core; then
calls from a process in which another thread computes in pure Python, and what these calls leave of
that thread's speed. The work is that of the round trips. (Beside the thread, some calls of a closed
loop are quick, and others wait 5 ms for the interpreter's lock: calls a second tell more than their
median.)
"""

from __future__ import annotations

import contextlib
import threading
import time
from multiprocessing.connection import Connection

import numpy as np

import broadcast
from common import Array, Child, Row, Table, add_ratios, interleaved, medians, parser, save
from links import workspace
from peers import Peer, find

NAMES = ("pyzmq ipc", "edgeml zmq", "edgeml shm")
HZ = 50.0
SIZES = {"56 B": 56, "301 KB": 2 * 224 * 224 * 3}


class Spinner:
    """A thread that computes in pure Python."""

    def __init__(self) -> None:
        self.count = 0
        self._go = True
        self._thread = threading.Thread(target=self._spin)
        self._thread.start()

    def _spin(self) -> None:
        while self._go:
            self.count += 1

    def stop(self) -> None:
        self._go = False
        self._thread.join()


def calls(peer: Peer, observation: Array, hz: float, seconds: float) -> list[float]:
    """Times of calls, in seconds: ``hz`` of them a second, in closed loop (0), or none (below)."""
    if hz < 0:
        time.sleep(seconds)
        return []
    times = []
    tick = time.perf_counter()
    end = tick + seconds
    while tick < end:
        if hz:
            time.sleep(max(0.0, tick - time.perf_counter()))
        began = time.perf_counter()
        chunk = peer.call(observation)
        now = time.perf_counter()
        times.append(now - began)
        if chunk.shape != (50, 14) or chunk[0, 0] != observation[0]:
            raise AssertionError(f"{peer.name} gave a wrong answer")
        tick = max(tick + 1 / hz, now) if hz else now
    return times


def client(pipe: Connection, kind: type[Peer], address: object) -> None:
    """Run as a child: make the calls that are asked for, and send what was measured."""
    peer = kind(address)
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            size, hz, seconds, beside = pipe.recv()
            observation = np.zeros(size, np.uint8)
            observation[0] = 7
            for _ in range(20):
                peer.call(observation)
            spinner = Spinner() if beside else None
            pipe.send("go")
            count, cpu = spinner.count if spinner else 0, time.process_time()
            began = time.perf_counter()
            times = calls(peer, observation, hz, seconds)
            took = time.perf_counter() - began
            row = {
                "p50_us": float(np.median(times)) * 1e6 if times else 0.0,
                "calls_per_s": len(times) / took,
                "client": (time.process_time() - cpu) / took * 100,
                "seconds": took,
            }
            if spinner:
                row["loops_per_s"] = (spinner.count - count) / took
                spinner.stop()
            pipe.send(row)
    peer.close()


class Pair:
    """A server, and a client in a process of its own."""

    def __init__(self, kind: type[Peer]) -> None:
        self.kind = kind
        self.server = Child(kind.serve)
        self.client = Child(client, kind, self.server.receive())
        self.client.receive()

    def run(self, size: int, hz: float, seconds: float, beside: bool = False) -> Row:
        self.client.pipe.send((size, hz, seconds, beside))
        self.client.receive()
        cpu = self.server.cpu()
        row: Row = self.client.receive()
        row["server"] = (self.server.cpu() - cpu) / row["seconds"] * 100
        return row

    def close(self) -> None:
        self.client.close(self.kind.patience)
        self.server.close(self.kind.patience)


def waiting(pairs: dict[str, Pair], seconds: float) -> dict[str, Row]:
    """CPU of servers, clients and subscribers that only wait, all at the same time."""
    kinds = broadcast.find()
    with contextlib.ExitStack() as stack:
        children = {}
        for name, pair in pairs.items():
            publisher = kinds[name](8, 1)
            stack.callback(publisher.close)
            children[name] = {
                "server": pair.server,
                "client": pair.client,
                "subscriber": publisher.children[0],
            }
        time.sleep(1)  # connecting and importing is over
        before = {n: {key: c.cpu() for key, c in row.items()} for n, row in children.items()}
        time.sleep(seconds)
        return {
            name: {key: (c.cpu() - before[name][key]) / seconds * 100 for key, c in row.items()}
            for name, row in children.items()
        }


def beside_a_thread(pair: Pair, size: int, seconds: float) -> Row:
    """Calls beside a thread that computes, and what is left of its speed."""
    alone = pair.run(size, -1, seconds / 2, beside=True)["loops_per_s"]
    paced = pair.run(size, HZ, seconds, beside=True)
    closed = pair.run(size, 0, seconds / 2, beside=True)
    return {
        "paced_p50_us": paced["p50_us"],
        "paced_left": paced["loops_per_s"] / alone,
        "closed_p50_us": closed["p50_us"],
        "calls_per_s": closed["calls_per_s"],
        "closed_left": closed["loops_per_s"] / alone,
    }


def main() -> None:
    known = {name: kind for name, kind in find().items() if name in NAMES}
    options = parser(__doc__, known, rounds=3)
    options.add_argument("--seconds", type=float, default=1.0, help="length of a round")
    given = options.parse_args()
    results: dict[str, dict[str, Row]] = {}
    with workspace(), contextlib.ExitStack() as stack:
        pairs = {}
        for name in given.peers:
            pairs[name] = Pair(known[name])
            stack.callback(pairs[name].close)

        print("CPU in per cent of a core, waiting")
        table = Table(*(8, 12), server="10.2", client="10.2", subscriber="10.2")
        results["waiting"] = waiting(pairs, 5 * given.seconds)
        for name, row in results["waiting"].items():
            table.add("", name, row=row)

        print(f"\nCPU in per cent of a core, and calls, at {HZ:g} Hz")
        table = Table(*(8, 12), server="10.2", client="10.2", p50_us="10.0", p50_us_ratio="6.2")
        for label, size in SIZES.items():
            kept: dict[str, list[Row]] = {name: [] for name in pairs}
            for name in interleaved(pairs, given.rounds):
                kept[name].append(pairs[name].run(size, HZ, given.seconds))
            rows = {name: medians(kept[name]) for name in pairs}
            add_ratios(rows, NAMES[:1], "p50_us")
            results[f"paced, {label}"] = rows
            for name, row in rows.items():
                table.add(label, name, row=row)

        print("\nBeside a thread that computes, and what is left of its speed")
        table = Table(
            *(8, 12),
            paced_p50_us="13.0",
            paced_p50_us_ratio="6.2",
            paced_left="11.2",
            closed_p50_us="14.0",
            calls_per_s="11.0",
            calls_per_s_ratio="6.2",
            closed_left="12.2",
        )
        for label, size in SIZES.items():
            kept = {name: [] for name in pairs}
            for name in interleaved(pairs, given.rounds):
                kept[name].append(beside_a_thread(pairs[name], size, given.seconds))
            rows = {name: medians(kept[name]) for name in pairs}
            add_ratios(rows, NAMES[:1], "paced_p50_us", "calls_per_s")
            results[f"beside, {label}"] = rows
            for name, row in rows.items():
                table.add(label, name, row=row)
    save(given, results)


if __name__ == "__main__":
    main()
