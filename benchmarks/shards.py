"""Time a learner in shards against one that is whole, and weights to another node of Ray's.

    python benchmarks/shards.py [--only items|weights] [--json FILE]

items: eight actors, each in a process of its own, insert into 1 shard and into 4, and then a
learner draws batches of 256, one by one and four ahead, each for so many seconds. What counts where
there are fewer cores than processes is the CPU time of an item: of the actors and the shards, or
the learner and the shards.

weights: two nodes of Ray's on this machine. 100 MB go from a learner on the first to eight
subscribers on the second, and what that node's raylet receives is counted by the system, for its
TCP connections (`ss`). The same weights from a TrainerServer on the first node are the reference.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from common import Child, Row, Table, interleaved, medians, parser, save
from edgeml import ShardedLearner, TrainerClient, TrainerConfig, TrainerServer
from edgeml.data import QueuedDataStore, ReplayBuffer
from upload import make_items

ACTORS, BATCH, AHEAD = 8, 256, 4
CASES = {"state, 168 B": 500, "image, 49 KB": 32}
"""Items that an actor inserts between two updates."""
WEIGHTS = 100 << 20
SUBSCRIBERS = 8

CONFIG = TrainerConfig(0, None)


# Inserts and samples --------------------------------------------------------------------------


def serve(pipe: Connection, case: str, transport: str, capacity: int) -> None:
    """Run as a child: a shard."""
    server = TrainerServer(TrainerConfig(0, None, transport=transport))
    store = ReplayBuffer(capacity, example=make_items(case)[0])
    server.register_data_store("robot", store)
    server.serve_samples()
    with server.serving():
        pipe.send(server.url)
        with contextlib.suppress(EOFError):
            while True:
                pipe.recv()
                pipe.send(store.latest_data_id())


def act(pipe: Connection, case: str, url: str) -> None:
    """Run as a child: an actor, which inserts from a begin to an end, and tells how many items."""
    items = make_items(case)[: CASES[case]]
    store = QueuedDataStore(4 * len(items))
    with TrainerClient("robot", None, CONFIG, store, url=url) as client:
        client.update()
        pipe.send("there")
        with contextlib.suppress(EOFError):
            while True:
                begin, end = pipe.recv()
                time.sleep(max(0.0, begin - time.monotonic()))
                sent = 0
                while time.monotonic() < end:
                    store.batch_insert(items)
                    sent += client.update().applied
                pipe.send(sent)


def learn(pipe: Connection, urls: list[str], ahead: bool) -> None:
    """Run as a child: a learner, which draws batches from a begin to an end, some ahead or not."""
    with ShardedLearner("robot", urls, CONFIG) as learner:
        out = learner.empty_batch(BATCH)
        learner.sample(BATCH, out=out)
        pipe.send("there")
        with contextlib.suppress(EOFError):
            while True:
                begin, end = pipe.recv()
                time.sleep(max(0.0, begin - time.monotonic()))
                drawn = 0
                with (
                    learner.prefetch(BATCH, depth=AHEAD)
                    if ahead
                    else contextlib.nullcontext() as batches
                ):
                    while time.monotonic() < end:
                        if batches is None:
                            learner.sample(BATCH, out=out)
                        else:
                            next(batches)
                        drawn += BATCH
                pipe.send(drawn)


class Setup:
    """So many shards, their actors and a learner; they rest while it is others' turn."""

    def __init__(self, shards: int, case: str, transport: str) -> None:
        capacity = (200_000 if case.startswith("state") else 8_000) // shards
        self.shards = [Child(serve, case, transport, capacity) for _ in range(shards)]
        urls = [shard.receive() for shard in self.shards]
        self.actors = [Child(act, case, urls[number % shards]) for number in range(ACTORS)]
        for actor in self.actors:
            actor.receive()
        self._run(self.actors, 1.0)  # so that there is something to draw
        self.learners = [Child(learn, urls, ahead) for ahead in (False, True)]
        for learner in self.learners:
            learner.receive()

    def close(self) -> None:
        for child in (*self.learners, *self.actors, *self.shards):
            child.close()

    def one_round(self, seconds: float) -> Row:
        inserts, insert_cpu = self._run(self.actors, seconds)
        (samples, sample_cpu), (ahead, ahead_cpu) = (
            self._run([learner], seconds) for learner in self.learners
        )
        return {
            "inserts_per_s": inserts / seconds,
            "insert_us": insert_cpu / inserts * 1e6,
            "samples_per_s": samples / seconds,
            "sample_us": sample_cpu / samples * 1e6,
            "ahead_per_s": ahead / seconds,
            "ahead_us": ahead_cpu / ahead * 1e6,
        }

    def _run(self, workers: list[Child], seconds: float) -> tuple[int, float]:
        """Have them work; returns how many items, and the CPU time of them and the shards."""
        begin = time.monotonic() + 0.1
        before = self._count(workers) if len(workers) > 1 else 0
        used = sum(child.cpu() for child in (*workers, *self.shards))
        for worker in workers:
            worker.pipe.send((begin, begin + seconds))
        told = sum(worker.receive(timeout=120) for worker in workers)
        used = sum(child.cpu() for child in (*workers, *self.shards)) - used
        if len(workers) > 1:
            arrived = self._count(workers) - before
            if arrived != told:
                raise RuntimeError(f"{told} items were acknowledged, and {arrived} are there")
        return told, used

    def _count(self, workers: list[Child]) -> int:
        for shard in self.shards:
            shard.pipe.send(None)
        return sum(int(shard.receive()) for shard in self.shards)


def measure_items(options: argparse.Namespace) -> dict[str, dict[str, Row]]:
    results = {}
    table = Table(
        *(14, 9),
        inserts_per_s="14.0",
        insert_us="10.2",
        insert_us_ratio="6.2",
        samples_per_s="14.0",
        sample_us="10.2",
        sample_us_ratio="6.2",
        ahead_per_s="12.0",
        ahead_us="9.2",
        ahead_us_ratio="6.2",
    )
    for case in CASES:
        kept: dict[str, list[Row]] = {"1": [], "4": []}
        with contextlib.ExitStack() as stack:
            setups = {}
            for name in kept:
                setups[name] = Setup(int(name), case, options.transport)
                stack.callback(setups[name].close)
            for name in interleaved(setups, options.rounds):
                kept[name].append(setups[name].one_round(options.seconds))
        rows = {name: medians(rounds) for name, rounds in kept.items()}
        for key in ("insert_us", "sample_us", "ahead_us"):
            # Of each round by itself, as what else the machine does changes from round to round.
            pairs = zip(kept["4"], kept["1"], strict=True)
            rows["4"][f"{key}_ratio"] = float(np.median([a[key] / b[key] for a, b in pairs]))
        for name, row in rows.items():
            table.add(case, f"{name} shards", row=row)
        results[case] = rows
    return results


# Weights --------------------------------------------------------------------------------------


def received_by(pid: int) -> int:
    """Bytes that the TCP connections that a process has now have received, as the system says."""
    told = subprocess.run(
        ["ss", "--tcp", "--info", "--process", "--numeric", "--oneline"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    mine = [line for line in told.splitlines() if f"pid={pid}," in line]
    return sum(int(n) for line in mine for n in re.findall(r"bytes_received:(\d+)", line))


class Subscriber:
    """An actor of Ray's, which notes when weights came."""

    def __init__(self, url: str) -> None:
        self._came: dict[int, float] = {}
        self._client = TrainerClient("robot", None, CONFIG, url=url, timeout=60)
        self._client.recv_network_callback(self._take)

    def _take(self, weights: Any) -> None:
        step, layer = int(weights["step"]), weights["layer"]
        if (
            layer[0] != step
            or layer[-1] != step
            or layer.sum(dtype=np.float64) != step * len(layer)
        ):
            raise RuntimeError("these are other weights")
        self._came[step] = time.monotonic()

    def pid(self) -> int:
        return os.getpid()

    def came(self, step: int) -> float:
        return self._came.get(step, 0.0)


def make_trainer() -> TrainerServer:
    server = TrainerServer(TrainerConfig(0, None), host="0.0.0.0")
    server.register_data_store("robot", ReplayBuffer(100, example={"step": 0}))
    return server


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Any, int]]:
    """Ray on two nodes, with the process of the second one's raylet."""
    home = tempfile.mkdtemp(prefix="rb-", dir="/tmp")
    os.environ["RAY_TMPDIR"] = home  # or other programs here would find this cluster
    from ray.cluster_utils import Cluster

    import ray

    os.makedirs(f"{home}/ray")
    memory = 6 * WEIGHTS
    common: dict[str, Any] = {"num_cpus": 16, "object_store_memory": memory}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            **common,
            "include_dashboard": False,
            "temp_dir": home,
            "resources": {"first": 1},
        },
    )
    try:
        second = cluster.add_node(**common, resources={"second": 1})
        ray.init(address=cluster.address, log_to_driver=False)
        (raylet,) = second.all_processes["raylet"]
        yield ray, raylet.process.pid
    finally:
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]
        shutil.rmtree(home, ignore_errors=True)


def publish_and_count(ray: Any, publish: Any, subscribers: list[Any], counted: list[int]) -> Row:
    """Publish thrice; returns the median bytes that these processes received, and the seconds."""
    rows = []
    for step in range(1, 5):
        layer = np.full(WEIGHTS // 4, step, np.float32)
        before = sum(map(received_by, counted))
        began = time.monotonic()
        publish({"step": step, "layer": layer})
        while not all(came := ray.get([each.came.remote(step) for each in subscribers])):
            if time.monotonic() - began > 120:
                raise TimeoutError(f"weights {step} came to {sum(map(bool, came))} subscribers")
            time.sleep(0.02)
        seconds = max(came) - began
        megabytes = (sum(map(received_by, counted)) - before) / 1e6
        if step > 1:  # the first one warms up
            rows.append({"megabytes": megabytes, "seconds": seconds})
    return medians(rows)


def measure_weights() -> dict[str, Row]:
    import edgeml.ray

    with two_nodes() as (ray, raylet):
        edgeml.ray.start("127.0.0.1:0")
        edgeml.ray.deploy_trainer(
            make_trainer, name="learner", shards=1, num_cpus=0, resources={"first": 0.1}
        )
        there = ray.remote(Subscriber).options(resources={"second": 0.1}, num_cpus=0)
        sent = WEIGHTS / 1e6
        table = Table(34, megabytes="10.1", copies="8.2", seconds="8.3")
        results = {}
        with edgeml.ray.learner("learner", "robot", CONFIG) as learner:
            subscribers = [there.remote("ray://learner") for _ in range(SUBSCRIBERS)]
            pids = ray.get([each.pid.remote() for each in subscribers])
            replicas = edgeml.ray.status("learner").replicas
            (relay,) = [each for each in replicas if each.id.startswith("relay")]
            counted = [raylet, relay.pid, *pids]
            row = publish_and_count(ray, learner.publish_network, subscribers, counted)
            results["by Ray, once to the node"] = {**row, "copies": row["megabytes"] / sent}
        for each in subscribers:
            ray.kill(each)
        with make_trainer().serving() as server:
            subscribers = [there.remote(server.url) for _ in range(SUBSCRIBERS)]
            pids = ray.get([each.pid.remote() for each in subscribers])
            row = publish_and_count(ray, server.publish_network, subscribers, [raylet, *pids])
            results["by a TrainerServer, zmq"] = {**row, "copies": row["megabytes"] / sent}
        for name, row in results.items():
            table.add(name, row=row)
        edgeml.ray.stop()
    return results


def main() -> None:
    made = parser(__doc__, [], rounds=5)
    made.add_argument("--only", choices=["items", "weights"])
    made.add_argument("--transport", default="zmq", help="between actors and shards (default zmq)")
    made.add_argument("--seconds", type=float, default=3.0, help="of a round (default 3)")
    options = made.parse_args()
    results: dict[str, Any] = {}
    if options.only != "weights":
        results["items"] = measure_items(options)
    if options.only != "items":
        results["weights"] = measure_weights()
    save(options, results)


if __name__ == "__main__":
    main()
