"""The server's end: a ROUTER, and the loop that alone touches it, whichever thread carries that."""

# ruff: noqa: D102 - what has no docstring is described in `edgeml.core.transport`

from __future__ import annotations

import logging
import math
import secrets
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, cast

import zmq

from edgeml.core import (
    Credentials,
    Endpoint,
    Limits,
    Message,
    OnRequest,
    Peer,
    PermissionDenied,
    Reply,
    Url,
    find_address,
    own,
    tell_url,
)
from edgeml.core.backlog import Backlog
from edgeml.core.carrier import Carrier, Stay
from edgeml.core.forks import drop_sockets, leave_to_parent, watch_forks
from edgeml.core.url import is_loopback
from edgeml.transports.zmq.curve import lock, server_keys
from edgeml.transports.zmq.guard import Guard, Remote
from edgeml.transports.zmq.sockets import (
    DROPPED,
    LARGEST_FRAME,
    MOST_BUFFERS,
    MOST_PENDING,
    NUMBER,
    WHO,
    ZERO_COPY,
    check,
    frame_on_wire,
    open_router,
    open_socket,
    receive,
    send,
    size_on_wire,
    start_collector,
)

__all__ = ["Listener"]

_log = logging.getLogger(__name__)

_LINGER = 200  # ms that an endpoint which closes gives to what is still to be sent
_MOST_AT_ONCE = 64  # messages that are received before a handler runs again
_EVENTS, _IN = int(zmq.EVENTS), int(zmq.POLLIN)
_MORE_NOW = int(zmq.SNDMORE | zmq.DONTWAIT)  # a plain int: enum flags cost a microsecond


_STEP = 1 << 25  # bytes of replies of which one tells when it has been written
_SEALED = 33  # bytes that CURVE adds to each frame
_LITTLE = 1 << 16  # bytes of replies that anybody may have unread
_KEPT = 1 << 16  # bytes of a first frame that is kept until its reply has been given


class _Reply:
    __slots__ = ("_head", "_listener", "_number", "_peer", "_remote")

    def __init__(self, listener: Listener, remote: Remote, number: bytes, head: zmq.Frame) -> None:
        self._listener = listener
        self._remote = remote
        self._number = number
        self._head: zmq.Frame | None = head
        if len(head) > _KEPT:
            self._peer = self.peer
            self._head = None

    @property
    def peer(self) -> Peer:
        if self._head is None:
            return self._peer
        return self._listener.identify(self._remote, self._head)

    @property
    def expired(self) -> bool:
        return False  # a ROUTER learns that a peer has gone only when it sends

    def __call__(self, message: Message) -> None:
        check(message)
        if not self._listener.send_inline(self._remote, self._number, message):
            self._listener.post([(self._remote, self._number, own(message))])

    def address(self, message: Message) -> tuple[Remote, bytes, Message]:
        """Return this reply as the outbox takes it."""
        return self._remote, self._number, message


class Listener(Endpoint):
    """Serves at one address; see `Endpoint`."""

    def __init__(
        self, url: Url, on_request: OnRequest, credentials: Credentials | None, limits: Limits
    ) -> None:
        start_collector()
        self._keyring = server_keys(credentials)
        self.secured = self._keyring is not None
        self._on_request = on_request
        self._most_buffers = min(limits.buffers, MOST_BUFFERS)
        self._most_bytes = limits.message_bytes
        self._most_unread = limits.replies_per_client
        self._step = self._widest = min(_STEP, self._most_unread // 4)
        self._most_of_all = limits.bytes
        self._share = math.inf  # bytes that one may have unread, as far as that is known
        self._given = 0  # bytes since all were weighed
        self._sealed = _SEALED if self.secured else 0
        self._remotes: dict[bytes, Remote] = {}
        self._counting = threading.Lock()
        self._context: zmq.Context[Any] = zmq.Context()
        self._router = open_router(self._context)
        self._router.router_mandatory = True
        self._router.sndhwm = 2 * MOST_PENDING  # more than an honest client has under way
        largest = min(LARGEST_FRAME, limits.message_bytes + NUMBER.size)
        self._router.maxmsgsize = largest + self._sealed
        self._router.handshake_ivl = max(1, int(limits.handshake * 1e3))
        self._door = open_socket(self._context, zmq.DEALER)
        self._door_id = secrets.token_bytes(16)
        self._door.routing_id = self._door_id
        self._door.sndhwm = 0
        try:
            self._guard = Guard(
                self._context, self._router, limits, self._keyring, self.count, self._forget
            )
            if credentials is not None and self.secured:
                lock(self._router, credentials)
            self.url = self._bind(url)
        except BaseException:
            with suppress(zmq.ZMQError):
                self._router.disable_monitor()
            self._context.destroy(linger=0)
            raise
        self._guard.start(self.url)
        # Connected before any peer can be, so nobody else can have taken its name.
        self._router.bind(f"inproc://{self._door_id.hex()}")
        self._door.connect(f"inproc://{self._door_id.hex()}")
        self._outbox: list[tuple[Remote, bytes, Message]] = []
        self._woken = False
        self._backlog = Backlog()
        self._torn = False  # whether a round ended in the middle of a message
        self._closed = False
        self._carrier = Carrier(f"edgeml {self.url}", self._run_rounds, self._wake, self._end)
        self._carrier.start()
        watch_forks(self)

    def _bind(self, url: Url) -> Url:
        address = find_address(url)
        self.local = is_loopback(address)
        self._router.ipv6 = "[" in address
        try:
            self._router.bind(f"tcp://{address}:{url.port or '*'}")
        except zmq.ZMQError as error:
            reason = f"cannot serve {url}: {error}; another port, or 0, may be free"
            raise OSError(error.errno, reason) from error
        bound = self._router.get_string(zmq.LAST_ENDPOINT)
        return tell_url(url, address, int(bound.rpartition(":")[2]))

    def _run_rounds(self, stay: Stay) -> bool:
        if self._torn:
            while self._router.getsockopt(zmq.RCVMORE):
                self._router.recv()
            self._torn = False
        try:
            if stay():
                self._take(self._wait())
                while not self._closed and stay():
                    self._take(self._wait())
            else:
                for _ in range(_MOST_AT_ONCE):
                    self._take(self._router.recv(zmq.DONTWAIT))
        except zmq.Again:
            self._backlog.clear()
        except MemoryError:
            self._torn = True
            self.count("Overloaded")
            with suppress(MemoryError):
                _log.error("%s: no memory for a message, which is dropped", self.url)
        except BaseException:  # Ctrl-C, in the thread that carries this
            self._torn = True
            raise
        return self._closed and self._empty_outbox()

    def _wait(self) -> bytes:
        """Return who sends the next message, once there is one."""
        if self._backlog.measured and not cast(int, self._router.getsockopt(_EVENTS)) & _IN:
            self._backlog.clear()
        return self._router.recv()

    @property
    def behind(self) -> float:
        return self._backlog.seconds

    def _take(self, routing_id: bytes) -> None:
        """Receive the rest of a message, and hand it over."""
        if routing_id == self._door_id:
            self._router.recv()
            self._empty_outbox()
            return
        remote = self._remotes.get(routing_id)
        try:
            head, number, message = receive(self._router, self._most_buffers)
            if remote is None:
                remote = self._meet(routing_id, head)
                if remote is None:
                    return
            if message.buffers:
                remote.taken += size_on_wire(number, message, self._sealed)
            else:
                remote.taken += frame_on_wire(len(head) + self._sealed)
        except BaseException:
            if remote is not None:
                remote.taken = math.inf  # it is not known any more
            raise
        if self.secured and remote.peer.identity is None:
            self.count("PermissionDenied")  # it was revoked just now
        elif len(number) < NUMBER.size or (
            message.buffers and message.nbytes > self._most_bytes  # one frame is never
        ):
            self.count("Malformed")
            _log.debug("%s: no message of ours from %s", self.url, remote.peer.address)
        else:
            reply = _Reply(self, remote, number, head)
            self._carrier.hand_over(self._on_request, message, reply)

    def _meet(self, routing_id: bytes, head: zmq.Frame) -> Remote | None:
        """Get to know who sends a first message; None if it had gone before it was looked at."""
        try:
            host = str(head.get("Peer-Address")).removeprefix("::ffff:")
            descriptor = int(head.get(zmq.SRCFD))
            # ZAP's, which a peer's own property of that name doesn't replace.
            key = str(head.get("User-Id")) if self._keyring is not None else ""
        except zmq.ZMQError:
            return None
        try:
            who = str(head.get(WHO))[:64]
        except zmq.ZMQError:  # no client of ours
            who = routing_id.hex()
        identity = None
        if self._keyring is not None:
            with suppress(PermissionDenied):
                identity = self._keyring.by_curve(key).name
        remote = Remote(routing_id, Peer(who, f"zmq://{host}", host, identity), descriptor, key)
        self._remotes[routing_id] = remote
        self._guard.meet(remote)
        return remote

    def identify(self, remote: Remote, head: zmq.Frame) -> Peer:
        """Return who sent a frame, which need not be who had this routing id before.

        Raises:
            PermissionDenied: its key has just been revoked, or it has gone.
        """
        try:
            if head.get(zmq.SRCFD) == remote.descriptor and (
                self._keyring is None or head.get("User-Id") == remote.key
            ):
                return remote.peer
        except zmq.ZMQError:
            pass
        met = self._meet(remote.routing_id, head)
        if met is None or (self.secured and met.peer.identity is None):
            raise PermissionDenied("who sent this has gone, or has no key any more")
        return met.peer

    def _forget(self, remote: Remote) -> None:
        if self._remotes.get(remote.routing_id) is remote:
            self._remotes.pop(remote.routing_id, None)

    def count(self, kind: str) -> None:
        """Count what this end refused or cut off; from any thread."""
        with self._counting:
            self.counts[kind] += 1

    def _empty_outbox(self) -> bool:
        """Send what other threads left."""
        with self._carrier.turn:
            outbox, self._outbox, self._woken = self._outbox, [], False
        for posted in outbox:
            self._send(*posted)
        return True

    def _end(self) -> None:
        with self._carrier.turn:
            self.dropped += len(self._outbox)
            self._outbox.clear()
            self._door.close()
        self._router.disable_monitor()  # the end of the guard
        self._router.close(linger=_LINGER)
        self._guard.join()
        self._context.term()

    def send_inline(self, remote: Remote, number: bytes, message: Message) -> bool:
        """Send a reply at once; False if this thread does not have the loop."""
        if not self._carrier.here:
            return False
        with self._carrier.turn:
            if not self._carrier.here:  # relieved just now
                return False
            self._send(remote, number, message)
        return True

    def _send(self, remote: Remote, number: bytes, message: Message) -> None:
        try:
            size = NUMBER.size + (message.nbytes if message.buffers else len(message.header))
            sent = remote.sent + size
            self._given += size
            if self._given * 16 > self._most_of_all:
                self._weigh()
            # One mark may have been written, and libzmq not have told of it yet.
            if remote.marks > 1 and (
                sent - remote.written > self._most_unread
                or remote.marked - remote.written + size > self._share
            ):
                self._drop(remote, number)
                return
            # Small buffers are copied by zmq as they are sent; large ones must be ours.
            if message.buffers and max(map(len, message.buffers)) >= ZERO_COPY:
                message = own(message)
            self._router.send(remote.routing_id, _MORE_NOW)
            remote.sent = sent
            mark = remote.mark if sent - remote.marked >= self._step else None
            send(self._router, number, message, mark=mark)
        except zmq.ZMQError as error:
            with self._carrier.turn:
                self.dropped += 1
            if error.errno == zmq.EAGAIN:  # too many unread ones, rather than nobody there
                self.count("Overloaded")
            why = error.strerror  # and not the error, with which a log could keep the reply
            _log.debug("%s: a reply to %s is dropped: %s", self.url, remote.peer.address, why)
        except BaseException:  # Ctrl-C: what comes next must not be taken for the rest of this
            with suppress(zmq.ZMQError):
                self._router.send(b"", zmq.DONTWAIT)
            raise

    def _weigh(self) -> None:
        """See what all peers together have not read, and what share of it each may have.

        What was sent after a peer's last mark may have been written or not: the more of that there
        is, the sooner marks are set.
        """
        self._given = 0
        half = self._most_of_all // 2
        remotes = list(self._remotes.values())
        unsure = sum(remote.sent - remote.marked for remote in remotes)
        self._step = min(self._widest, _LITTLE) if unsure > half else self._widest
        known = [remote.marked - remote.written for remote in remotes]
        slow = sum(unread > _LITTLE for unread in known)
        self._share = max(half // slow, _LITTLE) if sum(known) > half else math.inf

    def _drop(self, remote: Remote, number: bytes) -> None:
        """Send word that a reply is dropped, in place of it, to a peer that reads too slowly."""
        with self._carrier.turn:
            self.dropped += 1
        self.count("Overloaded")
        _log.debug(
            "%s: %s has %d bytes unread; a reply to it is dropped",
            self.url,
            remote.peer.address,
            remote.sent - remote.written,
        )
        self._router.send(remote.routing_id, _MORE_NOW)
        self._router.send(DROPPED, zmq.SNDMORE)
        self._router.send(number)

    def post(self, replies: list[tuple[Remote, bytes, Message]]) -> None:
        """Leave owned replies for the loop, with one wake for them all."""
        with self._carrier.turn:
            if self._carrier.over:
                self.dropped += len(replies)
            elif self._carrier.here:
                for posted in replies:
                    self._send(*posted)
            else:
                self._outbox += replies
                self._carrier.rouse()

    def _wake(self) -> None:
        if not self._woken:
            self._door.send(b"")
            self._woken = True  # last: Ctrl-C may come before it, but must not undo it

    def reply_many(self, replies: Iterable[Reply], message: Message) -> None:
        check(message)
        message = own(message)
        self.post([r.address(message) for r in replies if isinstance(r, _Reply)])

    def carry(self, stay: Stay) -> bool:
        return self._carrier.carry(stay)

    def wake(self) -> None:
        self._carrier.wake()

    def relieve(self) -> None:
        self._carrier.relieve()

    def abandon(self) -> None:
        """Forget everything, in a forked child, where the loop is not."""
        leave_to_parent(self)
        self._guard.abandon()
        self._counting = threading.Lock()  # whoever held it is not there
        if not self._carrier.over:
            drop_sockets(port=self.url.port)
        self._carrier.abandon()
        self._closed = True

    def close(self) -> None:
        with self._carrier.turn:
            self._closed = True
            if not self._carrier.in_round:
                self._carrier.relieve()  # a handler that stops its own server carries it no more
            self._carrier.wake()
        self._carrier.wait(3.0)
