"""What all servers and all clients take alike: where they are, and how they behave."""

from __future__ import annotations

import inspect
import threading
import time
from concurrent.futures import Future

import pytest

import edgeml
from edgeml import (
    ActionClient,
    ActionConfig,
    ActionServer,
    Closed,
    ConfigMismatch,
    InferenceClient,
    InferenceServer,
    TrainerClient,
    TrainerConfig,
    TrainerServer,
    TrainerTunnel,
    UnknownInterface,
    Unreachable,
)
from edgeml.core import Url
from edgeml.data import QueuedDataStore
from pairs import free_port, no_thread_left, started, took, wait_until

KEYS = ["joints"]


class Action:
    """How the action pair is made, and a call of it."""

    @staticmethod
    def config(port=0, transport=None) -> ActionConfig:
        return ActionConfig(port, KEYS, KEYS, transport=transport)

    @classmethod
    def server(cls, *, config=None, **settings):
        def observe(keys):
            return {key: [1.0, 2.0] for key in keys}

        return ActionServer(config or cls.config(), observe, lambda key, value: value, **settings)

    @classmethod
    def client(cls, *args, config=None, **settings):
        return ActionClient(*args, config=config or cls.config(), **settings)

    @staticmethod
    def call(client) -> None:
        assert client.act("joints", 3) == 3

    @staticmethod
    def ask(client) -> Future:
        return client.act_async("joints", 3)


class Inference:
    """How the inference pair is made, and a call of it."""

    @classmethod
    def server(cls, **settings):
        server = InferenceServer(**settings)
        server.register_interface("echo", lambda payload: payload)
        return server

    @classmethod
    def client(cls, *args, **settings):
        return InferenceClient(*args, **settings)

    @staticmethod
    def call(client) -> None:
        assert client.call("echo", 3) == 3

    @staticmethod
    def ask(client) -> Future:
        return client.call_async("echo", 3)


class Trainer:
    """How the trainer pair is made, and a call of it."""

    @staticmethod
    def config(port=0, transport=None) -> TrainerConfig:
        return TrainerConfig(port, None, ["echo"], transport=transport)

    @classmethod
    def server(cls, *, config=None, **settings):
        def answer(kind, payload):
            return payload

        return TrainerServer(config or cls.config(), request_callback=answer, **settings)

    @classmethod
    def client(cls, *args, config=None, **settings):
        return TrainerClient("arm", *args, config=config or cls.config(), **settings)

    @staticmethod
    def call(client) -> None:
        assert client.request("echo", 3) == 3

    @staticmethod
    def ask(client) -> Future:
        return client.request_async("echo", 3)


@pytest.fixture(params=[Action, Inference, Trainer], ids=lambda pair: pair.__name__.lower())
def pair(request):
    """Each of the three pairs in turn."""
    return request.param


def anywhere(transport) -> str:
    return f"{transport}://127.0.0.1:0"


# Where ------------------------------------------------------------------------------------------


def test_a_url_says_all_of_where_and_how(transport, pair, monkeypatch):
    monkeypatch.setenv("EDGEML_TRANSPORT", "nonsense")  # which is asked for nowhere
    with started(pair.server(url=anywhere(transport))) as server:
        assert server.url == f"{transport}://127.0.0.1:{server.port}"
        assert server.urls() == [server.url]
        with pair.client(url=server.url) as client:
            pair.call(client)


def test_a_url_wins_over_what_the_configuration_says():
    for pair in (Action, Trainer):
        port = 7  # which the system gives nobody
        config = pair.config(port, "inproc")
        config.broadcast_port = 8
        with started(pair.server(config=config, url="zmq://127.0.0.1:0")) as server:
            assert server.urls() == [server.url]
            assert server.url.startswith("zmq://127.0.0.1:")
            assert server.port not in (port, config.broadcast_port)
            with pair.client(config=config, url=server.url) as client:
                pair.call(client)


def test_a_clients_url_without_a_port_means_the_configurations():
    for pair in (Action, Trainer):
        with started(pair.server(url="zmq://127.0.0.1:0")) as server:
            with pair.client(config=pair.config(server.port), url="zmq://127.0.0.1") as client:
                pair.call(client)
            with pytest.raises(ValueError, match=r"zmq://127.0.0.1:0 has no port"):
                pair.client(config=pair.config(0), url="zmq://127.0.0.1")


def test_a_url_may_be_a_file_or_several_by_commas(pair, tmp_path):
    both = f"shm://{tmp_path}/robot.sock, zmq://127.0.0.1:0"
    with started(pair.server(url=both)) as server:
        near, far = server.urls()
        assert near == f"shm://{tmp_path}/robot.sock"
        assert far == f"zmq://127.0.0.1:{Url.parse(far).port}"
        for url in (near, far, f"{near},{far}", f"shm://{tmp_path}/nobody.sock,{far}"):
            with pair.client(url=url) as client:
                pair.call(client)
    with started(pair.server(url="auto://127.0.0.1:0")) as server:
        assert [url.partition(":")[0] for url in server.urls()] == ["shm", "zmq"]
        with pair.client(url=f"auto://127.0.0.1:{server.port}") as client:
            pair.call(client)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "robot"}, "url 'zmq://robot:1' says where and how, but host 'robot' was given"),
        ({"transport": "zmq"}, "but transport 'zmq' was given as well; give one of them"),
    ],
)
def test_to_say_it_in_two_ways_is_refused(pair, settings, message):
    for make in (pair.server, pair.client):
        with pytest.raises(ValueError, match=message):
            make(url="zmq://robot:1", **settings)


def test_a_port_beside_a_url_is_refused():
    said = "url 'zmq://robot:1' says where and how, but port 1 was given as well"
    for make in (
        lambda: InferenceServer(1, url="zmq://robot:1"),
        lambda: InferenceClient(port_num=1, url="zmq://robot:1"),
        lambda: ActionClient(port_number=1, url="zmq://robot:1", config=Action.config()),
    ):
        with pytest.raises(ValueError, match=said):
            make()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("zmq", r"'zmq' is not a URL; write it as 'zmq://host:port'"),
        ("zmq://robot:1,shm", r"'shm' is not a URL"),
        ("zmq://robot:port", r"zmq://robot:port"),
        ("zmq://robot:1?fast=1", r"says more than scheme, host, port and path"),
        ("zmq://ro\nbot:1", r"'zmq://ro\\nbot:1' has characters in it that can't be seen"),
        ("shm:///run/\x1b[31mred", r"has characters in it that can't be seen"),
        ("shm:///run/\0x", r"has characters in it that can't be seen"),
        ("", r"url must be a text such as 'zmq://host:port', not ''"),
        (b"zmq://robot:1", r"url must be a text"),
        (" , ", r"names no transport"),
    ],
)
def test_a_url_that_is_none_is_told(pair, url, message):
    for make in (pair.server, pair.client):
        with pytest.raises(ValueError, match=message):
            make(url=url)


def test_an_end_that_is_nowhere_is_told():
    with pytest.raises(ValueError, match=r"say where to listen: at a port .*, or url="):
        InferenceServer()
    with pytest.raises(ValueError, match=r"zmq://127\.0\.0\.1:0 has no port; say at which port"):
        InferenceClient(transport="zmq")
    for client in (ActionClient, lambda *_: TrainerClient("arm", "localhost")):
        with pytest.raises(TypeError, match="needs config="):
            client("localhost")


# As in the first edgeml -------------------------------------------------------------------------


def test_the_calls_of_the_first_edgeml_work(transport):
    with started(Action.server(url=anywhere(transport))) as server:
        config = Action.config(server.port, transport)
        for client in (
            ActionClient("127.0.0.1", config),
            ActionClient(server_ip="127.0.0.1", config=config),
            ActionClient("127.0.0.1", server.port, config),
        ):
            with client:
                Action.call(client)
                assert client.config is config
    with started(Inference.server(url=anywhere(transport))) as server:
        for client in (
            InferenceClient("127.0.0.1", server.port, transport=transport),
            InferenceClient(server_ip="127.0.0.1", port_num=server.port, transport=transport),
        ):
            with client:
                Inference.call(client)
    with started(Trainer.server(url=anywhere(transport))) as server:
        config, store = Trainer.config(server.port, transport), QueuedDataStore(10)
        server.register_data_store("arm", QueuedDataStore(10))
        for client in (
            TrainerClient("arm", "127.0.0.1", config, store),
            TrainerClient("arm", server_ip="127.0.0.1", config=config, data_store=store),
            TrainerClient("arm", "127.0.0.1", config, store, wait_for_server=True),
        ):
            with client:
                Trainer.call(client)
                store.insert(1)
                assert client.update().applied >= 1


def test_two_hosts_and_two_configurations_are_refused(pair):
    with pytest.raises(ValueError, match="host 'robot' and server_ip 'arm': give one of them"):
        pair.client("robot", server_ip="arm")
    with pytest.raises(ValueError, match="two configurations"):
        ActionClient("robot", Action.config(1), Action.config(1))
    with pytest.raises(ValueError, match="but host 'robot' was given as well"):
        pair.client(server_ip="robot", url="zmq://robot:1")


# How --------------------------------------------------------------------------------------------


def settings_of(kind) -> set[str]:
    """What a class's constructor takes, those settings included that all of its kind take."""
    taken = set(inspect.signature(kind).parameters) - {"settings"}
    base = edgeml.services.base
    shared = base.ServerSettings if issubclass(kind, base.ServiceServer) else base.ClientSettings
    return taken | set(shared.__annotations__)


@pytest.mark.parametrize("kind", [ActionServer, InferenceServer, TrainerServer])
def test_every_server_takes_what_every_server_takes(kind):
    assert settings_of(kind) >= {
        *("url", "host", "transport", "workers", "codecs", "rate_limit", "advertise"),
        "credentials",
    }


@pytest.mark.parametrize("kind", [ActionClient, InferenceClient, TrainerClient])
def test_every_client_takes_what_every_client_takes(kind):
    assert settings_of(kind) >= {
        *("url", "host", "server_ip", "transport", "timeout", "wait_for_server", "client_id"),
        *("codec", "writable", "credentials"),
    }


def test_a_setting_that_there_is_not_is_refused(pair):
    for make in (pair.server, pair.client):
        with pytest.raises(TypeError, match="unexpected keyword argument 'compress'"):
            make(url="zmq://127.0.0.1:1", compress=True)


def test_every_client_waits_for_its_server(pair):
    url = f"zmq://127.0.0.1:{free_port()}"
    began = time.monotonic()
    with pytest.raises(Unreachable):
        pair.client(url=url, timeout=0.2, wait_for_server=0.3)
    assert time.monotonic() - began >= 0.3
    made = []
    waiting = threading.Thread(
        target=lambda: made.append(pair.client(url=url, timeout=0.2, wait_for_server=True))
    )
    waiting.start()
    with started(pair.server(url=url)):
        waiting.join(30)
        with made[0] as client:
            pair.call(client)


def test_every_client_has_a_codec_and_a_timeout(transport, pair):
    with started(pair.server(url=anywhere(transport), codecs=["cloudpickle"])) as server:
        with pair.client(url=server.url, codec="cloudpickle", timeout=5) as client:
            pair.call(client)
        with pytest.raises(ConfigMismatch, match="the server offers cloudpickle"):
            pair.client(url=server.url)
        with pytest.raises(ValueError, match="timeout must be positive"):
            pair.client(url=server.url, timeout=0)


def test_every_server_limits_the_rate(pair):
    with (
        started(pair.server(url="inproc://127.0.0.1:0", rate_limit=20)) as server,
        pair.client(url=server.url) as client,
    ):
        pair.call(client)
        with took(at_least=0.18, at_most=5.0):
            for _ in range(4):
                pair.call(client)
    if pair is Trainer:
        config = TrainerConfig(0, None, ["echo"], rate_limit=0.001)
        with (
            started(pair.server(config=config, url="inproc://a:0", rate_limit=None)) as server,
            pair.client(url=server.url) as client,
        ):
            pair.call(client)
            pair.call(client)


def test_every_client_asks_without_waiting(transport, pair):
    with started(pair.server(url=anywhere(transport))) as server:
        with pair.client(url=server.url) as client:
            futures = [pair.ask(client) for _ in range(20)]
            assert [future.result(10) for future in futures] == [3] * 20
        with pytest.raises(Closed):
            pair.ask(client)


def test_observations_are_asked_for_without_waiting(transport):
    with (
        started(Action.server(url=anywhere(transport))) as server,
        Action.client(url=server.url) as client,
    ):
        assert client.obs_async().result(10) == {"joints": [1.0, 2.0]}
        assert client.obs_async(["joints"], timeout=5).result(10) == {"joints": [1.0, 2.0]}
        with pytest.raises(UnknownInterface, match="no observation 'lidar'; known: joints"):
            client.obs_async(["lidar"]).result(10)
        with pytest.raises(UnknownInterface, match="no action 'jump'"):
            client.act_async("jump").result(10)
        assert client.act_async("joints").result(10) == {}
        with pytest.raises(ValueError, match="keys"):
            client.obs_async("joints")


def test_a_server_serves_within_a_with_block(transport, pair):
    with no_thread_left():
        made = pair.server(url=anywhere(transport))
        with made.serving() as server:
            assert server is made
            url = server.url
            with pair.client(url=url) as client:
                pair.call(client)
        with pytest.raises(Unreachable):
            pair.client(url=url, timeout=0.5)
    with pytest.raises(RuntimeError, match="stopped before"), made.serving():
        pytest.fail("it serves")  # pragma: no cover


def test_a_server_that_serves_in_a_with_block_stops_whatever_happens_there(pair):
    urls = []

    def fail_while_it_serves():
        with pair.server(url="zmq://127.0.0.1:0").serving() as server:
            urls.append(server.url)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail_while_it_serves()
    with pytest.raises(Unreachable):
        pair.client(url=urls[0], timeout=0.5)
    with started(pair.server(url="zmq://127.0.0.1:0")) as other:
        taken = pair.server(url=other.url)
        with pytest.raises(OSError, match=r"127\.0\.0\.1"), taken.serving():
            pytest.fail("it serves")  # pragma: no cover


def test_a_tunnel_serves_in_a_with_block_and_asks_without_waiting():
    config = TrainerConfig(request_types=["echo"])
    tunnel = TrainerTunnel(config, request_callback=lambda kind, payload: payload)
    with tunnel.serving() as served:
        assert served is tunnel
        assert served.request_async("echo", 3).result(10) == 3
        assert served.update_async().result(0) == (0, 0)


def test_a_subscription_is_public(transport):
    with (
        started(Action.server(url=anywhere(transport))) as server,
        Action.client(url=server.url) as client,
    ):
        seen: list[object] = []
        subscription = client.register_obs_callback(seen.append)
        assert isinstance(subscription, edgeml.Subscription)
        server.publish_obs({"joints": 1})
        wait_until(lambda: seen)
        subscription.close()
