"""Forked children: what was open in the parent is told, for its threads are not in the child.

Locks may be held there for ever by threads that are gone, and sockets are the parent's: to use or
to close them as usual would take part in its conversations. But the child must not keep them
either, or ports would stay taken and peers would not learn of the parent's end.
"""

from __future__ import annotations

import logging
import os
import socket
import weakref
from collections.abc import Iterable
from contextlib import suppress
from typing import Protocol

from edgeml.core.errors import Closed

__all__ = ["drop_descriptors", "drop_sockets", "explain_fork", "leave_to_parent", "watch_forks"]

_log = logging.getLogger(__name__)


class _Watching(Protocol):
    def abandon(self) -> None: ...


_watching: weakref.WeakSet[_Watching] = weakref.WeakSet()
_left: list[object] = []
_descriptors: set[int] = set()  # to be dropped
_ports: set[int] = set()  # whose sockets are
_peers: set[tuple[str, int]] = set()


def watch_forks(end: _Watching) -> None:
    """Have ``end.abandon()`` called in every forked child, as long as ``end`` lives.

    It makes its locks anew, and has every use raise `explain_fork`'s error. Its threads are not
    there; what follows may be called within it.
    """
    _watching.add(end)


def leave_to_parent(*things: object) -> None:
    """Never free things in this child: what frees them would act upon what the parent uses."""
    _left.extend(things)


def drop_descriptors(descriptors: Iterable[int]) -> None:
    """Let go of this child's copies.

    The numbers stay in use, for nothing: whoever believes to have them may close them.
    """
    _descriptors.update(descriptors)


def drop_sockets(*, port: int = 0, peers: Iterable[tuple[str, int]] = ()) -> None:
    """Let go of this child's copies of TCP sockets that a library keeps to itself.

    Args:
        port: of the one that listens there, and of all that it has accepted; 0 for none.
        peers: numeric address and port of those whom others are connected to.
    """
    _ports.update({port} - {0})
    _peers.update(peers)


def explain_fork(url: object) -> Closed:
    """Return the error of a connection that was made before the fork."""
    return Closed(f"the connection to {url} belongs to the process before the fork")


def _abandon_all() -> None:
    for end in list(_watching):
        end.abandon()
    try:
        if _ports or _peers:  # once for all, as a process may have thousands
            drop_descriptors(fd for fd in map(int, os.listdir("/dev/fd")) if _is_dropped(fd))
        if _descriptors:
            nothing = os.open(os.devnull, os.O_RDWR)
            for descriptor in _descriptors:
                os.dup2(nothing, descriptor, inheritable=False)
            os.close(nothing)
    except OSError:
        _log.exception("this child keeps sockets of its parent's")
    _descriptors.clear()
    _ports.clear()
    _peers.clear()


def _is_dropped(descriptor: int) -> bool:
    with suppress(OSError):  # no socket, or not connected
        sock = socket.socket(fileno=descriptor)
        try:
            if sock.type != socket.SOCK_STREAM or sock.family == socket.AF_UNIX:
                return False
            if sock.getsockname()[1] in _ports:
                return True
            host, port = sock.getpeername()[:2]
            return (host.removeprefix("::ffff:"), port) in _peers  # IPv4 in an IPv6 socket
        finally:
            sock.detach()
    return False


os.register_at_fork(after_in_child=_abandon_all)
