"""What servers and clients log: who comes and goes at INFO, and at WARNING only what went wrong."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace

import numpy as np
import pytest

from edgeml import (
    ActionClient,
    ActionConfig,
    ActionServer,
    InferenceClient,
    InferenceServer,
    RemoteError,
    TrainerClient,
    TrainerConfig,
    TrainerServer,
    Unreachable,
)
from edgeml.data import QueuedDataStore
from pairs import plain_client, started, wait_until

ACTION = ActionConfig(0, ["move"], ["cam"])
TRAINER = TrainerConfig(0, None, ["stats"])


@pytest.fixture
def said(caplog):
    """Lists what has been logged: by edgeml at INFO and above, or by anybody at WARNING."""
    caplog.set_level(logging.INFO)

    def list_messages(level=logging.INFO):
        return [
            record.getMessage()
            for record in caplog.records
            if record.levelno >= level
            and (record.levelno >= logging.WARNING or record.name.startswith("edgeml."))
        ]

    return list_messages


def act(key, payload):
    if payload == "fail":
        raise ValueError("it is stuck")
    return {"done": key}


def observe(keys):
    return {key: np.zeros((48, 64, 3), np.uint8) for key in keys}


def infer(payload):
    if isinstance(payload, str):
        raise ValueError(f"no image, but {payload}")
    return {"action": np.zeros(7)}


def answer(kind, payload):
    if payload == "fail":
        raise ValueError("no figures yet")
    return {"step": 7}


def action_server(transport):
    return ActionServer(replace(ACTION, transport=transport), observe, act)


def inference_server(transport):
    server = InferenceServer(0, transport=transport)
    server.register_interface("policy", infer)
    return server


def trainer_server(transport):
    server = TrainerServer(replace(TRAINER, transport=transport), request_callback=answer)
    server.register_data_store("actor", QueuedDataStore(1000))
    return server


SERVERS = {"action": action_server, "inference": inference_server, "trainer": trainer_server}


@contextlib.contextmanager
def robot_at_work(server):
    """An action client that has done all that it can, and still has a subscription."""
    got: list = []
    with ActionClient("", config=ACTION, task_id="arm", transport=server.url) as client:
        client.register_obs_callback(got.append)
        for n in range(3):
            client.obs()
            client.act("move", {"to": n})
            server.publish_obs({"n": n})
        wait_until(lambda: got[-1:] == [{"n": 2}])
        yield client


@contextlib.contextmanager
def policy_at_work(server):
    with InferenceClient("", 0, transport=server.url) as client:
        assert client.interfaces() == ["policy"]
        for _ in range(3):
            client.call("policy", {"image": np.zeros(300_000, np.uint8)})
            client.call_async("policy", None).result(20)
        yield client


@contextlib.contextmanager
def actor_at_work(server):
    got: list = []
    store = QueuedDataStore(1000)
    before = len(server.data_store("actor"))
    with TrainerClient("actor", "", TRAINER, store, transport=server.url) as client:
        client.recv_network_callback(got.append)
        client.start_async_update(0.02)
        for n in range(3):
            store.batch_insert([{"x": float(n)}] * 10)
            client.update()
            client.request("stats")
            server.publish_network({"w": np.full(1000, n)})
        wait_until(lambda: got and got[-1]["w"][0] == 2)
        store.insert({"x": 1.0})
        wait_until(lambda: len(server.data_store("actor")) == before + 31)
        yield client


WORK = {"action": robot_at_work, "inference": policy_at_work, "trainer": actor_at_work}


@pytest.mark.parametrize("pair", SERVERS)
@pytest.mark.parametrize("first_to_stop", ["client", "server"])
def test_a_healthy_run_logs_nothing_that_is_a_warning(transport, pair, first_to_stop, said, capfd):
    with started(SERVERS[pair](transport)) as server:
        for _ in range(2):  # another client comes after the first
            with WORK[pair](server) as client:
                if first_to_stop == "server":
                    server.stop()
                client.stop()
            if first_to_stop == "server":
                break
    assert said(logging.WARNING) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("pair", SERVERS)
def test_who_comes_calls_and_leaves_is_told_once_each(transport, pair, said):
    with started(SERVERS[pair](transport)) as server:
        urls = ", ".join(server.urls())
        assert said() == [f"serving {pair} on {urls}"]
        with WORK[pair](server) as client:
            (peer,) = server.clients()
            label = {"action": "arm", "inference": client.client_id, "trainer": "actor"}[pair]
            address = peer.address.rpartition("at ")[2]
            who = f"{label} at {address}"
        wait_until(lambda: not server.clients())
        wait_until(lambda: said()[-1] == f"{pair}: {who} has left")
    called = {"action": ["obs", "act"], "inference": ["policy"], "trainer": ["update", "request"]}
    assert said()[1] == f"{pair}: {who} has come"
    assert sorted(said()[2:-1]) == sorted(
        f"{pair} {name!r} is called for the first time, by {who}" for name in called[pair]
    )


def refuse(timeout):
    raise Unreachable("cut for a test")


def test_a_client_that_is_lost_is_told(transport, said, monkeypatch):
    with (
        started(inference_server(transport)) as server,
        plain_client(server, label="arm") as client,
        InferenceClient("", 0, transport=server.url) as other,
    ):
        arm = next(f"{peer.address}" for peer in server.clients() if peer.id == client.client_id)
        assert f"inference: {arm} has come" in said()
        # It comes back by itself, to the session that it had, and so nobody is lost.
        first = client.sessions.current
        first.lose(Unreachable("cut for a test"))
        wait_until(lambda: sum("arm at" in each and "has come" in each for each in said()) == 2)
        wait_until(lambda: client.sessions.current is not first)  # it knows a moment later
        other.call("policy", None)
        assert not any("is lost" in each for each in said())
        arm = next(f"{peer.address}" for peer in server.clients() if peer.id == client.client_id)
        # Now it can't.
        monkeypatch.setattr(client.sessions, "connect", refuse)
        client.sessions.current.lose(Unreachable("cut for a test"))
        wait_until(lambda: f"inference: {arm} is lost: silent for 2.5 s" in said())
        assert sum("is lost" in each for each in said()) == 1
        other.call("policy", None)
    assert said(logging.WARNING) == []


def test_a_call_that_fails_is_told_with_interface_and_client(transport, said):
    with (
        started(inference_server(transport)) as server,
        InferenceClient("", 0, transport=server.url, client_id="camera-7") as client,
    ):
        who = f"camera-7 {server.clients()[0].address}"
        for _ in range(2):
            with pytest.raises(RemoteError, match="ValueError: no image, but noise"):
                client.call("policy", "noise")
        text = f"inference 'policy' failed for {who}: ValueError: no image, but noise"
        assert said(logging.WARNING) == [text, text]


def test_an_action_that_fails_is_told_with_its_key(transport, said):
    with (
        started(action_server(transport)) as server,
        ActionClient("", config=ACTION, task_id="arm", transport=server.url) as client,
    ):
        who = server.clients()[0].address
        assert who.startswith("arm at ")
        with pytest.raises(RemoteError):
            client.act("move", "fail")
        text = f"action \"act 'move'\" failed for {who}: ValueError: it is stuck"
        assert said(logging.WARNING) == [text]


def test_a_request_that_fails_is_told_with_its_type(transport, said):
    with (
        started(trainer_server(transport)) as server,
        TrainerClient("actor", "", TRAINER, transport=server.url) as client,
    ):
        who = server.clients()[0].address
        with pytest.raises(RemoteError):
            client.request("stats", "fail")
        text = f"trainer \"request 'stats'\" failed for {who}: ValueError: no figures yet"
        assert said(logging.WARNING) == [text]
