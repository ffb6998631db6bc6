"""Watches over a ROUTER's connections: who comes in, how many, and how long they take over it.

It has a thread of its own. libzmq tells of connections, and asks who may come in, by messages on
sockets of their own; so the listener's loop waits for its ROUTER alone, as fast as ever, and a
handshake never waits for a handler. What libzmq calls a peer and what the system calls a
connection meet in a message, which brings the number of its connection's descriptor.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import secrets
import socket
import sys
import termios
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from edgeml.core.advice import what_to_do
from edgeml.core.descriptors import borrow, count_received, end_connection
from edgeml.core.errors import PermissionDenied
from edgeml.core.limits import Limits
from edgeml.core.security import Keyring
from edgeml.core.transport import Peer
from edgeml.core.url import Url
from edgeml.transports.zmq.curve import ZAP, answer_zap
from edgeml.transports.zmq.sockets import open_socket

__all__ = ["Guard", "Remote"]

_log = logging.getLogger(__name__)

_EVENTS = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_MONITOR_STOPPED
)
_MISMATCH = 0x11000002  # ZMQ_PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH: one side has keys
_CRYPTOGRAPHIC = 0x11000001  # ZMQ_PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC: made for another server's key
_TICK = 0.25  # seconds between two looks at those that are connected
_SPARE = 8  # descriptors that are kept for when there are no others
_PAGE = os.sysconf("SC_PAGE_SIZE")
_MOST_TOLD = 1000  # addresses and reasons that have been logged
_UNSEEN = 1 << 16  # bytes of a message that may lie about: of handshakes, say, which nobody counts
_HANDSHAKE = 64 + 27  # bytes that one takes at least: a greeting, and READY
_CURVE_HANDSHAKE = 64 + 202 + 259  # a greeting, HELLO, and INITIATE, which takes a key
_TCP = (socket.AF_INET6, socket.SOCK_STREAM, 0)  # said, so that the system need not be asked


class Remote:
    """A peer as the listener's loop knows it, by the routing id that a ROUTER has for it.

    Attributes:
        routing_id: as libzmq has it.
        peer: who it is.
        descriptor: of its connection.
        key: that it has shown, in Z85; empty without keys.
        taken: bytes, as they came over TCP, of all messages that the loop has taken from it.
        sent: bytes of all replies given to libzmq.
        written: how many of them libzmq has written for sure; the others may be unread.
        marked: how many of them there were when the last one was marked.
    """

    __slots__ = (
        "_marks",
        "descriptor",
        "key",
        "marked",
        "peer",
        "routing_id",
        "sent",
        "taken",
        "written",
    )

    def __init__(self, routing_id: bytes, peer: Peer, descriptor: int, key: str) -> None:
        self.routing_id = routing_id
        self.peer = peer
        self.descriptor = descriptor
        self.key = key
        self.taken: float = 0
        self.sent = 0
        self.written = 0
        self.marked = 0
        self._marks: deque[_Mark] = deque()

    @property
    def marks(self) -> int:
        """How many marks there are of which libzmq has told nothing yet."""
        return len(self._marks)

    def mark(self, view: memoryview) -> None:
        """Have the end of this view tell that all that was sent until now has been written.

        It is the last frame of a message, sent from where it lies: libzmq lets go of it when it has
        written it, and all before it.
        """
        self.marked = self.sent
        self._marks.append(_Mark(view, self))

    def reach(self, mark: _Mark) -> None:
        """Take notice that libzmq has written what was sent until this mark."""
        self.written = max(self.written, mark.sent)
        with suppress(IndexError):
            while self._marks.popleft() is not mark:
                pass


class _Mark(weakref.ref[memoryview]):
    """Tells a peer when libzmq has let go of a view; pyzmq's own trackers cost more."""

    __slots__ = ("remote", "sent")

    def __new__(cls, view: memoryview, remote: Remote) -> _Mark:
        return super().__new__(cls, view, _tell)

    def __init__(self, view: memoryview, remote: Remote) -> None:
        super().__init__(view, _tell)  # type: ignore[call-arg]
        self.remote = remote
        self.sent = remote.sent


def _tell(mark: Any) -> None:
    mark.remote.reach(mark)


class _Link:
    """A connection of the ROUTER's."""

    __slots__ = ("address", "base", "host", "remote", "seen", "since", "told")

    def __init__(self, address: tuple[Any, ...]) -> None:
        self.address = address
        self.host = str(address[0]).removeprefix("::ffff:")
        self.since = time.monotonic()
        self.remote: Remote | None = None  # once it has said something
        self.seen: tuple[int, float] = (0, 0)  # bytes received and taken, at the last look
        self.told = False  # that it is about to end
        self.base = 0  # bytes that the process had when half a message was first seen, or 0

    @property
    def name(self) -> str:
        return f"{self.host}:{self.address[1]}"


class Guard:
    """The thread that watches over one ROUTER.

    Args:
        url: where it serves; for people to read.
        limits: of connections.
        keyring: whom to let in; None for everybody.
        count: is told, from this thread, the kind of each refusal.
        forget: is given each peer whose connection has ended.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        router: zmq.Socket[bytes],
        limits: Limits,
        keyring: Keyring | None,
        count: Callable[[str], object],
        forget: Callable[[Remote], object],
    ) -> None:
        self.url: Url | None = None
        self._limits = limits
        self._keyring = keyring
        self._count = count
        self._forget = forget
        self._links: dict[int, _Link] = {}
        self._unmet: dict[int, _Link] = {}  # those that may not have shaken hands yet
        self._hosts: Counter[str] = Counter()
        self._spoke: deque[Remote] = deque()
        self._failed: int | None = None  # what was said of the handshake that ends next
        self._told: set[tuple[str, str]] = set()
        self._spare: list[int] = []
        # Not to be full before it is read: libzmq's own thread would wait for that.
        address = f"inproc://{secrets.token_hex(8)}.monitor"
        router.monitor(address, _EVENTS)
        self._monitor = open_socket(context, zmq.PAIR)
        self._monitor.rcvhwm = 0
        self._monitor.connect(address)
        self._zap = open_socket(context, zmq.REP)
        if keyring is not None:
            self._zap.bind(ZAP)

    def start(self, url: Url) -> None:
        """Watch from now on; it ends when the ROUTER's monitor does."""
        self.url = url
        self._keep_spare()
        self._thread = threading.Thread(target=self._run, name=f"edgeml guards {url}", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join(5.0)

    def meet(self, remote: Remote) -> None:
        """Take notice, from the loop, that a peer has said something."""
        self._spoke.append(remote)

    def cut(self, remote: Remote) -> None:
        """End a peer's connection; from any thread."""
        if (link := self._links.get(remote.descriptor)) is not None:
            _shut(remote.descriptor, link.address)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._monitor, zmq.POLLIN)
        poller.register(self._zap, zmq.POLLIN)
        due = time.monotonic() + _TICK
        try:
            while True:
                left = max(0.0, due - time.monotonic())
                ready = dict(poller.poll(math.ceil(left * 1e3)))
                try:
                    if self._zap in ready:
                        self._answer()
                    if self._monitor in ready and self._follow():
                        return
                    if time.monotonic() >= due:
                        due = time.monotonic() + _TICK
                        self._look()
                except zmq.ContextTerminated:
                    return
                except Exception:  # MemoryError, say: who watches has to go on
                    with suppress(Exception):
                        _log.exception(
                            "%s: watching over connections failed, and goes on", self.url
                        )
        finally:
            self._release_spare()
            self._monitor.close()
            self._zap.close()

    # Who comes in ------------------------------------------------------------------------

    def _answer(self) -> None:
        """Answer libzmq's question whether a key may come in."""
        assert self._keyring is not None
        request = self._zap.recv_multipart()
        answer, address, why = answer_zap(self._keyring, request)
        self._zap.send_multipart(answer)
        if why:
            self._refuse("PermissionDenied", address, why)

    def _follow(self) -> bool:
        """Take in what has happened to connections; True once there is nothing to watch."""
        with suppress(zmq.Again):
            while True:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.DONTWAIT))
                kind, value = event["event"], event["value"]
                if kind == zmq.EVENT_MONITOR_STOPPED:
                    return True
                if kind == zmq.EVENT_ACCEPTED:
                    self._accept(value)
                elif kind == zmq.EVENT_DISCONNECTED:
                    self._end(value)
                else:  # and this connection's end is what is told of next
                    self._failed = value if kind == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL else 0
        return False

    def _accept(self, descriptor: int) -> None:
        full = not self._spare
        try:
            link = self._find_link(descriptor)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                return  # it has gone already
            full = True
            self._release_spare()
            try:
                link = self._find_link(descriptor, duplicate=False)
            except OSError:
                return
        if link is None:
            return
        self._end(descriptor)  # of which nothing was told
        self._links[descriptor] = self._unmet[descriptor] = link
        self._hosts[link.host] += 1
        if self._hosts[link.host] > self._limits.connections_per_address:
            most = self._limits.connections_per_address
            self._make_room(link.host, f"it has {most} connections already")
        elif full:
            why = f"this process has no files left{what_to_do(errno.EMFILE)}"
            self._make_room(self._hosts.most_common(1)[0][0], why)

    def _find_link(self, descriptor: int, *, duplicate: bool = True) -> _Link | None:
        """Look at a connection; None if somebody else's has its descriptor by now."""
        with borrow(descriptor, _TCP, duplicate=duplicate) as sock:
            if self.url is None or sock.getsockname()[1] != self.url.port:
                return None
            return _Link(sock.getpeername())

    def _make_room(self, host: str, why: str) -> None:
        """End the oldest connection from a host that has not shaken hands, or else its newest."""
        victim = None
        met = []
        for descriptor, link in self._unmet.items():  # the oldest first
            if self._has_met(descriptor, link):
                met.append(descriptor)
            elif link.host == host and not link.told:
                victim = descriptor
                break
        for descriptor in met:
            del self._unmet[descriptor]
        if victim is None:
            newest = reversed(self._links.items())
            of_host = (each for each, link in newest if link.host == host and not link.told)
            victim = next(of_host, None)
        if victim is not None:
            self._cut(victim, "Overloaded", why)

    def _has_met(self, descriptor: int, link: _Link) -> bool:
        """Whether enough has come over a connection for a handshake; libzmq tells of no one's."""
        if link.remote is not None or sys.platform != "linux":
            return True
        with suppress(OSError), borrow(descriptor, _TCP) as sock:
            return count_received(sock)[1] >= (
                _HANDSHAKE if self._keyring is None else _CURVE_HANDSHAKE
            )
        return True  # it has gone

    def _end(self, descriptor: int) -> None:
        failed, self._failed = self._failed, None
        link = self._links.pop(descriptor, None)
        self._unmet.pop(descriptor, None)
        name, since = "somebody who has gone", math.inf
        if link is not None:
            name, since = link.name, link.since
            self._hosts[link.host] -= 1
            if not self._hosts[link.host]:
                del self._hosts[link.host]
            if link.remote is not None:
                self._forget(link.remote)
            if link.told:
                return
        if failed == _MISMATCH and self._keyring is not None:
            self._refuse("PermissionDenied", name, "it has no keys")
        elif failed == _CRYPTOGRAPHIC:
            self._refuse("PermissionDenied", name, "it has the key of another server")
        elif failed:
            self._refuse("Malformed", name, "its handshake is not this server's")
        elif failed == 0 and time.monotonic() - since >= 0.9 * self._limits.handshake:
            self._refuse("HandshakeTimeout", name, "its handshake took too long")

    # Who is connected --------------------------------------------------------------------

    def _note_who_spoke(self) -> None:
        with suppress(IndexError):
            while True:
                remote = self._spoke.popleft()
                if (link := self._links.get(remote.descriptor)) is None:
                    self._forget(remote)  # its last message was taken when it had gone
                    continue
                if link.remote is not None and link.remote is not remote:
                    self._forget(link.remote)
                    remote.taken = math.inf  # how much of it the other one had, nobody knows
                link.remote = remote

    def _look(self) -> None:
        """Look, every now and then, at all that are connected."""
        self._note_who_spoke()
        self._keep_spare()
        if self._keyring is not None:
            self._look_for_revoked(self._keyring)
        if sys.platform == "linux":
            self._look_for_unfinished()

    def _look_for_revoked(self, keyring: Keyring) -> None:
        """End connections whose key is no longer let in; core has the keyring read again."""
        for descriptor, link in list(self._links.items()):
            if link.remote is None or link.told:
                continue
            try:
                known = keyring.by_name(link.remote.peer.identity or "").curve
            except PermissionDenied as error:
                self._cut(descriptor, "PermissionDenied", str(error))
            else:
                if known != link.remote.key:
                    self._cut(descriptor, "PermissionDenied", "its key has been replaced")

    def _look_for_unfinished(self) -> None:
        """End connections with half a message of which too much has come, or nothing for long.

        libzmq hands out whole messages, and knows no bound for one of many frames; but what a peer
        has sent, less what was taken from it, is what it has under way.
        """
        unfinished: dict[int, float] = {}  # bytes of each
        for descriptor, link in list(self._links.items()):
            if link.told:
                continue
            with suppress(OSError), borrow(descriptor, _TCP) as sock:
                idle, received = count_received(sock)
                taken = 0 if link.remote is None else link.remote.taken
                before, link.seen = link.seen, (received, taken)
                under_way = received - taken
                if under_way < _UNSEEN or taken != before[1]:
                    pass  # the loop takes what there is
                elif under_way > self._limits.message_bytes:
                    self._cut(descriptor, "Malformed", f"a message of {under_way} bytes and more")
                elif (
                    idle > self._limits.stall * 1e3 and received == before[0] and not _waiting(sock)
                ):
                    self._cut(descriptor, "Stalled", "no further byte of a message came for long")
                else:
                    unfinished[descriptor] = under_way
                    link.base = link.base or _resident()
                    continue
            link.base = 0
        most = max(self._limits.bytes, self._limits.message_bytes)
        total = sum(unfinished.values())
        for descriptor in sorted(unfinished, key=unfinished.__getitem__, reverse=True):
            if total <= most:
                break
            self._cut(descriptor, "Overloaded", "too much of too many messages is under way")
            total -= unfinished.pop(descriptor)
        self._look_at_memory(unfinished)

    def _look_at_memory(self, unfinished: dict[int, float]) -> None:
        """End the oldest of half messages if the process has grown by far more than has come.

        libzmq takes 64 bytes for each frame, however small, and tells of none before the last one
        has come. Something else may be what grows; then a client has to send once more.
        """
        links = [
            (self._links[each].base, each) for each in unfinished if not self._links[each].told
        ]
        if not links:
            return
        base, oldest = min(links)
        if (
            base
            and _resident() - base > self._limits.bytes_per_client + 4 * self._links[oldest].seen[0]
        ):
            self._cut(oldest, "Overloaded", "a message of countless small frames, it seems")

    def _keep_spare(self) -> None:
        """Keep descriptors for later, or let go of them if there are no others.

        libzmq's own thread goes on and on over a connection for which it has no descriptor. With
        the spare ones it has, and those that come are ended, until there are enough again.
        """
        if self._spare:
            try:
                os.close(os.dup(self._spare[0]))
            except OSError:
                self._release_spare()
            return
        try:
            while len(self._spare) < 2 * _SPARE:
                self._spare.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
            while len(self._spare) > _SPARE:
                os.close(self._spare.pop())
        except OSError:
            self._release_spare()

    def _release_spare(self) -> None:
        while self._spare:
            os.close(self._spare.pop())

    def abandon(self) -> None:
        """Let go, in a forked child."""
        self._release_spare()

    # What is told ------------------------------------------------------------------------

    def _cut(self, descriptor: int, kind: str, why: str) -> None:
        link = self._links[descriptor]
        link.told = True
        self._refuse(kind, link.name, why)
        _shut(descriptor, link.address)

    def _refuse(self, kind: str, address: str, why: str) -> None:
        told = (address.rpartition(":")[0] or address, why)  # with any port
        if told not in self._told:
            if len(self._told) >= _MOST_TOLD:
                self._told.clear()
            self._told.add(told)
            _log.warning("%s refuses %s: %s (told once for this address)", self.url, address, why)
        self._count(kind)  # last: who sees it counted finds it logged


def _resident() -> int:
    """Bytes of memory that this process uses, as Linux tells; 0 if no file can be opened."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * _PAGE
    except OSError:
        return 0


def _shut(descriptor: int, address: tuple[Any, ...]) -> None:
    """End the connection to this address, which has that descriptor unless it has ended already."""
    end_connection(descriptor, lambda sock: bool(sock.getpeername() == address), _TCP)


def _waiting(sock: socket.socket) -> bool:
    """Whether bytes lie in the system's buffer, as libzmq doesn't take them."""
    return any(fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4)))
