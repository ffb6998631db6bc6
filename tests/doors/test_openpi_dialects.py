"""What openpi's door says and takes, message by message, in each of its two dialects."""

from __future__ import annotations

import http.client
import threading
import urllib.request
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import pytest
from edgeml_openpi.codec import read, write
from edgeml_openpi.config import configure

from edgeml import Context, Feature, InferenceServer, Limits, PolicyContract
from edgeml.core import Malformed, NotEncodable, Url
from pairs import wait_until
from raw_websocket import RawWebSocket

REALTIME = "/v1/realtime/robot/openpi"
ACTIONS = np.arange(6, dtype=np.float32).reshape(3, 2)

encode, decode = msgspec.msgpack.encode, msgspec.msgpack.decode


@contextmanager
def serving(function: Any, *, contract: Any = None, limits: Any = None, **door: Any) -> Any:
    """A server of a function behind the door; gives it and the door's port."""
    server = InferenceServer(url="inproc://127.0.0.1:0", limits=limits or Limits())
    server.register_interface("policy", function, contract=contract)
    server.open_door("openpi://127.0.0.1:0", **door)
    with server.serving():
        yield server, Url.parse(server.doors()[0]).port


def ask(client: RawWebSocket, value: Any) -> Any:
    """What an observation is answered with, not made into arrays."""
    client.send(value if isinstance(value, (bytes, str)) else encode(value))
    answer = client.receive()
    return answer if isinstance(answer, str) else decode(answer)


def array(given: np.ndarray[Any, Any]) -> dict[bytes, Any]:
    return {
        b"__ndarray__": True,
        b"data": given.tobytes(),
        b"dtype": given.dtype.str,
        b"shape": list(given.shape),
    }


# openpi's own -----------------------------------------------------------------------------


def test_the_server_speaks_first_and_says_its_metadata() -> None:
    told = {"robot": "droid", "action_horizon": 16, "reset_pose": [0.0, 1.5]}
    with serving(lambda _: {}, metadata=told) as (_, port), RawWebSocket(port) as client:
        assert decode(client.receive()) == told
    with serving(lambda _: {}) as (_, port), RawWebSocket(port) as client:
        assert client.receive() == encode({})


def test_metadata_may_have_arrays() -> None:
    told = {"mean": ACTIONS}
    with serving(lambda _: {}, metadata=told) as (_, port), RawWebSocket(port) as client:
        assert decode(client.receive()) == {"mean": array(ACTIONS)}


def test_observations_are_answered_strictly_in_order_and_one_at_a_time() -> None:
    at_once, most = 0, 0
    lock = threading.Lock()

    def function(observation: Any) -> Any:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        threading.Event().wait(0.02 if observation["number"] % 2 else 0.0)
        with lock:
            at_once -= 1
        return {"number": observation["number"]}

    server = InferenceServer(url="inproc://127.0.0.1:0", workers=4)
    server.register_interface("policy", function)
    server.open_door("openpi://127.0.0.1:0")
    with server.serving(), RawWebSocket(Url.parse(server.doors()[0]).port) as client:
        client.receive()
        for number in range(8):
            client.send(encode({"number": number}))
        assert [decode(client.receive())["number"] for _ in range(8)] == list(range(8))
    assert most == 1


def test_arrays_and_scalars_are_maps_with_keys_that_are_bytes() -> None:
    got: list[Any] = []

    def function(observation: Any) -> Any:
        got.append(observation)
        return {"actions": ACTIONS, "sure": np.float32(0.5), "step": np.int64(3), "text": "ok"}

    with serving(function) as (_, port), RawWebSocket(port) as client:
        client.receive()
        answer = ask(
            client,
            {
                "observation/state": array(np.arange(3.0)),
                "observation/gripper": {
                    b"__npgeneric__": True,
                    b"data": 0.25,
                    b"dtype": "<f4",
                },
                "prompt": "pick up the cup",
            },
        )
        del answer["server_timing"]
        assert answer == {
            "actions": array(ACTIONS),
            "sure": {b"__npgeneric__": True, b"data": 0.5, b"dtype": "<f4"},
            "step": {b"__npgeneric__": True, b"data": 3, b"dtype": "<i8"},
            "text": "ok",
        }
    (observation,) = got
    assert observation["observation/state"].tolist() == [0, 1, 2]
    assert not observation["observation/state"].flags.writeable
    assert observation["observation/gripper"] == np.float32(0.25)
    assert type(observation["observation/gripper"]) is np.float32
    assert observation["prompt"] == "pick up the cup"


def test_an_action_that_is_no_dict_is_called_actions() -> None:
    with serving(lambda _: ACTIONS) as (_, port), RawWebSocket(port) as client:
        client.receive()
        answer = ask(client, {})
        assert answer.pop("server_timing")
        assert answer == {"actions": array(ACTIONS)}


def test_answers_say_how_long_they_took_and_leave_the_result_as_it_is() -> None:
    result = {"actions": ACTIONS}

    def function(_: Any) -> Any:
        threading.Event().wait(0.05)
        return result

    with serving(function) as (_, port), RawWebSocket(port) as client:
        client.receive()
        first = ask(client, {})["server_timing"]
        assert first.keys() == {"infer_ms"}
        assert 50 <= first["infer_ms"] < 5000
        second = ask(client, {})["server_timing"]
        assert second.keys() == {"infer_ms", "prev_total_ms"}
        assert second["prev_total_ms"] > first["infer_ms"]
    assert result.keys() == {"actions"}


def test_an_error_is_a_text_with_the_tracebacks_last_lines_then_the_close() -> None:
    def deep(depth: int) -> Any:
        return deep(depth - 1) if depth else {}["the key that is missing"]

    def other(depth: int) -> Any:
        return deep(depth) if depth < 60 else other(depth - 1)

    with serving(lambda observation: other(observation["depth"])) as (_, port):
        with RawWebSocket(port) as client:
            client.receive()
            told = ask(client, {"depth": 3})
            assert isinstance(told, str)
            assert told.splitlines()[-1] == "KeyError: 'the key that is missing'"
            assert "in deep" in told  # where
            assert client.ending() == (1011, client.reason)
            assert client.reason
        with RawWebSocket(port) as client:
            client.receive()
            told = ask(client, {"depth": 59})
            assert len(told.splitlines()) <= 20
            assert told.endswith("KeyError: 'the key that is missing'")


@pytest.mark.parametrize(
    "wrong", ["a text", b"", b"\xc1", b"\x80\x80", encode({"x": {b"__ndarray__": True}})]
)
def test_what_is_no_observation_is_an_error_that_says_so(wrong: Any) -> None:
    with serving(lambda _: {}) as (server, port), RawWebSocket(port) as client:
        client.receive()
        told = ask(client, wrong)
        assert told.startswith("Malformed: ")
        assert client.ending()[0] == 1011
        assert server.stats()["Malformed"] == 1


def test_health_is_answered_by_http() -> None:
    with serving(lambda _: {}) as (_, port):
        url = f"http://127.0.0.1:{port}/healthz"
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert (answer.status, answer.read()) == (200, b"OK\n")
        with urllib.request.urlopen(f"{url}?from=probe", timeout=10) as answer:
            assert answer.status == 200
        other = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        other.request("GET", "/")
        assert other.getresponse().status == 426  # Upgrade Required
        other.close()


def test_nothing_is_ever_compressed() -> None:
    offer = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"
    with serving(lambda x: x) as (_, port), RawWebSocket(port, "/", offer) as client:
        assert b"extensions" not in client.head.lower()
        client.receive()
        assert ask(client, {"zeros": bytes(100_000)})["zeros"] == bytes(100_000)


def test_a_client_says_who_it_is_by_its_headers() -> None:
    name = "User-Agent: robot 7"
    with serving(lambda _: {}) as (server, port), RawWebSocket(port, "/", name) as client:
        client.receive()
        wait_until(server.clients)
        assert "robot 7" in str(server.clients())


# vLLM-Omni's ------------------------------------------------------------------------------


@contextmanager
def talking(function: Any, **settings: Any) -> Any:
    """A server, and a client of the second dialect that has read its configuration."""
    with serving(function, **settings) as (_, port), RawWebSocket(port, REALTIME) as client:
        yield client, decode(client.receive())


def test_the_first_message_is_the_policys_configuration() -> None:
    with talking(lambda _: {}) as (_, told):
        assert told == {
            "image_resolution": None,
            "n_external_cameras": 0,
            "needs_wrist_camera": False,
            "needs_session_id": False,
            "action_space": "joint_position",
        }


CONTRACT = PolicyContract(
    observation={
        "observation": {
            "exterior_image_0_left": Feature((180, 320, 3), "uint8", kind="image"),
            "exterior_image_1_left": Feature((180, 320, 3), "uint8"),
            "wrist_image_left": Feature((180, 320, 3), "uint8", kind="image"),
            "joint_position": Feature((7,), "float32"),
        },
        "prompt": Feature((), "str"),
    },
    action={"joints": Feature((16, 7), "float32"), "gripper": Feature((16, 1), "float32")},
    horizon=16,
)


def test_the_configuration_is_what_the_contract_says() -> None:
    assert configure(CONTRACT.to_plain(), {}) == {
        "image_resolution": [180, 320],
        "n_external_cameras": 2,
        "needs_wrist_camera": True,
        "needs_session_id": False,
        "action_space": "joint_position",
        "action_horizon": 16,
        "action_dim": 8,
        "action_keys": ["joints", "gripper"],
    }
    bare = PolicyContract(action=Feature((None, 7), "float32"))
    told = configure(bare.to_plain(), {})
    assert told["action_dim"] == 7
    assert "action_keys" not in told
    assert "action_horizon" not in told
    of_any_size = {"image": Feature((None, None, 3), "uint8", kind="image")}
    told = configure(PolicyContract(observation=of_any_size).to_plain(), {})
    assert told["image_resolution"] is None
    assert told["n_external_cameras"] == 1


def test_whoever_opens_the_door_can_say_it_otherwise() -> None:
    said = {"action_space": "joint_velocity", "embodiment_tag": "droid", "needs_session_id": True}
    with talking(lambda _: {}, metadata={**said, "image_resolution": None}) as (_, told):
        assert told == {**said, "n_external_cameras": 0, "needs_wrist_camera": False}


def test_a_request_names_its_endpoint_or_means_infer() -> None:
    got: list[Any] = []

    def function(observation: Any) -> Any:
        got.append(observation)
        return ACTIONS

    with talking(function) as (client, _):
        for request in (
            {"endpoint": "infer", "session_id": "a", "seed": 7, "x": 1},
            {"x": 1, "seed": 7},
        ):
            assert ask(client, request) == array(ACTIONS)  # bare
        assert got == [{"x": 1, "seed": 7}] * 2
        told = ask(client, {"endpoint": "kill"})
        assert told["type"] == "error"
        assert "infer and reset" in told["message"]
        assert len(got) == 2


def test_an_answer_is_an_array_or_a_dict_of_them_and_no_more() -> None:
    with talking(lambda _: {"joints": ACTIONS, "gripper": ACTIONS[:, :1]}) as (client, _):
        assert ask(client, {}) == {"joints": array(ACTIONS), "gripper": array(ACTIONS[:, :1])}


def test_sessions_begin_and_end_as_their_names_do() -> None:
    ended: list[int] = []

    def function(_: Any, context: Context) -> Any:
        count = context.session["count"] = context.session.get("count", 0) + 1
        if count == 1:
            context.on_end(lambda: ended.append(context.session["count"]))
        return {"count": count}

    with talking(function) as (client, _):

        def count(**request: Any) -> int:
            return int(ask(client, request)["count"])

        assert [count() for _ in range(2)] == [1, 2]
        assert count(session_id="default") == 3  # what it is called that has no name
        assert count(session_id="a") == 1
        assert count() == 2  # a session goes on until another is named
        assert count(session_id="a") == 3
        assert count(session_id="b") == 1
        wait_until(lambda: ended == [3, 3])
        assert ask(client, {"endpoint": "reset"}) == {"status": "reset successful"}
        assert count(session_id="b") == 1
        assert count() == 2
        wait_until(lambda: ended == [3, 3, 1])


def test_errors_are_messages_and_the_connection_goes_on() -> None:
    def function(observation: Any) -> Any:
        if observation.get("bad"):
            raise ValueError("on purpose")
        return {"actions": ACTIONS}

    with talking(function) as (client, _):
        for _ in range(3):
            assert ask(client, {"bad": True}) == {
                "type": "error",
                "message": "ValueError: on purpose",
            }
            for wrong in ("a text", b"", b"\xc1", encode([1]), encode({1: 2})):
                told = ask(client, wrong)
                assert told["type"] == "error"
                assert told["message"].startswith("Malformed: ")
        assert ask(client, {}) == {"actions": array(ACTIONS)}


def test_what_is_no_request_is_counted() -> None:
    with serving(lambda x: x) as (server, port), RawWebSocket(port, REALTIME) as client:
        client.receive()
        for number, wrong in enumerate((b"", b"\xc1", "text", encode({"endpoint": "kill"}))):
            assert ask(client, wrong)["type"] == "error"
            assert server.stats()["Malformed"] == number + 1
        bad = {b"__ndarray__": True, b"data": b"", b"dtype": "|O", b"shape": [1]}
        assert ask(client, {"x": bad})["type"] == "error"
        assert server.stats()["Malformed"] == 5


def test_names_of_sessions_and_endpoints_are_short_texts(caplog: pytest.LogCaptureFixture) -> None:
    with talking(lambda _: {}) as (client, _):
        for wrong in (array(ACTIONS), [1] * 1000, {"a": 1}, b"bytes", 0.5, "long " * 1000, True):
            for name in ("session_id", "endpoint"):
                told = ask(client, {name: wrong})
                assert told["type"] == "error"
                assert told["message"].startswith(f"Malformed: {name} ")
        told = ask(client, {"endpoint": "infer", **array(ACTIONS)})
        assert told["message"].startswith("Malformed: an observation is a map")
        assert ask(client, {"session_id": 7, "endpoint": None}) == {}
        assert ask(client, {"session_id": None}) == {}
        told = ask(client, {"session_id": bytes(3_000_000)})
        assert told["message"].startswith("Malformed: session_id is longer than ")
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("keys", ["bytes", "str"])
@pytest.mark.parametrize("kind", ["f", ""])
def test_arrays_are_read_in_the_other_spelling_too(keys: str, kind: str) -> None:
    def spelt(**fields: Any) -> dict[Any, Any]:
        return {key.encode() if keys == "bytes" else key: value for key, value in fields.items()}

    given = spelt(nd=True, type="<f4", kind=kind, shape=[3, 2], data=ACTIONS.tobytes())
    scalar = spelt(nd=False, type=b"<f4", kind=kind.encode(), data=ACTIONS[2, 1].tobytes())
    usual = spelt(__ndarray__=True, dtype="<f4", shape=[3, 2], data=ACTIONS.tobytes())
    own = {"nd": 3, "kind": "a user's", "data": None}
    value = read(encode({"nd": given, "scalar": scalar, "usual": usual, "own": own}))
    assert np.array_equal(value["nd"], ACTIONS)
    assert value["nd"].dtype == np.float32
    assert np.array_equal(value["usual"], ACTIONS)
    assert value["scalar"] == np.float32(5)
    assert type(value["scalar"]) is np.float32
    assert value["own"] == own


def test_large_arrays_are_views_and_a_users_own_maps_are_its_own() -> None:
    large = np.arange(10_000.0)
    own = {b"data": bytes(20_000), "nd": [1, {"x": bytes(20_000)}], "data": "text"}
    message = write({"a": {"large": large, "small": large[:10]}, "own": own, "list": [large]})
    value = read(message)
    assert np.array_equal(value["a"]["large"], large)
    assert np.array_equal(value["a"]["small"], large[:10])
    assert np.array_equal(value["list"][0], large)
    assert value["own"] == own
    received = np.frombuffer(message, np.uint8)
    assert np.shares_memory(value["a"]["large"], received)
    assert not np.shares_memory(value["a"]["small"], received)
    assert not value["a"]["large"].flags.writeable
    assert type(read(write({"all": own}))["all"][b"data"]) is bytes


# Both -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["|O", "<c8", "<c16", "|V8", "M8[s]"])
def test_arrays_that_are_not_carried_are_refused_either_way(dtype: str) -> None:
    made = np.empty(2, dtype)
    for value in (made, made[0]):
        if isinstance(value, (np.ndarray, np.generic)):
            with pytest.raises(NotEncodable, match=r"dtype|take"):
                write({"x": value})
    with pytest.raises(Malformed):
        read(encode({"x": {b"__ndarray__": True, b"data": b"", b"dtype": dtype, b"shape": [0]}}))
    with pytest.raises(Malformed):
        read(encode({"x": {b"__npgeneric__": True, b"data": 1, b"dtype": dtype}}))


@pytest.mark.parametrize(
    "value",
    [
        np.array(["a", "bc"]),
        np.array([b"a", b"bc"]),
        np.array([True, False]),
        np.array([], np.float16),
        np.array(7, np.uint8),
        np.float64(0.1),
        np.uint64(2**64 - 1),
        np.bool_(True),
        [None, True, -1, 2**64 - 1, 0.5, "text", b"bytes", [], {}],
        {"a": {b"b": [1]}},
    ],
)
def test_what_is_carried_comes_back_as_it_was(value: Any) -> None:
    back = read(write({"x": value}))["x"]
    np.testing.assert_equal(back, value)
    assert type(back) is type(value)
    if isinstance(value, np.ndarray):
        assert back.dtype == value.dtype


@pytest.mark.parametrize(
    "value",
    [
        {1: 2},  # keys that their readers refuse
        {None: 1},
        2**64,
        object(),
        {"deep": [{"set": print}]},
        np.ma.masked_array([1, 2], [True, False]),
    ],
)
def test_what_is_not_carried_is_said(value: Any) -> None:
    with pytest.raises(NotEncodable, match="openpi's clients take"):
        write({"x": value})


def test_a_nest_that_closes_on_itself_is_not_carried() -> None:
    nest: list[Any] = []
    nest.append(nest)
    with pytest.raises(NotEncodable):
        write({"x": nest})
