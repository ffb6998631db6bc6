"""Real messages, from the vectors of docs/wire.md, as what each target takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeml.core import Message, wire

VECTORS = Path(__file__).parents[1] / "tests" / "wire" / "vectors"

SESSION = bytes(range(16))
"""The session in the vectors, in whose place a target puts one that its server knows."""

CUT = b"\xfe\xed\xfa\xce"
"""Stands between the pieces of what is several, such as the frames of one zmq message."""


def _raw(shown: Any) -> bytes:
    if isinstance(shown, dict):
        return bytes.fromhex(shown["repeat"]) * shown["times"]
    return bytes.fromhex(shown)


def _vectors(stem: str) -> dict[str, list[dict[str, Any]]]:
    vectors: dict[str, Any] = json.loads((VECTORS / f"{stem}.json").read_text())
    return {key: found for key, found in vectors.items() if isinstance(found, list)}


def payloads() -> Iterator[Message]:
    """What codecs made, or somebody who meant no good."""
    for stem in ("codec", "images"):
        for vectors in _vectors(stem).values():
            for each in vectors:
                buffers = [memoryview(_raw(buffer)) for buffer in each["buffers"]]
                yield Message(_raw(each["header"]), buffers)


def envelopes() -> Iterator[bytes]:
    """Requests, replies and their bodies."""
    for vectors in _vectors("envelope").values():
        for each in vectors:
            yield _raw(each["hex"])


def requests() -> Iterator[Message]:
    """Every request of the vectors, and a call with every payload."""
    for vectors in _vectors("envelope").values():
        for each in vectors:
            if each["type"] == "request":
                yield Message(_raw(each["hex"]))
    yield from hostile_requests()
    for payload in payloads():
        for name in ("echo", "update", "act", ""):
            request = wire.Request(wire.CALL, SESSION, name, 2.5, payload.header)
            yield Message(wire.pack(request), payload.buffers)


# Made to do harm, each in a way of its own ------------------------------------------------


def _claim(tag: int, claimed: int, item: bytes, n: int) -> bytes:
    return bytes([tag]) + claimed.to_bytes(4, "big") + item * n


def hostile_payloads() -> Iterator[Message]:
    """What a codec is sent to make it slow or large."""
    most = (1 << 32) - 1
    for header in (
        _claim(0xDD, 100_000, b"\x80", 100_000),  # empty maps
        _claim(0xDD, 30_000, b"\xd5\x06\x90\x90", 30_000),  # what is no set
        _claim(0xDD, 30_000, b"\xd4\x06\x90", 30_000),  # empty sets
        _claim(0xDD, most, b"\x01", 100),
        _claim(0xDF, most, b"\xa1a\x01", 100),
        b"\xdd\xff\xff\xff\xff" * 40,
        b"\x91" * 100_000,
        b"\x81\xa0" * 100_000,
        b"\xc7\x03\x05\x91\xc7" * 1000,
        _claim(0xDB, most, b"x", 10),
        _claim(0xC6, most, b"x", 10),
        _claim(0xC9, most, b"\x05\x90", 10),
        _claim(0xDF, 5000, b"\xcf\x1f\xff\xff\xff\xff\xff\xff\xff\x01", 5000),  # one key
        _claim(0xDF, 5000, b"\x92\x01\x02\x01", 5000),  # keys that are lists
    ):
        yield Message(header)
    yield Message(b"\x90", [memoryview(b"")] * (1 << 14))
    entry = b"\x93\x91\xa1a\xa3png\x93\xcd\x40\x00\xcd\x40\x00\x03"
    yield Message(b"\xc1\x92\xc4\x04\x81\xa1a\xc0" + _claim(0xDD, 5000, entry, 5000))
    yield Message(b"\xc1\x92\xc4\x04\x81\xa1a\xc0" + _claim(0xDD, most, entry, 2))


def hostile_requests() -> Iterator[Message]:
    """What a server is sent to make it slow or large, or to confuse it."""
    pack = wire.pack
    for payload in hostile_payloads():
        yield Message(
            pack(wire.Request(wire.CALL, SESSION, "echo", 2.5, payload.header)), payload.buffers
        )
        yield Message(pack(wire.Request(wire.HELLO, b"", "", 2.5, payload.header)))
        hello = pack({"protocol": 1, "service": "inference", "client_id": "", "label": ""})
        body = b"\x86" + hello[1:] + pack("codec") + pack("msgpack") + pack("config")
        yield Message(pack(wire.Request(wire.HELLO, b"", "", 2.5, body + payload.header)))
    for timeout in (float("nan"), float("inf"), -1.0, 1e308, 0.0):
        yield Message(pack(wire.Request(wire.CALL, SESSION, "echo", timeout, b"\x01")))
        yield Message(pack(wire.Request(wire.NEXT, SESSION, "", timeout, pack([0, 0, 0]))))
    for credit in (
        [1 << 63, 1 << 63, 1 << 63],
        [-1, -1, -1],
        [0, 1 << 64 - 1, 0],
        [1.5, None, "x"],
    ):
        yield Message(pack(wire.Request(wire.NEXT, SESSION, "", 2.5, pack(credit))))
    for kind in (5, 127, -1, (1 << 64) - 1):
        yield Message(pack([kind, SESSION, "echo", 2.5, b"\x01"]))
    yield Message(pack([wire.CALL, SESSION * 1000, "echo" * 1000, 2.5, b"\x01"]))
    yield Message(b"\xdd\x00\x01\x86\xa5" + pack(wire.CALL) + b"\x90" * 100_000)
    yield Message(b"\x96\x01\xc4\x00\xa0\x01\xc4\x00" + b"\x91" * 100_000)
