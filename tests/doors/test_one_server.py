"""One server, in a process of its own, answers other people's clients and native ones at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import pytest

from edgeml import InferenceClient
from pairs import process
from small_clients import (
    GrootClient,
    OlderGrootClient,
    OpenpiClient,
    OtherArraysClient,
    RealtimeClient,
    RemoteFailure,
    VlaClient,
)

SERVER = """
import json, signal
import numpy as np
from edgeml import Batching, InferenceServer

DOORS = ["openpi://127.0.0.1:0", "groot://127.0.0.1:0", "vla-eval://127.0.0.1:0"]
# All have the same port, so that two by TCP need an address each.
native = "zmq://127.0.0.1:0,grpc://127.0.0.2:0,shm://127.0.0.1:0"
server = InferenceServer(url=native, doors=DOORS)

# It runs once all six have asked.
@server.register_interface("policy", batching=Batching(6, max_delay=60.0, sizes=[6]))
def policy(batch):
    together = np.tile(batch["number"][:, 0], (6, 1))
    brightness = batch["image"].mean(axis=(1, 2, 3), dtype=np.float32)
    actions = batch["state"][:, None] * brightness[:, None, None]
    return {"actions": actions, "number": batch["number"], "together": together}

server.register_interface("echo", lambda payload: {"back": payload["arrays"]})

@server.register_interface("count")
def count(payload, context):
    context.session["calls"] = calls = context.session.get("calls", 0) + 1
    return {"calls": np.array(calls)}

server.register_interface("stats", lambda payload: server.stats())
with server.serving():
    doors = {"policy": server.doors()}
    for name in ("echo", "count"):
        doors[name] = [server.open_door(url, name) for url in DOORS]
    print(json.dumps({"native": server.urls(), "doors": doors}), flush=True)
    signal.pause()
"""


class NativeClient:
    """Ours, with the face of the others."""

    def __init__(self, url: str, interface: str) -> None:
        self._robot = InferenceClient(url=url, timeout=20)
        self._interface = interface
        self.close = self._robot.stop

    def call(self, observation: Any) -> Any:
        return self._robot.call(self._interface, observation)


OTHERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "openpi": ("openpi", OpenpiClient),
    "openpi, second dialect": ("openpi", RealtimeClient),
    "openpi, other arrays": ("openpi", OtherArraysClient),
    "groot": ("groot", GrootClient),
    "groot, older": ("groot", OlderGrootClient),
    "vla-eval": ("vla-eval", VlaClient),
}
"""Other people's clients, and by which door they come."""
NATIVE = ("zmq", "grpc", "shm")
SIX = ("openpi", "groot", "vla-eval", *NATIVE)

Connect = Callable[[str, str], Any]
"""``connect(kind, interface)`` makes a client; they are closed at the end of the test."""


@pytest.fixture(scope="module")
def addresses() -> Iterator[dict[str, dict[str, str]]]:
    """Where one server is, by interface, and by transport or door."""

    def by_scheme(urls: list[str]) -> dict[str, str]:
        return {url.partition(":")[0]: url for url in urls}

    with process(SERVER) as server:
        told = json.loads(server.line())
        native = by_scheme(told["native"])
        yield {name: {**native, **by_scheme(urls)} for name, urls in told["doors"].items()}


@pytest.fixture
def connect(addresses: dict[str, dict[str, str]]) -> Iterator[Connect]:
    with ExitStack() as made:

        def connect(kind: str, interface: str) -> Any:
            if kind in NATIVE:
                client: Any = NativeClient(addresses[interface][kind], interface)
            else:
                door, of_kind = OTHERS[kind]
                client = of_kind(addresses[interface][door])
            return made.enter_context(closing(client))

        yield connect


@pytest.fixture
def stats(addresses: dict[str, dict[str, str]]) -> Iterator[Callable[[], dict[str, int]]]:
    with InferenceClient(url=addresses["policy"]["zmq"]) as client:
        yield lambda: client.call("stats", None)


def test_a_batch_has_rows_of_all_six(connect: Connect, stats: Callable[[], dict[str, int]]) -> None:
    clients = [connect(kind, "policy") for kind in SIX]
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 24, 3), np.uint8)

    def run(number: int) -> list[Any]:
        observation = {
            "image": images[number],
            "state": np.linspace(number, 1, 7, dtype=np.float32),
            "number": np.array([number]),
            "task": f"fold towel {number}",
        }
        return [clients[number].call(observation) for _ in range(5)]

    before = stats()
    with ThreadPoolExecutor(6) as robots:
        answers = list(robots.map(run, range(6)))
    for number, results in enumerate(answers):
        state = np.linspace(number, 1, 7, dtype=np.float32)
        for result in results:
            assert sorted(result["together"].tolist()) == [0, 1, 2, 3, 4, 5]
            assert result["number"].tolist() == [number]
            expected = state[None] * images[number].mean(dtype=np.float32)
            np.testing.assert_allclose(result["actions"], expected, rtol=1e-5)
    after = stats()
    for door in ("openpi", "groot", "vla-eval"):
        assert after[f"calls_by_{door}"] - before.get(f"calls_by_{door}", 0) == 5


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    """Arrays of every kind that all of the protocols carry."""
    rng = np.random.default_rng(1)
    made = {
        dtype: rng.integers(0, 100, (2, 3)).astype(dtype)
        for dtype in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
    }
    made |= {
        "big-endian": rng.random((2, 3)).astype(">f4"),
        "big-endian numbers": rng.integers(0, 9, 5).astype(">u2"),
        "no axis": np.array(2.5),
        "nothing": np.zeros((0, 3), np.float32),
        "every second": np.arange(20.0)[::2],
        "backwards": np.arange(5)[::-1],
        "turned": rng.random((3, 4)).T,
        "by columns": np.asfortranarray(rng.random((3, 4))),
        "repeated": np.broadcast_to(np.arange(3), (4, 3)),
        "not a number": np.array([np.nan, np.inf, -0.0]),
        "image": rng.integers(0, 256, (8, 9, 3), np.uint8),
        "gray": rng.integers(0, 256, (8, 9, 1), np.uint8),
        "large": rng.random((300, 300)),
    }
    return made


@pytest.mark.parametrize("kind", [*OTHERS, "grpc", "shm"])
def test_each_answer_is_bit_for_bit_the_one_that_a_native_client_gets(
    kind: str, connect: Connect
) -> None:
    sent = {"arrays": arrays(), "task": "fold"}
    ours = connect("zmq", "echo").call(sent)["back"]
    theirs = connect(kind, "echo").call(sent)["back"]
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert array.dtype.str == ours[name].dtype.str, name
        assert array.shape == ours[name].shape, name
        assert array.tobytes() == ours[name].tobytes(), name


@pytest.mark.parametrize("kind", [*OTHERS, *NATIVE])
def test_each_has_a_session_of_its_own(kind: str, connect: Connect) -> None:
    first, second = connect(kind, "count"), connect(kind, "count")
    assert [int(first.call({})["calls"]) for _ in range(3)] == [1, 2, 3]
    assert int(second.call({})["calls"]) == 1
    assert int(first.call({})["calls"]) == 4


def test_an_episode_of_each_protocol_is_a_session(connect: Connect) -> None:
    harness = connect("vla-eval", "count")
    for _ in range(2):
        harness.start("fold")
        assert [int(harness.call({})["calls"]) for _ in range(2)] == [1, 2]
        harness.end()
    robot = connect("groot", "count")
    assert int(robot.call({})["calls"]) == 1
    robot.reset()
    assert int(robot.call({})["calls"]) == 1
    both = connect("openpi, second dialect", "count")
    assert [int(both.call({}, "left")["calls"]) for _ in range(2)] == [1, 2]
    assert int(both.call({}, "right")["calls"]) == 1
    assert int(both.call({}, "right")["calls"]) == 2
    assert both.reset("right") == {"status": "reset successful"}
    assert int(both.call({}, "right")["calls"]) == 1


def test_what_one_sends_amiss_disturbs_none_of_the_others(connect: Connect) -> None:
    clients = {kind: connect(kind, "echo") for kind in (*OTHERS, *NATIVE)}
    sent = {"arrays": {"state": np.arange(3.0)}}
    for kind in OTHERS:
        with pytest.raises(RemoteFailure):
            clients[kind].call({"nothing": np.zeros(3)})
        if kind == "openpi":  # its protocol ends with an error
            clients[kind] = connect(kind, "echo")
        for client in clients.values():
            assert client.call(sent)["back"]["state"].tolist() == [0, 1, 2]
