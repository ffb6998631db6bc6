"""Clients of GR00T's policy server, written from its protocol's description."""

from __future__ import annotations

import io
import socket
import struct
from typing import Any

import msgspec
import numpy as np

from edgeml.core import Url
from edgeml.testing import DoorClient, Refused

_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\x00" + bytes(31)
_READY = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03REQ"


def pack(value: Any) -> bytes:
    """As GR00T's clients do: arrays as numpy.save writes them."""

    def encode(array: np.ndarray) -> dict[str, Any]:
        file = io.BytesIO()
        np.save(file, array, allow_pickle=False)
        return {"__ndarray_class__": True, "as_npy": file.getvalue()}

    return msgspec.msgpack.encode(value, enc_hook=encode)


def unpack(data: bytes) -> Any:
    def decode(value: Any) -> Any:
        if isinstance(value, list):
            return [decode(each) for each in value]
        if not isinstance(value, dict):
            return value
        if "__ndarray_class__" in value:
            return np.load(io.BytesIO(value["as_npy"]), allow_pickle=False)
        return {key: decode(each) for key, each in value.items()}

    return decode(msgspec.msgpack.decode(data))


def dial(url: Url) -> socket.socket:
    return socket.create_connection((url.host, url.port), 10.0)


class Wire:
    """A connection of ZeroMQ's that does as it likes, frame by frame."""

    def __init__(self, url: Url) -> None:
        self.socket = dial(url)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self.socket.makefile("rb")
        try:
            self.socket.sendall(_GREETING + _READY)
            assert self._read(64)[12:32] == _GREETING[12:32]
            assert b"ROUTER" in self._receive()[1]
        except BaseException:  # it may have been one too many
            self.close()
            raise

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise ConnectionError("the connection is over")
        return data

    def _receive(self) -> tuple[bool, bytes]:
        flags = self._read(1)[0]
        size = self._read(8 if flags & 2 else 1)
        return bool(flags & 1), self._read(int.from_bytes(size, "big"))

    def send(self, *frames: bytes) -> None:
        message = b""
        for number, frame in enumerate(frames):
            flags = 2 | (number < len(frames) - 1)
            message += bytes([flags]) + struct.pack(">Q", len(frame)) + frame
        self.socket.sendall(message)

    def receive(self, timeout: float = 10.0) -> list[bytes]:
        self.socket.settimeout(timeout)
        frames = []
        more = True
        while more:
            more, frame = self._receive()
            frames.append(frame)
        return frames

    def close(self) -> None:
        self._file.close()
        self.socket.close()


class Client(DoorClient):
    """A client of the newer form, as its description says."""

    def __init__(self, url: Url, token: str | None = None) -> None:
        self.token = {} if token is None else {"api_token": token}
        self.wire = Wire(url)

    def ask(self, endpoint: str | None, data: Any = None) -> Any:
        """What an endpoint answers, as an older client takes it."""
        request = {} if endpoint is None else {"endpoint": endpoint}
        if data is not None:
            request["data"] = data
        answer = unpack(self.exchange(pack({**request, **self.token})))
        if isinstance(answer, dict) and "error" in answer:
            raise Refused(answer["error"])
        return answer

    def encode(self, observation: dict[str, Any]) -> bytes:
        data = {"observation": observation, "options": None}
        return pack({"endpoint": "get_action", "data": data, **self.token})

    def exchange(self, message: bytes, timeout: float = 10.0) -> bytes:
        self.wire.send(b"", message)
        delimiter, answer = self.wire.receive(timeout)
        assert delimiter == b""
        return answer

    def decode(self, answer: bytes | str) -> Any:
        value = unpack(answer)
        if isinstance(value, dict):
            assert value.keys() == {"error"}
            raise Refused(value["error"])
        action, info = value
        assert info == {}
        return action

    def close(self) -> None:
        self.wire.close()

    def reset(self) -> None:
        assert self.ask("reset", {"options": None}) == {}
