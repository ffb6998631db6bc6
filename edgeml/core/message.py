"""The unit that transports move and codecs make, and the memory that it may outlive.

Ownership, in one paragraph: a message that a codec has just made *aliases* the user's arrays.
Whoever keeps it beyond the call that it was given in must `own` it first, which copies
the buffers into pooled memory; a message that is owned already is returned as it is. The pool
exists because fresh memory costs a page fault for each 4 KiB: at 3 MB that is more than the copy.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np

__all__ = [
    "Message",
    "Owned",
    "Allocator",
    "aligned",
    "copy",
    "empty",
    "is_owned",
    "own",
    "owned",
    "pooled",
    "private",
    "root_of",
    "together",
]


Allocator = Callable[[int], memoryview | None]
"""Gives memory of so many bytes, to be filled once and then only read; or None, if it has none."""


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
    """Marks memory that whoever had it filled will not change: `root_of` slices of it is one.

    Its base must be no array, or numpy would make that the base of its views, and it would not live
    as long as they do.
    """


class _Private(np.ndarray[Any, Any]):
    """Marks memory as `Owned` does, but whoever has it may change it at any time."""


_PARALLEL = 1 << 24  # bytes; from here on a second thread is worth its start
_PIECES = 4  # that a copy is divided into; each gives the GIL up, which a busy thread keeps 5 ms


def copy(target: memoryview, source: memoryview) -> None:
    """Copy bytes; many of them in two threads, as one core alone can't use all of the memory's
    speed (1.5 times as fast, measured with two cores at 25 MB).
    """
    size = source.nbytes
    if size < _PARALLEL or os.cpu_count() == 1:
        # An assignment keeps the GIL, which would take 5 ms to get back beside a thread that
        # computes.
        target[:] = source
        return
    to, from_ = np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8)
    step = -(-size // _PIECES)
    starts = iter(range(0, size, step))

    def work() -> None:
        for start in starts:  # whoever is free takes the next
            np.copyto(to[start : start + step], from_[start : start + step])

    together(work)


def together(work: Callable[[], None], helpers: int = 1) -> None:
    """Run ``work`` in this thread and in others; between them they share what there is to do.

    A thread takes some 60 us to start, and leaves nothing behind that would have to be closed.
    """
    started = []
    with suppress(RuntimeError):  # the interpreter is shutting down
        for _ in range(helpers):
            helper = threading.Thread(target=work, name="edgeml helper", daemon=True)
            helper.start()
            started.append(helper)
    work()
    for helper in started:
        helper.join()


class _Pool:
    """Blocks of a few sizes, given back when the last view on them dies.

    `give_back` runs inside a finalizer, at any time and in any thread, so it takes no lock and
    only appends to a deque (atomic in CPython). A deque's ``maxlen`` bounds what is kept.
    """

    _KEEP = 8  # blocks kept for each size
    _SMALL = 1 << 16  # below this malloc is faster than we are
    _LARGE = 1 << 27  # above this a block is too much to keep

    def __init__(self) -> None:
        self._free: dict[int, deque[mmap.mmap]] = {}

    def allocate(self, size: int, kind: type[np.ndarray[Any, Any]] = Owned) -> memoryview | None:
        """Memory of that size, if pooling it pays; ``kind`` marks what becomes of it."""
        if size < self._SMALL or size > self._LARGE:
            return None
        # Four sizes to each power of two waste at most a fifth.
        step = 1 << (size.bit_length() - 3)
        rounded = -(-size // step) * step
        free = self._free.setdefault(rounded, deque(maxlen=self._KEEP))
        try:
            block = free.pop()
        except IndexError:
            # Private, or a forked child would go on to write into the same memory.
            block = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        root = kind(rounded, np.uint8, block)
        weakref.finalize(root, free.append, block).atexit = False
        return memoryview(root)[:size]

    def copy(self, source: memoryview) -> memoryview:
        view = self.allocate(source.nbytes)
        if view is None:
            return memoryview(bytes(source))
        copy(view, source)
        return view.toreadonly()


_pool = _Pool()
pooled: Allocator = _pool.allocate
"""Gives memory that has been used before, which spares the page faults."""


def private(nbytes: int) -> memoryview | None:
    """Gives such memory, too, but for arrays that users may change: a message copies those."""
    return _pool.allocate(nbytes, _Private)


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


def owned(buffer: memoryview) -> memoryview:
    """Mark memory that nobody will change, so that `own` need not copy it."""
    return memoryview(Owned(buffer.nbytes, np.uint8, buffer)).toreadonly()


def own(message: Message, allocate: Allocator | None = None) -> Message:
    """Return a message equal to this one whose buffers nobody else can change.

    Args:
        message: is returned as it is if that is so already.
        allocate: gives memory of so many bytes to copy into, or None; see `Endpoint.allocate`.
    """
    foreign = [not is_owned(buffer) for buffer in message.buffers]
    if not any(foreign):
        return message
    pairs = list(zip(message.buffers, foreign, strict=True))
    place = None
    if allocate is not None:
        place = allocate(sum(aligned(buffer) for buffer, theirs in pairs if theirs))
    if place is None:
        return Message(message.header, [_pool.copy(b) if theirs else b for b, theirs in pairs])
    buffers = []
    at = 0
    for buffer, theirs in pairs:
        if theirs:
            copy(place[at : at + buffer.nbytes], buffer)
            buffers.append(place[at : at + buffer.nbytes].toreadonly())
            at += aligned(buffer)
        else:
            buffers.append(buffer)
    return Message(message.header, buffers)


def empty(allocate: Allocator, shape: int | tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """An array with anything in it, in memory from ``allocate`` where there is any."""
    dtype = np.dtype(dtype)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    place = None if dtype.hasobject else allocate(math.prod(shape) * dtype.itemsize)
    return np.empty(shape, dtype) if place is None else np.frombuffer(place, dtype).reshape(shape)


def aligned(buffer: memoryview) -> int:
    """Bytes that it takes up if the next one is to be aligned for vector instructions."""
    return -(-buffer.nbytes // 64) * 64
