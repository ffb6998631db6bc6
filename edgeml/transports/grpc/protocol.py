"""What goes over the wire: methods, pieces, codes. ``docs/wire.md`` says it for other languages.

Every request and reply starts with a prefix of two numbers, little-endian: which server this is for
(or, in a reply, under which number the rest is kept), and the size of the frame that follows. A
unary method carries one piece, with a frame of at most `LARGEST_FRAME` bytes, a streaming one any
number of pieces.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Iterator

import grpc
import numpy as np

from edgeml.core import (
    Closed,
    DeadlineExceeded,
    EdgemlError,
    Malformed,
    Message,
    NotEncodable,
    Overloaded,
    Owned,
    PermissionDenied,
    Unreachable,
    pooled,
    unframe,
)
from edgeml.core.frames import parts

__all__ = [
    "ERRORS",
    "LARGEST_FRAME",
    "PREFIX",
    "SERVICE",
    "Assembly",
    "Parts",
    "flatten",
    "cut",
    "cut_message",
]

SERVICE = "edgeml.Transport"
PREFIX = struct.Struct("<QQ")
LARGEST_FRAME = (4 << 20) - PREFIX.size
"""That goes in one piece: gRPC's own limit on what is received, which neither end changes."""

_STREAMED = 1 << 20  # bytes of a piece of a stream; larger and smaller ones were slower
_LARGEST = 1 << 32  # bytes of a frame

ERRORS: dict[grpc.StatusCode, type[EdgemlError]] = {
    grpc.StatusCode.CANCELLED: Closed,
    grpc.StatusCode.INVALID_ARGUMENT: Malformed,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNAUTHENTICATED: PermissionDenied,
    grpc.StatusCode.UNAVAILABLE: Unreachable,
}
"""What a status means here, and what an error is told as; any other means `Unreachable`."""

Parts = list[bytes | memoryview]


def flatten(message: Message) -> tuple[int, Parts]:
    """The size of a message's frame, and what it consists of.

    Raises:
        NotEncodable: it is too large.
    """
    made = parts(message)
    size = sum(map(len, made))
    if size > _LARGEST:
        raise NotEncodable(f"a message of {size} bytes; grpc carries {_LARGEST}: split it")
    return size, made


def cut(content: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """Cut what is to be concatenated into the pieces of a stream, copying each byte once."""
    held: Parts = []
    left = _STREAMED
    for part in content:
        view = memoryview(part)
        while len(view) >= left:
            held.append(view[:left])
            yield b"".join(held)
            held, view, left = [], view[left:], _STREAMED
        held.append(view)
        left -= len(view)
    if left < _STREAMED:
        yield b"".join(held)


def cut_message(number: int, message: Message) -> Iterator[bytes]:
    """A message as a stream, with the number that its prefix starts with."""
    size, content = flatten(message)
    return cut([PREFIX.pack(number, size), *content])


class Assembly:
    """A stream that is being received, into memory that has been used before where that pays.

    Attributes:
        number: that its prefix starts with; 0 before the first piece.
    """

    def __init__(self) -> None:
        self.number = 0
        self._into: memoryview | None = None
        self._at = 0

    def add(self, piece: bytes) -> None:
        """The next piece; raises Malformed if it doesn't fit, Overloaded if there is no memory."""
        content = memoryview(piece)
        if self._into is None:
            if len(piece) < PREFIX.size:
                raise Malformed("a stream that ends in its prefix")
            self.number, size = PREFIX.unpack_from(piece)
            if size > _LARGEST:
                raise Malformed(f"a frame of {size} bytes; {_LARGEST} are the most")
            # Of a large one, memory is used only as it is filled, whatever the sender claims.
            self._into = pooled(size)
            if self._into is None:
                try:
                    block = mmap.mmap(-1, size or 1, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                except OSError as error:
                    raise Overloaded(f"no memory for a frame of {size} bytes: {error}") from None
                self._into = memoryview(Owned(size, np.uint8, block))
            content = content[PREFIX.size :]
        end = self._at + len(content)
        if end > len(self._into):
            raise Malformed("a stream that is longer than its prefix says")
        self._into[self._at : end] = content
        self._at = end

    def message(self) -> Message:
        """The whole; raises Malformed if it isn't one."""
        if self._into is None or self._at != len(self._into):
            raise Malformed("a stream that is shorter than its prefix says")
        return unframe(self._into)
