"""What a shadow costs the real calls: with a candidate that is alive, slow, and dead.

    python benchmarks/shadow.py [--hz 0] [--rounds 7] [--json FILE]

A client calls with two cameras of 224x224 (301 KB), 50 times a second, or with ``--hz 0`` in
closed loop; the policy takes ``--compute`` seconds, without the GIL. Each case has a client in a
process of its own, which calls for ``--seconds`` a round, while the others wait:

- **none**: no shadow. All ratios are to this.
- **alive**: a candidate that takes as long as the real policy.
- **slow**: one that takes a second.
- **dead**: nobody listens there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from multiprocessing.connection import Connection

import numpy as np

from common import Child, Row, Table, interleaved, parser, save, transports
from edgeml.services import InferenceClient, InferenceServer

CASES = ("none", "alive", "slow", "dead")
SLOW = 1.0  # seconds


def serve(pipe: Connection, transport: str, compute: float) -> None:
    server = InferenceServer(0, transport=transport)

    def policy(observation: dict[str, np.ndarray]) -> dict[str, object]:
        time.sleep(compute)
        return {"actions": np.zeros((50, 14), np.float32), "number": int(observation["number"])}

    server.register_interface("policy", policy)
    with server.serving():
        pipe.send(server.url)
        with suppress(EOFError):
            pipe.recv()


def call(pipe: Connection, url: str, shadow: str | None, hz: float) -> None:
    """Run as a child: call for so many seconds, whenever told to; an end of 0 ends it."""
    cameras = np.zeros((2, 224, 224, 3), np.uint8)
    with InferenceClient(url=url, shadow=shadow) as client:
        number = 0
        while seconds := pipe.recv():
            took = []
            begin = due = time.monotonic()
            while due < begin + seconds:
                time.sleep(max(0.0, due - time.monotonic()))
                number += 1
                began = time.perf_counter()
                answer = client.call("policy", {"cameras": cameras, "number": number})
                took.append(time.perf_counter() - began)
                if answer["number"] != number:
                    raise ValueError("another call's answer")
                due = due + 1 / hz if hz else time.monotonic()
            pipe.send((took, client.stats().get("shadow", {})))
        pipe.send(None)


@contextmanager
def clients_of(transport: str, compute: float, hz: float) -> Iterator[dict[str, Child]]:
    with ExitStack() as stack:
        servers = [
            stack.enter_context(closing(Child(serve, transport, seconds)))
            for seconds in (compute, compute, SLOW, compute)
        ]
        urls = [server.receive() for server in servers]
        servers[3].close()  # so that nobody listens there
        shadows = dict(zip(CASES, (None, *urls[1:]), strict=True))
        yield {
            case: stack.enter_context(closing(Child(call, urls[0], shadow, hz)))
            for case, shadow in shadows.items()
        }


def measure(
    transport: str, rounds: int, seconds: float, compute: float, hz: float
) -> dict[str, Row]:
    times: dict[str, list[float]] = {case: [] for case in CASES}
    told: dict[str, dict[str, float]] = {}
    with clients_of(transport, compute, hz) as clients:
        for number, case in enumerate(interleaved(CASES, rounds + 1)):
            clients[case].pipe.send(seconds)
            took, told[case] = clients[case].receive()
            if number >= len(CASES):  # the first round counts for nothing
                times[case] += took
        for child in clients.values():
            child.pipe.send(0.0)
            child.receive()
    rows: dict[str, Row] = {}
    for case in CASES:
        row = rows[case] = {"calls": float(len(times[case]))}
        for name, percentile in (("p50_ms", 50), ("p99_ms", 99)):
            # Of the calls of all rounds, as a round has too few for its hundredth.
            row[name] = float(np.percentile(times[case], percentile)) * 1e3
            row[f"{name}_ratio"] = row[name] / rows["none"][name]
        row["answered"], row["skipped"] = (told[case].get(n, 0) for n in ("answered", "skipped"))
    return rows


def main() -> None:
    options = parser(__doc__, transports(), rounds=7)
    options.add_argument("--seconds", type=float, default=4.0, help="of each case, each round")
    options.add_argument("--compute", type=float, default=0.005, help="seconds of the policy")
    options.add_argument("--hz", type=float, default=50.0, help="0 for closed loop")
    given = options.parse_args()
    table = Table(
        6,
        6,
        p50_ms="8.2",
        p50_ms_ratio="8.3",
        p99_ms="8.2",
        p99_ms_ratio="8.3",
        answered="9.0",
        skipped="8.0",
    )
    results = {}
    for transport in given.peers:
        results[transport] = measure(
            transport, given.rounds, given.seconds, given.compute, given.hz
        )
        for case, row in results[transport].items():
            table.add(transport, case, row=row)
    save(given, results)


if __name__ == "__main__":
    main()
