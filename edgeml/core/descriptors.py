"""Connections that a library has open, by their descriptors: what it doesn't tell the system does.

A descriptor may become another's at any moment. So a connection is ended by a duplicate, once that
was seen to be the one that is meant.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

__all__ = ["UNKNOWN", "borrow", "count_received", "end_connection", "watch_for_end"]

UNKNOWN = (-1, -1, -1)
"""The family, type and protocol of a socket about which the system is to be asked."""

_KEEPALIVE = {  # seconds, or times; the last in milliseconds
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 30_000,
}
_TCP_INFO = struct.Struct("=52xI72xQ")  # of Linux: tcpi_last_data_recv (ms), tcpi_bytes_received


@contextmanager
def borrow(
    descriptor: int, kind: tuple[int, int, int] = UNKNOWN, *, duplicate: bool = False
) -> Iterator[socket.socket]:
    """Look at somebody's socket; a duplicate is the same one for as long as it is held.

    Raises:
        OSError: it has been closed, or no descriptor is left for a duplicate.
    """
    number = os.dup(descriptor) if duplicate else descriptor
    try:
        sock = socket.socket(*kind, fileno=number)
    except BaseException:
        if duplicate:
            os.close(number)
        raise
    try:
        yield sock
    finally:
        if duplicate:
            sock.close()
        else:
            sock.detach()


def count_received(sock: socket.socket) -> tuple[int, int]:
    """Ask Linux how long ago a connection's last byte came, in ms, and how many have."""
    told = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    idle, received = _TCP_INFO.unpack(told)
    return idle, received


def end_connection(
    descriptor: int, is_meant: Callable[[socket.socket], bool], kind: tuple[int, int, int] = UNKNOWN
) -> bool:
    """End a connection, unless its descriptor has become another's; whether it was ended."""

    def end(sock: socket.socket) -> bool:
        meant = is_meant(sock)
        if meant:
            sock.shutdown(socket.SHUT_RDWR)
        return meant

    try:
        with borrow(descriptor, kind, duplicate=True) as sock:
            return end(sock)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):  # without a duplicate, then
            with suppress(OSError), borrow(descriptor, kind) as sock:
                return end(sock)
    return False


def watch_for_end(sock: socket.socket | None) -> None:
    """Have the system find out within half a minute that a peer's machine has vanished.

    Args:
        sock: a TCP connection's; None where that has gone already.
    """
    if sock is None:
        return
    with suppress(OSError):  # it has gone
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
