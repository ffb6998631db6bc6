"""Who is connected to a server: gRPC accepts by itself, and tells nothing of those that it refuses.

But its sockets are among this process's open files, and so is each peer's address. So connections
beyond what one address may have are cut off, and with keys a connection that ends before anything
was asked by it is known for one whose handshake failed.

Nor does gRPC bound what it holds of requests that are half sent: 4 MB of each, and there may be
thousands. But the system counts what each connection has received, and a server knows what it was
given of that.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from edgeml.core.descriptors import borrow, count_received, end_connection
from edgeml.core.limits import Limits
from edgeml.core.refusals import Refusals
from edgeml.core.tls import NO_KEY

__all__ = ["Address", "Sockets"]

_log = logging.getLogger(__name__)

Address = tuple[str, int]

_PERIOD = 1.0  # seconds between two checks, at least
# What a look takes, 20 us for each file that the process has open, is a tenth of the time at most
# while others shake hands, and a hundredth otherwise.
_SPARE_HASTE, _SPARE = 10, 100
_SILENCE = 60.0  # seconds between two lines in the log about a want of descriptors, at least
_GLANCE = 0.1  # seconds between two looks at what is half sent, at least
_ONE = 16 << 20  # bytes that may be half sent, whatever the limits: of one connection, and in all


class _Flow:
    """What has come over one connection."""

    def __init__(self) -> None:
        self.requests = 0  # that are being received
        self.given = 0  # bytes of them that the server was given
        self.before = 0  # bytes received when none was


class Sockets:
    """Watches over the connections of one server.

    Args:
        later: calls a function in so many seconds.
        limits: how many one address may have.
        refusals: where those that fail are counted.
        secured: whether each has to shake hands by keys.
    """

    def __init__(
        self,
        later: Callable[..., object],
        limits: Limits,
        refusals: Refusals,
        secured: bool,
    ) -> None:
        self._later = later
        self._flows: dict[Address, _Flow] = {}
        self._watching = False
        self._limits = limits
        self._refusals = refusals
        self._secured = secured
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        self._begun = 0  # handshakes
        self._shaken = 0  # that came to something
        self._failed = 0  # that are counted as failed
        self._descriptors: dict[Address, int] = {}  # in the order in which they were seen
        self._asked: set[Address] = set()
        self._ended: list[Address] = []  # which had asked for nothing
        self._silent = 0.0  # until then about a want of descriptors
        self._next = 0.0  # before which `begin` doesn't look
        self.port = 0
        """Of the server; 0 before it has one."""

    def begin(self) -> None:
        """Note that a handshake begins; in any thread, several at a time."""
        with self._counting:
            self._begun += 1
        self._glance()

    def _glance(self) -> None:
        """Look, but not all the time, and not if another thread does."""
        if time.monotonic() >= self._next and self._lock.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._lock.release()

    def ask(self, address: Address) -> None:
        """Note that something was asked from there, by whoever had shaken hands."""
        if address not in self._asked:
            self._asked.add(address)
            self._shaken += 1

    @contextmanager
    def receiving(self, address: Address) -> Iterator[_Flow]:
        """While a request is being received from there; say how much was, in its ``given``."""
        flow = self._flows.get(address)
        if flow is None:
            flow = self._flows[address] = _Flow()
        flow.requests += 1
        if not self._watching:
            self._watching = True
            self._later(_GLANCE, self._watch)
        try:
            yield flow
        finally:
            flow.requests -= 1

    def _watch(self) -> None:
        """Cut off those of whose half sent requests gRPC holds too much; soon again, if any are."""
        began = time.monotonic()
        self._watching = False
        held: dict[Address, int] = {}
        for address, flow in list(self._flows.items()):
            if address not in self._descriptors:  # it is new, or has gone
                self._glance()
            descriptor = self._descriptors.get(address)
            received = 0 if descriptor is None else _count_received(descriptor, address)
            if flow.requests:
                held[address] = received - flow.given - flow.before
            else:
                flow.before = received - flow.given  # what isn't a request's
                if received == 0:
                    del self._flows[address]
        left = max(self._limits.bytes, _ONE)
        each = max(self._limits.bytes_per_client, _ONE)
        for address, nbytes in sorted(held.items(), key=lambda item: item[1]):
            left -= nbytes
            if nbytes > each or left < 0:
                host, port = address
                _cut(self._descriptors[address], address)
                why = f"{nbytes} bytes of its requests are half sent (Limits.bytes_per_client)"
                self._refusals.note("Overloaded", f"{host}:{port}", host, why)
        if held and not self._watching:
            self._watching = True
            took = time.monotonic() - began
            self._later(max(_GLANCE, _SPARE_HASTE * took), self._watch)

    def check(self) -> float:
        """Cut off those beyond the limit, and count them and those that failed.

        Returns:
            In how many seconds to do it again.
        """
        begun = self._begun
        with self._lock:
            took = self._look()
            ended, self._ended = self._ended, []
            known = list(self._descriptors.items())
        if self._secured:
            for host, port in ended:
                self._refusals.note("PermissionDenied", f"{host}:{port}", host, NO_KEY)
            self._failed += len(ended)
            under_way = sum(address not in self._asked for address, _ in known)
            # Those that were over before anybody looked, whose addresses nobody knows.
            unseen = begun - self._shaken - under_way - self._failed
            if unseen > 0:
                self._failed += unseen
                self._refusals.count("PermissionDenied", unseen)
        most = self._limits.connections_per_address
        counts: Counter[str] = Counter()
        for (host, port), descriptor in known:
            counts[host] += 1
            if counts[host] > most and _cut(descriptor, (host, port)):
                why = f"it has {most} connections (Limits.connections_per_address)"
                self._refusals.note("Overloaded", f"{host}:{port}", host, why)
        return max(_PERIOD, _SPARE * took)

    def _look(self) -> float:
        began = time.monotonic()
        asked = self._asked.copy()  # by those who were there before
        try:
            found = _find(self.port) if self.port else {}
        except OSError as error:  # out of descriptors: what is known stays so
            self._next = began + _PERIOD
            if began >= self._silent:
                self._silent = began + _SILENCE
                _log.warning("port %d can't see who is connected for now: %s", self.port, error)
            return 0.0
        gone = self._descriptors.keys() - found.keys()
        self._ended.extend(gone - self._asked)
        for address in gone:
            del self._descriptors[address]
        self._asked -= asked - found.keys()
        for address, descriptor in found.items():
            self._descriptors[address] = descriptor
        now = time.monotonic()
        self._next = now + _SPARE_HASTE * (now - began)
        return now - began


def _find(port: int) -> dict[Address, int]:
    """This process's TCP connections from a port, by the peer's address, with their descriptors."""
    found = {}
    for descriptor in map(int, os.listdir("/dev/fd")):
        with suppress(OSError), borrow(descriptor) as sock:
            if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.getsockname()[1] == port:
                found[_address_of(sock)] = descriptor  # or OSError, if it listens
    return found


def _count_received(descriptor: int, address: Address) -> int:
    """Bytes that a connection has received; 0 where that can't be told."""
    with suppress(OSError, AttributeError, struct.error), borrow(descriptor) as sock:
        if _address_of(sock) == address:
            return count_received(sock)[1]
    return 0


def _cut(descriptor: int, address: Address) -> bool:
    """End a connection, unless its descriptor has become another's."""
    return end_connection(descriptor, lambda sock: _address_of(sock) == address)


def _address_of(sock: socket.socket) -> Address:
    host, port = sock.getpeername()[:2]
    return host.removeprefix("::ffff:").partition("%")[0], port  # as gRPC writes it
