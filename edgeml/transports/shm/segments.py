"""Shared memory as the system has it: made by one process, and mapped by others to read.

A *segment* is a piece of shared memory without a name, which lives as long as somebody has it open
or mapped, so that nothing is left behind whoever is killed. It is divided into *blocks* of one
size.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
import tempfile
from collections.abc import Iterable

from edgeml.core import Malformed

__all__ = ["SEALABLE", "Block", "Segment", "map_segment"]

SEALABLE = sys.platform == "linux"
"""Whether there is memory that its maker can't truncate under its readers, which would be SIGBUS.
Elsewhere an unlinked temporary file has to do."""

_SEALS = 0x02 | 0x04 | 0x10 | 0x01  # shrink, grow, future write (fcntl(2); 3.11 lacks it), seal
_NEEDED = 0x02  # shrink: what a reader insists on


class Segment:
    """A piece of shared memory, and its division into blocks."""

    __slots__ = ("blocks", "fd", "live", "memory", "number", "retired", "size", "used")

    def __init__(self, number: int, size: int, count: int, tokens: Iterable[int]) -> None:
        self.number = number
        self.size = size * count
        self.fd = _create(self.size)
        try:
            # Filled at once where all of it will be written: cheaper than a fault for each page.
            flags = mmap.MAP_SHARED | (getattr(mmap, "MAP_POPULATE", 0) if count == 1 else 0)
            self.memory = mmap.mmap(self.fd, self.size, flags=flags)
            if SEALABLE:  # after mapping it, as nobody can map it to write from now on
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(self.fd)
            raise
        view = memoryview(self.memory)
        self.blocks = [
            Block(token, self, at, view[at : at + size])
            for token, at in zip(tokens, range(0, self.size, size), strict=False)
        ]
        self.live = 0  # blocks in use
        self.retired = False
        self.used = 0.0  # when a block of it was last given back

    def close(self) -> None:
        """Give the memory up; it is gone when the last that has it mapped gives it up as well."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self.blocks = []
        del self.memory


def _create(size: int) -> int:
    if SEALABLE:
        fd = os.memfd_create("edgeml", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:
        fd, path = tempfile.mkstemp(prefix="edgeml-")
        os.unlink(path)
    try:
        os.truncate(fd, size)
        if not SEALABLE:  # a disk that is full must be an error now, and not a SIGBUS later
            zeros = bytes(1 << 20)
            for at in range(0, size, len(zeros)):
                os.pwrite(fd, zeros[: size - at], at)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Block:
    """The memory of one message.

    Attributes:
        token: its number in the pool, by which a reader gives it back.
        offset: where it lies in its segment.
        size: in bytes.
        view: the memory itself.
        users: how many have it: the endpoint, peers, and a user who allocated it.
    """

    __slots__ = ("offset", "segment", "size", "token", "users", "view")

    def __init__(self, token: int, segment: Segment, offset: int, view: memoryview) -> None:
        self.token = token
        self.segment = segment
        self.offset = offset
        self.size = len(view)
        self.view = view
        self.users = 0


def map_segment(fd: int, size: int, *, whole: bool) -> mmap.mmap:
    """Map a peer's segment to read it, after a look whether it can be trusted to stay.

    Args:
        fd: closed in any case.
        size: in bytes, as the peer says.
        whole: whether all of it is about to be read.

    Raises:
        Malformed: not what a peer of ours would send.
        OSError: no more file descriptors or mappings.
    """
    try:
        if SEALABLE:
            try:
                seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            except OSError:
                seals = 0
            if seals & _NEEDED != _NEEDED:
                raise Malformed("memory that its sender could truncate")
            if os.fstatvfs(fd).f_bsize != mmap.PAGESIZE:  # which could be taken back: SIGBUS, too
                raise Malformed("memory of large pages")
        now = os.fstat(fd)
        if not 0 < size <= now.st_size:
            raise Malformed(f"memory that is smaller than the {size} bytes it claims")
        # Not what is full of holes, which would be filled with memory at this end's cost.
        whole = whole and now.st_blocks * 512 >= size
        flags = mmap.MAP_SHARED | (getattr(mmap, "MAP_POPULATE", 0) if whole else 0)
        return mmap.mmap(fd, size, flags=flags, prot=mmap.PROT_READ)
    finally:
        os.close(fd)
