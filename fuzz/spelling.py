"""The one spelling of a message of the msgpack codec, made without the codec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from edgeml.core import Message

_ARRAY, _SMALL, _BYTES, _TUPLE, _SET, _FROZENSET = 1, 2, 4, 5, 6, 7
_INLINE = 8192

_pack = msgspec.msgpack.encode


def respell(message: Message) -> Message:
    """A message that means the same, in all that docs/wire.md leaves to a writer as edgeml does it.

    That is the widths of ints, floats and lengths, repeated keys, the order of members, and which
    bytes are buffers. All else stays as it is.
    """
    speller = _Speller(message.buffers)
    header = _pack(speller.value(msgspec.msgpack.decode(message.header)))
    return Message(header, speller.made)


class _Speller:
    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._buffers = buffers
        self._in_set = 0
        self.made: list[memoryview] = []

    def value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.value(each) for each in value]
        if isinstance(value, dict):
            return {key: self.value(each) for key, each in value.items()}
        if isinstance(value, bytes):
            return self._bytes(memoryview(value))
        if isinstance(value, msgspec.msgpack.Ext):
            return self._ext(value.code, bytes(value.data))
        return value

    def _bytes(self, data: memoryview) -> Any:
        if len(data) <= _INLINE or self._in_set:
            return bytes(data)
        return self._buffer(_BYTES, b"", data)

    def _buffer(self, code: int, head: bytes, data: memoryview) -> Any:
        self.made.append(data)
        return msgspec.msgpack.Ext(code, head + (len(self.made) - 1).to_bytes(4, "little"))

    def _ext(self, code: int, data: bytes) -> Any:
        if code in (_TUPLE, _SET, _FROZENSET):
            self._in_set += code != _TUPLE
            items = [self.value(each) for each in msgspec.msgpack.decode(data)]
            self._in_set -= code != _TUPLE
            if code != _TUPLE:
                items = [msgspec.Raw(each) for each in sorted(map(_pack, items))]
            return msgspec.msgpack.Ext(code, _pack(items))
        if code == _BYTES:
            return self._bytes(self._buffers[int.from_bytes(data, "little")])
        if code in (_ARRAY, _SMALL):
            split = (data[0] + 9 & ~7) + 8 * data[1]
            head, rest = data[:split], memoryview(data)[split:]
            if code == _ARRAY:
                rest = self._buffers[int.from_bytes(rest, "little")]
            if len(rest) > _INLINE:
                return self._buffer(_ARRAY, head, rest)
            return msgspec.msgpack.Ext(_SMALL, head + rest)
        return msgspec.msgpack.Ext(code, data)
