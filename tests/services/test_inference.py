"""The inference pair: functions by name, called from elsewhere."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from edgeml import InferenceClient, InferenceServer, RemoteError, UnknownInterface
from pairs import process, started, wait_until


@pytest.fixture
def server(transport):
    with started(InferenceServer(0, transport=transport)) as server:
        yield server


@pytest.fixture
def client(server, transport):
    with InferenceClient("127.0.0.1", server.port, transport) as client:
        yield client


# The program that the README shows -------------------------------------------------------------


def test_the_program_of_the_readme(transport):
    def voice_recognition(payload):
        return {"text": f"{len(payload['audio'])} samples at {payload['rate']} Hz"}

    def face_recognition(payload):
        return {"faces": int(payload["image"].max())}

    server = InferenceServer(port_num=0, transport=transport)
    server.register_interface("voice_reg", voice_recognition)
    server.register_interface("face_reg", face_recognition)
    server.start(threaded=True)

    client = InferenceClient("localhost", port_num=server.port, transport=transport)
    assert client.interfaces() == ["face_reg", "voice_reg"]
    answer = client.call("voice_reg", {"audio": np.zeros(16_000, np.float32), "rate": 16_000})
    assert answer == {"text": "16000 samples at 16000 Hz"}
    assert client.call("face_reg", {"image": np.full((8, 8), 3, np.uint8)}) == {"faces": 3}
    client.stop()
    server.stop()


# Interfaces -----------------------------------------------------------------------------------


def test_interfaces_are_listed_sorted_and_without_those_of_our_own(server, client):
    assert client.interfaces() == []
    with pytest.raises(UnknownInterface, match="known: none"):
        client.call("policy", {})
    for name in ("z", "a", "policy/v2", "with space", "日本"):
        server.register_interface(name, lambda payload: payload)
    assert client.interfaces() == ["a", "policy/v2", "with space", "z", "日本"]
    for name in client.interfaces():
        assert client.call(name, name) == name


def test_an_interface_registered_after_the_start_is_there_at_once(server, client):
    with pytest.raises(UnknownInterface):
        client.call("late", 1)
    server.register_interface("late", lambda payload: payload + 1)
    assert client.call("late", 1) == 2


@pytest.mark.parametrize("name", ["", "/mine", None, 3])
def test_a_name_that_cannot_be_used_is_refused(server, name):
    with pytest.raises(ValueError, match="can't be called"):
        server.register_interface(name, lambda payload: payload)


def test_a_name_that_is_taken_is_refused_and_the_first_stays(server, client):
    server.register_interface("policy", lambda payload: "first")
    with pytest.raises(ValueError, match="'policy'"):
        server.register_interface("policy", lambda payload: "second")
    assert client.call("policy", None) == "first"


def test_what_is_no_function_is_refused_when_it_is_registered(server):
    with pytest.raises(TypeError, match="policy"):
        server.register_interface("policy", {"not": "callable"})


# Calls ----------------------------------------------------------------------------------------

VALUES = [
    None,
    True,
    -7,
    2**63,
    3.5,
    1 + 2j,
    "text",
    b"bytes",
    [1, [2, [3]]],
    (1, ("two", 3.0)),
    {"a": {"b": (1, 2)}, 3: None},
    {1, 2},
    np.float32(1.5),
    np.arange(12).reshape(3, 4),
    np.zeros((0, 3)),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(100_000, dtype=np.int16)[::2],
    {"cam": np.zeros((224, 224, 3), np.uint8), "state": np.ones(14, np.float32), "task": "pick"},
]


@pytest.mark.parametrize("value", VALUES, ids=[str(n) for n in range(len(VALUES))])
def test_values_arrive_as_they_were_both_ways(server, client, value):
    arrived = []

    def echo(payload):
        arrived.append(payload)
        return payload

    server.register_interface("echo", echo)
    for answer in (client.call("echo", value), client.call_async("echo", value).result(20)):
        for got in (answer, arrived[-1]):
            np.testing.assert_equal(got, value)
            assert type(got) is type(value)
            if isinstance(value, np.ndarray):
                assert got.dtype == value.dtype


def test_a_call_takes_its_arguments_by_name(server, client):
    server.register_interface("echo", lambda payload: payload)
    assert client.call(name="echo", payload=1, timeout=20) == 1
    assert client.call_async(name="echo", payload=1, timeout=20).result() == 1


def test_call_async_gives_a_real_future_while_calls_go_on(server, client):
    go_on = threading.Event()

    def infer(payload):
        assert go_on.wait(10)
        return payload * 2

    server.register_interface("policy", infer)
    futures = [client.call_async("policy", np.full(10, n)) for n in range(5)]
    assert all(isinstance(future, Future) for future in futures)
    assert not any(future.done() for future in futures)
    go_on.set()
    for n, future in enumerate(futures):
        assert (future.result(20) == 2 * n).all()
    with pytest.raises(RemoteError):
        client.call_async("policy", {}).result(20)
    assert isinstance(client.call_async("policy", {}).exception(20), RemoteError)


def test_large_calls_go_both_ways_whole(server, client):
    server.register_interface("negate", lambda payload: 255 - payload)
    for size in (1, 8_192, 8_193, 262_144, 4_000_000, 25_000_000):
        array = np.resize(np.arange(251, dtype=np.uint8), size)
        answer = client.call("negate", array)
        assert answer.shape == (size,)
        assert (answer == 255 - array).all()


def test_a_server_for_a_fleet_answers_each_its_own(server, transport):
    server.register_interface("policy", lambda payload: {"for": payload["id"]})

    def robot(k) -> None:
        with InferenceClient("127.0.0.1", server.port, transport) as client:
            for n in range(25):
                assert client.call("policy", {"id": (k, n)}) == {"for": (k, n)}

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(robot, range(12)))
    assert server.stats()["calls"] == 300


def test_the_statistics_count_calls_and_what_was_refused_by_reason(server, client):
    server.register_interface("fail", lambda payload: 1 / payload)
    assert client.call("fail", 2) == 0.5
    for _ in range(2):
        with pytest.raises(RemoteError, match="ZeroDivisionError"):
            client.call("fail", 0)
    with pytest.raises(UnknownInterface):
        client.call("missing", 0)
    stats = server.stats()
    assert stats["calls"] == 3
    assert stats["RemoteError"] == 2
    assert stats["UnknownInterface"] == 1
    assert stats["replies_dropped"] == 0


def test_functions_are_held_by_nothing_once_the_server_is_gone(transport):
    import gc
    import weakref

    class Policy:
        def __call__(self, payload):
            return payload

    policy = Policy()
    gone = weakref.ref(policy)
    with started(InferenceServer(0, transport=transport)) as server:
        server.register_interface("policy", policy)
        with InferenceClient("127.0.0.1", server.port, transport) as client:
            assert client.call("policy", 1) == 1
    del policy, server, client

    def is_gone() -> bool:
        gc.collect()
        return gone() is None

    wait_until(is_gone)


POLICY = """
import numpy as np
from edgeml import InferenceServer
server = InferenceServer(0)
chunk = np.zeros((50, 14), np.float32)
def policy(obs):
    chunk[:] = obs["state"].mean() + obs["cam"].mean()
    return {"actions": chunk}
server.register_interface("policy", policy)
server.start(threaded=True)
print(server.port, flush=True)
import signal
signal.pause()
"""

ROBOT = """
import sys
import numpy as np
from edgeml import InferenceClient
port, k = map(int, sys.argv[1:])
with InferenceClient("localhost", port) as client:
    for n in range(100):
        obs = {"cam": np.full((64, 64, 3), k, np.uint8), "state": np.full(14, n, np.float32)}
        actions = client.call("policy", obs)["actions"]
        assert actions.shape == (50, 14)
        assert (actions == n + k).all(), (n, k, actions)
print("done", flush=True)
"""


def test_robots_in_processes_share_a_policy_in_another():
    with process(POLICY) as policy:
        port = policy.line()
        with process(ROBOT, port, 1) as first, process(ROBOT, port, 100) as second:
            for robot in (first, second):
                assert robot.line() == "done"
                assert robot.end() == (0, "")
        policy.signal(signal.SIGTERM)
        assert policy.end()[0] == -signal.SIGINT  # as by Ctrl-C, once it is closed
