"""openpi's door: what all doors promise, and what its two dialects say, message by message."""

from __future__ import annotations

import struct
import threading
import time
import urllib.error
import urllib.request
from typing import Any

import msgspec
import numpy as np
import pytest

import raw_websocket
from edgeml.core import Url
from edgeml.testing import DoorClient, DoorTests, Refused
from pairs import long_form, some_of
from raw_websocket import RawWebSocket

REALTIME = "/v1/realtime/robot/openpi"


def pack(value: Any) -> bytes:
    """As openpi's client packs."""

    def spell(each: Any) -> Any:
        if isinstance(each, np.ndarray):
            return {
                b"__ndarray__": True,
                b"data": each.tobytes(),
                b"dtype": each.dtype.str,
                b"shape": each.shape,
            }
        return {b"__npgeneric__": True, b"data": each.item(), b"dtype": each.dtype.str}

    return msgspec.msgpack.encode(value, enc_hook=spell)


def unpack(data: bytes) -> Any:
    """As openpi's client unpacks."""

    def made(value: Any) -> Any:
        if isinstance(value, list):
            return [made(each) for each in value]
        if not isinstance(value, dict):
            return value
        if b"__ndarray__" in value:
            dtype = np.dtype(value[b"dtype"])
            return np.ndarray(buffer=value[b"data"], dtype=dtype, shape=value[b"shape"])
        if b"__npgeneric__" in value:
            return np.dtype(value[b"dtype"]).type(value[b"data"])
        return {key: made(each) for key, each in value.items()}

    return made(msgspec.msgpack.decode(data))


class OpenpiClient(DoorClient):
    """Written from the description of openpi's dialect."""

    path = "/"

    def __init__(self, url: Url, token: str | None = None) -> None:
        more = [] if token is None else [f"Authorization: Api-Key {token}"]
        try:
            self.socket = RawWebSocket(url.port, self.path, *more, host=url.host)
        except raw_websocket.Refused as refused:
            raise Refused(str(refused)) from None
        try:
            self.metadata = unpack(self.socket.receive())
        except BaseException:
            self.socket.close()
            raise

    def encode(self, observation: dict[str, Any]) -> bytes:
        return pack(observation)

    def exchange(self, message: bytes, timeout: float = 10.0) -> bytes | str:
        self.socket.send(message)
        return self.socket.receive(timeout)

    def decode(self, answer: bytes | str) -> Any:
        if isinstance(answer, str):
            raise Refused(answer)
        action = unpack(answer)
        assert action.pop("server_timing")["infer_ms"] >= 0
        return action

    def close(self) -> None:
        self.socket.close()


class RealtimeClient(OpenpiClient):
    """Written from the description of the second dialect."""

    path = REALTIME

    def encode(self, observation: dict[str, Any]) -> bytes:
        return pack({"endpoint": "infer", **observation})

    def decode(self, answer: bytes | str) -> Any:
        action = unpack(answer)
        if isinstance(action, dict) and action.get("type") == "error":
            raise Refused(action["message"])
        return action

    def reset(self) -> None:
        assert self.decode(self.exchange(pack({"endpoint": "reset"}))) == {
            "status": "reset successful"
        }


class Hostile(DoorTests):
    url = "openpi://127.0.0.1:0"
    keeps_scalars = True

    def hostile(self, client: DoorClient) -> dict[str, bytes]:
        def array(data: Any, dtype: Any, shape: Any) -> bytes:
            return msgspec.msgpack.encode(
                {"x": {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}}
            )

        def scalar(data: Any, dtype: Any) -> bytes:
            return msgspec.msgpack.encode(
                {"x": {b"__npgeneric__": True, b"data": data, b"dtype": dtype}}
            )

        def nd(**more: Any) -> bytes:
            fields = {b"nd": True, b"type": "<f4", b"kind": "f", b"shape": [1], b"data": bytes(4)}
            fields.update({key.encode(): value for key, value in more.items()})
            return msgspec.msgpack.encode({"x": fields})

        return {
            "objects": array(bytes(8), "|O", [1]),
            "structs": array(bytes(8), "|V8", [1]),
            "complex": array(bytes(8), "<c8", [1]),
            "a list of fields": array(bytes(8), [["a", "<f4"]], [1]),
            "no dtype": array(bytes(8), "<q99", [1]),
            "too few bytes": array(bytes(7), "<f8", [1]),
            "too many bytes": array(bytes(9), "<f8", [1]),
            "a shape that wraps": array(b"", "<f8", [1 << 32, 1 << 32]),
            "a negative shape": array(bytes(8), "<f8", [-1]),
            "texts of no size": array(b"", "<U0", [1 << 33]),
            "data that are a text": array("text", "<f8", [1]),
            "no data": msgspec.msgpack.encode({"x": {b"__ndarray__": True}}),
            "a scalar that is an object": scalar(1, "|O"),
            "a scalar out of range": scalar(300, "|u1"),
            "a scalar that is a list": scalar([1] * 100, "<f4"),
            "a scalar that is a text": scalar("1", "<f4"),
            "a kind that isn't its dtype's": nd(kind="i"),
            "a struct by kind": nd(kind="V"),
            "objects by nd": nd(type="|O", kind="O"),
            "a scalar of two": nd(nd=False, data=bytes(8)),
            "nested deep": b"\x91" * 100_000,
            "maps in maps": b"\x81\xa1a" * 100_000,
            "many values": b"\x81\xa1x\xdd" + struct.pack("!I", 1 << 20) + bytes(1 << 20),
            "a size that lies": b"\x81\xa1x\xc6\xff\xff\xff\xff",
            "a map of a billion": b"\xdf\x40\0\0\0",
            "keys that are maps": b"\x81\x80\1",
            "keys that are ints": b"\x81\1\1",
            "an ext": b"\x81\xa1x\xd4\1\0",
            "two values": b"\x80\x80",
            "no value": b"\xc1",
            "nothing": b"",
            "bad UTF-8": b"\x81\xa1x\xa1\xff",
        }

    def test_a_server_that_loads_says_so(self, lab: Any) -> None:
        """To health checks; a client waits for the first message, as openpi's own does."""
        go_on = threading.Event()
        server = lab.serve(load=lambda report: go_on.wait(10))
        port = lab.door_of(server).port
        try:
            with pytest.raises(urllib.error.HTTPError) as told:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10)
            with told.value as answer:
                assert answer.code == 503
                assert b"loading" in answer.read()
            waiting = lab.start(lab.visit, server)
            time.sleep(0.2)
            assert not waiting.done()
        finally:
            go_on.set()
        assert waiting.result(10).call({"x": 1}) == {"x": 1}


class TestOpenpi(Hostile):
    client = OpenpiClient
    errors_close = True


class Realtime(Hostile):
    client = RealtimeClient


# How a dialect is spoken; what becomes of connections is the same.
TestRealtime = some_of(
    Realtime,
    *(
        "test_arrays_",
        "test_values_",
        "test_scalars_",
        "test_names_",
        "test_what_",
        "test_a_result_",
    ),
    *(
        "test_hostile_",
        "test_mutated_",
        "test_a_function_that_h",
        "test_a_server_that_",
        "test_a_reset_",
    ),
    *("test_each_", "test_closing_", "test_native_", "test_memory_"),
    mutations=200,
)
TestLongRealtime = long_form(Realtime, "test_", mutations=10_000, garbage=1000)
TestLongOpenpi = long_form(
    TestOpenpi, "test_mutated_", "test_garbage_", mutations=10_000, garbage=10_000
)
