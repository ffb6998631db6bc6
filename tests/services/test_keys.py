"""Keys, as users of the pairs give and lack them, over every transport."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from dataclasses import replace
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from edgeml import (
    ActionClient,
    ActionConfig,
    ActionServer,
    Credentials,
    EdgemlError,
    InferenceClient,
    InferenceServer,
    PermissionDenied,
    TrainerClient,
    TrainerConfig,
    TrainerServer,
    aio,
)
from edgeml.cli.keygen import make_client_keys
from edgeml.data import QueuedDataStore
from edgeml.gym import EnvServer, RemoteEnv
from pairs import make_keys, started, took, wait_until

IN_TIME = 5.0  # seconds: two, and what a busy machine takes
SECURED = pytest.mark.parametrize("transport", ["grpc", "ws", "zmq"])


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """Directories: of a server, of several of its clients, and of others."""
    made = make_keys(tmp_path_factory.mktemp("keys"))
    return {
        **made,
        "other": make_client_keys(made["server"], "other"),
        "env": make_client_keys(made["server"], "env", "call:/env/*"),
    }


def wrong_credentials(homes, name):
    robot = Credentials.load(homes["robot"])
    if name == "none":
        return None
    if name == "a token of nobody's":
        return replace(robot, token=secrets.token_hex(32))
    if name == "another's token":
        return replace(robot, token=Credentials.load(homes["other"]).token)
    if name == "no token":
        return replace(robot, token=None)
    if name == "revoked":
        return Credentials.load(homes["other"])
    return Credentials.load(homes[name])


class Served:
    """A server of each kind, and what was done by it."""

    def __init__(self, kind: str, transport: str, keys: Credentials) -> None:
        self.done: list[object] = []
        self.kind, self.transport = kind, transport
        if kind == "action":
            self.server = ActionServer(self.action(0), self.note, self.note, credentials=keys)
        elif kind == "inference":
            self.server = InferenceServer(0, transport=transport, credentials=keys)
            self.server.register_interface("note", self.note)
        else:
            self.server = TrainerServer(self.trainer(0), self.note, self.note, credentials=keys)
            self.server.register_data_store("demos", QueuedDataStore(100))

    def note(self, *arguments):
        self.done.append(arguments)
        return {}

    def action(self, port):
        return ActionConfig(port, ["move"], transport=self.transport)

    def trainer(self, port):
        return TrainerConfig(port, None, ["ask"], transport=self.transport)

    def use(self, keys, **settings):
        """Do all that a client can."""
        settings.update(credentials=keys)
        port = self.server.port
        if self.kind == "action":
            with ActionClient("127.0.0.1", config=self.action(port), **settings) as client:
                client.obs([])
                client.act("move")
        elif self.kind == "inference":
            with InferenceClient("127.0.0.1", port, self.transport, **settings) as client:
                client.call("note", None)
        else:
            own = QueuedDataStore(10)
            own.insert({"x": 1.0})
            with TrainerClient("demos", "127.0.0.1", self.trainer(port), own, **settings) as client:
                client.update()
                client.request("ask")


KINDS = pytest.mark.parametrize("kind", ["action", "inference", "trainer"])


@KINDS
def test_who_has_the_keys_is_served(kind, transport, homes):
    made = Served(kind, transport, Credentials.load(homes["server"]))
    with started(made.server):
        made.use(homes["robot"])
        assert len(made.done) == (1 if kind == "inference" else 2)


@pytest.mark.parametrize(
    "wrong",
    [
        "none",
        "a token of nobody's",
        "another's token",
        "no token",
        "revoked",
        "expired",
        "stranger",
    ],
)
@KINDS
def test_who_has_not_is_refused_in_time_and_reaches_nothing(kind, transport, wrong, homes, caplog):
    if wrong == "another's token" and transport in ("inproc", "shm"):
        pytest.skip("there the token is the key")
    keys = Credentials.load(homes["server"])
    made = Served(kind, transport, keys)
    given = wrong_credentials(homes, wrong)
    with started(made.server):
        if wrong == "revoked":
            keys.clients.revoke("other")
        with took(IN_TIME), pytest.raises(PermissionDenied):
            made.use(given)
        assert made.done == []
        assert made.server.clients() == []
        wait_until(lambda: made.server.stats().get("PermissionDenied", 0) >= 1, 30.0)
        if transport != "grpc" or wrong not in ("none", "expired", "stranger"):
            # Else gRPC has ended the handshake, and says only that it did.
            wait_until(lambda: [r for r in caplog.records if r.levelno >= logging.WARNING])


@SECURED
def test_a_client_with_keys_speaks_to_its_own_server_alone(transport, homes):
    for keys in (None, Credentials.load(homes["other server"])):
        made = Served("inference", transport, keys)
        with started(made.server):
            with took(IN_TIME), pytest.raises(PermissionDenied):
                made.use(homes["robot"])
            assert made.done == []


def test_waiting_for_a_server_is_not_waiting_for_keys(transport, homes):
    made = Served("inference", transport, Credentials.load(homes["server"]))
    with started(made.server), took(IN_TIME), pytest.raises(PermissionDenied):
        made.use(None, wait_for_server=30.0)


# The ways to give them --------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("how", [str, Path, Credentials.load], ids=["text", "path", "loaded"])
def test_keys_are_a_directory_or_credentials(kind, how, homes):
    made = Served(kind, "zmq", how(homes["server"]))
    with started(made.server):
        made.use(how(homes["robot"]))


@KINDS
def test_the_environment_says_which_where_nobody_else_does(kind, homes, monkeypatch):
    monkeypatch.setenv("EDGEML_CREDENTIALS", str(homes["server"]))
    made = Served(kind, "zmq", None)
    monkeypatch.setenv("EDGEML_CREDENTIALS", str(homes["robot"]))
    with started(made.server):
        made.use(None)
        with pytest.raises(PermissionDenied):
            made.use(homes["stranger"])


def test_clients_for_asyncio_take_keys(transport, homes):
    made = Served("inference", transport, Credentials.load(homes["server"]))

    async def ask(keys):
        async with aio.InferenceClient(
            "127.0.0.1", made.server.port, transport, credentials=keys
        ) as client:
            return await client.call("note", 5)

    with started(made.server):
        assert asyncio.run(ask(homes["robot"])) == {}
        with pytest.raises(PermissionDenied):
            asyncio.run(ask(None))
    assert made.done == [(5,)]


def test_environments_take_keys(transport, homes):
    make = partial(gymnasium.make, "CartPole-v1")
    with started(EnvServer(make, 0, transport=transport, credentials=homes["server"])) as server:
        with contextlib.closing(RemoteEnv(server.url, credentials=homes["env"])) as env:
            observation, _ = env.reset(seed=3)
            assert np.shape(observation) == (4,)
            env.step(0)
            with pytest.raises(EdgemlError):
                env.client.call("something", None)
        with pytest.raises(PermissionDenied):
            RemoteEnv(server.url)


def test_a_key_that_is_revoked_while_in_use_ends_there(transport, homes):
    keys = Credentials.load(homes["server"])
    made = Served("inference", transport, keys)
    with (
        started(made.server),
        InferenceClient(
            "127.0.0.1", made.server.port, transport, credentials=homes["other"]
        ) as client,
    ):
        client.call("note", 1)
        keys.clients.revoke("other")

        def ended():
            try:
                client.call("note", 2, 1.0)
            except EdgemlError:
                return True
            return False

        with took(at_most=2.0):  # a second, and what a busy machine takes
            wait_until(ended)
        with pytest.raises(PermissionDenied):
            client.call("note", 3, 5.0)
        assert (3,) not in made.done
