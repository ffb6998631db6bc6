"""The server's end: a ROUTER, and the loop that alone touches it, whichever thread carries that."""

# ruff: noqa: D102 - what has no docstring is described in `edgeml.core.transport`

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import zmq

from edgeml.core import Endpoint, Message, OnRequest, Peer, Reply, Url, find_address, own, tell_url
from edgeml.core.carrier import Carrier, Stay
from edgeml.core.forks import drop_sockets, leave_to_parent, watch_forks
from edgeml.core.url import is_loopback
from edgeml.transports.zmq.sockets import (
    MOST_PENDING,
    NUMBER,
    WHO,
    ZERO_COPY,
    check,
    open_router,
    open_socket,
    receive,
    send,
)

__all__ = ["Listener"]

_log = logging.getLogger(__name__)

_LINGER = 200  # ms that an endpoint which closes gives to what is still to be sent
_MOST_AT_ONCE = 64  # messages that are received before a handler runs again
_MORE_NOW = int(zmq.SNDMORE | zmq.DONTWAIT)  # a plain int: enum flags cost a microsecond


class _Reply:
    __slots__ = ("_head", "_identity", "_listener", "_number")

    def __init__(self, listener: Listener, identity: bytes, number: bytes, head: zmq.Frame) -> None:
        self._listener = listener
        self._identity = identity
        self._number = number
        self._head = head

    @property
    def peer(self) -> Peer:
        try:
            who = str(self._head.get(WHO))[:64]
        except zmq.ZMQError:  # no client of ours
            who = self._identity.hex()
        return Peer(who, f"zmq://{self._head.get('Peer-Address')}")

    @property
    def expired(self) -> bool:
        return False  # a ROUTER learns that a peer has gone only when it sends

    def __call__(self, message: Message) -> None:
        check(message)
        if not self._listener.send_inline(self._identity, self._number, message):
            self._listener.post([(self._identity, self._number, own(message))])

    def address(self, message: Message) -> tuple[bytes, bytes, Message]:
        """Return this reply as the outbox takes it."""
        return self._identity, self._number, message


class Listener(Endpoint):
    """Serves at one address; see `Endpoint`."""

    def __init__(self, url: Url, on_request: OnRequest) -> None:
        self._on_request = on_request
        self._context: zmq.Context[Any] = zmq.Context()
        self._router = open_router(self._context)
        self._router.router_mandatory = True
        self._router.sndhwm = 2 * MOST_PENDING  # more than an honest client has under way
        self._door = open_socket(self._context, zmq.DEALER)
        self._door_id = secrets.token_bytes(16)
        self._door.routing_id = self._door_id
        self._door.sndhwm = 0
        try:
            self.url = self._bind(url)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        # Connected before any peer can be, so nobody else can have taken its name.
        self._router.bind(f"inproc://{self._door_id.hex()}")
        self._door.connect(f"inproc://{self._door_id.hex()}")
        self._outbox: list[tuple[bytes, bytes, Message]] = []
        self._woken = False
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
                self._take(self._router.recv())
                while not self._closed and stay():
                    self._take(self._router.recv())
            else:
                for _ in range(_MOST_AT_ONCE):
                    self._take(self._router.recv(zmq.DONTWAIT))
        except zmq.Again:
            pass
        except BaseException:  # Ctrl-C, in the thread that carries this
            self._torn = True
            raise
        return self._closed and self._empty_outbox()

    def _take(self, identity: bytes) -> None:
        """Receive the rest of a message, and hand it over."""
        head, message = receive(self._router)
        if identity == self._door_id:
            self._empty_outbox()
        elif len(message.header) < NUMBER.size:
            _log.debug("%s: a message without a number from %s", self.url, identity.hex())
        else:
            number = message.header[: NUMBER.size]
            message = Message(message.header[NUMBER.size :], message.buffers)
            reply = _Reply(self, identity, number, head)
            self._carrier.hand_over(self._on_request, message, reply)

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
        self._router.close(linger=_LINGER)
        self._context.term()

    def send_inline(self, identity: bytes, number: bytes, message: Message) -> bool:
        """Send a reply at once; False if this thread does not have the loop."""
        if not self._carrier.here:
            return False
        with self._carrier.turn:
            if not self._carrier.here:  # relieved just now
                return False
            self._send(identity, number, message)
        return True

    def _send(self, identity: bytes, number: bytes, message: Message) -> None:
        try:
            # Small buffers are copied by zmq as they are sent; large ones must be ours.
            if message.buffers and max(map(len, message.buffers)) >= ZERO_COPY:
                message = own(message)
            self._router.send(identity, _MORE_NOW)
            send(self._router, number, message)
        except zmq.ZMQError as error:
            with self._carrier.turn:
                self.dropped += 1
            _log.debug("%s: a reply to %s is dropped: %s", self.url, identity.hex(), error)
        except BaseException:  # Ctrl-C: what comes next must not be taken for the rest of this
            with suppress(zmq.ZMQError):
                self._router.send(b"", zmq.DONTWAIT)
            raise

    def post(self, replies: list[tuple[bytes, bytes, Message]]) -> None:
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
