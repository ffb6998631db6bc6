"""Weights come once to each node, and from there to all its clients."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import numpy as np
import pytest

import edgeml.ray
from edgeml import Closed, NotEncodable, TrainerClient, TrainerConfig, TrainerServer, Unreachable
from edgeml.data import ReplayBuffer
from edgeml.ray.relay import Board
from pairs import wait_until

CONFIG = TrainerConfig(0, None)


def make() -> TrainerServer:
    server = TrainerServer(TrainerConfig(0, None))
    server.register_data_store("robot", ReplayBuffer(100, example={"step": 0}))
    return server


class Weights:
    """What a client has received."""

    def __init__(self) -> None:
        self.all: list[object] = []
        self._lock = threading.Lock()

    def __call__(self, weights) -> None:
        with self._lock:
            self.all.append(weights)

    def newest(self) -> int:
        return int(self.all[-1]["step"]) if self.all else -1


def relay_of(name):
    found = [each for each in edgeml.ray.status(name).replicas if each.id.startswith("relay-")]
    return found[0] if found and found[0].state == "ready" else None


def test_weights_reach_all_clients_of_a_node(name):
    edgeml.ray.deploy_trainer(make, name=name, shards=1, num_cpus=0)
    clients = [TrainerClient("robot", None, CONFIG, url=f"ray://{name}") for _ in range(3)]
    clients.append(TrainerClient("robot", None, CONFIG, url=edgeml.ray.status(name).url))
    received = [Weights() for _ in range(5)]
    try:
        with edgeml.ray.learner(name, "robot", CONFIG) as learner:
            for client, weights in zip(clients, received, strict=False):
                client.recv_network_callback(weights)
            layer = np.arange(100_000, dtype=np.float32)
            assert learner.publish_network({"step": 1, "layer": layer}) == 1
            layer[:] = 0  # it may be changed at once
            wait_until(lambda: all(weights.newest() == 1 for weights in received[:4]))
            for weights in received[:4]:
                assert (weights.all[-1]["layer"] == np.arange(100_000)).all()
            # Late ones get the newest.
            clients.append(TrainerClient("robot", None, CONFIG, url=f"ray://{name}"))
            clients[-1].recv_network_callback(received[4])
            wait_until(lambda: received[4].newest() == 1)
            wait_until(lambda: relay_of(name).detail == "1 published to 5 clients")
            with pytest.raises(NotEncodable):
                learner.publish_network({"step": object()})
            # A relay that is killed is started anew, and gets the newest again.
            os.kill(relay_of(name).pid, signal.SIGKILL)
            assert learner.publish_network({"step": 2}) == 2
            wait_until(lambda: all(weights.newest() == 2 for weights in received))
            edgeml.ray.delete(name)
            with pytest.raises(Unreachable, match="no trainer that is deployed"):
                learner.publish_network({"step": 3})
        with pytest.raises(Closed):
            learner.publish_network({"step": 3})
    finally:
        for client in clients:
            client.stop()


def test_the_board_gives_what_is_newer():
    async def play() -> None:
        board = Board()
        waits = asyncio.ensure_future(board.next("", 0))
        await asyncio.sleep(0)
        assert await board.put(["a"]) == 1
        epoch, number, newest = await waits
        assert (number, newest) == (1, ["a"])
        assert await board.next("", 0) == (epoch, 1, ["a"])
        assert await board.next("other", 1) == (epoch, 1, ["a"])  # of a board before this one
        waits = asyncio.ensure_future(board.next(epoch, 1))
        await asyncio.sleep(0)
        assert not waits.done()
        await board.put(["b"])
        await board.put(["c"])
        assert await waits == (epoch, 3, ["c"])

    asyncio.run(play())


def test_the_board_says_in_time_that_there_is_nothing(monkeypatch):
    monkeypatch.setattr("edgeml.ray.relay._HOLD", 0.05)
    assert asyncio.run(Board().next("", 0)) is None
