"""Time round trips to a policy server, side by side with the peers, in one run.

    python benchmarks/roundtrip.py [--json FILE]

Rounds of the peers are interleaved, so that a noisy moment hits all of them; what is printed are
medians over rounds, and ratios to raw pyzmq. Read the ratios: times are this machine's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from statistics import median
from typing import Any

import numpy as np

from peers import CHUNK, PAGE, PEERS, Array, Peer

SIZES = {
    "56 B": 56,
    "301 KB": 2 * 224 * 224 * 3,  # two cameras
    "2.8 MB": 2 * 680 * 680 * 3 + 24_000,
    "25 MB": 25_000_000,
}


def one_round(peer: Peer, observation: Array, calls: int) -> list[float]:
    """Times of ``calls`` round trips, in seconds."""
    times = []
    for number in range(calls):
        observation[0] = number % 256
        began = time.perf_counter()
        chunk = peer.call(observation)
        times.append(time.perf_counter() - began)
        if chunk.shape != CHUNK.shape or chunk[0, 0] != np.float32(observation[::PAGE].sum()):
            raise AssertionError(f"{peer.name} gave a wrong answer")
    return times


def measure(peers: dict[str, Peer], size: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Medians over rounds of p50 and p99 in microseconds, and of calls per second, by peer."""
    observation = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    calls = {}
    for name, peer in peers.items():
        one_round(peer, observation, 20)  # connections, pages and branch predictors
        calls[name] = max(20, int(seconds / median(one_round(peer, observation, 20))))
    kept: dict[str, list[list[float]]] = {name: [] for name in peers}
    for number in range(rounds):
        order = list(peers) if number % 2 else list(reversed(peers))
        for name in order:
            kept[name].append(one_round(peers[name], observation, calls[name]))
    return {
        name: {
            "p50_us": median(float(np.percentile(times, 50)) * 1e6 for times in kept[name]),
            "p99_us": median(float(np.percentile(times, 99)) * 1e6 for times in kept[name]),
            "calls_per_s": median(len(times) / sum(times) for times in kept[name]),
            "calls": sum(map(len, kept[name])),
        }
        for name in peers
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time round trips, side by side with the peers.")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=11, help="rounds of each peer and size")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a round")
    parser.add_argument("--json", metavar="FILE", help="keep the figures in a file")
    options = parser.parse_args()

    peers = {name: PEERS[name]() for name in options.peers}
    reference = options.peers[0]
    results = {}
    print(f"{'':8} {'':12} {'p50 us':>9} {'ratio':>6} {'p99 us':>9} {'ratio':>6}", end="")
    print(f" {'calls/s':>9} {'MB/s':>8}")
    try:
        for label in options.sizes:
            size = SIZES[label]
            results[label] = measured = measure(peers, size, options.rounds, options.seconds)
            base = measured[reference]
            for name, row in measured.items():
                row["p50_ratio"] = row["p50_us"] / base["p50_us"]
                row["p99_ratio"] = row["p99_us"] / base["p99_us"]
                print(f"{label:8} {name:12} {row['p50_us']:9.0f} {row['p50_ratio']:6.2f}", end="")
                print(f" {row['p99_us']:9.0f} {row['p99_ratio']:6.2f}", end="")
                print(f" {row['calls_per_s']:9.0f} {row['calls_per_s'] * size / 1e6:8.1f}")
    finally:
        for peer in peers.values():
            peer.close()
    for peer in peers.values():
        if peer.note:
            print(f"note: {peer.note}")
    if options.json:
        machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "when": time.ctime()}
        with open(options.json, "w") as file:
            json.dump({"machine": machine, "reference": reference, "results": results}, file)


if __name__ == "__main__":
    main()
