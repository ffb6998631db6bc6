"""What a key may do, who its client is known to be, and whose a client id is."""

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
    Credentials,
    InferenceClient,
    InferenceServer,
    PermissionDenied,
    TrainerClient,
    TrainerConfig,
    TrainerServer,
    TrainerTunnel,
)
from edgeml.cli.keygen import make_client_keys, make_server_keys
from edgeml.core.security import Role
from edgeml.data import QueuedDataStore, ReplayBuffer
from edgeml.services.base import ServiceServer
from edgeml.testing.stopwatch import Stopwatch
from pairs import started, wait_until

ROLES = {
    "boss": "all",
    "other": "all",
    "observer": "observe",
    "camera": "observe:cam*",
    "grip": "act:grip*",
    "caller": "call:policy*",
    "asker": "call:stats",
    "actor": "upload:demos,subscribe",
    "reader": "subscribe",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The keys of a server, and of a client of each role."""
    made = make_server_keys(tmp_path_factory.mktemp("keys") / "server")
    for name, role in ROLES.items():
        make_client_keys(made, name, role)
    return made


@pytest.fixture
def key_of(home):
    return lambda name: Credentials.load(home / "clients" / name)


def refused(lacking: str):
    return pytest.raises(PermissionDenied, match=f"lacks {lacking}")


def give_role(keys: Credentials, name: str, role: str) -> None:
    keys.clients.add(replace(keys.clients.by_name(name), role=Role.parse(role)))


def told(caplog, *parts: str) -> bool:
    return any(all(p in record.getMessage() for p in parts) for record in caplog.records)


# Devices ----------------------------------------------------------------------------------------

ACTIONS = ["grip", "grip_hard", "move"]
OBSERVATIONS = ["cam_left", "cam_right", "joints"]


@contextlib.contextmanager
def device(transport, home, act=None):
    config = ActionConfig(0, ACTIONS, OBSERVATIONS, transport=transport)
    done = []

    def carry_out(key, payload, context):
        done.append((key, context.identity, context.name, context.client_id))
        return {"by": context.identity}

    server = ActionServer(
        config, lambda keys: dict.fromkeys(keys, 1), act or carry_out, credentials=home
    )
    with started(server):
        yield server, done


def hand(server: ServiceServer, key: Credentials, **settings) -> ActionClient:
    config = ActionConfig(server.port, ACTIONS, OBSERVATIONS, transport=server.config.transport)
    return ActionClient("127.0.0.1", config=config, credentials=key, url=None, **settings)


def test_an_observer_reads_and_follows_and_does_nothing_else(transport, home, key_of, caplog):
    with device(transport, home) as (server, done):
        server.publish_obs({"joints": 3})
        with hand(server, key_of("observer"), client_id="eye") as client:
            assert client.obs() == {"cam_left": 1, "cam_right": 1, "joints": 1}
            got = []
            client.register_obs_callback(got.append)
            wait_until(lambda: got == [{"joints": 3}])
            for _ in range(3):
                with refused("act:move"):
                    client.act("move")
            with refused("act:nothing"):  # rather than tell what there is
                client.act_async("nothing").result(20)
            assert [(c.id, c.identity) for c in server.clients()] == [("eye", "observer")]
        assert done == []
        assert server.stats()["PermissionDenied"] == 4
        assert server.stats().get("actions", 0) == 0
    lines = [r.getMessage() for r in caplog.records if "act:move" in r.getMessage()]
    assert len([line for line in lines if "observer" in line]) == 1, lines


def test_patterns_say_which_observations_and_which_actions(transport, home, key_of):
    with device(transport, home) as (server, done):
        with hand(server, key_of("camera")) as client:
            assert client.obs(["cam_left"]) == {"cam_left": 1}
            with refused("observe:joints"):
                client.obs()
            with refused("observe:joints"):
                client.obs(["cam_left", "joints"])
            with refused("observe:observations"):
                client.register_obs_callback(print)
        with hand(server, key_of("grip"), client_id="fingers") as client:
            assert client.act("grip", 1) == client.act("grip_hard") == {"by": "grip"}
            with refused("act:move"):
                client.act("move")
            with refused("observe:"):
                client.obs([])
        assert done == [(k, "grip", k, "fingers") for k in ("grip", "grip_hard")]


def test_what_was_carried_out_is_known_by_its_key(transport, home, key_of, caplog):
    caplog.set_level(logging.INFO)
    with device(transport, home) as (server, _):
        for name in ("boss", "grip"):
            with hand(server, key_of(name)) as client:
                client.act("grip")
                client.act("grip")
        stats = server.stats()
        assert (stats["actions"], stats["actions_of_boss"], stats["actions_of_grip"]) == (4, 2, 2)
    for name in ("boss", "grip"):
        assert told(caplog, "first action", f"key of {name}", "'grip'")


def test_without_keys_everybody_may_do_everything_and_is_nobody(transport):
    contexts = []
    config = ActionConfig(0, ACTIONS, OBSERVATIONS, transport=transport)

    def observe(keys, context):
        contexts.append(context)
        return dict.fromkeys(keys, 2)

    def act(key, payload, times=1):
        return {"times": times}

    with started(ActionServer(config, observe, act)) as server, hand(server, None) as client:
        assert client.obs(["joints"]) == {"joints": 2}
        assert client.act("move") == {"times": 1}
        assert [(c.name, c.identity) for c in contexts] == [("obs", None)]
        assert server.stats()["actions"] == 1
        assert [c.identity for c in server.clients()] == [None]


# Policies ---------------------------------------------------------------------------------------


def test_a_role_says_which_functions_may_be_called(transport, home, key_of):
    seen = []
    server = InferenceServer(0, transport=transport, credentials=home)

    @server.register_interface("policy_a")
    def policy(payload, context):
        seen.append((context.identity, context.name))
        return payload

    server.register_interface("restart", lambda payload: seen.append("restarted"))
    with started(server):
        with InferenceClient(url=server.url, credentials=key_of("caller")) as client:
            assert client.call("policy_a", 5) == 5
            assert client.reset("one") == "one"
            with refused("call:restart"):
                client.call("restart", None)
            with refused("call:restart"):
                client.call_async("restart", None).result(20)
        with (
            InferenceClient(url=server.url, credentials=key_of("observer")) as client,
            refused("call:policy_a"),
        ):
            client.call("policy_a", 5)
        assert seen == [("caller", "policy_a")]
        assert server.stats()["PermissionDenied"] == 3


# Learners ---------------------------------------------------------------------------------------


def learner(transport, home, **settings) -> TrainerServer:
    config = TrainerConfig(0, None, ["stats", "reset"], transport=transport)
    server = TrainerServer(config, credentials=home, **settings)
    for name in ("demos", "online"):
        server.register_data_store(name, QueuedDataStore(1000))
    return server


def actor(server, key, store="demos", n=5, **settings) -> TrainerClient:
    own = QueuedDataStore(100)
    own.batch_insert([{"x": float(k)} for k in range(n)])
    config = TrainerConfig(server.port, None, ["stats", "reset"], transport=server.config.transport)
    return TrainerClient(store, "127.0.0.1", config, own, credentials=key, **settings)


def test_a_role_says_which_stores_requests_and_topics(transport, home, key_of):
    heard = []

    def keep(name, batch, context):
        heard.append((name, len(batch), context.identity, context.name))

    def answer(kind, payload, context):
        return [kind, context.identity, context.name]

    with started(learner(transport, home, data_callback=keep, request_callback=answer)) as server:
        server.publish_network({"w": 1})
        got = []
        with actor(server, key_of("actor")) as client:
            assert client.update().applied == 5
            client.recv_network_callback(got.append)
            wait_until(lambda: got == [{"w": 1}])
            with refused("call:stats"):
                client.request("stats")
        with actor(server, key_of("actor"), "online") as client, refused("upload:online"):
            client.update()
        with actor(server, key_of("asker")) as client:
            assert client.request("stats") == ["stats", "asker", "stats"]
            with refused("call:reset"):
                client.request("reset")
            with refused("subscribe:network"):
                client.recv_network_callback(got.append)
            with refused("upload:demos"):
                client.update()
        assert heard == [("demos", 5, "actor", "demos")]
        assert server.stats()["items_of_actor"] == server.stats()["items"] == 5
        assert len(server.data_store("online")) == 0


def test_nobody_uploads_in_anothers_name_also_after_a_restart(transport, home, key_of, tmp_path):
    with started(learner(transport, home)) as server:
        with actor(server, key_of("boss"), client_id="arm-1") as client:
            assert client.update().applied == 5
        with pytest.raises(PermissionDenied, match="arm-1"):
            actor(server, key_of("other"), client_id="arm-1", timeout=20.0)
        server.save_checkpoint(tmp_path / "run")
    again = learner(transport, home)
    again.load_checkpoint(tmp_path / "run")
    with started(again) as server:
        with pytest.raises(PermissionDenied, match="arm-1"):
            actor(server, key_of("other"), client_id="arm-1", timeout=20.0)
        with actor(server, key_of("boss"), n=3, client_id="arm-1") as client:
            assert client.update().applied == 3
        assert len(server.data_store("demos")) == 8


def test_updates_in_the_background_go_on_once_the_key_may_upload(transport, tmp_path, caplog):
    home = make_server_keys(tmp_path / "server")
    make_client_keys(home, "arm", "subscribe")
    keys = Credentials.load(home)
    with (
        started(learner(transport, keys)) as server,
        actor(server, Credentials.load(home / "clients" / "arm")) as client,
    ):
        client.start_async_update(0.05)
        wait_until(lambda: told(caplog, "lacks upload:demos"))
        give_role(keys, "arm", "all")
        wait_until(lambda: len(server.data_store("demos")) == 5)


def test_a_role_that_changes_counts_within_a_second(tmp_path):
    home = make_server_keys(tmp_path / "server")
    make_client_keys(home, "eye", "all")
    keys = Credentials.load(home)
    with (
        device("inproc", keys) as (server, _),
        hand(server, Credentials.load(home / "clients" / "eye")) as client,
    ):
        client.act("move")
        give_role(keys, "eye", "observe")
        watch = Stopwatch()

        def is_refused():
            with contextlib.suppress(PermissionDenied):
                client.act("move")
                return False
            return True

        wait_until(is_refused)
        assert watch.seconds < 1.0
        assert client.obs(["joints"]) == {"joints": 1}


def test_a_tunnel_asks_for_no_keys_whatever_the_environment_says(home, monkeypatch):
    monkeypatch.setenv("EDGEML_CREDENTIALS", str(home))
    with TrainerTunnel(TrainerConfig()) as tunnel:
        tunnel.publish_network({"w": 1})
        got = []
        tunnel.recv_network_callback(got.append)
        wait_until(lambda: got == [{"w": 1}])


# What items are like ----------------------------------------------------------------------------


def test_whose_first_item_says_what_all_must_be_like_is_told(caplog):
    """As it may be anybody's; an example has it said by the learner."""
    caplog.set_level(logging.INFO)
    item = {"x": np.zeros(2, np.float32)}
    config = TrainerConfig(0, None, transport="inproc")
    server = TrainerServer(config)
    server.register_data_store("learns", ReplayBuffer(10))
    server.register_data_store("knows", ReplayBuffer(10, example=item))
    assert server.data_store("learns").learns
    assert not server.data_store("knows").learns
    with started(server):
        for name in ("learns", "knows"):
            own = QueuedDataStore(10)
            own.insert({"x": np.zeros(3, np.float32)})
            config = TrainerConfig(server.port, None, transport="inproc")
            with TrainerClient(name, None, config, own, client_id="stranger") as client:
                assert client.update().applied == (name == "learns")
    assert told(caplog, "'learns'", "example=")
    assert not told(caplog, "'knows'", "example=")
