"""A wall clock that jumps, for this process alone.

`time.time` and `time.time_ns` tell what the system does and a shift, which another process changes
by writing eight bytes to a file. It covers what Python code asks for the time: the library and the
program. It can't cover what C does (libzmq, OpenSSL, `datetime`, timestamps of files), and gRPC's
Python is told the truth, as it adds timeouts to it and hands the sum to C, which would be fooled by
nothing but this. The clock of the machine itself is the whole machine's, and moving it needs root.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
import time

_SHIFT = struct.Struct("@d")


def make(path: str | os.PathLike[str]) -> None:
    """Make the file of a clock that is right."""
    shift(path, 0.0)


def shift(path: str | os.PathLike[str], seconds: float) -> None:
    """Move the wall clocks of all processes that follow this file."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.pwrite(fd, _SHIFT.pack(seconds), 0)
    os.close(fd)


def follow(path: str | os.PathLike[str]) -> None:
    """Have this process's wall clock follow the file."""
    fd = os.open(path, os.O_RDONLY)
    shifted = mmap.mmap(fd, _SHIFT.size, prot=mmap.PROT_READ)
    os.close(fd)
    true_time, true_time_ns = time.time, time.time_ns

    def seconds() -> float:
        if sys._getframe(2).f_globals.get("__name__", "").partition(".")[0] == "grpc":
            return 0.0
        return float(_SHIFT.unpack(shifted[:])[0])

    def wall() -> float:
        return true_time() + seconds()

    def wall_ns() -> int:
        return true_time_ns() + int(seconds() * 1e9)

    time.time, time.time_ns = wall, wall_ns
