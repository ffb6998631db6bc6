"""Memory that one process writes and others read: who has it, who lends it, and when it is free.

A message's buffers lie in one *block* of a *segment* (`segments`). A block is used again when
nobody uses it any more: neither the endpoint that fills it, nor a peer that it is lent to, nor the
user who allocated it. What a peer had when its connection was lost may still be read, by views that
outlive the connection, so such a segment is *retired*: no block of it is ever used again.

A reader maps a segment once, read-only, and *leases* a block of it for each message. A lease ends
with the last view on it, which a weak reference tells: that runs at any moment and in any thread,
so it takes no lock, does no I/O and only leaves a note.
"""

from __future__ import annotations

import itertools
import mmap
import os
import resource
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from edgeml.core import Overloaded, Owned
from edgeml.core.forks import watch_forks
from edgeml.transports.shm.segments import Block, Segment

__all__ = [
    "INLINE",
    "RETIRE",
    "Account",
    "Lease",
    "Leases",
    "Pool",
    "Allocation",
    "limit_of_environment",
]

RETIRE = 1 << 31
"""Set in a token that is returned: the block is not to be used again."""

INLINE = 16 << 10
"""Bytes; up to here two copies by the kernel cost less than a lease."""

_SHARED = 16 << 20  # bytes; a segment for blocks that are small enough to share one
_PARTS = 4  # that such a segment has at least
_SMALLEST = 1 << 16  # bytes; of a block
_LEAST_LIMIT, _MOST_LIMIT = 1 << 28, 1 << 31  # bytes, of the limit that nobody has chosen
_FREELY = 4  # blocks that a user may hold of almost any size; beyond them ...
_MOST_HELD, _MOST_HELD_BYTES = 64, 1 << 28  # ... what comes is copied
_KEEP = 30.0  # seconds that a segment is kept for which there is no use at the moment
_MOST_SEGMENTS = 1024  # of one pool; a system allows 65,530 mappings in a process
_MOST_FILES = 8  # a pool has at most one segment for so many files that may be open
_MOST_OF_ONE = 4  # a peer may hold blocks in at most one of so many of them

Array = np.ndarray[Any, Any]


class Allocation(Owned):
    """The root of an array that the user fills where it will be read."""

    block: Block
    pool: Pool
    address: int


class Pool:
    """The segments that one endpoint writes. Safe to use from any thread.

    Args:
        limit: bytes that may be lent to one peer at a time.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._tokens = itertools.count(1)
        self._free: dict[int, list[Block]] = {}  # by size; the last to be freed is the first taken
        self._dead: deque[tuple[Block, bool]] = deque()  # whose allocation nobody has any more
        self._allocations: dict[int, Lease] = {}
        self._closed = False
        self.segments: dict[int, Segment] = {}
        self.blocks: dict[int, Block] = {}
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.most_segments = max(_MOST_OF_ONE, min(_MOST_SEGMENTS, files // _MOST_FILES))
        """Each takes two file descriptors here (Python's mmap keeps one), and one of a reader's."""
        self.generation = 0
        """Changes whenever a segment is given up, which readers want to be told."""
        _open_pools.add(self)
        watch_forks(self)

    def take(self, size: int) -> Block:
        """A block of at least ``size`` bytes, with one user.

        Raises:
            Overloaded: the system gives no more memory, or no more file descriptors.
        """
        size_class = _round_up(size)
        with self._lock:
            if self._dead:
                self._collect()
            free = self._free.get(size_class)
            if not free:
                free = self._grow(size_class)
            block = free.pop()
            block.users = 1
            block.segment.live += 1
        return block

    def allocate(self, size: int) -> memoryview | None:
        """Memory of ``size`` bytes that is sent without a copy; None if there is none, or if it
        would be sent within a record.
        """
        if not INLINE < size <= self.limit:
            return None
        try:
            block = self.take(size)
        except Overloaded:  # ordinary memory will do
            return None
        root = Allocation(block.size, np.uint8, block.view)
        root.block, root.pool = block, self
        root.address = root.__array_interface__["data"][0]
        dead, allocations = self._dead, self._allocations

        def gone(lease: Lease) -> None:
            allocations.pop(id(lease), None)
            dead.append((block, bool(lease.token & RETIRE)))

        lease = Lease(root, gone)
        lease.token, lease.size = block.token, block.size
        allocations[id(lease)] = lease
        return memoryview(root)[:size]

    @property
    def has_allocations(self) -> bool:
        """Whether a user has memory that may be sent."""
        return bool(self._allocations)

    def keep(self, block: Block) -> None:
        """Count one user more of a block that is in use."""
        with self._lock:
            block.users += 1

    def open_account(self) -> Account:
        """For one more peer."""
        return Account(self.limit, self.most_segments // _MOST_OF_ONE)

    def drop(self, block: Block, users: int = 1, *, retire: bool = False) -> None:
        """Count fewer users; without any, the block is free, unless its segment is retired."""
        with self._lock:
            self._drop(block, users, retire)

    def tidy(self) -> None:
        """Give up segments that have been of no use for long."""
        with self._lock:
            self._collect()
            before = time.monotonic() - _KEEP
            for segment in list(self.segments.values()):
                if not segment.live and segment.used < before:
                    self._give_up(segment)

    def close(self) -> None:
        """Give up everything, but for what a user still has."""
        with self._lock:
            self._closed = True
            for segment in self.segments.values():
                segment.close()
            self.segments.clear()
            self.blocks.clear()
            self._free.clear()

    def forking(self) -> None:
        """A child will see what there is now: its views must not change when ours are gone."""
        for lease in list(self._allocations.values()):
            lease.token |= RETIRE

    def abandon(self) -> None:
        """In the child: whoever held the lock is not there, and nothing is ours to use again."""
        self._lock = threading.Lock()
        self._closed = True

    def _grow(self, size: int) -> list[Block]:
        if self._closed or len(self.segments) >= self.most_segments:
            raise Overloaded("too much shared memory is in use by this endpoint")
        count = _SHARED // size if size * _PARTS <= _SHARED else 1
        try:
            segment = Segment(next(self._numbers), size, count, self._tokens)
        except (OSError, ValueError) as error:
            raise Overloaded(
                f"the system gives no more shared memory: {error}; let go of received arrays, or "
                "raise the limit of open files (ulimit -n)"
            ) from error
        segment.used = time.monotonic()
        self.segments[segment.number] = segment
        self.blocks |= {block.token: block for block in segment.blocks}
        free = self._free.setdefault(size, [])
        free += reversed(segment.blocks)
        return free

    def _collect(self) -> None:
        while self._dead:
            block, retire = self._dead.popleft()
            self._drop(block, 1, retire)

    def _drop(self, block: Block, users: int, retire: bool) -> None:
        if self._closed:
            return
        segment = block.segment
        if retire and not segment.retired:
            segment.retired = True
            free = self._free[block.size]
            free[:] = [other for other in free if other.segment is not segment]
        block.users -= users
        if block.users:
            return
        segment.live -= 1
        if not segment.retired:
            self._free[block.size].append(block)
            segment.used = time.monotonic()
        elif not segment.live:
            self._give_up(segment)

    def _give_up(self, segment: Segment) -> None:
        if not segment.retired:
            free = self._free[segment.blocks[0].size]
            free[:] = [block for block in free if block.segment is not segment]
        for block in segment.blocks:
            del self.blocks[block.token]
        del self.segments[segment.number]
        segment.close()
        self.generation += 1


def limit_of_environment() -> int:
    """Bytes that may be lent to one peer at a time, as the environment says."""
    given = os.environ.get("EDGEML_SHM_LIMIT_MB")
    if given:
        try:
            megabytes = int(given)
        except ValueError:
            megabytes = 0
        if megabytes < 1:
            raise ValueError(f"EDGEML_SHM_LIMIT_MB must be a number from 1, not {given!r}")
        return megabytes << 20
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(_LEAST_LIMIT, min(_MOST_LIMIT, memory // 4))


class Account:
    """What is lent to one peer, and held of what it lends, over all sockets. Safe in any thread.

    Args:
        limit: bytes.
        segments: in how many of them it may hold blocks, so that no peer that stops reading uses up
            the file descriptors which the others need.
    """

    def __init__(self, limit: int, segments: int) -> None:
        self.limit = limit
        self._most = segments
        self._lock = threading.Lock()
        self._bytes = 0
        self._segments: dict[int, int] = {}  # and how many of its blocks
        self.leases: weakref.WeakSet[Leases] = weakref.WeakSet()

    def lend(self, blocks: Sequence[Block]) -> None:
        """Count blocks as lent, or raise `Overloaded`; one message may always be under way."""
        size = 0
        for block in blocks:
            size += block.size
        segments = self._segments
        with self._lock:
            held = self._bytes
            if held and (held + size > self.limit or len(segments) + len(blocks) > self._most):
                self._refuse(blocks, size)
            self._bytes = held + size
            for block in blocks:
                number = block.segment.number
                segments[number] = segments.get(number, 0) + 1

    def _refuse(self, blocks: Sequence[Block], size: int) -> None:
        held = f"the peer has {self._bytes >> 20} MiB that it hasn't read or doesn't let go of"
        if self._bytes + size > self.limit:
            raise Overloaded(f"{held}; {self.told}")
        new = {block.segment.number for block in blocks}.difference(self._segments)
        if len(self._segments) + len(new) > self._most:
            raise Overloaded(
                f"{held}, in {len(self._segments)} segments; with a higher limit of open files "
                "(ulimit -n) it may have more"
            )

    def give_back(self, block: Block, times: int = 1) -> None:
        """Count a block as not lent any more."""
        number = block.segment.number
        with self._lock:
            self._bytes -= times * block.size
            left = self._segments[number] - times
            if left:
                self._segments[number] = left
            else:
                del self._segments[number]

    def holds_much(self, lendable: int) -> bool:
        """Whether what comes next of a peer that lends so many bytes should be copied, for it to
        have some left to lend.
        """
        leases = _list(self.leases)
        count = sum(map(len, leases))
        size = sum(each.size for each in leases)
        if size > lendable // 2 or count > _MOST_HELD:
            return True
        return count > _FREELY and size > min(lendable // 4, _MOST_HELD_BYTES)

    @property
    def told(self) -> str:
        """What to tell of the limit."""
        return f"{self.limit >> 20} MiB are lent to a peer at most: see EDGEML_SHM_LIMIT_MB"


def _round_up(size: int) -> int:
    """Up to one of four sizes to each power of two, so that a block fits many messages."""
    size = max(size, _SMALLEST)
    step = 1 << ((size - 1).bit_length() - 3)
    return -(-size // step) * step


class Lease(weakref.ref[Array]):
    """Tells when the last view on a block is gone.

    Attributes:
        token: the block's, `RETIRE` included if its writer must not use it again.
        size: bytes that are held.
    """

    __slots__ = ("size", "token")
    token: int
    size: int


class Leases:
    """What this process holds of the blocks that one peer has lent."""

    def __init__(self) -> None:
        self.ended: deque[int] = deque()
        """Tokens of the blocks that can be given back."""
        self._held: dict[int, Lease] = {}
        _open_leases.add(self)
        held, ended = self._held, self.ended

        def gone(lease: Lease) -> None:
            held.pop(id(lease), None)
            ended.append(lease.token)

        self._gone = gone

    def __len__(self) -> int:
        return len(self._held)

    @property
    def size(self) -> int:
        """Bytes of the buffers that are held."""
        return sum(lease.size for lease in list(self._held.values()))

    def begin(self, memory: mmap.mmap, token: int) -> tuple[memoryview, Lease]:
        """A read-only view of a segment, and the lease that ends with its last slice."""
        root = np.frombuffer(memory, np.uint8)
        lease = Lease(root, self._gone)
        lease.token, lease.size = token, 0
        self._held[id(lease)] = lease
        return memoryview(root), lease  # type: ignore[arg-type]

    def forking(self) -> None:
        """A child will see what there is now: its views must not change when ours are gone."""
        for lease in list(self._held.values()):
            lease.token |= RETIRE


_open_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
_open_leases: weakref.WeakSet[Leases] = weakref.WeakSet()


T = TypeVar("T")


def _list(some: weakref.WeakSet[T]) -> list[T]:
    while True:
        try:
            return list(some)
        except RuntimeError:  # another thread has just added one
            continue


def _forking() -> None:
    for pool in _list(_open_pools):
        pool.forking()
    for leases in _list(_open_leases):
        leases.forking()


# Twice, since a lease may begin between the first time and the fork.
os.register_at_fork(before=_forking, after_in_parent=_forking)
