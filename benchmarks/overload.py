"""Ask more of a server than it can answer, and count what comes in time.

    python benchmarks/overload.py [--loads 1.1 3.2 10] [--works "fixed 0.02"] [--json FILE]

Robots ask at a steady rate without waiting for their answers, each time with a deadline of five
runs of the function, or 0.1 s if that is longer. *Useful* are the answers that are there within it,
as a part of what the function could have answered, by what its runs took; *fair* is what the robot
with the fewest got, as a part of the average; *refused* are those of all that were asked that were
told so, by the server or by their own client, which holds back; and *told* is after which part of
the deadline they knew it, at the median.

A function's work is a sleep, since it stands for a GPU: "fixed" is always as long, and "varying"
half to one and a half times that. "batched" takes as long for up to 8 calls as for one.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import threading
import time
from multiprocessing.connection import Connection

import numpy as np

from common import Child, Row, Table, medians, save, transports

_BATCH = 8  # calls of a batch, at most
_SETTLE = 1.0  # seconds that all ask before it counts


def serve(
    pipe: Connection, transport: str, kind: str, work: float, workers: int, newest: bool
) -> None:
    """Run as a child: the server."""
    import edgeml

    rng = random.Random(0)
    took: list[float] = []

    def take_long() -> None:
        began = time.monotonic()
        time.sleep(work * rng.uniform(0.5, 1.5) if kind == "varying" else work)
        took.append(time.monotonic() - began)

    def policy(observation):  # type: ignore[no-untyped-def]
        take_long()
        return observation["state"]

    batching = edgeml.Batching(max_size=_BATCH, sizes="any") if kind == "batched" else None
    with edgeml.InferenceServer(0, transport=transport, workers=workers) as server:
        server.register_interface("policy", policy, batching=batching, newest_first=newest)
        server.start(threaded=True)
        pipe.send(server.url)
        pipe.poll(None)
        pipe.send((server.stats(), sum(took) / len(took)))


def ask(
    pipe: Connection, url: str, robots: int, first: int, of: int, period: float, timeout: float
) -> None:
    """Run as a child: some of the robots. Gets when to begin and to end; sends what came of it."""
    import edgeml

    useful = [0] * robots
    told: list[float] = []
    asked = [0] * robots
    observation = {"state": np.zeros(14, np.float32)}
    begin, end = 0.0, 0.0

    def run(client: edgeml.InferenceClient, number: int) -> None:
        at = begin - _SETTLE + (first + number) / of * period
        rng = random.Random(first + number)

        def note(since: float, future) -> None:  # type: ignore[no-untyped-def]
            took = time.monotonic() - since
            if not begin <= since < end:
                return
            error = future.exception()
            if error is None and took <= timeout:
                useful[number] += 1
            elif error is not None and took < timeout:
                told.append(took / timeout)

        while at < end:
            # A clock that is a little off, as clocks are; two that aren't would keep their order.
            time.sleep(max(0.0, at + rng.uniform(-0.1, 0.1) * period - time.monotonic()))
            since = time.monotonic()
            asked[number] += begin <= since < end
            future = client.call_async("policy", observation, timeout)
            future.add_done_callback(functools.partial(note, since))
            at += period

    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(edgeml.InferenceClient(url=url, timeout=10)) for _ in range(robots)
        ]
        for client in clients:
            client.call("policy", observation)
        pipe.send("there")
        begin, end = pipe.recv()
        threads = [
            threading.Thread(target=run, args=(client, number), daemon=True)
            for number, client in enumerate(clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        time.sleep(timeout)
        pipe.send((useful, sum(asked), told))


def measure(
    transport: str,
    kind: str,
    work: float,
    load: float,
    robots: int,
    workers: int,
    newest: bool,
    seconds: float,
    processes: int,
) -> Row:
    """One case."""
    capacity = workers / work * (_BATCH if kind == "batched" else 1)
    timeout = max(0.1, 5 * work)
    period = robots / (load * capacity)
    server = Child(serve, transport, kind, work, workers, newest)
    children: list[Child] = []
    try:
        url = server.receive()
        first = 0
        for left in range(processes, 0, -1):
            count = (robots - first) // left
            children.append(Child(ask, url, count, first, robots, period, timeout))
            first += count
        for child in children:
            child.receive()
        begin = time.monotonic() + 0.2 + _SETTLE
        for child in children:
            child.pipe.send((begin, begin + seconds))
        useful: list[int] = []
        told: list[float] = []
        asked = 0
        for child in children:
            ours, number, refused = child.receive(timeout=seconds + 60)
            useful += ours
            asked += number
            told += refused
        server.pipe.send("stats")
        stats, took = server.receive()
    finally:
        for child in (*children, server):
            child.close()
    total = sum(useful)
    best = workers / took * (_BATCH if kind == "batched" else 1)
    return {
        "asked_per_s": asked / seconds,
        "useful_per_s": total / seconds,
        "useful": total / seconds / best,
        "fair": min(useful) * robots / total if total else 0.0,
        "refused": len(told) / max(1, asked),
        "told": float(np.median(told)) if told else 0.0,
        "late_per_s": stats.get("answered_too_late", 0) / seconds,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--transports", nargs="*", default=transports())
    options.add_argument("--loads", nargs="*", type=float, default=[0.5, 1.1, 2, 3.2, 10])
    options.add_argument(
        "--works",
        nargs="*",
        default=["fixed 0.02", "varying 0.02", "fixed 0.002", "fixed 0.2", "batched 0.02"],
    )
    options.add_argument("--robots", type=int, default=8)
    options.add_argument("--processes", type=int, default=2, help="that the robots are in")
    options.add_argument("--workers", type=int, default=1)
    options.add_argument("--newest-first", action="store_true")
    options.add_argument("--seconds", type=float, default=5.0)
    options.add_argument("--rounds", type=int, default=1)
    options.add_argument("--json", metavar="FILE", help="keep the figures in a file")
    given = options.parse_args()
    results: dict[str, Row] = {}
    table = Table(
        *(6, 14, 6),
        asked_per_s="12.0",
        useful_per_s="13.1",
        useful="8.2",
        fair="6.2",
        refused="9.2",
        told="6.2",
        late_per_s="11.1",
    )
    for transport in given.transports:
        for job in given.works:
            kind, work = job.split()
            for load in given.loads:
                row = medians(
                    measure(
                        transport,
                        kind,
                        float(work),
                        load,
                        given.robots,
                        given.workers,
                        given.newest_first,
                        max(given.seconds, 25 * float(work)),
                        given.processes,
                    )
                    for _ in range(given.rounds)
                )
                results[f"{transport} {job} {load:g}"] = row
                table.add(transport, job, f"{load:g}x", row=row)
    save(given, results)


if __name__ == "__main__":
    main()
