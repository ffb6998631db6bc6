"""Who comes in by a listening socket: how many from one address, and how long they take to greet.

Libraries that accept connections by themselves ask nobody, and tell nothing of those that failed.
So they are given a socket to listen by that does.
"""

from __future__ import annotations

import errno
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from edgeml.core.limits import Limits
from edgeml.core.loops import LACKING
from edgeml.core.refusals import Refusals
from edgeml.core.url import Url, find_address, format_host

__all__ = ["Gate"]


class Gate:
    """Lets connections in; for one thread at a time.

    Args:
        limits: how many of one address, and how long.
        refusals: where those that fail are counted.
        later: calls a function in so many seconds.
        unless_greeted: as what one is counted that said something and never greeted, and why.
    """

    def __init__(
        self,
        limits: Limits,
        refusals: Refusals,
        later: Callable[..., object],
        unless_greeted: tuple[str, str],
    ) -> None:
        self._limits = limits
        self._refusals = refusals
        self._later = later
        self._unless_greeted = unless_greeted
        self._from_host: Counter[str] = Counter()
        self._waiting: dict[Any, _Connection] = {}  # who haven't greeted, by address

    def bind(self, url: Url) -> socket.socket:
        """A socket to listen by, bound to an address.

        Raises:
            OSError: the address is taken, or isn't this machine's.
        """
        host = find_address(url).strip("[]")
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, url.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = _Listening(family, kind, protocol)
        sock.gate = self
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setblocking(False)
            sock.bind(address)
        except OSError as error:
            sock.close()
            hint = "; another port, or 0, may be free" if error.errno == errno.EADDRINUSE else ""
            why = f"cannot serve {url}: {error.strerror}{hint}"
            raise OSError(error.errno, why) from None
        return sock

    def greet(self, address: object) -> None:
        """Note that whoever is there has shaken hands."""
        connection = self._waiting.pop(address, None)
        if connection is not None:
            connection.greeted = True

    def admit(self, connection: socket.socket, address: tuple[Any, ...]) -> socket.socket | None:
        """What has just been accepted, counted; None if there are too many from that address."""
        host = format_host(address)
        if self._from_host[host] >= self._limits.connections_per_address:
            why = (
                f"it has {self._limits.connections_per_address} connections, which are the most "
                "(Limits.connections_per_address)"
            )
            self._refusals.note("Overloaded", str(address), host, why)
            connection.close()
            return None
        self._from_host[host] += 1
        known = _Connection(fileno=connection.detach())
        known.gate, known.address, known.host = self, address, host
        self._waiting[address] = known
        self._later(self._limits.handshake, self._expire, known)
        return known

    def _expire(self, connection: _Connection) -> None:
        if connection.greeted or connection.fileno() < 0:
            return
        self._note(connection, "HandshakeTimeout", "it has not said who it is in time")
        connection.greeted = True  # or it would be counted once more
        connection.shutdown_quietly()

    def leave(self, connection: _Connection) -> None:
        """Note that a connection is closed."""
        self._from_host[connection.host] -= 1
        if not self._from_host[connection.host]:
            del self._from_host[connection.host]
        if self._waiting.get(connection.address) is connection:
            del self._waiting[connection.address]
        if not connection.greeted and connection.spoke:
            self._note(connection, *self._unless_greeted)

    def _note(self, connection: _Connection, kind: str, why: str) -> None:
        self._refusals.note(kind, str(connection.address), connection.host, why)


class _Listening(socket.socket):
    gate: Gate
    rests = False

    def accept(self) -> tuple[socket.socket, Any]:
        if self.rests:  # asyncio would ask a hundred times, and each time plan to ask again
            self.rests = False
            raise BlockingIOError
        while True:
            try:
                accepted, address = super().accept()
            except OSError as error:
                self.rests = error.errno in LACKING
                raise
            admitted = self.gate.admit(accepted, address)
            if admitted is not None:
                return admitted, address


class _Connection(socket.socket):
    gate: Gate | None = None
    address: Any = None
    host = ""
    greeted = False
    spoke = False

    def recv(self, *arguments: Any) -> bytes:
        data = super().recv(*arguments)
        self._hear(len(data))
        return data

    def recv_into(self, *arguments: Any) -> int:
        count = super().recv_into(*arguments)
        self._hear(count)
        return count

    def _hear(self, count: int) -> None:
        if count:
            self.spoke = True
            self.recv, self.recv_into = super().recv, super().recv_into  # type: ignore[method-assign]

    def shutdown_quietly(self) -> None:
        with suppress(OSError):  # it may have gone
            self.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        gate, self.gate = self.gate, None
        self.__dict__.pop("recv", None)  # or it would refer to itself
        self.__dict__.pop("recv_into", None)
        super().close()
        if gate is not None:
            gate.leave(self)
