"""The server's end: a ROUTER, and the one loop that touches it."""

# ruff: noqa: D102 - what has no docstring is described in `edgeml.core.transport`

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Iterable
from typing import Any

import zmq

from edgeml.core import Endpoint, Message, OnRequest, Peer, Reply, Url, bindable, own, reached
from edgeml.core.forks import leave_to_parent, watch_forks
from edgeml.transports.zmq.sockets import (
    MOST_PENDING,
    NUMBER,
    WHO,
    ZERO_COPY,
    check,
    open_socket,
    receive,
    send,
)

__all__ = ["Listener"]

_log = logging.getLogger(__name__)

_LINGER = 200  # ms that an endpoint which closes gives to what is still to be sent
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

    def posted(self, message: Message) -> tuple[bytes, bytes, Message]:
        """This reply as the outbox takes it."""
        return self._identity, self._number, message


class Listener(Endpoint):
    """Serves at one address; see `Endpoint`."""

    def __init__(self, url: Url, on_request: OnRequest) -> None:
        self._on_request = on_request
        self._context: zmq.Context[Any] = zmq.Context()
        self._router = open_socket(self._context, zmq.ROUTER)
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
        self._lock = threading.Lock()
        self._outbox: list[tuple[bytes, bytes, Message]] = []
        self._woken = False
        self._closed = False
        self._ended = False
        self._turn = threading.Lock()  # held to use the ROUTER in a handler, or to pass it on
        self._start_loop()
        watch_forks(self)

    def _bind(self, url: Url) -> Url:
        address = bindable(url)
        self._router.ipv6 = "[" in address
        try:
            self._router.bind(f"tcp://{address}:{url.port or '*'}")
        except zmq.ZMQError as error:
            reason = f"cannot serve {url}: {error}; another port, or 0, may be free"
            raise OSError(error.errno, reason) from error
        bound = self._router.get_string(zmq.LAST_ENDPOINT)
        return reached(url, address, int(bound.rpartition(":")[2]))

    def _start_loop(self) -> None:
        self._handling = False
        self._ident = 0
        self._loop = threading.Thread(target=self._run, name=f"edgeml {self.url}", daemon=True)
        self._loop.start()

    def _run(self) -> None:
        me = threading.current_thread()
        self._ident = threading.get_ident()
        while True:
            identity = self._router.recv()
            head, message = receive(self._router)
            if identity == self._door_id:
                if self._empty_outbox():
                    self._end()
                    return
                continue
            if len(message.header) < NUMBER.size:
                _log.debug("%s: a message without a number from %s", self.url, identity.hex())
                continue
            number = message.header[: NUMBER.size]
            message = Message(message.header[NUMBER.size :], message.buffers)
            self._handling = True
            try:
                self._on_request(message, _Reply(self, identity, number, head))
            except BaseException:  # a handler's sys.exit() ends nothing here
                _log.exception("%s: on_request failed", self.url)
            del head, message  # or the buffers live until the next request
            with self._turn:
                if self._loop is not me:
                    return
                self._handling = False

    def _empty_outbox(self) -> bool:
        """Send what other threads left; True if the loop is to end."""
        with self._lock:
            outbox, self._outbox, self._woken = self._outbox, [], False
            closed = self._closed
        for posted in outbox:
            self._send(*posted)
        return closed

    def _end(self) -> None:
        with self._lock:
            self._ended = True
            self.dropped += len(self._outbox)
            self._outbox.clear()
            self._door.close()
        self._ident = 0  # another thread may come to bear it
        self._router.close(linger=_LINGER)
        self._context.term()

    def send_inline(self, identity: bytes, number: bytes, message: Message) -> bool:
        """Send a reply from within a handler; False if this thread is not the loop's."""
        if threading.get_ident() != self._ident:
            return False
        with self._turn:
            if threading.get_ident() != self._ident:  # relieved just now
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
            with self._lock:
                self.dropped += 1
            _log.debug("%s: a reply to %s is dropped: %s", self.url, identity.hex(), error)

    def post(self, replies: list[tuple[bytes, bytes, Message]]) -> None:
        """Leave owned replies for the loop, with one wake for them all."""
        with self._lock:
            if self._ended:
                self.dropped += len(replies)
                return
            self._outbox += replies
            self._wake()

    def _wake(self) -> None:
        if not self._woken:
            self._door.send(b"")
            self._woken = True  # last: Ctrl-C may come before it, but must not undo it

    def reply_many(self, replies: Iterable[Reply], message: Message) -> None:
        check(message)
        message = own(message)
        self.post([r.posted(message) for r in replies if isinstance(r, _Reply)])

    def relieve(self) -> None:
        with self._turn:
            if self._handling:
                self._start_loop()

    def abandon(self) -> None:
        """Forget everything, in a forked child, where the loop is not."""
        leave_to_parent(self)
        self._lock = threading.Lock()  # whoever held it is not there
        self._turn = threading.Lock()
        self._closed = self._ended = True
        self._handling = False
        self._ident = 0

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._wake()
        me = threading.current_thread()
        loop = self._loop
        if loop is me:
            return  # a handler that stops its own server: the loop ends when it returns
        loop.join(1.0)
        if loop.is_alive() and not self._ended:  # it is stuck in a handler
            self.relieve()
            self._loop.join(1.0)
