"""Batches served to clients, over every transport, from threads and other processes."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from edgeml import (
    Batching,
    DeadlineExceeded,
    EdgemlError,
    InferenceClient,
    InferenceServer,
    RemoteError,
)
from pairs import process, wait_until


class Held:
    """A batch function that waits, once it has begun, until it is let go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.sizes: list[int] = []

    def __call__(self, batch):
        self.sizes.append(len(batch["x"]))
        self.entered.set()
        assert self.go_on.wait(30)
        return {"x": batch["x"] * 2}


@pytest.fixture
def serve(transport):
    """Serves a function as "policy", in batches unless told otherwise."""
    servers = []

    def start(function, batching=Batching(max_size=8), workers=1, before=None):  # noqa: B008
        server = InferenceServer(0, transport=transport, workers=workers)
        server.register_interface("policy", function, batching=batching)
        if before is not None:
            before(server)
        servers.append(server)
        server.start(threaded=True)
        return server

    yield start
    for server in servers:
        server.stop()


def test_clients_that_call_at_once_are_answered_together(serve):
    held = Held()
    server = serve(held)
    with ThreadPoolExecutor(8) as pool, InferenceClient(url=server.url) as client:
        first = pool.submit(client.call, "policy", {"x": 0.5})
        assert held.entered.wait(10)
        with InferenceClient(url=server.url) as other:
            futures = [
                asked.call_async("policy", {"x": float(n)})
                for n, asked in enumerate([client, other] * 3)
            ]
            wait_until(lambda: server.stats()["waiting"] == 6)
            held.go_on.set()
            assert first.result(10) == {"x": 1.0}
            assert [f.result(10)["x"] for f in futures] == [0, 2, 4, 6, 8, 10]
            assert [future.timing.batch_size for future in futures] == [6] * 6
            assert all(future.timing.queue > 0 for future in futures)
    assert held.sizes == [1, 8]
    assert server.stats()["calls"] == 7


def test_images_of_many_clients_come_back_right(serve):
    server = serve(lambda batch: {"image": 255 - batch["image"], "n": batch["n"]})

    def loop(number):
        rng = np.random.default_rng(number)
        with InferenceClient(url=server.url) as client:
            for _ in range(10):
                image = rng.integers(0, 256, (64, 64, 3), np.uint8)
                answer = client.call("policy", {"image": image, "n": number})
                assert answer["n"] == number
                assert np.array_equal(answer["image"], 255 - image)

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(loop, number) for number in range(6)]:
            done.result(60)


CALLS_ONCE = """
import sys
from edgeml import InferenceClient
client = InferenceClient(url=sys.argv[1])
print("there", flush=True)
client.call("policy", {"x": 1.0})
"""


def test_a_client_that_dies_within_a_batch_leaves_the_others_their_answers(serve, transport):
    if transport == "inproc":
        pytest.skip("of one process")
    held = Held()
    server = serve(held)
    with InferenceClient(url=server.url, timeout=60) as client:
        first = client.call_async("policy", {"x": 0.0})
        assert held.entered.wait(10)
        with process(CALLS_ONCE, server.url) as dying:
            assert dying.line() == "there"
            wait_until(lambda: server.stats()["waiting"] == 1)
            futures = [client.call_async("policy", {"x": float(n)}) for n in range(1, 4)]
            wait_until(lambda: server.stats()["waiting"] == 4)
            dying.signal(signal.SIGKILL)
            dying.end()
        held.go_on.set()
        assert first.result(10) == {"x": 0.0}
        assert [future.result(10)["x"] for future in futures] == [2, 4, 6]
        assert client.call("policy", {"x": 5.0}) == {"x": 10.0}


def test_late_calls_cost_nothing(serve):
    held = Held()
    server = serve(held)
    with InferenceClient(url=server.url) as client:
        first = client.call_async("policy", {"x": 0.0})
        assert held.entered.wait(10)
        while not server.stats()["waiting"]:
            with pytest.raises(DeadlineExceeded):
                client.call("policy", {"x": 1.0}, timeout=0.05)
        time.sleep(0.1)  # until it is late at the server, too
        held.go_on.set()
        first.result(10)
        assert client.call("policy", {"x": 2.0}) == {"x": 4.0}
    assert held.sizes == [1, 1]


def test_the_culprit_alone_gets_the_error(serve):
    def policy(batch):
        if (batch["x"] == 3).any():
            raise ValueError("three")
        return batch["x"] * 2

    server = serve(policy, Batching(max_size=8, max_delay=0.3))
    with InferenceClient(url=server.url) as client:
        futures = [client.call_async("policy", {"x": n}) for n in range(8)]
        for n, future in enumerate(futures):
            if n == 3:
                with pytest.raises(RemoteError, match="ValueError: three"):
                    future.result(10)
            else:
                assert future.result(10) == 2 * n


def test_swaps_under_load_lose_no_call_and_mix_nothing(serve):
    def make(version):
        def policy(batch):
            time.sleep(0.0002)
            return {"version": np.full(len(batch["x"]), version), "x": batch["x"]}

        return policy

    server = serve(make(1))
    ended = threading.Event()

    def loop(number):
        calls, newest = 0, 0
        with InferenceClient(url=server.url) as client:
            while not ended.is_set():
                answer, timing = client.call("policy", {"x": number}, timing=True)
                assert answer["x"] == number
                assert answer["version"] == timing.version >= newest
                newest = timing.version
                calls += 1
        return calls

    with ThreadPoolExecutor(8) as pool:
        loops = [pool.submit(loop, number) for number in range(8)]
        try:
            for version in range(2, 202):
                assert server.swap("policy", make(version)) == version
                time.sleep(0.001)
        finally:
            ended.set()
        assert sum(done.result(60) for done in loops) == server.stats()["calls"]


def test_warm_up_runs_every_size_before_the_server_is_ready(serve):
    sizes = []

    def policy(batch):
        sizes.append(len(batch["x"]))
        return batch["x"]

    server = serve(
        policy, Batching(max_size=6), before=lambda server: server.warmup("policy", {"x": 1.0})
    )
    with InferenceClient(url=server.url, wait_for_server=10) as client:
        assert set(sizes) == {1, 2, 4, 6}
        assert client.call("policy", {"x": 2.0}) == 2.0
    del sizes[:]
    server.warmup("policy", {"x": 1.0})
    assert set(sizes) == {1, 2, 4, 6}


def test_jax_compiles_once_for_each_size_and_never_after_the_warm_up(transport):
    jax = pytest.importorskip("jax")
    compiled = []

    @jax.jit
    def policy(batch):
        compiled.append(batch["x"].shape)  # runs while it is traced only
        return {"x": batch["x"] * 2}

    server = InferenceServer(0, transport=transport)
    server.register_interface("policy", policy, batching=Batching(max_size=8))
    server.warmup("policy", {"x": np.zeros(3, np.float32)})
    with server.serving(), InferenceClient(url=server.url, wait_for_server=60) as client:
        assert sorted(compiled) == [(1, 3), (2, 3), (4, 3), (8, 3)]
        futures = [client.call_async("policy", {"x": np.full(3, n, "f4")}) for n in range(50)]
        assert all(future.result(30)["x"][0] == 2 * n for n, future in enumerate(futures))
        assert len(compiled) == 4
        futures = [client.call_async("policy", {"x": np.zeros(5, "f4")}) for _ in range(50)]
        assert all(future.result(30)["x"].shape == (5,) for future in futures)
        assert len(compiled) == len(set(compiled)) <= 8


def test_an_example_that_the_function_refuses_is_told_where_the_warm_up_is_asked_for(serve):
    server = serve(lambda batch: batch["x"])
    with pytest.raises(KeyError):
        server.warmup("policy", {"y": 1.0})
    with InferenceClient(url=server.url) as client:
        assert client.call("policy", {"x": 2.0}) == 2.0


@contextmanager
def twenty_waiting(serve):
    """A server, its function, a call that this holds, and twenty that wait meanwhile."""
    held = Held()
    server = serve(held)
    with InferenceClient(url=server.url) as client:
        first = client.call_async("policy", {"x": 0.0})
        assert held.entered.wait(10)
        waiting = [client.call_async("policy", {"x": float(n)}) for n in range(20)]
        wait_until(lambda: server.stats()["waiting"] == 20)
        yield server, held, first, waiting


def test_what_waits_is_refused_when_the_server_stops(serve):
    with twenty_waiting(serve) as (server, held, first, waiting):
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        for future in waiting:
            with pytest.raises(EdgemlError):
                future.result(10)
        held.go_on.set()
        stopping.join(10)
        assert first.result(10) == {"x": 0.0}


def test_a_server_that_drains_answers_all_that_it_has(serve):
    with twenty_waiting(serve) as (server, held, first, waiting), ThreadPoolExecutor(1) as pool:
        draining = pool.submit(server.drain)
        wait_until(lambda: server.state().state == "draining")
        held.go_on.set()
        assert first.result(10) == {"x": 0.0}
        assert [future.result(10)["x"] for future in waiting] == [2 * n for n in range(20)]
        assert draining.result(10)


def test_garbage_and_other_builds_of_payloads_hurt_nobody(serve):
    server = serve(lambda batch: batch["x"])
    with InferenceClient(url=server.url) as client:
        for payload in (None, 1, "text", [], {}, {"y": 1}, b"bytes", [[[1]]]):
            with pytest.raises(RemoteError):
                client.call("policy", payload)
            assert client.call("policy", {"x": 2.0}) == 2.0
        assert client.call("policy", {"x": "text"}) == "text"
        assert client.call("policy", {"x": np.zeros((0, 3))}).shape == (0, 3)


def test_a_client_that_asks_ahead_gets_full_batches_time_after_time(serve):
    # So long that the next batch has come, also where calls come a millisecond apart.
    server = serve(lambda batch: time.sleep(0.02) or batch["x"], Batching(max_size=16))
    with InferenceClient(url=server.url) as client:
        means = []
        for _ in range(5):
            futures = [client.call_async("policy", {"x": float(n)}) for n in range(160)]
            assert [future.result(30) for future in futures] == list(range(160))
            means.append(np.mean([future.timing.batch_size for future in futures]))
    assert np.median(means) > 6
