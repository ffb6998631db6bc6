"""agentlace's own tests of its pairs, by hand: what they do and expect, without their pauses."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from agentlace.action import ActionClient, ActionConfig, ActionServer
from agentlace.data.data_store import QueuedDataStore
from agentlace.inference import InferenceClient, InferenceServer
from agentlace.trainer import TrainerClient, TrainerConfig, TrainerServer

from pairs import wait_until

TABLES = ("table1", "table2")


@contextmanager
def both(server: Any, make_client: Any) -> Iterator[Any]:
    server.start(threaded=True)
    client = None
    try:
        client = make_client(server.port)
        yield client
    finally:
        if client is not None:
            client.stop()
        server.stop()


def test_queued_data_store() -> None:
    store = QueuedDataStore(6)
    assert len(store) == 0
    store.insert(1)
    store.insert(2)
    assert len(store) == 2
    second = store.latest_data_id()
    assert store.get_latest_data(second) == []
    store.insert(3)
    assert len(store) == 3
    assert len(store.get_latest_data(second)) == 1
    store.batch_insert([4, 5, 6])
    assert len(store) == 6
    sixth = store.latest_data_id()
    store.batch_insert([7, 8, 9])
    assert len(store) == 6
    assert store.get_latest_data(second) == [4, 5, 6, 7, 8, 9]
    assert store.get_latest_data(sixth) == [7, 8, 9]
    store.batch_insert([10, 11, 12, 13, 14, 15, 16, 17])
    assert store._data_queue[-1] == 17


def test_trainer() -> None:
    networks = queue.Queue[Any]()

    def take(table: str, payload: Any) -> dict[str, Any]:
        assert table in TABLES
        return {}

    def answer(type: str, payload: Any) -> dict[str, Any]:
        assert type == "get-stats"
        return {"trainer-status": "it's working"}

    server = TrainerServer(TrainerConfig(0, 0, ["get-stats"]), take, answer)
    learners = {name: QueuedDataStore(6) for name in TABLES}
    for name, store in learners.items():
        server.register_data_store(name, store)
    actors = {name: QueuedDataStore(3) for name in TABLES}
    first, second = actors.values()

    def lengths() -> list[int]:
        return [len(store) for store in learners.values()]

    def make_client(port: int) -> TrainerClient:
        config = TrainerConfig(port, 0, ["get-stats"])
        return TrainerClient("table1", "127.0.0.1", config, data_stores=actors)

    assert set(TABLES) == server.store_names()
    with both(server, make_client) as client:
        client.recv_network_callback(networks.put)
        first.insert(np.array([1, 2, 3]))
        assert len(first) == 1
        first.insert(np.array([4, 5, 6]))
        assert client.update()
        assert len(first) == 2  # what was sent is kept
        assert lengths() == [2, 0]
        first.insert(np.array([7, 8, 9]))
        second.batch_insert([np.array([30, 31, 32])] * 2)
        assert lengths() == [2, 0]
        assert client.update()
        assert lengths() == [3, 2]
        first.insert(np.array([10, 11, 12]))
        assert len(first) == 3
        assert client.update() is not None
        assert lengths() == [4, 2]
        assert client.request("get-stats", {})["trainer-status"] == "it's working"
        assert client.request("invalid", {}) is None
        client.start_async_update(interval=0.1)
        first.insert(np.array([13, 14, 15]))
        wait_until(lambda: learners["table1"].latest_data_id() == first.latest_data_id())
        network = np.array([100, 200, 300, 400])
        server.publish_network(network)
        assert np.array_equal(networks.get(timeout=20), network)


def test_the_stress_test_of_a_trainer() -> None:
    server = TrainerServer(TrainerConfig(0, 0), lambda *_: {}, lambda *_: {})
    learners = {name: QueuedDataStore(100_000) for name in TABLES}
    for name, store in learners.items():
        server.register_data_store(name, store)
    actors = {name: QueuedDataStore(100_000) for name in TABLES}

    def make_client(port: int) -> TrainerClient:
        config = TrainerConfig(port, 0)
        return TrainerClient("table1", "127.0.0.1", config, data_stores=actors)

    with both(server, make_client) as client:
        timeout = 5  # milliseconds, which may well be too few, and then more and more
        for i in range(1000):
            for store, n in zip(actors.values(), (300, 100), strict=True):
                store.insert(np.array([i] * n))
            if (i + 1) % 100 == 0:
                client.req_rep_client.timeout_ms = timeout
                client.req_rep_client.reset_socket()
                client.update()
                assert all(len(learners[name]) <= len(actors[name]) for name in TABLES)
                timeout += 8
        client.req_rep_client.timeout_ms = 5000
        wait_until(client.update)
        for name in TABLES:
            assert len(learners[name]) == len(actors[name])
            pair = learners[name], actors[name]
            items = zip(*(store.get_latest_data(-1) for store in pair), strict=True)
            assert all(np.array_equal(a, b) for a, b in items)  # each once, and in order


def test_action() -> None:
    image = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)

    def observe(keys: set[str]) -> dict[str, Any]:
        if "test_image" in keys:
            return {"status": "success", "test_image": image}
        return {"status": "error", "message": "Invalid key requested"}

    def act(key: str, payload: Any) -> dict[str, Any]:
        if key == "send_image":
            return {"status": "success", "message": "Image received"}
        return {"status": "error", "message": "Invalid action"}

    def config(port: int) -> ActionConfig:
        return ActionConfig(
            port_number=port,
            action_keys=["send_image"],
            observation_keys=["test_image"],
            broadcast_port=0,
        )

    published = queue.Queue[Any]()
    server = ActionServer(config(0), observe, act)
    with both(server, lambda port: ActionClient("127.0.0.1", config(port))) as client:
        client.register_obs_callback(published.put)
        assert np.array_equal(client.obs()["test_image"], image)
        assert client.act("send_image", {"image": image})["status"] == "success"
        server.publish_obs({"test-broadcast": 1})
        assert "test-broadcast" in published.get(timeout=20)


def test_inference() -> None:
    def greet(payload: Any) -> dict[str, Any]:
        name = payload.get("name")
        if name:
            return {"status": "ok", "message": f"Hello, {name}!"}
        return {"status": "error", "message": "Name not provided"}

    server = InferenceServer(0)
    server.register_interface("echo", lambda payload: {"status": "ok", "message": payload})
    server.register_interface("greet", greet)
    with both(server, lambda port: InferenceClient("localhost", port)) as client:
        assert {"echo", "greet"} <= client.interfaces()
        answer = client.call("echo", {"message": "test"})
        assert answer["status"] == "ok"
        assert answer["message"]["message"] == "test"
        assert client.call("greet", {"name": "John"})["message"] == "Hello, John!"
        assert client.call("greet", {}) == {"status": "error", "message": "Name not provided"}
        assert not client.call("unknown", {})["success"]
