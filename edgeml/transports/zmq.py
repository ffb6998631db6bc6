"""ZeroMQ over TCP: a ROUTER serves, DEALERs ask.

A request or reply is one multipart message: an 8-byte number chosen by the client, directly
followed by the header, then one frame for each buffer. The number comes back with the reply, so a
late reply is never taken for the next one's.

Threads. The listener has one loop, which alone touches the ROUTER; other threads leave their
replies in an outbox and wake the loop through a DEALER that is connected to the same ROUTER over
inproc, so that there is one socket to wait on and no poll. A connection gives each calling thread
a DEALER of its own, on which `call` sends and waits without a thread hop; `request` goes
through one I/O thread. All connections share one context, and so one of libzmq's own threads. What
wakes a caller that is blocked in its DEALER is a message from the connection's waker, to which the
DEALER is connected as well, by a pipe that is filled at first so that no request takes it. Nothing
of this survives a fork: in the child every connection is closed, and its sockets are left alone.

Copies. Frames from 512 KiB on are sent from where they lie (below that pyzmq's bookkeeping costs
more than the copy). In `call` they are the user's own memory, which is why an abandoned call closes
its socket and waits until libzmq has let go.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import math
import os
import secrets
import socket
import struct
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, ClassVar, cast

import zmq
import zmq.utils.garbage  # registers with atexit what is to come after our own
from zmq.utils.monitor import parse_monitor_message

from edgeml.core import (
    Closed,
    Credentials,
    DeadlineExceeded,
    Endpoint,
    Message,
    NotEncodable,
    OnRequest,
    Peer,
    Pending,
    Reply,
    Requester,
    Transport,
    Unreachable,
    Url,
    bindable,
    hookimpl,
    own,
    reached,
)
from edgeml.core.limits import if_out_of_files, what_to_do

_log = logging.getLogger(__name__)
_exiting = False

_ZERO_COPY = 1 << 19  # bytes
_LARGEST_FRAME = 1 << 30  # bytes; a peer that announces more is cut off by libzmq
_MOST_BUFFERS = 1 << 14  # in one message
_MOST_PENDING = 4096  # requests under way on one connection
_MOST_QUEUED = 64  # requests given to libzmq, which can't be forgotten any more
_LINGER = 200  # ms that an endpoint which closes gives to what is still to be sent
_MOST_SOCKETS = 1 << 14  # of all connections; eight for each, and one for each thread that calls
_GRACE = 0.3  # seconds that calls under way are given then to take their last reply
_LONGEST = 1 << 30  # ms that a socket is told to wait
_WHO = "X-Edgeml-Connection"  # a property that sockets tell each other when they meet
_NUMBER = struct.Struct("<Q")
_MORE = int(zmq.SNDMORE)  # plain ints: enum flags cost a microsecond to combine
_MORE_NOW = int(zmq.SNDMORE | zmq.DONTWAIT)


class _Woken(Exception):
    """The connection is over, and whoever waits for a reply is told so."""


_context: zmq.Context[Any] | None = None
_context_lock = threading.Lock()


def _shared_context() -> zmq.Context[Any]:
    """The one of all connections of this process."""
    global _context
    with _context_lock:
        if _context is None:
            _context = zmq.Context()
            _context.max_sockets = _MOST_SOCKETS
        return _context


def _socket(context: zmq.Context[Any], kind: int) -> zmq.Socket[bytes]:
    made: zmq.Socket[bytes] = context.socket(kind)
    made.linger = 0
    made.maxmsgsize = _LARGEST_FRAME
    # A machine that vanished without a word is noticed, and what is kept for it freed. By TCP,
    # for ZeroMQ's own heartbeats wait behind the frame under way: they cut off whoever takes
    # longer over one than they allow.
    made.tcp_keepalive, made.tcp_keepalive_cnt = 1, 3
    made.tcp_keepalive_idle, made.tcp_keepalive_intvl = 10, 5  # seconds
    made.tcp_maxrt = 60_000  # ms
    return made


def _check(message: Message) -> None:
    """Refuse here, with a reason, what the other end would cut the connection for."""
    if len(message.buffers) > _MOST_BUFFERS:
        raise NotEncodable(
            f"a message of {len(message.buffers)} arrays; zmq carries {_MOST_BUFFERS}: "
            "stack the small ones into one"
        )
    for buffer in message.buffers:
        if buffer.nbytes > _LARGEST_FRAME:
            raise NotEncodable(
                f"an array of {buffer.nbytes} bytes; zmq carries {_LARGEST_FRAME}: split it"
            )
    if len(message.header) > _LARGEST_FRAME - _NUMBER.size:
        raise NotEncodable(f"a header of {len(message.header)} bytes; zmq carries {_LARGEST_FRAME}")


def _send(
    line: zmq.Socket[bytes],
    number: bytes,
    message: Message,
    lent: list[weakref.ref[memoryview]] | None = None,
) -> None:
    """Send one message; ``lent`` receives a reference to each buffer that is sent in place.

    It dies when libzmq has let go of the buffer; pyzmq's own trackers cost several times as much.
    """
    buffers = message.buffers
    last = len(buffers) - 1
    line.send(number + message.header, _MORE if buffers else 0)
    for index, buffer in enumerate(buffers):
        flags = 0 if index == last else _MORE
        if buffer.nbytes < _ZERO_COPY or _exiting:
            line.send(buffer, flags)
        else:
            view = memoryview(buffer)
            if lent is not None:
                lent.append(weakref.ref(view))
            line.send(view, flags, copy=False)
            del view


def _receive(line: zmq.Socket[bytes]) -> tuple[zmq.Frame, Message]:
    """Receive one message, number included in the header."""
    head = line.recv(copy=False)
    if not head.more:
        return head, Message(head.bytes)
    buffers: list[memoryview] = []
    more = True
    surplus = False
    while more:
        frame = line.recv(copy=False)
        more = frame.more
        if len(buffers) < _MOST_BUFFERS:
            buffers.append(frame.buffer.toreadonly())
        else:
            surplus = True
    if surplus:
        return head, Message(b"")  # shorter than a number: treated as malformed
    return head, Message(head.bytes, buffers)


class _Reply:
    __slots__ = ("_head", "_identity", "_listener", "_number")

    def __init__(
        self, listener: _Listener, identity: bytes, number: bytes, head: zmq.Frame
    ) -> None:
        self._listener = listener
        self._identity = identity
        self._number = number
        self._head = head

    @property
    def peer(self) -> Peer:
        try:
            who = str(self._head.get(_WHO))[:64]
        except zmq.ZMQError:  # no client of ours
            who = self._identity.hex()
        return Peer(who, f"zmq://{self._head.get('Peer-Address')}")

    @property
    def expired(self) -> bool:
        return False  # a ROUTER learns that a peer has gone only when it sends

    def __call__(self, message: Message) -> None:
        _check(message)
        if not self._listener.send_inline(self._identity, self._number, message):
            self._listener.post([(self._identity, self._number, own(message))])

    def posted(self, message: Message) -> tuple[bytes, bytes, Message]:
        """This reply as the outbox takes it."""
        return self._identity, self._number, message


class _Listener(Endpoint):
    def __init__(self, url: Url, on_request: OnRequest) -> None:
        self._on_request = on_request
        self._context: zmq.Context[Any] = zmq.Context()
        self._router = _socket(self._context, zmq.ROUTER)
        self._router.router_mandatory = True
        self._router.sndhwm = 2 * _MOST_PENDING  # more than an honest client has under way
        self._door = _socket(self._context, zmq.DEALER)
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
        _open_ends.add(self)

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
            head, message = _receive(self._router)
            if identity == self._door_id:
                if self._empty_outbox():
                    self._end()
                    return
                continue
            if len(message.header) < _NUMBER.size:
                _log.debug("%s: a message without a number from %s", self.url, identity.hex())
                continue
            number = message.header[: _NUMBER.size]
            message = Message(message.header[_NUMBER.size :], message.buffers)
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
            if message.buffers and max(map(len, message.buffers)) >= _ZERO_COPY:
                message = own(message)
            self._router.send(identity, _MORE_NOW)
            _send(self._router, number, message)
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
        _check(message)
        message = own(message)
        self.post([r.posted(message) for r in replies if isinstance(r, _Reply)])

    def relieve(self) -> None:
        with self._turn:
            if self._handling:
                self._start_loop()

    def forked(self) -> None:
        """Forget everything, in a forked child, where the loop is not."""
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


class _Line:
    """The DEALER of one calling thread."""

    def __init__(self, connection: _Connection) -> None:
        self.lock = threading.Lock()
        self.calling = False
        self._connection = connection
        self._url = connection.url
        self._numbers = itertools.count(1)
        self._socket: zmq.Socket[bytes] | None = None
        self._open()

    def _open(self) -> zmq.Socket[bytes]:
        self._timeout = -1  # ms, as set on the socket
        self._socket = self._connection.line()
        if self._connection.lost:  # it may have been before there was a socket to wake
            raise _Woken
        return self._socket

    def call(self, message: Message, timeout: float) -> Message:
        with self.lock:
            line = self._socket or self._open()
            number = _NUMBER.pack(next(self._numbers))
            lent: list[weakref.ref[memoryview]] = []
            self.calling = True
            try:
                _send(line, number, message, lent)
                return self._wait(line, number, timeout)
            except DeadlineExceeded:
                if _any_alive(lent):
                    self._take_back(lent)
                raise
            except BaseException as error:
                # Ctrl-C, say, may have come in the middle of a message: this socket can't go on.
                traceback.clear_frames(error.__traceback__)  # they hold what was lent
                self._take_back(lent)
                raise
            finally:
                self.calling = False

    def _wait(self, line: zmq.Socket[bytes], number: bytes, timeout: float) -> Message:
        deadline = time.monotonic() + timeout
        left = timeout
        while True:
            milliseconds = max(1, math.ceil(min(left * 1e3, _LONGEST)))
            if milliseconds != self._timeout:  # setting it is a system call's worth
                line.rcvtimeo = self._timeout = milliseconds
            try:
                _, reply = _receive(line)
                header = reply.header
                if header[: _NUMBER.size] == number:
                    return Message(header[_NUMBER.size :], reply.buffers)
                if not header and self._connection.lost:
                    raise _Woken
            except zmq.Again:
                pass
            left = deadline - time.monotonic()
            if left <= 0:
                raise DeadlineExceeded(f"{self._url} gave no reply within {timeout:g} s")

    def _take_back(self, lent: list[weakref.ref[memoryview]]) -> None:
        """Have libzmq let go of the user's memory, which it may still be sending from."""
        self.close()
        deadline = time.monotonic() + 5.0
        while _any_alive(lent):
            if time.monotonic() > deadline:
                _log.warning("%s: libzmq still holds a buffer of an abandoned call", self._url)
                return
            time.sleep(1e-3)

    def close(self) -> None:
        """Close the socket; the next call opens another."""
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None

    def __del__(self) -> None:  # its thread has ended
        self.close()


def _any_alive(lent: list[weakref.ref[memoryview]]) -> bool:
    return any(view() is not None for view in lent)


def _events(line: zmq.Socket[bytes]) -> int:
    """What could be done without waiting; cheaper than polling a single socket."""
    return cast(int, line.getsockopt(zmq.EVENTS))


_LOST = zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


class _Connection(Requester):
    def __init__(self, url: Url, address: str) -> None:
        self.url = url
        self._address = address
        self._who = secrets.token_hex(8)
        self._context = _shared_context()
        self._lock = threading.Lock()
        self._local = threading.local()
        self._lines: weakref.WeakSet[_Line] = weakref.WeakSet()
        self._pending = Pending(_MOST_PENDING)
        self._outbox: deque[tuple[int, Message]] = deque()
        self._woken = False
        self._why: Closed | Unreachable | None = None  # set once, when it is over
        self._ended = False
        self._sockets: list[zmq.Socket[bytes]] = []
        try:
            self._listen, self._bell = self._open(zmq.PAIR), self._open(zmq.PAIR)
            self._listen.bind(f"inproc://{self._who}.bell")
            self._bell.connect(f"inproc://{self._who}.bell")
            self._waker = self._open(zmq.DEALER)
            self._waker.rcvhwm = 1
            self._waker.bind(f"inproc://{self._who}.waker")
            self._shared = self._open(zmq.DEALER)
            self._monitor = self._shared.get_monitor_socket(_LOST)
            self._sockets.append(self._monitor)
            self._dial(self._shared, _MOST_QUEUED)
        except zmq.ZMQError as error:
            self._close_sockets()
            raise Unreachable(
                f"no connection to {url} can be opened: {error}{what_to_do(error.errno)}"
            ) from error
        self._io = threading.Thread(target=self._run, name=f"edgeml to {url}", daemon=True)
        self._io.start()
        _open_ends.add(self)

    def _open(self, kind: int) -> zmq.Socket[bytes]:
        made = _socket(self._context, kind)
        self._sockets.append(made)
        return made

    def _dial(self, line: zmq.Socket[bytes], most: int) -> None:
        """Connect a socket to the peer, to queue ``most`` messages; 0 for any number."""
        line.sndhwm = most
        line.ipv6 = "[" in self._address
        line.metadata = f"{_WHO}:{self._who}".encode()
        line.connect(self._address)

    def line(self) -> zmq.Socket[bytes]:
        """A socket to the peer that `_wake` wakes."""
        line = _socket(self._context, zmq.DEALER)
        line.sndhwm = 1
        line.connect(f"inproc://{self._who}.waker")
        with suppress(zmq.Again):
            while True:  # until this way is full, which it stays, as nobody reads there
                line.send(b"", zmq.DONTWAIT)
        self._dial(line, 0)
        return line

    def _wake(self) -> None:
        """Send something to every line; they take turns, and some may just be closing."""
        with self._lock, suppress(zmq.Again):
            for _ in range(0 if self._ended else 2 * len(self._lines)):
                self._waker.send(b"", zmq.DONTWAIT)

    @property
    def lost(self) -> bool:
        return self._why is not None

    def _over(self) -> Exception:
        why = self._why or Unreachable(f"the connection to {self.url} was lost")
        return type(why)(*why.args)

    def call(self, message: Message, timeout: float) -> Message:
        _check(message)
        if self._why is not None:
            raise self._over()
        line: _Line | None = getattr(self._local, "line", None)
        try:
            if line is None:
                line = self._new_line()
            return line.call(message, timeout)
        except _Woken:
            raise self._over() from None
        except zmq.ZMQError as error:
            if self._why is None:
                raise Unreachable(f"{self.url}: {error}{what_to_do(error.errno)}") from error
            raise self._over() from None

    def _new_line(self) -> _Line:
        with self._lock:
            if self._why is not None:
                raise self._over()
            line = _Line(self)
            self._lines.add(line)
        self._local.line = line
        return line

    def request(self, message: Message) -> Future[Message]:
        _check(message)
        message = own(message)
        with self._lock:
            if self._why is not None:
                raise self._over()
            number, future = self._pending.add()
            self._outbox.append((number, message))
            if not self._woken:
                self._bell.send(b"")
                self._woken = True  # last: Ctrl-C may come before it, but must not undo it
        return future

    def _run(self) -> None:
        why: Closed | Unreachable
        try:
            if self._carry() == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                why = Unreachable(f"what listens at {self.url} does not speak ZeroMQ")
            else:
                why = Unreachable(f"the connection to {self.url} was lost{if_out_of_files()}")
        except Exception as error:
            _log.exception("the connection to %s failed", self.url)
            why = Unreachable(f"the connection to {self.url} failed: {error}")
        self._end(why)

    def _carry(self) -> int:
        """Send requests and settle replies until the connection is over; returns the event."""
        poller = zmq.Poller()
        for sock in (self._listen, self._shared, self._monitor):
            poller.register(sock, zmq.POLLIN)
        queue: deque[tuple[int, Message]] = deque()
        while True:
            ready = dict(poller.poll())
            if self._listen in ready:
                self._listen.recv()
                with self._lock:
                    if self._why is not None:
                        return zmq.EVENT_CLOSED
                    queue += self._outbox
                    self._outbox.clear()
                    self._woken = False
            if queue:
                self._send_some(queue)
                # What finds no room waits here, where it can still be forgotten.
                poller.register(self._shared, zmq.POLLIN | (zmq.POLLOUT if queue else 0))
            if ready.get(self._shared, 0) & zmq.POLLIN:
                self._settle_next()
            if self._monitor in ready:
                event: int = parse_monitor_message(self._monitor.recv_multipart())["event"]
                while _events(self._shared) & zmq.POLLIN:  # what came before the loss
                    self._settle_next()
                return event

    def _send_some(self, queue: deque[tuple[int, Message]]) -> None:
        while queue:
            number, message = queue[0]
            if number in self._pending:  # not cancelled meanwhile
                if not _events(self._shared) & zmq.POLLOUT:
                    return
                _send(self._shared, _NUMBER.pack(number), message)
            queue.popleft()

    def _settle_next(self) -> None:
        _, message = _receive(self._shared)
        header = message.header
        if len(header) >= _NUMBER.size:
            number = _NUMBER.unpack_from(header)[0]
            self._pending.settle(number, Message(header[_NUMBER.size :], message.buffers))

    def _end(self, why: Closed | Unreachable) -> None:
        """Free everything; runs in the I/O thread, for a loss as for a close."""
        with self._lock:
            if self._why is None:
                self._why = why
            self._outbox.clear()
            lines = list(self._lines)
        self._pending.fail(self._over())
        # Calls have TCP connections of their own, on which a last reply may still be under way.
        deadline = time.monotonic() + (0 if isinstance(self._why, Closed) else _GRACE)
        for line in lines:
            if line.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                line.lock.release()
        self._wake()
        for line in lines:
            while not line.lock.acquire(timeout=0.05):
                self._wake()
            line.close()
            line.lock.release()
        with self._lock:
            self._ended = True
            self._close_sockets()

    def _close_sockets(self) -> None:
        for sock in self._sockets:
            # First, or libzmq's thread would wait for ever to tell the monitor of the end.
            sock.disable_monitor()
            sock.close(linger=0)

    def forked(self) -> None:
        """Forget everything, in a forked child, where the I/O thread is not."""
        self._why = Closed(f"the connection to {self.url} belongs to the process before the fork")
        self._lock = threading.Lock()  # whoever held it is not there
        self._ended = True
        _inherited.append((self._local, self._sockets))
        self._local = threading.local()

    def close(self) -> None:
        with self._lock:
            if self._why is None:
                self._why = Closed(f"the connection to {self.url} has been closed")
            if not self._ended:
                self._bell.send(b"")
        self._wake()  # here, too, for this may be the I/O thread
        line: _Line | None = getattr(self._local, "line", None)
        within_call = line is not None and line.calling  # in a signal's handler, say
        if self._io is not threading.current_thread() and not within_call:
            self._io.join(5.0)


_open_ends: weakref.WeakSet[_Listener | _Connection] = weakref.WeakSet()


def _forked() -> None:
    # Kept for good, for a parent's sockets are not the child's to close.
    global _context, _context_lock
    ends = list(_open_ends)
    _inherited.append((ends, _context))
    _context, _context_lock = None, threading.Lock()
    for end in ends:
        end.forked()


_inherited: list[Any] = []
os.register_at_fork(after_in_child=_forked)


@atexit.register
def _exit() -> None:
    """Copy from now on, since pyzmq sends nothing in place while the interpreter shuts down."""
    global _exiting
    _exiting = True


class ZmqTransport(Transport):
    """``zmq://host:port``: ZeroMQ over TCP."""

    name: ClassVar[str] = "zmq"

    def report(self) -> dict[str, str]:
        """See `Transport.report`: versions, and how many sockets there may be."""
        return {
            "libzmq": zmq.zmq_version(),
            "pyzmq": zmq.__version__,
            "sockets of all clients": f"{_MOST_SOCKETS} at most, about eight for each client",
        }

    def serve(
        self, url: Url, on_request: OnRequest, *, credentials: Credentials = None
    ) -> Endpoint:
        """See `Transport.serve`."""
        return _Listener(url, on_request)

    def connect(self, url: Url, timeout: float, *, credentials: Credentials = None) -> Requester:
        """See `Transport.connect`. ZeroMQ itself never tells that nobody listens, so ask TCP."""
        try:
            with socket.create_connection((url.host, url.port), timeout) as probe:
                host = probe.getpeername()[0]
        except (OSError, UnicodeError) as error:
            if advice := what_to_do(getattr(error, "errno", None)):
                raise Unreachable(f"no connection to {url}: {error}{advice}") from error
            raise Unreachable(
                f"nobody answers at {url}: {error}; is the server started, and does its host= let "
                "this machine in?"
            ) from error
        return _Connection(url, str(Url("tcp", host, url.port)))


@hookimpl
def edgeml_transport() -> type[Transport]:
    """Answer the plugin hook."""
    return ZmqTransport
