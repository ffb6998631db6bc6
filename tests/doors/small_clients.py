"""Small clients of the protocols that doors speak, written after their descriptions.

They know no edgeml, and are as trusting as the originals.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import msgspec
import numpy as np
import zmq
from websockets.sync.client import connect

PATIENCE = 20.0  # seconds


class RemoteFailure(Exception):
    """What the server says that went wrong."""


def _pack(value: Any, mark: Callable[[Any], Any]) -> bytes:
    return msgspec.msgpack.encode(value, enc_hook=mark)


def _unpack(data: bytes | str, restore: Callable[[dict[Any, Any]], Any]) -> Any:
    assert isinstance(data, bytes), data

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            return restore({key: walk(part) for key, part in node.items()})
        return [walk(part) for part in node] if isinstance(node, list) else node

    return walk(msgspec.msgpack.decode(data))


class _WebSocket:
    def __init__(self, url: str, headers: dict[str, str] | None = None) -> None:
        address = f"ws://{url.partition('://')[2]}"
        with ExitStack() as stack:
            made = connect(address, compression=None, max_size=None, additional_headers=headers)
            self._socket = stack.enter_context(made)
            self.begin()
            self.close = stack.pop_all().close

    def begin(self) -> None:
        """Hear or say what comes first."""


# openpi -------------------------------------------------------------------------------------


def _mark_openpi(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"{type(value)}")


def _restore_openpi(node: dict[Any, Any]) -> Any:
    if b"__ndarray__" in node:
        return np.ndarray(node[b"shape"], np.dtype(node[b"dtype"]), node[b"data"])
    if b"__npgeneric__" in node:
        return np.dtype(node[b"dtype"]).type(node[b"data"])
    return node


class OpenpiClient(_WebSocket):
    """openpi's own dialect: ``metadata`` comes first, and then one result for each observation."""

    path = ""

    def __init__(self, url: str, key: str | None = None) -> None:
        super().__init__(url + self.path, {"Authorization": f"Api-Key {key}"} if key else None)

    def begin(self) -> None:
        self.metadata = _unpack(self._socket.recv(PATIENCE), _restore_openpi)

    def call(self, observation: Any) -> Any:
        result = self._ask(observation)
        result.pop("server_timing")
        return result

    def _ask(self, request: Any) -> Any:
        self._socket.send(_pack(request, _mark_openpi))
        reply = self._socket.recv(PATIENCE)
        if isinstance(reply, str):
            raise RemoteFailure(reply)
        return _unpack(reply, _restore_openpi)


class RealtimeClient(OpenpiClient):
    """The second dialect: sessions, and errors that do not close."""

    path = "/v1/realtime/robot/openpi"

    def call(self, observation: Any, session: str | None = None) -> Any:
        return self._send({"endpoint": "infer", **observation}, session)

    def reset(self, session: str | None = None) -> Any:
        return self._send({"endpoint": "reset"}, session)

    def _send(self, request: dict[str, Any], session: str | None) -> Any:
        reply = self._ask(request if session is None else {**request, "session_id": session})
        if isinstance(reply, dict) and reply.get("type") == "error":
            raise RemoteFailure(reply["message"])
        return reply


class OtherArraysClient(RealtimeClient):
    """It writes arrays as msgpack-numpy does."""

    def _ask(self, request: Any) -> Any:
        def mark(value: Any) -> Any:
            return {
                b"nd": True,
                b"type": value.dtype.str,
                b"kind": b"",
                b"shape": value.shape,
                b"data": value.tobytes(),
            }

        self._socket.send(_pack(request, mark))
        return _unpack(self._socket.recv(PATIENCE), _restore_openpi)


# GR00T --------------------------------------------------------------------------------------


def _mark_groot(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        file = io.BytesIO()
        np.save(file, value, allow_pickle=False)
        return {"__ndarray_class__": True, "as_npy": file.getvalue()}
    raise TypeError(f"{type(value)}")


def _restore_groot(node: dict[Any, Any]) -> Any:
    if "__ndarray_class__" in node:
        return np.load(io.BytesIO(node["as_npy"]), allow_pickle=False)
    return node


class OlderGrootClient:
    """GR00T N1's: the data is the observation, and a dict of actions comes back."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self._key = key
        self._socket: Any = zmq.Context.instance().socket(zmq.REQ)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, int(PATIENCE * 1000))
        self._socket.connect(f"tcp://{url.partition('://')[2]}")

    def ask(self, endpoint: str | None, data: Any = None) -> Any:
        request = {} if endpoint is None else {"endpoint": endpoint}
        if data is not None:
            request["data"] = data
        if self._key is not None:
            request["api_token"] = self._key
        self._socket.send(_pack(request, _mark_groot))
        reply = _unpack(self._socket.recv(), _restore_groot)
        if isinstance(reply, dict) and "error" in reply:
            raise RemoteFailure(reply["error"])
        return reply

    def call(self, observation: Any) -> Any:
        return self.ask("get_action", observation)

    def close(self) -> None:
        self._socket.close()


class GrootClient(OlderGrootClient):
    """GR00T N1.6's: options beside the observation, and an info beside the action."""

    def call(self, observation: Any, options: Any = None) -> Any:
        action, self.info = self.ask("get_action", {"observation": observation, "options": options})
        return action

    def reset(self, options: Any = None) -> Any:
        return self.ask("reset", {"options": options})


# vla-eval -----------------------------------------------------------------------------------


def _mark_vla(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {
            "__ndarray__": True,
            "data": value.tobytes(),
            "dtype": value.dtype.str,
            "shape": list(value.shape),
        }
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value)}")


def _restore_vla(node: dict[Any, Any]) -> Any:
    if "__ndarray__" in node or (node.get("__image__") and node["format"] == "raw"):
        array = np.frombuffer(node["data"], np.dtype(node["dtype"]))
        return array.reshape(node["shape"])
    return node


class VlaClient(_WebSocket):
    """vla-eval's: it says hello, and numbers all that it sends."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self._number = 0
        super().__init__(url, {"Authorization": f"Bearer {key}"} if key else None)

    def begin(self) -> None:
        self._send("hello", {"harness_version": "0.8.0", "protocol_version": 1})
        self.server = self._receive("hello")

    def start(self, task: str) -> None:
        self._send("episode_start", {"task": {"name": task}})

    def end(self) -> None:
        self._send("episode_end", {"metrics": {"success": True}})

    def call(self, observation: Any) -> Any:
        self._send("observation", observation)
        return self._receive("action")

    def _send(self, kind: str, payload: Any) -> None:
        self._number += 1
        message = {
            "type": kind,
            "payload": payload,
            "seq": self._number,
            "timestamp": time.time(),
        }
        self._socket.send(_pack(message, _mark_vla))

    def _receive(self, kind: str) -> Any:
        reply = _unpack(self._socket.recv(PATIENCE), _restore_vla)
        assert reply["seq"] == self._number, reply
        if reply["type"] == "error":
            raise RemoteFailure(reply["payload"])
        assert reply["type"] == kind, reply
        return reply["payload"]
