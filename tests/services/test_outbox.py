"""An actor's log: what was inserted arrives once, whatever becomes of the actor and the learner."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeml import TrainerClient, TrainerConfig, TrainerServer
from edgeml.data import LoggedDataStore, QueuedDataStore, ReplayBuffer
from pairs import free_port, process, started, wait_until

TRANSPORT = "zmq"


def config(port: int = 0) -> TrainerConfig:
    return TrainerConfig(port, None, transport=TRANSPORT)


def make_learner(port: int = 0) -> tuple[TrainerServer, QueuedDataStore]:
    store = QueuedDataStore(100_000)
    server = TrainerServer(config(port))
    server.register_data_store("robot", store)
    return server, store


def make_actor(server: TrainerServer, log: Path | None, store: Any, **more: Any) -> TrainerClient:
    return TrainerClient("robot", "127.0.0.1", config(server.port), store, log=log, **more)


def item(i: int) -> dict[str, Any]:
    return {"id": i, "x": np.full(3, i, np.float32)}


def ids(store: Any) -> list[int]:
    return [int(each["id"]) for each in store.get_latest_data(0)]


@pytest.mark.parametrize("make", [lambda: QueuedDataStore(100), lambda: ReplayBuffer(100)])
def test_an_actor_that_starts_anew_sends_what_is_left(make: Any, tmp_path: Path) -> None:
    server, there = make_learner()
    with started(server):
        store = make()
        store.insert(item(0))
        with make_actor(server, tmp_path / "log", store) as client:
            first = client.client_id
            for i in range(1, 6):
                store.insert(item(i))
            assert client.update().applied == 6
            for i in range(6, 11):
                store.insert(item(i))
        with make_actor(server, tmp_path / "log", store := make()) as client:
            assert client.client_id == first
            store.insert(item(11))
            assert client.update().applied == 6
            assert client.update().applied == 0
        assert ids(there) == [*range(12)]


def test_files_go_when_a_checkpoint_has_the_items(tmp_path: Path) -> None:
    server, there = make_learner()
    path = tmp_path / "log"
    with started(server):
        server.save_checkpoint(tmp_path / "saved")
        store = ReplayBuffer(100)
        with make_actor(server, path, store) as client:
            for i in range(5):
                store.insert({"id": i, "big": np.zeros(1 << 19)})
            assert client.update() == (5, 0)
            files = set((path / "store-robot").glob("*.log"))
            assert len(files) > 1
            server.save_checkpoint(tmp_path / "saved")
            store.insert({"id": 5, "big": np.zeros(1 << 19)})
            assert client.update().durable == 5
            wait_until(lambda: len(files & set((path / "store-robot").glob("*.log"))) <= 1)
        with LoggedDataStore(path / "store-robot") as log:
            assert ids(log) == [5]
    assert len(there) == 6


def test_a_learner_that_starts_anew_gets_what_the_log_holds(tmp_path: Path) -> None:
    store = QueuedDataStore(3)  # which is handed on at once
    server, _ = make_learner()
    with started(server), make_actor(server, tmp_path / "log", store) as client:
        for i in range(50):
            store.insert(item(i))
        assert client.update().applied == 50
    server, there = make_learner()
    with started(server), make_actor(server, tmp_path / "log", QueuedDataStore(3)) as client:
        assert client.update().applied == 50
        assert ids(there) == [*range(50)]


def test_a_log_may_be_the_store(tmp_path: Path) -> None:
    server, there = make_learner()
    with started(server):
        for begin in (0, 10):
            with LoggedDataStore(tmp_path / "log") as log:
                with make_actor(server, None, log) as client:
                    for i in range(begin, begin + 5):
                        log.insert(item(i))
                    client.update()
                for i in range(begin + 5, begin + 10):
                    log.insert(item(i))
        with LoggedDataStore(tmp_path / "log") as log, make_actor(server, None, log) as client:
            assert client.update().applied == 5
        assert ids(there) == [*range(20)]


def test_one_client_has_the_directory_and_lets_go_of_it(tmp_path: Path) -> None:
    server, _ = make_learner()
    with started(server):
        store = ReplayBuffer(10)
        client = make_actor(server, tmp_path / "log", store)
        with pytest.raises(BlockingIOError, match="another client keeps its log there"):
            make_actor(server, tmp_path / "log", ReplayBuffer(10))
        client.stop()
        store.insert(item(1))
        with make_actor(server, tmp_path / "log", store, client_id="mine") as client:
            assert client.client_id == "mine"
            assert client.update().applied == 1
        with pytest.raises(ValueError, match="url"):
            make_actor(server, tmp_path / "log", store, url="://")
        make_actor(server, tmp_path / "log", store).stop()


def test_names_of_stores_are_no_paths(tmp_path: Path) -> None:
    server = TrainerServer(config())
    names = ["robot", "..", "a/../../b", ".", "lock", "größe"]
    for name in names:
        server.register_data_store(name, QueuedDataStore(10))
    with started(server):
        stores = {name: QueuedDataStore(10) for name in names}
        with make_actor(server, tmp_path / "log", None, data_stores=stores) as client:
            for store in stores.values():
                store.insert(item(1))
            assert client.update().applied == len(names)
    assert os.listdir(tmp_path) == ["log"]
    assert len(list((tmp_path / "log").glob("store-*"))) == len(names)


ACTOR = """
import sys, time
import numpy as np
from edgeml import EdgemlError, TrainerClient, TrainerConfig
from edgeml.data import ReplayBuffer

transport, port, path, begin = sys.argv[1:]
store = ReplayBuffer(50)
config = TrainerConfig(int(port), None, transport=transport)
with TrainerClient("robot", "127.0.0.1", config, store, log=path) as client:
    client.start_async_update(0.01)
    i = int(begin)
    while True:
        store.insert({"id": i, "x": np.full(3, i, np.float32)})
        print(i, flush=True)
        i += 1
        if i % 20 == 0:
            time.sleep(0.001)
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("transport", ["zmq", "grpc", "shm"])
def test_kills_of_either_side_lose_nothing_and_double_nothing(
    transport: str, tmp_path: Path
) -> None:
    rng = random.Random(transport)
    port = free_port()
    saved = tmp_path / "saved"

    def start_learner() -> tuple[TrainerServer, QueuedDataStore]:
        store = QueuedDataStore(1_000_000)
        server = TrainerServer(TrainerConfig(port, None, transport=transport))
        server.register_data_store("robot", store)
        if saved.exists():
            server.load_checkpoint(saved)
        else:
            server.save_checkpoint(saved)
        server.start(threaded=True)
        return server, store

    server, store = start_learner()
    told = -1
    try:
        for _ in range(4):
            with process(ACTOR, transport, port, tmp_path / "log", told + 1) as actor:
                for _ in range(rng.randrange(1, 400)):
                    told = int(actor.line())
                if rng.random() < 0.5:
                    server.save_checkpoint(saved)
                if rng.random() < 0.6:
                    server.stop()  # and what came since the checkpoint is forgotten
                    server, store = start_learner()
                actor.popen.send_signal(signal.SIGKILL)
                actor.popen.wait()
                assert actor.popen.stdout is not None
                for line in actor.popen.stdout.read().split("\n")[:-1]:
                    told = int(line)
            with LoggedDataStore(tmp_path / "log" / "store-robot") as log:
                # One that was inserted, but not told of.
                told = max(told, *ids(log), told)
        host = TrainerConfig(port, None, transport=transport)
        with TrainerClient(
            "robot", "127.0.0.1", host, ReplayBuffer(5), log=tmp_path / "log"
        ) as client:
            client.update()
        assert ids(store) == [*range(told + 1)]
    finally:
        server.stop()
