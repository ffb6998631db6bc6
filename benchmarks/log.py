"""Time what an actor's log costs: inserts in the control thread, and uploads, with and without it.

    python benchmarks/log.py [--json FILE] [--directory DIR]

Inserts of a transition of 168 bytes are timed one by one, in turns of the stores. An upload is of a
thousand of them, or of a hundred with an image, to a learner in another process, as in upload.py;
"log" is `TrainerClient(log=)` with the same store.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common import Row, Table, interleaved, medians, parser, save
from edgeml.data import DataStoreBase, LoggedDataStore, QueuedDataStore, ReplayBuffer
from links import workspace
from upload import CASES, Edgeml, make_items

_HELD = 100_000
_AT_ONCE = 500  # inserts of one store before the next one's turn


def make_stores(directory: Path, stack: contextlib.ExitStack) -> dict[str, DataStoreBase]:
    def make_log(name: str) -> LoggedDataStore:
        return stack.enter_context(LoggedDataStore(directory / name))

    replay, queue = ReplayBuffer(_HELD), QueuedDataStore(_HELD)
    replay.forward_to(make_log("replay"))
    queue.forward_to(make_log("queue"))
    return {
        "queue": QueuedDataStore(_HELD),
        "queue, log": queue,
        "logged store": make_log("alone"),
        "replay": ReplayBuffer(_HELD),
        "replay, log": replay,
    }


def time_inserts(directory: Path, rounds: int) -> dict[str, Row]:
    """Microseconds of one insert: the median, and the 99th percentile, over all rounds."""
    item = make_items("state, 168 B")[0]
    times: dict[str, list[int]] = {}
    with contextlib.ExitStack() as stack:
        stores = make_stores(directory, stack)
        for number, name in enumerate(interleaved(stores, rounds)):
            insert: Callable[[Any], None] = stores[name].insert
            took = times.setdefault(name, [])
            clock = time.perf_counter_ns
            for _ in range(_AT_ONCE):
                begun = clock()
                insert(item)
                if number >= len(stores):  # the first round learns what items are like
                    took.append(clock() - begun)
    rows = {}
    for name in stores:
        median, high = np.percentile(times[name], [50, 99]) / 1e3
        rows[name] = {"p50_us": float(median), "p99_us": float(high)}
    for name, base in (
        ("queue, log", "queue"),
        ("logged store", "queue"),
        ("replay, log", "replay"),
    ):
        rows[name]["p50_us_more"] = rows[name]["p50_us"] - rows[base]["p50_us"]
    return rows


class _Peer(Edgeml):
    """An actor of upload.py's, with a log or without one."""

    log: str | None = None

    def connect(self, address: str) -> None:
        import edgeml

        self._store = (
            QueuedDataStore(self._capacity)
            if self.local == "queue"
            else ReplayBuffer(self._capacity)
        )
        config = edgeml.TrainerConfig(0, None, ["check"], transport=address)
        self._client = edgeml.TrainerClient(
            "actor", "", config, self._store, timeout=30, log=self.log
        )


def time_uploads(directory: Path, transports: list[str], rounds: int) -> dict[str, dict[str, Row]]:
    """Items a second, for each kind of item."""
    results = {}
    for case in CASES:
        items = make_items(case)
        kept: dict[str, list[Row]] = {}
        with contextlib.ExitStack() as stack:
            peers: dict[str, _Peer] = {}
            for transport in transports:
                for local in ("queue", "replay"):
                    for log in (None, str(directory / f"{case[:5]} {transport} {local}")):
                        name = f"{transport}, {local}{', log' if log else ''}"
                        options = {"name": name, "transport": transport, "local": local, "log": log}
                        peer = type("Peer", (_Peer,), options)(4 * len(items))
                        stack.callback(peer.close)
                        peer.one_round(items, 8)
                        peers[name], kept[name] = peer, []
            for name in interleaved(peers, rounds):
                kept[name].append(peers[name].one_round(items, 10))
        rows = {name: medians(each) for name, each in kept.items()}
        for name, row in rows.items():
            base = rows[name.removesuffix(", log")]
            row["items_per_s_ratio"] = row["items_per_s"] / base["items_per_s"]
        results[case] = rows
    return results


def main() -> None:
    options = parser(__doc__, ["zmq", "shm"], rounds=20)
    options.add_argument("--directory", help="of the logs (default: a new one in $TMPDIR)")
    given = options.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=given.directory) as made, workspace():
        table = Table(14, p50_us="10.2", p99_us="10.2", p50_us_more="10.2")
        results["inserts"] = time_inserts(Path(made) / "inserts", given.rounds)
        for name, row in results["inserts"].items():
            table.add(name, row=row)
        uploads = time_uploads(Path(made), given.peers, given.rounds)
        table = Table(*(14, 20), items_per_s="12.0", items_per_s_ratio="6.2")
        for case, rows in uploads.items():
            for name, row in rows.items():
                table.add(case, name, row=row)
        results["uploads"] = uploads
    save(given, results)


if __name__ == "__main__":
    main()
