"""gRPC's health service, ``grpc.health.v1.Health``: what load balancers and Kubernetes ask.

Its messages are two small ones of protobuf, so they are written and read here by hand. Answered
for the whole server, "", and for the service by its name; both are alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from enum import IntEnum
from typing import Any

import grpc

from edgeml.core import Malformed
from edgeml.transports.grpc.protocol import SERVICE

__all__ = ["Health"]

_HEALTH = "grpc.health.v1.Health"
_NAMES = ("", SERVICE)
# The kinds of field that protobuf knows: how the size of one is told.
_VARINT, _EIGHT_BYTES, _SIZED, _FOUR_BYTES = 0, 1, 2, 5

_Context = Any  # aio.ServicerContext; grpcio is published without types


class _Status(IntEnum):
    SERVING = 1
    NOT_SERVING = 2
    SERVICE_UNKNOWN = 3


class Health:
    """Tells that the server serves, until `end`. All of it runs in the server's loop.

    Args:
        receive: gives the one message of a request.
    """

    def __init__(self, receive: Callable[[_Context], Awaitable[bytes]]) -> None:
        self._receive = receive
        self._ended = asyncio.Event()

    def handler(self) -> Any:
        """Return what a server of `grpc.aio` is given."""
        return grpc.method_handlers_generic_handler(
            _HEALTH,
            {
                "Check": grpc.stream_unary_rpc_method_handler(self._check),
                "List": grpc.stream_unary_rpc_method_handler(self._list),
                "Watch": grpc.stream_stream_rpc_method_handler(self._watch),
            },
        )

    def end(self) -> None:
        """Tell everybody that the server serves no more."""
        self._ended.set()

    def _status(self, name: str) -> _Status:
        if name not in _NAMES:
            return _Status.SERVICE_UNKNOWN
        return _Status.NOT_SERVING if self._ended.is_set() else _Status.SERVING

    async def _check(self, _: AsyncIterator[bytes], context: _Context) -> bytes:
        name = await self._read_name(context)
        status = self._status(name)
        if status is _Status.SERVICE_UNKNOWN:
            known = ", ".join(map(repr, _NAMES))
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"no service {name!r} is here; known: {known}"
            )
        return _encode(status)

    async def _list(self, _: AsyncIterator[bytes], context: _Context) -> bytes:
        await self._receive(context)
        # A map from names to what `_check` answers.
        entries = [
            _field(1, name.encode()) + _field(2, _encode(self._status(name))) for name in _NAMES
        ]
        return b"".join(_field(1, entry) for entry in entries)

    async def _watch(self, _: AsyncIterator[bytes], context: _Context) -> None:
        name = await self._read_name(context)
        await context.write(_encode(self._status(name)))
        await self._ended.wait()
        if name in _NAMES:
            await context.write(_encode(self._status(name)))

    async def _read_name(self, context: _Context) -> str:
        try:
            return _decode_name(await self._receive(context))
        except (Malformed, UnicodeDecodeError) as error:
            why = f"no request about health: {error}"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, why)
            raise  # which abort has done


def _decode_name(data: bytes) -> str:
    """Return the field 1 of a message, a string; "" if it isn't there. Others are skipped."""
    name = b""
    at = 0
    while at < len(data):
        key, at = _decode_varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            _, at = _decode_varint(data, at)
            continue
        if kind == _SIZED:
            size, at = _decode_varint(data, at)
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            size = 8 if kind == _EIGHT_BYTES else 4
        else:
            raise Malformed(f"a field of kind {kind}")
        if at + size > len(data):
            raise Malformed("a field that is longer than the message")
        if key == 1 << 3 | _SIZED:
            name = data[at : at + size]
        at += size
    return name.decode()


def _decode_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number that begins there, 7 bits a byte, the lowest first, and where it ends."""
    value = 0
    for index, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise Malformed("a number without an end")


def _encode(status: _Status) -> bytes:
    return bytes([1 << 3 | _VARINT, status])


def _field(number: int, content: bytes) -> bytes:
    """Return a sized field of less than 128 bytes."""
    return bytes([number << 3 | _SIZED, len(content)]) + content
