"""A message in pieces of bounded size, for transports that carry bytes: gRPC's streams, links.

Joined together, the pieces are a *prefix*, two numbers of 8 bytes, little-endian, and then the
message's frame (`edgeml.core.frames`). The first number is the transport's own: which request this
is, say; the second is the size of the frame. So a receiver knows from the first piece how much is
to come, before it takes memory for it.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from edgeml.core.errors import Malformed, NotEncodable, Overloaded
from edgeml.core.frames import parts, unframe
from edgeml.core.message import Message, Owned, pooled

__all__ = ["LARGEST", "PREFIX", "Assembly", "Parts", "cut", "cut_message", "flatten"]

PREFIX = struct.Struct("<QQ")
LARGEST = 1 << 32
"""Bytes of a frame that is sent; a server takes less by default (`Limits.message_bytes`)."""

Parts = list[bytes | memoryview]


def flatten(message: Message) -> tuple[int, Parts]:
    """The size of a message's frame, and what it consists of.

    Raises:
        NotEncodable: it is too large.
    """
    made = parts(message)
    size = sum(map(len, made))
    if size > LARGEST:
        raise NotEncodable(f"a message of {size} bytes; {LARGEST} are the most: split it")
    return size, made


def cut(content: Iterable[bytes | memoryview], size: int) -> Iterator[bytes]:
    """Cut what is to be concatenated into pieces of that size, copying each byte once."""
    held: Parts = []
    left = size
    for part in content:
        view = memoryview(part)
        while len(view) >= left:
            held.append(view[:left])
            yield b"".join(held)
            held, view, left = [], view[left:], size
        held.append(view)
        left -= len(view)
    if left < size:
        yield b"".join(held)


def cut_message(number: int, message: Message, size: int) -> Iterator[bytes]:
    """A message in pieces of that size, with the number that its prefix starts with."""
    total, content = flatten(message)
    return cut([PREFIX.pack(number, total), *content], size)


class Assembly:
    """A message that is being received, into memory that has been used before where that pays.

    Args:
        most: bytes of a frame; who announces more is refused before memory is taken.
        admit: is asked with the frame's size, likewise; raises what the sender is to be told.

    Attributes:
        number: that its prefix starts with; 0 before the first piece.
    """

    def __init__(self, most: int = LARGEST, admit: Callable[[int], object] | None = None) -> None:
        self.number = 0
        self._most = most
        self._admit = admit
        self._into: memoryview | None = None
        self._at = 0

    @property
    def whole(self) -> bool:
        """Whether all of it has come."""
        return self._into is not None and self._at == len(self._into)

    def add(self, piece: bytes) -> None:
        """Take the next piece.

        Raises:
            Malformed: it doesn't fit, or announces more than is taken.
            Overloaded: there is no memory for what it announces.
        """
        content = memoryview(piece)
        if self._into is None:
            if len(piece) < PREFIX.size:
                raise Malformed("a message that ends in its prefix")
            self.number, size = PREFIX.unpack_from(piece)
            if size > self._most:
                raise Malformed(
                    f"a message of {size} bytes; {self._most} are the most that is taken "
                    "(Limits.message_bytes): split it"
                )
            if self._admit is not None:
                self._admit(size)
            self._into = _take_memory(size)
            content = content[PREFIX.size :]
        end = self._at + len(content)
        if end > len(self._into):
            raise Malformed("a message that is longer than its prefix says")
        self._into[self._at : end] = content
        self._at = end

    def message(self) -> Message:
        """Give the whole away; raises Malformed if it is none, Overloaded without memory for it."""
        if self._into is None or not self.whole:
            raise Malformed("a message that is shorter than its prefix says")
        whole, self._into = self._into, None
        try:
            return unframe(whole)
        except MemoryError:  # its header is copied
            raise Overloaded(f"no memory for a message of {len(whole)} bytes") from None


def _take_memory(size: int) -> memoryview:
    """Memory of which a large one is used only as it is filled, whatever the sender claims."""
    try:
        memory = pooled(size)
        if memory is None:
            block = mmap.mmap(-1, size or 1, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory = memoryview(Owned(size, np.uint8, block))
    except (OSError, MemoryError) as error:
        raise Overloaded(f"no memory for a message of {size} bytes: {error}") from None
    return memory
