"""Servers in Ray that come, go and die while sixteen clients call them without a pause."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import edgeml.ray
from edgeml import InferenceClient, InferenceServer, Unreachable
from edgeml.ray import Autoscale, cluster
from pairs import took, wait_until

CLIENTS = 16
TIMEOUT = 20.0  # seconds that a call may take
PATIENCE = 60.0  # seconds; of whoever waits for Ray on a machine that is busy with the clients
COST = 0.02  # seconds, in which others may run


def working(version: int) -> Callable[[], InferenceServer]:
    """A factory of servers that take a while to answer which they are."""

    def make() -> InferenceServer:
        server = InferenceServer(0)

        @server.register_interface("work")
        def work(number: int) -> list[int]:
            time.sleep(COST)
            return [number, version, os.getpid()]

        return server

    return make


class Load:
    """Clients that each have one call under way at a time, and what came of each."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answered: Counter[int] = Counter()  # by process
        self.versions: set[int] = set()
        self.failed: list[list[tuple[float, BaseException]]] = [[] for _ in range(CLIENTS)]
        self.began = threading.Barrier(CLIENTS + 1)
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self.call, args=(n,)) for n in range(CLIENTS)]

    def call(self, me: int) -> None:
        with InferenceClient(url=self.url, timeout=TIMEOUT) as client:
            assert client.call("work", 0)[0] == 0
            self.began.wait(60)
            number = 0
            while not self.over.is_set():
                number += 1
                began = time.monotonic()
                try:
                    echoed, version, pid = client.call("work", number)
                    assert echoed == number
                except BaseException as error:
                    self.failed[me].append((time.monotonic() - began, error))
                else:
                    with self.lock:
                        self.answered[pid] += 1
                        self.versions.add(version)

    @property
    def errors(self) -> list[str]:
        return [f"{type(error).__name__}: {error}" for each in self.failed for _, error in each]

    def pids(self) -> set[int]:
        """The processes that answer now."""
        with self.lock:
            self.answered.clear()
        wait_until(lambda: sum(self.answered.values()) > 4 * CLIENTS, PATIENCE)
        return set(self.answered)


@contextmanager
def loaded(url: str) -> Iterator[Load]:
    load = Load(url)
    for thread in load.threads:
        thread.start()
    try:
        load.began.wait(60)
        yield load
    finally:
        load.over.set()
        load.began.abort()
        for thread in load.threads:
            thread.join(60)


def pids_of(name: str) -> set[int]:
    return {each.pid for each in edgeml.ray.status(name).replicas if each.state == "ready"}


def test_no_call_is_lost_while_servers_are_replaced_and_scaled_and_the_controller_dies(ray, name):
    url = edgeml.ray.deploy(working(1), name=name, replicas=2, timeout=60).url
    controller = cluster.find_actor(cluster.CONTROLLER)
    with loaded(url) as load:
        assert load.pids() == pids_of(name)
        edgeml.ray.scale(name, 3)
        wait_until(lambda: load.pids() == pids_of(name) and len(pids_of(name)) == 3, PATIENCE)
        pids, there = load.pids(), ray.get(controller.pid.remote())
        os.kill(there, signal.SIGKILL)
        assert load.pids() == pids
        edgeml.ray.deploy(working(2), name=name, replicas=2, timeout=60)  # by the next controller
        wait_until(lambda: load.pids() == pids_of(name), PATIENCE)
        edgeml.ray.scale(name, 1)
        wait_until(lambda: len(edgeml.ray.status(name).replicas) == 1, PATIENCE)
        assert load.pids() == pids_of(name)
    assert load.errors == []
    assert load.versions == {1, 2}


def test_a_server_that_is_killed_loses_what_was_under_way_in_it_alone(name):
    url = edgeml.ray.deploy(working(1), name=name, replicas=2, timeout=60).url
    with loaded(url) as load:
        assert load.pids() == pids_of(name)
        victim = edgeml.ray.status(name).replicas[0]
        before = load.pids()
        with took(10.0):
            os.kill(victim.pid, signal.SIGKILL)
            wait_until(lambda: load.pids() - before, PATIENCE)  # a new one answers
    # Nobody has lost more than the one call that it had there.
    assert max(map(len, load.failed)) <= 1
    for seconds, error in [each for failed in load.failed for each in failed]:
        assert seconds < TIMEOUT
        assert isinstance(error, Unreachable)
        assert "carried out" in str(error)
        assert victim.url in str(error)


def test_replicas_come_and_go_by_how_many_calls_wait(name):
    bounds = Autoscale(least=1, most=2, waiting=3.0, up_after=1.0, down_after=2.0)
    url = edgeml.ray.deploy(working(1), name=name, autoscale=bounds, timeout=60).url
    with loaded(url) as load:
        wait_until(lambda: len(pids_of(name)) == 2, PATIENCE)
        wait_until(lambda: len(load.pids()) == 2, PATIENCE)
    wait_until(lambda: len(edgeml.ray.status(name).replicas) == 1, PATIENCE)
    assert load.errors == []
