"""The action pair: an edge device serves its observations and takes actions."""

from __future__ import annotations

import contextlib
import threading
import time

import numpy as np
import pytest

from edgeml import (
    ActionClient,
    ActionConfig,
    ActionServer,
    ConfigMismatch,
    DeadlineExceeded,
    Malformed,
    NotEncodable,
    RemoteError,
    UnknownInterface,
    Unreachable,
)
from edgeml.core import Url
from pairs import (
    TRANSPORTS,
    free_port,
    no_thread_left,
    plain_client,
    process,
    started,
    took,
    wait_until,
)


def config_of(transport, port=0, **kwargs) -> ActionConfig:
    keys = {"action_keys": ["move", "reset"], "observation_keys": ["cam", "joints"]}
    return ActionConfig(port, **{**keys, **kwargs}, transport=transport)


class Device:
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list = []
        self.done: list = []

    def observe(self, keys):
        self.asked.append(keys)
        values = {"cam": np.zeros((4, 4, 3), np.uint8), "joints": np.arange(6.0)}
        return {key: values[key] for key in keys}

    def act(self, key, payload):
        self.done.append((key, payload))
        return {"done": key}


@pytest.fixture
def device():
    return Device()


@pytest.fixture
def server(transport, device):
    with started(ActionServer(config_of(transport), device.observe, device.act)) as server:
        yield server


@pytest.fixture
def client(server, transport):
    with ActionClient("127.0.0.1", server.port, config=config_of(transport)) as client:
        yield client


# The program that the README shows -------------------------------------------------------------


def test_the_program_of_the_readme(transport):
    agent_config = ActionConfig(
        port_number=0,
        action_keys=["move", "reset"],
        observation_keys=["camera", "position"],
        broadcast_port=0,
        transport=transport,
    )

    def obs_callback(keys):
        return {key: np.zeros(3) for key in keys}

    def act_callback(key, payload):
        return {"moved": payload}

    server = ActionServer(agent_config, obs_callback, act_callback)
    server.start(threaded=True)

    agent = ActionClient("localhost", server.port, task_id="mnist", config=agent_config)
    observations = agent.obs()
    assert set(observations) == {"camera", "position"}
    assert agent.act("move", {"x": 1.0, "y": np.ones(2)})["moved"]["x"] == 1.0
    seen = []
    agent.register_obs_callback(seen.append)
    server.publish_obs(observations)
    wait_until(lambda: seen)
    assert set(seen[0]) == {"camera", "position"}
    assert "mnist" in server.clients()[0].address
    agent.stop()
    server.stop()


# Observations ---------------------------------------------------------------------------------


def test_obs_gives_all_observations_or_those_asked_for(client, device):
    everything = client.obs()
    assert sorted(everything) == ["cam", "joints"]
    assert everything["cam"].shape == (4, 4, 3)
    assert everything["cam"].dtype == np.uint8
    assert client.obs(["joints"])["joints"].tolist() == [0, 1, 2, 3, 4, 5]
    assert sorted(client.obs(("joints", "cam"))) == ["cam", "joints"]
    assert client.obs(keys=[]) == {}
    assert sorted(client.obs(timeout=20)) == ["cam", "joints"]
    assert device.asked == [
        ["cam", "joints"],
        ["joints"],
        ["joints", "cam"],
        [],
        ["cam", "joints"],
    ]


def test_an_unknown_observation_is_told_with_those_that_are_known(client, device):
    with pytest.raises(UnknownInterface) as caught:
        client.obs(["joints", "lidar"])
    assert str(caught.value) == "there is no observation 'lidar'; known: cam, joints"
    assert device.asked == []


def test_keys_that_are_no_list_of_names_are_refused(server, client, device):
    for keys in ("cam", [1], [""]):
        with pytest.raises(ValueError, match="keys"):
            client.obs(keys)
    with plain_client(server) as plain:
        for payload in ("cam", [1], {"cam": 1}, 3):
            with pytest.raises(Malformed):
                plain.call("obs", payload)
    assert device.asked == []
    assert client.obs(["cam"])


def test_whatever_the_callback_gives_arrives(transport):
    given = {
        "cam": None,
        "joints": (),
        "any": [1, (2.5, None), {"thing": b"bytes"}],
        "scalar": np.float32(3),
    }
    with (
        started(ActionServer(config_of(transport), lambda keys: given, None)) as server,
        ActionClient("127.0.0.1", server.port, config=config_of(transport)) as client,
    ):
        assert client.obs() == given
        assert type(client.obs()["any"][1]) is tuple


def test_a_callback_that_leaves_something_out_is_told_what(transport):
    gives = [{"cam": 1}, None, [1, 2]]
    server = ActionServer(config_of(transport), lambda keys: gives.pop(0), None)
    with (
        started(server),
        ActionClient("127.0.0.1", server.port, config=config_of(transport)) as client,
    ):
        with pytest.raises(RemoteError, match="obs_callback gave no 'joints'"):
            client.obs()
        for _ in range(2):
            with pytest.raises(RemoteError, match="it is to return a dict"):
                client.obs(["cam"])


# Actions --------------------------------------------------------------------------------------


def test_act_carries_key_and_payload_and_returns_the_answer(client, device):
    assert client.act("move", {"x": 1.5}) == {"done": "move"}
    assert client.act("reset") == {"done": "reset"}
    assert client.act(key="move", payload=[1, 2], timeout=20) == {"done": "move"}
    assert device.done == [("move", {"x": 1.5}), ("reset", {}), ("move", [1, 2])]
    client.act("move", np.arange(4))
    assert device.done[-1][1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("payload", [0, "", False, [], 0.0, b"", ()])
def test_an_empty_payload_is_carried_as_it_is(client, device, payload):
    client.act("move", payload)
    assert device.done == [("move", payload)]
    assert type(device.done[0][1]) is type(payload)


def test_an_unknown_action_is_told_with_those_that_are_known(server, client, device):
    with pytest.raises(UnknownInterface) as caught:
        client.act("fly")
    assert str(caught.value) == "there is no action 'fly'; known: move, reset"
    with plain_client(server) as plain:
        for payload in ("move", ["move"], [1, {}], {"move": 1}, None):
            with pytest.raises(Malformed):
                plain.call("act", payload)
    assert device.done == []
    assert client.act("move") == {"done": "move"}


def test_a_payload_that_cannot_be_carried_is_told_with_the_path(client, device):
    with pytest.raises(NotEncodable, match=r"\['grip'\]"):
        client.act("move", {"grip": object()})
    assert device.done == []


def test_a_device_without_callbacks_says_what_it_does_not_offer(transport):
    with (
        started(ActionServer(config_of(transport), None, None)) as server,
        ActionClient("127.0.0.1", server.port, config=config_of(transport)) as client,
    ):
        with pytest.raises(UnknownInterface, match="no observations"):
            client.obs()
        with pytest.raises(UnknownInterface, match="no actions"):
            client.act("move")


def test_a_callback_that_raises_hurts_only_its_own_call(transport):
    def observe(keys):
        raise OSError("the camera is unplugged")

    def act(key, payload):
        if payload:
            raise ValueError(f"cannot {key}")
        return {}

    with (
        started(ActionServer(config_of(transport), observe, act)) as server,
        ActionClient("127.0.0.1", server.port, config=config_of(transport)) as client,
    ):
        with pytest.raises(RemoteError, match="the camera is unplugged") as caught:
            client.obs()
        assert caught.value.type_name == "OSError"
        assert "def observe" in caught.value.traceback or "observe" in caught.value.traceback
        with pytest.raises(RemoteError, match="cannot move"):
            client.act("move", 1)
        assert client.act("move") == {}


def test_a_device_that_moves_slowly_keeps_the_deadline_of_its_caller(transport):
    still, moved = threading.Event(), []

    begun = threading.Event()

    def act(key, payload):
        begun.set()
        still.wait(20)
        moved.append(payload)

    with (
        started(ActionServer(config_of(transport), None, act)) as server,
        ActionClient("127.0.0.1", config=config_of(transport, server.port), timeout=0.2) as client,
    ):
        while not begun.is_set():  # what arrives too late does not begin
            with took(at_least=0.2, at_most=5.0), pytest.raises(DeadlineExceeded):
                client.act("move", 1)
        with took(at_least=0.3, at_most=5.0), pytest.raises(DeadlineExceeded):
            client.act("move", 2, timeout=0.3)
        wait_until(lambda: server.stats()["waiting"] >= 1)
        time.sleep(0.3)  # the server counts from when a call arrives, a little later than we
        still.set()
        client.act("move", 3, timeout=20)
        assert moved == [1, 3]  # the second was late before it began


def test_actions_are_carried_out_one_at_a_time_and_in_the_order_of_one_caller(transport):
    moves: list[int] = []
    with (
        started(
            ActionServer(config_of(transport), None, lambda key, payload: moves.append(payload))
        ) as server,
        ActionClient("127.0.0.1", server.port, config=config_of(transport)) as client,
    ):
        for n in range(300):
            client.act("move", n)
    assert moves == list(range(300))


@pytest.mark.parametrize("apart", [{"workers": 2}, {"act_in_own_thread": True}])
def test_a_device_observes_while_it_moves_if_it_may(transport, apart):
    moving, arrived = threading.Event(), threading.Event()

    def act(key, payload):
        moving.set()
        assert arrived.wait(10)
        return {"there": True}

    server = ActionServer(config_of(transport), lambda keys: {"cam": 1, "joints": 2}, act, **apart)
    with (
        started(server),
        ActionClient("127.0.0.1", server.port, config=config_of(transport)) as client,
        plain_client(server) as plain,
    ):
        future = plain.call_async("act", ["move", {}])
        assert moving.wait(20)
        assert client.obs(timeout=20) == {"cam": 1, "joints": 2}
        arrived.set()
        assert future.result(20) == {"there": True}


# Connecting -----------------------------------------------------------------------------------


def test_all_that_differs_is_told_at_once_with_both_values(server, transport):
    theirs = config_of(
        transport, action_keys=["move", "fly"], observation_keys=["cam"], version="2"
    )
    with pytest.raises(ConfigMismatch) as caught:
        ActionClient("127.0.0.1", server.port, config=theirs, codec="cloudpickle")
    assert sorted(str(caught.value).split("; ")) == [
        "action_keys: the server has ['move', 'reset'], the client has ['fly', 'move']",
        "codec: the server offers msgpack, the client has cloudpickle",
        "observation_keys: the server has ['cam', 'joints'], the client has ['cam']",
        "version: the server has '1', the client has '2'",
    ]
    theirs = config_of(transport, action_keys=["fly"], version="2")  # and nothing that agrees
    with pytest.raises(ConfigMismatch) as caught:
        ActionClient("127.0.0.1", server.port, config=theirs)
    told = {each.partition(":")[0] for each in str(caught.value).split("; ")}
    assert told == {"action_keys", "version"}


def test_the_port_of_the_config_is_the_default_and_the_argument_wins(server, transport, device):
    with ActionClient("localhost", config=config_of(transport, server.port)) as client:
        assert client.act("move") == {"done": "move"}
    with ActionClient("localhost", server.port, config=config_of(transport, 1)) as client:
        assert client.act("move") == {"done": "move"}


def test_the_transport_argument_wins_over_the_config(server, transport):
    other = next(name for name in TRANSPORTS if name != transport)
    config = config_of(other)
    with ActionClient("localhost", server.port, config=config, transport=transport) as client:
        assert client.act("move") == {"done": "move"}
    with ActionClient("", config=config, transport=server.url) as client:
        assert client.act("move") == {"done": "move"}


def test_the_broadcast_port_answers_just_as_well(transport, device):
    config = config_of(transport, broadcast_port=0)
    server = ActionServer(config_of(transport, broadcast_port=None), None, device.act)
    with started(server):
        assert len(server.urls()) == 1
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(started(ActionServer(config_of(transport), None, None)))
        port = first.port
        first.stop()
        config = config_of(transport, broadcast_port=port)
        server = ActionServer(config, device.observe, device.act)
        stack.enter_context(started(server))
        # Where the system picks the port, it picks this one too.
        urls = server.urls()
        assert len(urls) == 2
        for url in map(Url.parse, urls):
            client = stack.enter_context(ActionClient("127.0.0.1", url.port, config=config))
            seen: list = []
            client.register_obs_callback(seen.append)
            assert client.act("move", url.port) == {"done": "move"}
            server.publish_obs({"n": url.port})
            wait_until(lambda seen=seen, url=url: seen and seen[-1] == {"n": url.port})


def test_the_server_tells_who_its_clients_are_and_what_they_call_themselves(server, transport):
    config = config_of(transport)
    with (
        ActionClient("127.0.0.1", server.port, config=config, task_id="pick"),
        ActionClient("127.0.0.1", server.port, config=config, client_id="arm-7") as second,
    ):
        assert second.client_id == "arm-7"
        clients = server.clients()
        assert len(clients) == 2
        assert sum(peer.address.startswith("pick at ") for peer in clients) == 1
        assert [peer.id for peer in clients].count("arm-7") == 1


def test_nobody_there_leaves_nothing_behind(transport):
    port = free_port()
    with no_thread_left(), took(at_most=5), pytest.raises(Unreachable):
        ActionClient("127.0.0.1", port, config=config_of(transport))


DEVICE = """
import signal
import numpy as np
from edgeml import ActionConfig, ActionServer
config = ActionConfig(0, ["move"], ["cam"])
frame = np.zeros((480, 640, 3), np.uint8)
def observe(keys):
    frame[:] += 1
    return {"cam": frame}
server = ActionServer(config, observe, lambda key, payload: {"sum": payload["a"].sum()})
server.start(threaded=True)
print(server.port, flush=True)
signal.pause()
"""


def test_a_device_in_another_process_is_read_and_moved():
    with process(DEVICE) as device:
        config = ActionConfig(int(device.line()), ["move"], ["cam"])
        with ActionClient("localhost", config=config) as client:
            frames = [client.obs()["cam"] for _ in range(20)]
            for n, frame in enumerate(frames, 1):
                assert frame.shape == (480, 640, 3)
                assert frame.min() == frame.max() == n
            assert client.act("move", {"a": np.ones(1_000_000, np.float32)}) == {"sum": 1e6}
