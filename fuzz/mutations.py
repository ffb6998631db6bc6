"""What chance makes of real messages."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import msgspec

from edgeml.core import Malformed, Message, wire

_LARGE = 8192  # bytes


def change(original: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Bytes, changed in one to eight places."""
    data = bytearray(original)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del data[at : at + rng.choice((1, 1, 2, 4, 8, 16))]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8)))
        elif kind == 4:
            other = rng.choice(others)
            begin = rng.randrange(len(other) + 1)
            data[at:at] = other[begin : begin + rng.choice((2, 8, 32, 128))]
        elif kind == 5:
            begin = rng.randrange(len(data) + 1)
            data[at:at] = data[begin : begin + rng.choice((2, 8, 32, 128))]
        else:
            data = data[:at]
    return bytes(data)


def make(target: Any, messages: list[Any], headers: list[bytes], rng: random.Random) -> bytes:
    """One of the messages, changed: its bytes, its header, or what an envelope holds.

    Seldom one that is large, and slow.
    """
    while len((message := rng.choice(messages)).header) > _LARGE and rng.random() > 0.005:
        pass
    how = rng.randrange(4)
    if how == 0:
        return change(target.wrap(message), headers, rng)
    header = message.header
    if how > 1:
        with suppress(Malformed):
            request = wire.unpack(wire.Request, header)
            body = change(request.body, headers, rng)
            header = wire.pack(msgspec.structs.replace(request, body=body))
            return target.wrap(Message(header, message.buffers))
    return target.wrap(Message(change(header, headers, rng), message.buffers))
