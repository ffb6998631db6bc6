"""vla-eval's door: the suite of all doors, and what its protocol says."""

from __future__ import annotations

import base64
import http.client
import itertools
import json
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from edgeml import Context, Feature, InferenceServer, Limits, PolicyContract
from edgeml.core import Url, load_door
from edgeml.testing import DoorClient, DoorTests, Refused
from edgeml.testing.ends import PATIENCE
from edgeml.testing.keys import make_keys
from pairs import long_form, started, wait_until
from test_vla_eval_codec import array, restored

pack, unpack = msgspec.msgpack.encode, msgspec.msgpack.decode


def said(value: Any) -> Any:
    """A payload as the harness's own client packs it, but for images, which it makes PNG of."""
    if isinstance(value, np.ndarray):
        return array(value)
    if isinstance(value, dict):
        return {key: said(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [said(item) for item in value]
    return value


class Talk:
    """One connection of somebody who speaks the protocol, message by message."""

    def __init__(self, url: Url | str, path: str = "", **options: Any) -> None:
        url = Url.parse(str(url))
        self._numbers = itertools.count(1)
        options = {"compression": None, "max_size": None, "ping_interval": None, **options}
        address = f"{replace(url, scheme='ws')}{path}"
        self._opened = ExitStack()
        self.connection: ClientConnection = self._opened.enter_context(
            connect(address, proxy=None, open_timeout=PATIENCE, **options)
        )

    def message(self, type: str, payload: Any = None, seq: int | None = None) -> bytes:
        seq = next(self._numbers) if seq is None else seq
        payload = {} if payload is None else said(payload)
        return pack({"type": type, "payload": payload, "seq": seq, "timestamp": time.time()})

    def send(self, type: str, payload: Any = None, seq: int | None = None) -> None:
        self.connection.send(self.message(type, payload, seq))

    def receive(self, timeout: float = PATIENCE) -> tuple[str, int, Any]:
        """The type, the number and the payload of the next message."""
        message = unpack(self.connection.recv(timeout))
        assert list(message) == ["type", "payload", "seq", "timestamp"]
        assert abs(message["timestamp"] - time.time()) < 60
        return message["type"], message["seq"], restored(message["payload"])

    def ask(self, type: str, payload: Any = None, seq: int | None = None) -> tuple[str, int, Any]:
        self.send(type, payload, seq)
        return self.receive()

    def act(self, payload: Any) -> Any:
        kind, _, action = self.ask("observation", payload)
        assert kind == "action", action
        return action

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._opened.close()


class Client(DoorClient):
    """As the harness's own client does: it greets, and then sends observations."""

    def __init__(self, url: Url, token: str | None = None) -> None:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        try:
            self._talk = Talk(url, additional_headers=headers)
        except InvalidStatus as error:
            raise Refused(f"{error}: {error.response.body!r}") from None
        except (ConnectionClosed, InvalidMessage) as error:
            raise ConnectionError(str(error)) from None
        try:
            kind, _, told = self._talk.ask("hello", {"harness_version": "0", "protocol_version": 1})
        except ConnectionClosed as error:
            self.close()
            if error.rcvd is not None and error.rcvd.reason:
                raise Refused(error.rcvd.reason) from None
            raise ConnectionError(str(error)) from None
        assert kind == "hello", told

    def encode(self, observation: dict[str, Any]) -> bytes:
        return self._talk.message("observation", observation)

    def exchange(self, message: bytes, timeout: float = PATIENCE) -> bytes | str:
        try:
            self._talk.connection.send(message)
            return self._talk.connection.recv(timeout)
        except ConnectionClosed as error:
            raise ConnectionError(str(error)) from None

    def decode(self, answer: bytes | str) -> Any:
        message = unpack(answer)
        if message["type"] == "error":
            raise Refused(message["payload"]["error"])
        assert message["type"] == "action"
        return restored(message["payload"])

    def close(self) -> None:
        self._talk.close()

    def reset(self) -> None:
        self._talk.send("episode_start", {"task": {"name": "lift"}})


class TestVlaEval(DoorTests):
    url = "vla-eval://127.0.0.1:0"
    client = Client

    def hostile(self, client: DoorClient) -> dict[str, bytes]:
        def message(payload: Any) -> bytes:
            return pack({"type": "observation", "payload": payload, "seq": 1, "timestamp": 0.0})

        def image(format: str, file: bytes) -> bytes:
            shape = [1 << 15, 1 << 15, 3]
            data = {"__image__": True, "format": format, "data": file, "shape": shape}
            return message({"x": data})

        large = [1 << 40, 1 << 20]
        wrong = {"__ndarray__": True, "data": b"12345678", "dtype": "<f8", "shape": [1]}
        huge = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x80\0\0\0\x80\0\x08\x02\0\0\0" + bytes(100)
        return {
            "nothing": b"",
            "noise": bytes(range(256)),
            "a map that goes on": b"\xdf\xff\xff\xff\xff",
            "nested": b"\x83\xa4type\xabobservation\xa3seq\x01\xa7payload" + b"\x91" * 100_000,
            "nested in what nobody reads": b"\x81\xa1x" + b"\x91" * 100_000,
            "many": message([[]] * 600_000),
            "a list that says it is long": message({})[:-1] + b"\xdd\xff\xff\xff\xff",
            "a number as a key": message({1: 1}),
            "an ext": message({"x": msgspec.msgpack.Ext(1, b"x")}),
            "objects": message({"x": {**wrong, "dtype": "|O"}}),
            "a dtype that is none": message({"x": {**wrong, "dtype": "(1000000000,)f8"}}),
            "a shape that lies": message({"x": {**wrong, "shape": large}}),
            "a shape that is negative": message({"x": {**wrong, "shape": [-1]}}),
            "an empty shape that can't be": message(
                {"x": {**wrong, "data": b"", "shape": [0, 1 << 61, 1 << 61]}}
            ),
            "a PNG of 3 GB": image("png", huge),
            "a JPEG that is none": image("jpeg", huge),
            "a format that is none": image("exr", huge),
        }


TestLongVlaEval = long_form(
    TestVlaEval, "test_garbage_", "test_mutated_", garbage=10_000, mutations=10_000
)


# What its protocol says -------------------------------------------------------------------

CONTRACT = PolicyContract(
    observation={
        "images": {"wrist": Feature((64, 64, 3), "uint8", kind="image")},
        "depth": Feature((64, 64), "float32", kind="depth", units="m"),
        "state": Feature(7, "float64", names=tuple("abcdefg"), units="rad", kind="state"),
        "goal": Feature((None,), "float32"),
        "gain": Feature((), "float32"),
        "task_description": Feature((), str, kind="text"),
    },
    action={"arm": Feature((10, 6), "float32"), "gripper": Feature((10, 1), "bool")},
    horizon=10,
)


def echo(observation: Any) -> Any:
    return observation


@contextmanager
def serving(function: Callable[..., Any] = echo, **settings: Any) -> Iterator[InferenceServer]:
    """A server with the door at ``server.doors()[0]``; settings of the door begin with it."""
    contract, door = settings.pop("contract", None), settings.pop("door", {})
    server = InferenceServer(url="inproc://127.0.0.1:0", **settings)
    server.register_interface("policy", function, contract=contract)
    server.open_door("vla-eval://127.0.0.1:0", **door)
    with started(server):
        yield server


@contextmanager
def talking(function: Callable[..., Any] = echo, **settings: Any) -> Iterator[Talk]:
    with serving(function, **settings) as server, Talk(server.doors()[0]) as talk:
        yield talk


def test_hello_is_answered_with_who_is_there() -> None:
    with talking() as talk:
        kind, seq, told = talk.ask("hello", {"harness_version": "0.8.0", "protocol_version": 1}, 41)
        assert (kind, seq) == ("hello", 41)
        assert told == {
            "harness_version": "edgeml",
            "protocol_version": 1,
            "model_server": "policy",
            "capabilities": {},
        }
        assert talk.ask("hello")[0] == "hello"  # again, and by whoever says no more


def test_hello_tells_what_the_contract_states() -> None:
    with talking(contract=CONTRACT) as talk:
        told = talk.ask("hello")[2]
    assert told["action_spec"] == {
        "arm": {"name": "arm", "dims": 6, "format": "raw", "description": "shape (10, 6) float32"},
        "gripper": {
            "name": "gripper",
            "dims": 1,
            "format": "raw",
            "description": "shape (10, 1) bool",
        },
    }
    observation = told["observation_spec"]
    assert {name: (each["dims"], each["format"]) for name, each in observation.items()} == {
        "images.wrist": (0, "rgb_hwc_uint8"),
        "depth": (0, "raw"),
        "state": (7, "raw"),
        "goal": (0, "raw"),
        "gain": (1, "raw"),
        "task_description": (0, "language"),
    }
    assert observation["state"]["description"] == "shape (7,) float64, a b c d e f g, in rad"
    assert all(each["name"] == name for name, each in observation.items())


def test_an_action_that_is_an_array_alone_is_told_by_the_name_that_it_is_sent_by() -> None:
    contract = PolicyContract(action=Feature(7, "float32", units=tuple("rrrrrrm")))
    with talking(lambda _: np.zeros(7, np.float32), contract=contract) as talk:
        told = talk.ask("hello")[2]
        assert "observation_spec" not in told
        assert told["action_spec"]["actions"]["description"].endswith("in r r r r r r m")
        assert list(talk.act({})) == ["actions"]


def test_hello_tells_what_whoever_opened_the_door_says() -> None:
    spec = {"position": {"name": "position", "dims": 3, "format": "delta_xyz", "range": [-1, 1]}}
    more = {"observation_params": {"send_wrist_image": True}, "model_server": "Pi0"}
    metadata = {"action_spec": spec, "protocol_version": 9, **more}
    with talking(contract=CONTRACT, door={"metadata": metadata}) as talk:
        told = talk.ask("hello")[2]
    assert told["action_spec"] == spec
    assert told["observation_params"] == {"send_wrist_image": True}
    assert told["model_server"] == "Pi0"
    assert told["protocol_version"] == 1
    assert "state" in told["observation_spec"]


def test_an_action_has_the_number_of_its_observation() -> None:
    with talking() as talk:
        for seq in (7, 3, 2**63, 0, -5):
            assert talk.ask("observation", {"x": seq}, seq) == ("action", seq, {"x": seq})


def test_observations_that_are_sent_ahead_are_answered_in_order() -> None:
    with talking() as talk:
        for number in range(20):
            talk.send("observation", {"number": number}, 100 + number)
        for number in range(20):
            assert talk.receive() == ("action", 100 + number, {"number": number})


def test_no_hello_is_needed() -> None:
    with talking() as talk:
        assert talk.act({"x": 1}) == {"x": 1}


def test_an_error_closes_nothing() -> None:
    def function(observation: Any) -> Any:
        if "raise" in observation:
            raise KeyError("no such task")
        return observation.get("result", {"is": object()})

    with talking(function) as talk:
        kind, seq, told = talk.ask("observation", {"raise": 1}, 8)
        assert (kind, seq) == ("error", 8)
        assert told == {"error": "observation_failed: KeyError: 'no such task'"}
        kind, seq, told = talk.ask("observation", {}, 9)
        assert (kind, seq) == ("error", 9)
        assert "result['is'] is a builtins.object" in told["error"]
        wrong = {"__ndarray__": True, "data": b"1", "dtype": "<f4", "shape": [1]}
        kind, seq, told = talk.ask("observation", {"state": wrong}, 10)
        assert (kind, seq) == ("error", 10)
        assert told["error"].startswith("observation_failed: Malformed: payload['state']: ")
        assert talk.act({"result": {"x": 1}}) == {"x": 1}


@pytest.mark.parametrize(
    "message",
    [
        "a text",
        b"\xc1",
        pack({"type": "observation", "payload": {}}),
        pack({"type": "observation", "payload": {}, "seq": "1", "timestamp": 0.0}),
    ],
)
def test_what_is_no_message_is_a_counted_error_and_closes_nothing(message: bytes | str) -> None:
    with serving(echo) as server, Talk(server.doors()[0]) as talk:
        for _ in range(2):
            talk.connection.send(message)
            kind, seq, told = talk.receive()
            assert (kind, seq) == ("error", 0)
            assert told["error"].startswith("message_failed: Malformed: ")
        assert talk.act({"x": 1}) == {"x": 1}
        assert talk.ask("observe")[0] == "error"
        wrong = {"__ndarray__": True, "data": b"1", "dtype": "<f4", "shape": [1]}
        assert talk.ask("observation", {"x": wrong})[0] == "error"
        assert server.stats()["Malformed"] == 4


@pytest.mark.parametrize("type", ["action", "observe", "", "x" * 300, "\n\ud7ff"])
def test_types_that_no_client_sends_are_errors(type: str) -> None:
    with talking() as talk:
        kind, seq, told = talk.ask(type, seq=4)
        assert (kind, seq) == ("error", 4)
        assert "clients send hello, observation, episode_start, episode_end" in told["error"]
        assert len(told["error"]) < 300
        assert told["error"].isprintable()
        assert talk.act({"x": 1}) == {"x": 1}


def test_an_error_of_the_client_is_logged_and_has_no_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    with talking() as talk:
        talk.send("error", {"error": "the simulator crashed\n" + "x" * 1000})
        assert talk.act({"x": 1}) == {"x": 1}
        assert talk.ask("error", {"error": 3})[0] == "error"
    assert re.search(
        r"tells of an error: the simulator crashed\\nx{10,200}\.\.\.$", caplog.text, re.M
    )


def test_a_hello_that_says_nonsense_is_an_error_and_closes_nothing() -> None:
    with talking() as talk:
        assert talk.ask("hello", {"harness_version": [1]})[0] == "error"
        assert talk.ask("hello", 3)[0] == "error"
        assert talk.ask("hello")[0] == "hello"


def test_who_calls_is_told_as_it_calls_itself() -> None:
    with talking(lambda _, context: {"label": context.label}) as talk:
        talk.ask("hello", {"harness_version": "0.8.0", "benchmark": "libero:Libero"})
        assert talk.act({})["label"].startswith("vla-eval 0.8.0 libero:Libero")


def test_a_label_is_not_longer_than_labels_are() -> None:
    with talking(lambda _, context: {"length": len(context.label)}) as talk:
        talk.ask("hello", {"harness_version": "x" * 10_000})
        assert talk.act({})["length"] <= 200


# Episodes ---------------------------------------------------------------------------------


def test_episodes_are_sessions() -> None:
    ended: list[str] = []

    def function(observation: Any, context: Context) -> Any:
        if "count" not in context.session:
            episode = context.episode
            context.on_end(lambda: ended.append(episode))
        count = context.session["count"] = context.session.get("count", 0) + 1
        return {"count": count, "episode": context.episode}

    with talking(function) as talk:
        recording = {"sid": "s", "eid": "episode-1", "eval_id": "e", "db_path": "/nowhere"}
        talk.ask("hello")
        talk.send("episode_start", {"task": {"name": "lift"}, "recording": recording})
        for count in (1, 2, 3):
            assert talk.act({}) == {"count": count, "episode": "episode-1"}
        assert not ended
        talk.send("episode_end", {"metrics": {"success": True}, "steps": 3})
        wait_until(lambda: ended == ["episode-1"])
        assert talk.act({}) == {"count": 1, "episode": ""}  # of nobody's episode
        episodes = []
        for _ in range(2):  # which no end has to precede, nor a name
            talk.send("episode_start", {"task": {}, "mode": "live", "recording": None})
            action = talk.act({})
            assert action["count"] == 1
            episodes.append(action["episode"])
        assert len({"", *episodes}) == 3
        wait_until(lambda: ended == ["episode-1", "", episodes[0]])
    assert ended == ["episode-1", "", *episodes]


def test_an_episode_ends_with_its_connection() -> None:
    ended = threading.Event()

    def function(_: Any, context: Context) -> Any:
        context.on_end(ended.set)
        return {}

    with serving(function) as server:
        with Talk(server.doors()[0]) as talk:
            talk.send("episode_start", {})
            talk.act({})
            assert not ended.is_set()
        assert ended.wait(PATIENCE)


def test_an_observation_belongs_to_the_episode_in_which_it_was_sent() -> None:
    with talking(lambda _, context: {"episode": context.episode}) as talk:
        for name in "abc":
            talk.send("episode_start", {"recording": {"eid": name}})
            talk.send("observation")
            talk.send("episode_end")
        assert [talk.receive()[2]["episode"] for _ in range(3)] == ["a", "b", "c"]


@pytest.mark.parametrize("recording", [3, {"eid": 3}, {"eid": "x" * 201}])
def test_an_episode_of_no_name_is_an_error_and_closes_nothing(recording: Any) -> None:
    with talking() as talk:
        kind, seq, told = talk.ask("episode_start", {"recording": recording}, 6)
        assert (kind, seq) == ("error", 6)
        assert told["error"].startswith("episode_start_failed: Malformed: ")
        assert talk.act({"x": 1}) == {"x": 1}


# HTTP -------------------------------------------------------------------------------------


def look(url: str, path: str = "/health") -> tuple[int, str | None, Any]:
    """Status, content type and body of what is answered to a GET."""
    place = Url.parse(url)
    connection = http.client.HTTPConnection(place.host, place.port, timeout=PATIENCE)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.getheader("Content-Type"), json.load(response)
    finally:
        connection.close()


def test_health_is_ok_once_the_server_is_ready_and_clients_wait_until_then() -> None:
    loading, go_on = threading.Event(), threading.Event()

    def load(report: Callable[[float, str], None]) -> None:
        report(0.25, "reading weights")
        loading.set()
        assert go_on.wait(PATIENCE)

    server = InferenceServer(url="inproc://127.0.0.1:0")
    server.register_interface("policy", echo)
    server.load(load)
    server.open_door("vla-eval://127.0.0.1:0")
    with started(server):
        try:
            url = server.doors()[0]
            assert loading.wait(PATIENCE)
            told = {"status": "loading", "progress": 0.25, "detail": "reading weights"}
            assert look(url) == (503, "application/json", told)
            # The harness's client tries again after this, and after nothing that comes later.
            with pytest.raises(InvalidStatus) as refused:
                Talk(url)
            assert refused.value.response.status_code == 503
            assert b"loading, 25% done: reading weights" in (refused.value.response.body or b"")
        finally:
            go_on.set()
        wait_until(lambda: server.state().state == "ready")
        assert look(url) == (200, "application/json", {"status": "ok"})
        assert look(url, "/health?probe=1")[0] == 200
        with Talk(url) as talk, Talk(url, "/any/path?is=taken") as other:
            assert talk.act({"x": 1}) == {"x": 1}
            assert other.act({"x": 2}) == {"x": 2}


def test_a_server_that_drains_is_not_healthy_and_lets_nobody_in() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def function(observation: Any) -> Any:
        begun.set()
        assert go_on.wait(PATIENCE)
        return observation

    with serving(function) as server, Talk(server.doors()[0]) as talk:
        talk.send("observation", {"x": 1})
        assert begun.wait(PATIENCE)
        draining = threading.Thread(target=server.drain)
        draining.start()
        try:
            wait_until(lambda: server.state().state == "draining")
            assert look(server.doors()[0])[::2][0] == 503
            with pytest.raises(InvalidStatus):
                Talk(server.doors()[0])
        finally:
            go_on.set()
        assert talk.receive()[2] == {"x": 1}
        draining.join(PATIENCE)


def test_nothing_is_compressed_whoever_asks() -> None:
    with serving() as server, Talk(server.doors()[0], compression="deflate") as talk:
        assert talk.connection.protocol.extensions == []
        assert talk.act({"x": 1}) == {"x": 1}


HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


def test_who_greets_and_goes_is_forgotten() -> None:
    hello = pack({"type": "hello", "payload": {}, "seq": 1})
    said = HANDSHAKE + bytes([0x82, 0x80 | len(hello)]) + bytes(4) + hello
    with serving() as server:
        place = Url.parse(server.doors()[0])
        for number in range(60):
            with socket.create_connection((place.host, place.port), PATIENCE) as hasty:
                hasty.sendall(said)
                if number % 2:
                    hasty.recv(1)
                linger = struct.pack("ii", 1, 0)  # the connection is reset
                hasty.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        with Talk(place) as talk:
            assert talk.act({"x": 1}) == {"x": 1}
        wait_until(lambda: not server.clients())


# Keys -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_keys(tmp_path_factory)


def basic(token: str) -> str:
    return "Basic " + base64.b64encode(f"robot:{token}".encode()).decode()


def test_a_token_is_shown_as_a_bearers_or_as_a_password(keys: Any) -> None:
    token = keys.client("robot").token
    with serving(lambda _, c: {"who": c.identity}, credentials=keys.server()) as server:
        place = Url.parse(server.doors()[0])
        for shown in (f"Bearer {token}", f"bearer  {token} ", basic(token)):
            with Talk(place, additional_headers={"Authorization": shown}) as talk:
                assert talk.ask("hello")[0] == "hello"
                assert talk.act({}) == {"who": "robot"}
        url = f"ws://robot:{token}@{place.host}:{place.port}"  # as the harness is given it
        with connect(url, proxy=None) as connection:
            connection.send(pack({"type": "observation", "payload": {}, "seq": 1}))
            assert unpack(connection.recv(PATIENCE))["payload"] == {"who": "robot"}


def test_beyond_this_machine_a_token_is_shown_through_tls(keys: Any) -> None:
    # What the harness does with an address of wss:// and SSL_CERT_FILE; `edgeml` is a host for it.
    trusts = ssl.create_default_context(cafile=str(keys.client("robot").tls.authority))
    trusts.verify_flags |= ssl.VERIFY_X509_STRICT
    server = InferenceServer(url="inproc://127.0.0.1:0", credentials=keys.server())
    server.register_interface("policy", lambda _, context: {"who": context.identity})
    server.open_door("vla-eval://0.0.0.0:0")
    with started(server):
        port = Url.parse(server.doors()[0]).port
        url = f"wss://robot:{keys.client('robot').token}@edgeml:{port}"
        sock = socket.create_connection(("127.0.0.1", port))
        with connect(url, proxy=None, sock=sock, ssl=trusts) as connection:
            connection.send(pack({"type": "observation", "payload": {}, "seq": 1}))
            assert unpack(connection.recv(PATIENCE))["payload"] == {"who": "robot"}
        with pytest.raises((http.client.HTTPException, OSError)):
            look(f"vla-eval://127.0.0.1:{port}")


@pytest.mark.parametrize("shown", [None, "Bearer", "Bearer x", "Basic !", "Basic eA==", "Digest x"])
def test_who_shows_no_token_is_told_why_and_closed(keys: Any, shown: str | None) -> None:
    headers = {} if shown is None else {"Authorization": shown}
    with serving(credentials=keys.server()) as server:
        # Of an answer to its hello that is no hello, the harness would show nothing but that.
        with Talk(server.doors()[0], additional_headers=headers) as talk:
            with pytest.raises(ConnectionClosed) as closed:
                talk.ask("hello")
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1008
            assert closed.value.rcvd.reason.startswith("PermissionDenied: ")
        with Talk(server.doors()[0], additional_headers=headers) as talk:
            kind, seq, told = talk.ask("observation", seq=5)
            assert (kind, seq) == ("error", 5)
            assert told["error"].startswith("observation_failed: PermissionDenied: ")
            with pytest.raises(ConnectionClosed):
                talk.receive()


def test_who_comes_where_too_many_are_may_try_again_later() -> None:
    with serving(limits=Limits(sessions=1)) as server, Talk(server.doors()[0]) as first:
        assert first.act({"x": 1}) == {"x": 1}
        with Talk(server.doors()[0]) as second:
            with pytest.raises(ConnectionClosed) as closed:
                second.ask("hello")
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1013
            assert closed.value.rcvd.reason.startswith("Overloaded: ")


def test_the_door_tells_what_it_speaks() -> None:
    assert load_door("vla-eval").report()["vla-eval's protocol"] == "1"
