"""Who is connected to a ROUTER: how many from one address, for how long, and with what half sent.

libzmq tells of connections by messages on a socket of their own, and hands out whole messages
only; how much has come of one, the system is asked.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from edgeml.core import Limits, Peer
from edgeml.core.descriptors import borrow, count_received, end_connection
from edgeml.core.quota import Held, Quota

__all__ = ["Connection", "Connections"]

_EVENTS = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_LITTLE = 1 << 16  # bytes of a message that may lie about, and of answers that may be unread
_LOOKS = 4  # by which libzmq has freed what it had of connections that were cut off
_PAGE = os.sysconf("SC_PAGE_SIZE")
_TCP = (socket.AF_INET6, socket.SOCK_STREAM, 0)  # said, so that the system need not be asked


class Connection:
    """One connection, from its first byte to its last.

    Attributes:
        descriptor: libzmq's.
        peer: who is there.
        spoke: whether a whole message has come.
        lines: the clients that come by it, by return address: one, unless it is a proxy's.
        waiting: requests that wait until others are answered.
        taken: bytes of all messages that have been taken from it, as they came over TCP.
    """

    def __init__(self, descriptor: int, address: tuple[Any, ...]) -> None:
        self.descriptor = descriptor
        self.address = address
        host = str(address[0]).removeprefix("::ffff:")
        name = f"groot://[{host}]" if ":" in host else f"groot://{host}"
        self.peer = Peer(secrets.token_hex(8), f"{name}:{address[1]}", host)
        self.since = time.monotonic()
        self.spoke = False
        self.lines: dict[tuple[bytes, ...], Any] = {}
        self.waiting = 0
        self.taken = 0
        self.seen = (0, 0)  # bytes received and taken, at the last look
        self.base = 0  # bytes of memory of this process when half a message was first seen, or 0
        self.ending = False
        self._uncounted = 0  # bytes of answers since the last that was counted
        self._unread: deque[tuple[zmq.MessageTracker, Held]] = deque()

    def hold(self, answer: bytes, quota: Quota) -> Held | None:
        """Count an answer among what the peer has not read; None while that is little.

        Raises:
            Overloaded: it has not read too much.
        """
        self.note_read()
        size = self._uncounted + len(answer)
        held = quota.take(self.peer, size) if size > _LITTLE else None
        self._uncounted = 0 if held else size
        return held

    def sent(self, tracker: zmq.MessageTracker, held: Held) -> None:
        """Count an answer, and what was sent before it, until libzmq has written it."""
        self._unread.append((tracker, held))

    def note_read(self) -> None:
        """Count no more what has been written."""
        while self._unread and self._unread[0][0].done:
            self._unread.popleft()[1].release()

    def release(self) -> None:
        """Count nothing of it, as it has ended."""
        while self._unread:
            self._unread.popleft()[1].release()


class Connections:
    """Watches over a ROUTER's connections; for one thread at a time.

    Args:
        router: not bound yet.
        limits: of connections and of what is half sent.
        largest: bytes of a message; libzmq cuts off who sends more in one frame.
        note: is given the kind of each refusal, whom it met, and why.
        forget: is given each connection that has ended.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        router: zmq.Socket[bytes],
        limits: Limits,
        largest: int,
        note: Callable[[str, Peer, str], object],
        forget: Callable[[Connection], object],
    ) -> None:
        self.port = 0
        self._limits = limits
        self._largest = largest + _LITTLE
        self._note = note
        self._forget = forget
        self._by_descriptor: dict[int, Connection] = {}
        self._hosts: Counter[str] = Counter()
        self._silent: dict[str, dict[int, Connection]] = {}  # of each host, by descriptor
        self._failed: int | None = None  # what was said of the handshake that ends next
        self._trim = 0  # looks until memory is given back
        self._router = router
        address = f"inproc://{secrets.token_hex(8)}.monitor"
        router.monitor(address, _EVENTS)
        self.monitor: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        self.monitor.linger = 0
        self.monitor.rcvhwm = 0  # never full, since libzmq's own thread would wait for that
        self.monitor.connect(address)

    def __iter__(self) -> Iterator[Connection]:
        return iter(list(self._by_descriptor.values()))

    def find(self, descriptor: int, address: tuple[bytes, ...]) -> Connection | None:
        """Return the connection by which a message has come; None if it has ended since.

        Args:
            descriptor: libzmq's, which may have been another's a moment ago.
            address: whom the message is from.
        """
        there = self._by_descriptor.get(descriptor)
        if there is None or address not in there.lines or address[0][:1] != b"\0":
            self.follow()  # names that libzmq gives are never given again; all others may be
            there = self._by_descriptor.get(descriptor)
        return there

    def follow(self) -> None:
        """Take notice of what has happened."""
        with suppress(zmq.Again):
            while True:
                event = parse_monitor_message(self.monitor.recv_multipart(zmq.DONTWAIT))
                kind, value = event["event"], event["value"]
                if kind == zmq.EVENT_ACCEPTED:
                    self._accept(value)
                elif kind == zmq.EVENT_DISCONNECTED:
                    self._end(value)
                elif kind != zmq.EVENT_MONITOR_STOPPED:  # this one's end is told of next
                    self._failed = 0 if kind == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL else value

    def close(self) -> None:
        """Watch no more."""
        self._router.disable_monitor()
        self.monitor.close()

    def _accept(self, descriptor: int) -> None:
        try:
            with borrow(descriptor, _TCP) as sock:
                if sock.getsockname()[1] != self.port:
                    return  # somebody else's by now
                made = Connection(descriptor, sock.getpeername())
        except OSError:
            return  # it has gone already
        self._end(descriptor)  # of which nothing was told
        self._by_descriptor[descriptor] = made
        host = made.peer.host
        self._hosts[host] += 1
        silent = self._silent.setdefault(host, {})
        silent[descriptor] = made
        most = self._limits.connections_per_address
        if self._hosts[host] > most:
            why = f"it has {most} connections already (Limits.connections_per_address)"
            self.cut(next(iter(silent.values())), "Overloaded", why)  # the oldest

    def meet(self, connection: Connection) -> None:
        """Take notice that a connection has said something."""
        connection.spoke = True
        self._silent.get(connection.peer.host, {}).pop(connection.descriptor, None)

    def _end(self, descriptor: int) -> None:
        failed, self._failed = self._failed, None
        ended = self._by_descriptor.pop(descriptor, None)
        if ended is None:
            return
        host = ended.peer.host
        self._hosts[host] -= 1
        if not self._hosts[host]:
            del self._hosts[host], self._silent[host]
        else:
            self._silent[host].pop(descriptor, None)
        ended.release()
        self._forget(ended)
        if failed is None or ended.ending:
            return
        if failed:
            self._note("Malformed", ended.peer, "its handshake is not ZeroMQ's")
        elif time.monotonic() - ended.since >= 0.9 * self._limits.handshake:
            self._note("HandshakeTimeout", ended.peer, "its handshake took too long")

    def cut(self, connection: Connection, kind: str, why: str) -> None:
        """End a connection."""
        connection.ending = True
        self._silent[connection.peer.host].pop(connection.descriptor, None)
        self._note(kind, connection.peer, why)
        address = connection.address
        end_connection(
            connection.descriptor, lambda sock: bool(sock.getpeername() == address), _TCP
        )

    # What is half sent ----------------------------------------------------------------

    def look(self) -> None:
        """Look, every now and then, at all that are connected."""
        self.follow()
        unfinished: list[tuple[int, Connection]] = []  # with the bytes of each
        for each in self:
            each.note_read()
            if each.ending or sys.platform != "linux":
                continue
            with suppress(OSError):
                if under_way := self._look_at(each):
                    unfinished.append((under_way, each))
                    each.base = each.base or _resident()
                    continue
            each.base = 0
        if self._trim:
            self._trim -= 1
            _give_memory_back()
        most = max(self._limits.bytes, self._limits.message_bytes)
        unfinished.sort(key=lambda found: found[0])
        while sum(under_way for under_way, _ in unfinished) > most:
            _, largest = unfinished.pop()
            self.cut(largest, "Overloaded", "too much of too many messages is under way")
            self._trim = _LOOKS
        self._look_at_memory([each for _, each in unfinished])

    def _look_at(self, connection: Connection) -> int:
        """Return how many bytes of an unfinished message have come; 0 for few, or too many."""
        with borrow(connection.descriptor, _TCP) as sock:
            idle, received = count_received(sock)
        before, connection.seen = connection.seen, (received, connection.taken)
        under_way = received - connection.taken
        if under_way < _LITTLE or connection.taken != before[1]:
            return 0  # or the loop is taking what there is
        if under_way > self._largest:
            self.cut(connection, "Malformed", f"a message of {under_way} bytes and more")
        elif idle > self._limits.stall * 1e3 and received == before[0]:
            self.cut(connection, "Stalled", "no further byte of a message came for long")
        else:
            return under_way
        return 0

    def _look_at_memory(self, unfinished: list[Connection]) -> None:
        """Cut off the oldest with half a message if the process has grown by more than has come.

        libzmq takes 64 bytes for each frame, however small, and tells of none before the last one.
        Something else may be what grows: then a client has to send once more.
        """
        if unfinished:
            oldest = min(unfinished, key=lambda each: each.base)
            allowed = self._limits.bytes_per_client + 4 * oldest.seen[0]
            if oldest.base and _resident() - oldest.base > allowed:
                self.cut(oldest, "Overloaded", "a message of countless small frames, it seems")
                self._trim = _LOOKS


def _give_memory_back() -> None:
    """Have the C library give back what it keeps of freed memory, if it is one that can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident() -> int:
    """Bytes of memory that this process uses; 0 if Linux doesn't tell."""
    with suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * _PAGE
    return 0
