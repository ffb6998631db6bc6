"""The unit that transports move and codecs make, and the memory that it may outlive.

Ownership, in one paragraph: a message that a codec has just made *aliases* the user's arrays.
Whoever keeps it beyond the call that it was given in must `own` it first, which copies
the buffers into pooled memory; a message that is owned already is returned as it is. The pool
exists because fresh memory costs a page fault for each 4 KiB: at 3 MB that is more than the copy.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

__all__ = ["Message", "Owned", "is_owned", "own", "root_of"]


class Message(msgspec.Struct, frozen=True, gc=False):
    """A small header, and the large buffers that it describes; never joined into one.

    Attributes:
        header: bytes, always private to the receiver.
        buffers: flat, contiguous memoryviews of format ``B``. A receiver may read them for as
            long as they live, and cannot write to them.
    """

    header: bytes
    buffers: Sequence[memoryview] = ()

    @property
    def nbytes(self) -> int:
        """Size in bytes of the header and all buffers."""
        return len(self.header) + sum(buffer.nbytes for buffer in self.buffers)


class Owned(np.ndarray[Any, Any]):
    """Marks memory that whoever had it filled will not change: `root_of` slices of it is one."""


class _Pool:
    """Blocks of a few sizes, given back when the last view on them dies.

    `give_back` runs inside a finalizer, at any time and in any thread, so it takes no lock and
    only appends to a deque (atomic in CPython). A deque's ``maxlen`` bounds what is kept.
    """

    _KEEP = 8  # blocks kept for each size
    _SMALL = 1 << 16  # below this malloc is faster than we are
    _LARGE = 1 << 27  # above this a block is too much to keep

    def __init__(self) -> None:
        self._free: dict[int, deque[np.ndarray[Any, Any]]] = {}

    def copy(self, source: memoryview) -> memoryview:
        size = source.nbytes
        if size < self._SMALL or size > self._LARGE:
            return memoryview(bytes(source))
        # Four sizes to each power of two waste at most a fifth.
        step = 1 << (size.bit_length() - 3)
        room = -(-size // step) * step
        free = self._free.setdefault(room, deque(maxlen=self._KEEP))
        try:
            block = free.pop()
        except IndexError:
            block = np.empty(room, np.uint8)
        root = block.view(Owned)
        weakref.finalize(root, free.append, block).atexit = False
        view = memoryview(root)[:size]  # type: ignore[arg-type]
        view[:] = source
        return view.toreadonly()


_pool = _Pool()


def root_of(buffer: memoryview) -> Any:
    """What the memory behind ``buffer`` belongs to, seen through views and views of views."""
    root: Any = buffer.obj
    while True:
        kind = type(root)
        if kind is np.ndarray:
            if root.base is None:
                return root
            root = root.base
        elif kind is memoryview:
            root = root.obj
        else:
            return root


def is_owned(buffer: memoryview) -> bool:
    """Whether the memory behind ``buffer`` can no longer be changed by whoever made it."""
    root = root_of(buffer)
    return type(root) is bytes or isinstance(root, Owned)


def own(message: Message, room: Callable[[int], memoryview | None] | None = None) -> Message:
    """Return a message equal to this one whose buffers nobody else can change.

    Args:
        message: is returned as it is if that is so already.
        room: gives memory of so many bytes to copy into, or None; see `Endpoint.room`.
    """
    copied = [not is_owned(buffer) for buffer in message.buffers]
    if not any(copied):
        return message
    pairs = list(zip(message.buffers, copied, strict=True))
    place = None
    if room is not None:
        place = room(sum(_aligned(buffer) for buffer, copy in pairs if copy))
    if place is None:
        return Message(message.header, [_pool.copy(b) if copy else b for b, copy in pairs])
    buffers = []
    at = 0
    for buffer, copy in pairs:
        if copy:
            place[at : at + buffer.nbytes] = buffer
            buffers.append(place[at : at + buffer.nbytes].toreadonly())
            at += _aligned(buffer)
        else:
            buffers.append(buffer)
    return Message(message.header, buffers)


def _aligned(buffer: memoryview) -> int:
    """Bytes that it takes up if the next one is to be aligned for vector instructions."""
    return -(-buffer.nbytes // 64) * 64
