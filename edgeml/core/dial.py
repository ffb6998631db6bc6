"""TCP connections, and the addresses of hosts, by a deadline.

The system's resolver knows none: where a name server doesn't answer, `socket.getaddrinfo` takes ten
seconds and more, and can't be stopped. So names are looked up in a thread, which is left behind
where it takes too long; who asks for a name that is being looked up waits for the same answer, so
that there is one such thread for each name at most.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from typing import Any

from edgeml.core.deadline import Deadline
from edgeml.core.forks import watch_forks

__all__ = ["STAGGER", "dial", "look_up", "look_up_soon"]

STAGGER = 0.25  # seconds that one address is tried before the next one is as well (RFC 8305)
_LONGEST = float(1 << 30)  # ms that a wait is told to last

Entry = tuple[int, int, int, str, Any]
"""An address as `socket.getaddrinfo` tells it: family, type, protocol, name, and the address."""


class _LookUps:
    """Those under way, by what is asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[tuple[Any, ...], Future[list[Entry]]] = {}
        watch_forks(self)

    def begin(self, *asked: Any) -> Future[list[Entry]]:
        with self._lock:
            future = self._under_way.get(asked)
            if future is not None:
                return future
            future = Future()
            future.set_running_or_notify_cancel()  # so that nobody can cancel it for the others
            thread = threading.Thread(
                target=self._answer, args=(future, asked), name="edgeml looks up", daemon=True
            )
            with suppress(RuntimeError):  # no thread can be started, as the program ends
                thread.start()
                self._under_way[asked] = future
                return future
        self._answer(future, asked)
        return future

    def _answer(self, future: Future[list[Entry]], asked: tuple[Any, ...]) -> None:
        try:
            found = socket.getaddrinfo(*asked)
        except BaseException as error:
            outcome: Any = error
        else:
            outcome = found
        with self._lock:
            self._under_way.pop(asked, None)
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def abandon(self) -> None:
        """In a forked child, where the threads are not."""
        self._lock = threading.Lock()  # whoever held it is not there
        self._under_way.clear()


_look_ups = _LookUps()


def _is_address(host: str | None) -> bool:
    with suppress(ValueError):
        ipaddress.ip_address((host or "").partition("%")[0])
        return True
    return False


def look_up_soon(host: str | None, port: int | None, *more: int) -> Future[list[Entry]]:
    """Look up a host's addresses; the future gives, or raises, what `socket.getaddrinfo` does."""
    if host and not _is_address(host):
        return _look_ups.begin(host, port, *more)
    future: Future[list[Entry]] = Future()
    try:
        found: Any = socket.getaddrinfo(host, port, *more)
    except (OSError, UnicodeError) as error:
        future.set_exception(error)
    else:
        future.set_result(found)
    return future


def look_up(host: str, port: int, deadline: Deadline) -> list[Entry]:
    """Return the addresses of a host, to which a TCP connection can be made.

    Raises:
        TimeoutError: no name server has answered by the deadline.
        OSError: there is no such host.
        UnicodeError: nor could there be.
    """
    try:
        return look_up_soon(host, port, 0, socket.SOCK_STREAM).result(deadline.left)
    except FutureTimeout:
        raise TimeoutError(
            f"no name server has told the address of {host!r} within {deadline.timeout:g} s"
        ) from None


def dial(host: str, port: int, deadline: Deadline) -> socket.socket:
    """Connect to the first of a host's addresses that answers.

    One that doesn't answer soon doesn't hold up the others: they are tried beside it.

    Returns:
        A socket whose timeout is what is left.

    Raises:
        OSError: none of them answers, or as `look_up` says.
        UnicodeError: there can be no such host.
    """
    made = _race(look_up(host, port, deadline), deadline)
    made.settimeout(max(1e-3, deadline.left))
    return made


def _race(found: Sequence[Entry], deadline: Deadline) -> socket.socket:
    untried = deque(found)
    trying: dict[int, socket.socket] = {}
    poll = select.poll()
    why: OSError | None = None
    try:
        while True:
            if untried:
                try:
                    sock = _begin(untried.popleft())
                except OSError as error:
                    why = why or error
                else:
                    trying[sock.fileno()] = sock
                    poll.register(sock, select.POLLOUT)
            if not trying:
                if untried:
                    continue
                raise why or OSError("it has no address")
            left = deadline.left
            pause = min(left, STAGGER) if untried else left
            for fd, _ in poll.poll(min(pause * 1e3, _LONGEST)):
                sock = trying.pop(fd)
                number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not number:
                    return sock
                why = why or OSError(number, os.strerror(number))
                poll.unregister(sock)
                sock.close()
            if not left:
                raise TimeoutError("timed out")
    finally:
        for sock in trying.values():
            sock.close()


def _begin(entry: Entry) -> socket.socket:
    """Begin to connect to an address."""
    family, kind, protocol, _, address = entry
    sock = socket.socket(family, kind, protocol)
    sock.setblocking(False)
    number = sock.connect_ex(address)
    if number in (0, errno.EINPROGRESS):
        return sock
    sock.close()
    raise OSError(number, os.strerror(number))
