"""A message as one piece of bytes, for transports whose unit is that: gRPC, websockets, files.

::

    offset  size
    0       4       header's size H, little-endian like all of these
    4       4       number of buffers N
    8       8 x N   size of each buffer
    8 + 8N  H       header
    ...             zeros up to the next multiple of 64, then the first buffer; likewise each other

Nothing follows the last buffer. What it starts from is aligned to 64 bytes in the piece, and so in
memory where that is.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from edgeml.core.errors import Malformed, NotEncodable
from edgeml.core.message import Message

__all__ = ["MOST_BUFFERS", "frame", "parts", "unframe"]

MOST_BUFFERS = 1 << 14
"""In one message."""

_HEAD = struct.Struct("<II")
_ALIGNMENT = 64
_ZEROS = bytes(_ALIGNMENT)


def parts(message: Message) -> list[bytes | memoryview]:
    """What a message's frame is the concatenation of; the buffers are its own, not copies.

    Raises:
        NotEncodable: too many buffers.
    """
    header, buffers = message.header, message.buffers
    if not buffers:
        return [_HEAD.pack(len(header), 0), header]
    if len(buffers) > MOST_BUFFERS:
        raise NotEncodable(
            f"a message of {len(buffers)} arrays; {MOST_BUFFERS} are the most: "
            "stack the small ones into one"
        )
    sizes = [buffer.nbytes for buffer in buffers]
    made: list[bytes | memoryview] = [
        _HEAD.pack(len(header), len(buffers)) + struct.pack(f"<{len(sizes)}Q", *sizes),
        header,
    ]
    at = len(made[0]) + len(header)
    for buffer in buffers:
        made += (_ZEROS[: -at % _ALIGNMENT], buffer)
        at += -at % _ALIGNMENT + buffer.nbytes
    return made


def frame(message: Message) -> bytes:
    """The whole in one piece, with one copy of everything; raises as `parts` does."""
    return b"".join(parts(message))


def unframe(piece: bytes | memoryview) -> Message:
    """The message in a piece; its buffers are read-only views of it.

    Raises:
        Malformed: this is no frame, whoever made it.
    """
    view = memoryview(piece).toreadonly()
    try:
        header_size, count = _HEAD.unpack_from(view)
        if count > MOST_BUFFERS:
            raise Malformed(f"a frame of {count} buffers; {MOST_BUFFERS} are the most")
        sizes: Sequence[int] = struct.unpack_from(f"<{count}Q", view, _HEAD.size)
    except struct.error:
        raise Malformed("a frame that ends in its sizes") from None
    at = _HEAD.size + 8 * count
    header = bytes(view[at : at + header_size])
    at += header_size
    buffers = []
    for size in sizes:
        at += -at % _ALIGNMENT
        buffers.append(view[at : at + size])
        at += size
    if at != len(view):
        raise Malformed(f"a frame of {len(view)} bytes that says it has {at}")
    return Message(header, buffers)
