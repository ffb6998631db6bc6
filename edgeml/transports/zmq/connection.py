"""The client's end: a DEALER for each thread that calls, and one for all requests."""

# ruff: noqa: D102 - what has no docstring is described in `edgeml.core.transport`

from __future__ import annotations

import itertools
import logging
import math
import secrets
import select
import threading
import time
import traceback
import weakref
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from typing import cast

import zmq
from zmq.utils.monitor import parse_monitor_message

from edgeml.core import (
    Closed,
    Credentials,
    Deadline,
    DeadlineExceeded,
    Message,
    Overloaded,
    Pending,
    PermissionDenied,
    Requester,
    Unreachable,
    Url,
    own,
)
from edgeml.core.advice import if_out_of_files, what_to_do
from edgeml.core.errors import copy_error
from edgeml.core.forks import drop_sockets, explain_fork, leave_to_parent, watch_forks
from edgeml.core.strangers import ZMTP, find_stranger
from edgeml.core.url import is_loopback
from edgeml.transports.zmq.curve import explain_refusal, unlock
from edgeml.transports.zmq.sockets import (
    DROPPED,
    MOST_PENDING,
    NUMBER,
    WHO,
    check,
    open_socket,
    receive,
    send,
    share_context,
)

__all__ = ["Connection"]

_log = logging.getLogger(__name__)

_MOST_QUEUED = 64  # requests given to libzmq, which can't be forgotten any more
_GRACE = 0.3  # seconds that calls under way are given to take their last reply
_EVENTS, _IN, _OUT = map(int, (zmq.EVENTS, zmq.POLLIN, zmq.POLLOUT))  # enums take a microsecond
_LOOK = 250  # ms that a call waits before it looks whether there is a way to its peer


class _Woken(Exception):
    """The connection is over, and whoever waits for a reply is told so."""


class _Relieved(Exception):
    """Ends an I/O thread whose work another one has taken over."""


class _Line:
    """The DEALER of one calling thread."""

    def __init__(self, connection: Connection) -> None:
        self.lock = threading.Lock()
        self.calling = False
        self._connection = connection
        self._url = connection.url
        self._numbers = itertools.count(1)
        self._socket: zmq.Socket[bytes] | None = None
        self._open()

    def _open(self) -> zmq.Socket[bytes]:
        self._socket = self._connection.open_line()
        self._socket.rcvtimeo = 0
        self._poll = select.poll()
        self._poll.register(self._socket.FD, select.POLLIN)
        if self._connection.lost:  # it may have been before there was a socket to wake
            raise _Woken
        return self._socket

    def call(self, message: Message, deadline: Deadline) -> Message:
        with self.lock:
            line = self._socket or self._open()
            number = NUMBER.pack(next(self._numbers))
            lent: list[weakref.ref[memoryview]] = []
            self.calling = True
            try:
                send(line, number, message, lent)
                return self._wait(line, number, deadline)
            except (DeadlineExceeded, Overloaded):
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

    def _wait(self, line: zmq.Socket[bytes], number: bytes, deadline: Deadline) -> Message:
        # Not by libzmq's own timeout, which begins anew behind each signal that has a handler. Its
        # descriptor tells of what comes, once what has come is taken.
        ready = _look(line) & _IN
        while True:
            if ready:
                try:
                    _, came, reply = receive(line)
                except zmq.Again:  # nothing has come, or nothing is left
                    pass
                else:
                    if came == number:
                        return reply
                    if came == DROPPED:
                        if self._connection.lost:
                            raise _Woken
                        if _dropped(reply) == number:
                            raise _explain_dropped(self._url)
                    continue
            left = deadline.left
            if not left:
                why = f"{self._url} gave no reply within {deadline.timeout:g} s"
                raise DeadlineExceeded(why)
            ready = len(self._poll.poll(min(left * 1e3, _LOOK)))
            if not ready:
                events = _look(line)
                ready = events & _IN  # the look took away what the descriptor would tell of it
                if not events & (_IN | _OUT):
                    raise zmq.Again  # the server has refused this line

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

    def __del__(self) -> None:  # its thread has ended; the I/O thread sees to the waker's end
        self.close()


def _any_alive(lent: list[weakref.ref[memoryview]]) -> bool:
    return any(view() is not None for view in lent)


def _dropped(message: Message) -> bytes:
    """The number of the request whose reply was dropped, as a message without a number tells."""
    buffers = message.buffers
    return bytes(buffers[0][: NUMBER.size]) if buffers else b""


def _explain_dropped(url: Url) -> Overloaded:
    return Overloaded(
        f"{url} has dropped the reply, since too many bytes of earlier ones have not been read"
    )


def _look(line: zmq.Socket[bytes]) -> int:
    """What could be done without waiting; cheaper than polling a single socket."""
    return cast(int, line.getsockopt(_EVENTS))


_GREETING = 0.3  # seconds that a peer may take to greet; libzmq itself would wait for ever
_ASKING = 0.4  # seconds that who greets otherwise is asked for who it is
_MEETING = 1.0  # seconds that `connect` waits for what may not be, where it can do without
_GREETED = zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED
_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_LOST = zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED | _FAILED


class Connection(Requester):
    """One connection, over several sockets; see `Requester`."""

    tells_loss = True

    def __init__(
        self, url: Url, address: Url, keys: Credentials | None, deadline: Deadline
    ) -> None:
        self.url = url
        self._address = address
        self._keys = keys
        self._deadline = deadline  # by which it is to have come about
        self.local = is_loopback(address.host)
        self.secured = keys is not None
        self._who = secrets.token_hex(8)
        self._context = share_context()
        self._lock = threading.Lock()
        self._local = threading.local()
        self._lines: weakref.WeakSet[_Line] = weakref.WeakSet()
        self._pending = Pending(MOST_PENDING)
        self._outbox: deque[tuple[int, Message]] = deque()
        self._woken = False
        self._why: Closed | Unreachable | PermissionDenied | None = None  # set once, at the end
        self._met = threading.Event()  # set when the handshake has come about, or all is over
        self._forgiven = 0  # events of a handshake that failed, and is tried once more
        self._ended = False
        self._sockets: list[zmq.Socket[bytes]] = []
        try:
            self._listen, self._bell = self._open(zmq.PAIR), self._open(zmq.PAIR)
            self._listen.bind(f"inproc://{self._who}.bell")
            self._bell.connect(f"inproc://{self._who}.bell")
            # Of a kind that reads nothing, or a line that closes would wait for it to read.
            self._waker = self._open(zmq.PUSH)
            self._waker.rcvhwm = 1
            self._waker.bind(f"inproc://{self._who}.waker")
            self._waker_fd = self._waker.FD
            self._shared = self._open(zmq.DEALER)
            self._monitor = self._shared.get_monitor_socket(_GREETED | _LOST)
            self._sockets.append(self._monitor)
            self._dial(self._shared, _MOST_QUEUED)
        except zmq.ZMQError as error:
            self._close_sockets()
            raise Unreachable(
                f"no connection to {url} can be opened: {error}{what_to_do(error.errno)}"
            ) from error
        self._queue: deque[tuple[int, Message]] = deque()  # of the I/O thread's
        self._due: float | None = None  # when the peer should have greeted
        self._poller = zmq.Poller()
        for each in (self._listen, self._shared, self._monitor, self._waker_fd):
            self._poller.register(each, zmq.POLLIN)
        self._start_io()
        watch_forks(self)

    def meet(self, deadline: Deadline) -> None:
        """Wait for the handshake, if there are keys; and else for a moment, since it may fail.

        Raises:
            PermissionDenied: it failed by one side's keys.
            Unreachable: it didn't come about, and there are keys.
        """
        left = deadline.left
        met = self._met.wait(left if self._keys is not None else min(left, _MEETING))
        why = self._why
        if isinstance(why, PermissionDenied):
            raise copy_error(why)
        if self._keys is not None and (why is not None or not met):
            raise copy_error(why or Unreachable(f"{self.url} did not shake hands in time"))

    def _start_io(self) -> None:
        self._io = threading.Thread(target=self._run, name=f"edgeml to {self.url}", daemon=True)
        self._io.start()

    def _open(self, kind: int) -> zmq.Socket[bytes]:
        made = open_socket(self._context, kind)
        self._sockets.append(made)
        return made

    def _dial(self, line: zmq.Socket[bytes], most: int) -> None:
        """Connect a socket to the peer, to queue ``most`` messages; 0 for any number."""
        line.sndhwm = most
        line.ipv6 = ":" in self._address.host
        if self._keys is not None:
            unlock(line, self._keys)
        line.metadata = f"{WHO}:{self._who}".encode()
        line.connect(str(self._address))

    def open_line(self) -> zmq.Socket[bytes]:
        """A socket to the peer that `_wake` wakes."""
        line = open_socket(self._context, zmq.DEALER)
        try:
            line.sndhwm = 1
            line.connect(f"inproc://{self._who}.waker")
            with suppress(zmq.Again):
                while True:  # until this way is full, which it stays, as nobody reads there
                    line.send(b"", zmq.DONTWAIT)
            self._dial(line, 0)
            # There is always room, but for where the server refused to be dialled again: libzmq
            # takes that way away, and would wait for another without end.
            line.sndtimeo = 0
        except BaseException:  # Ctrl-C, say
            line.close()
            raise
        return line

    def _wake(self) -> None:
        """Send something to every line; they take turns, and some may just be closing."""
        with self._lock, suppress(zmq.Again):
            for _ in range(0 if self._ended else 2 * len(self._lines)):
                self._waker.send(b"", zmq.DONTWAIT)

    def _lose(self, why: PermissionDenied | None) -> None:
        """End, as a line has lost its peer, who won't have it back."""
        with self._lock:
            if self._why is None:
                self._why = why or Unreachable(f"the connection to {self.url} was lost")
                self._bell.send(b"")

    @property
    def lost(self) -> bool:
        return self._why is not None

    def _copy_why(self) -> Exception:
        why = self._why or Unreachable(f"the connection to {self.url} was lost")
        return copy_error(why)

    def call(self, message: Message, timeout: float) -> Message:
        deadline = Deadline(timeout)
        check(message)
        if self._why is not None:
            raise self._copy_why()
        if self._pending.unanswered:  # a line would overtake them
            if threading.current_thread() is self._io:  # in a future's callback
                self._start_io()
            return self.wait_for(self.request(message), deadline)
        line: _Line | None = getattr(self._local, "line", None)
        try:
            if line is None:
                line = self._new_line()
            return line.call(message, deadline)
        except _Woken:
            raise self._copy_why() from None
        except zmq.Again:
            told = self._keys is not None
            self._lose(explain_refusal(self.url, self._address, self._keys, told))
            raise self._copy_why() from None
        except zmq.ZMQError as error:
            if self._why is None:
                raise Unreachable(f"{self.url}: {error}{what_to_do(error.errno)}") from error
            raise self._copy_why() from None

    def _new_line(self) -> _Line:
        with self._lock:
            if self._why is not None:
                raise self._copy_why()
            line = _Line(self)
            self._lines.add(line)
        self._local.line = line
        return line

    def request(self, message: Message) -> Future[Message]:
        check(message)
        message = own(message)
        with self._lock:
            if self._why is not None:
                raise self._copy_why()
            number, future = self._pending.add()
            self._outbox.append((number, message))
            if not self._woken:
                self._bell.send(b"")
                self._woken = True  # last: Ctrl-C may come before it, but must not undo it
        return future

    def _run(self) -> None:
        why: Unreachable | PermissionDenied
        try:
            why = self._carry()
        except _Relieved:
            return
        except Exception as error:
            _log.exception("the connection to %s failed", self.url)
            why = Unreachable(f"the connection to {self.url} failed: {error}")
        self._end(why)

    def _carry(self) -> Unreachable | PermissionDenied:
        """Send requests and settle replies until the connection is over; returns why it is.

        Raises:
            _Relieved: another thread does so since a future's callback called.
        """
        queue = self._queue
        while True:
            left = None if self._due is None else max(0.0, self._due - time.monotonic())
            ready = dict(self._poller.poll(None if left is None else math.ceil(left * 1e3)))
            if left == 0.0:
                self._due = None
                if stranger := self._find_stranger():
                    return stranger
            if self._listen in ready:
                self._listen.recv()
                with self._lock:
                    if self._why is not None:
                        return Unreachable("it has been closed")  # which is told already
                    queue += self._outbox
                    self._outbox.clear()
                    self._woken = False
            if queue:
                self._send_some(queue)
                # What finds no room waits here, where it can still be forgotten.
                self._poller.register(self._shared, zmq.POLLIN | (zmq.POLLOUT if queue else 0))
            if ready.get(self._shared, 0) & zmq.POLLIN:
                self._settle_next()
            if self._waker_fd in ready:
                with self._lock:  # a line has come or gone, and the waker must take notice
                    _look(self._waker)
            if self._monitor in ready:
                while _look(self._shared) & zmq.POLLIN:  # what came before the loss
                    self._settle_next()
                event: int = parse_monitor_message(self._monitor.recv_multipart())["event"]
                if not event & _GREETED:
                    if self._is_forgiven(event):
                        continue
                    return self._explain(event)
                connected = event == zmq.EVENT_CONNECTED
                self._due = time.monotonic() + _GREETING if connected else None
                if not connected:
                    self._forgiven = 0
                    self._met.set()

    def _is_forgiven(self, event: int) -> bool:
        """Whether a handshake is tried once more, as libzmq does by itself.

        To who has another server's key a server just hangs up, as one does that is being restarted.
        """
        if self._keys is None or self._met.is_set():
            return False
        if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and not self._forgiven:
            self._forgiven = event | zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED
            return True
        if event & self._forgiven & ~_FAILED:
            self._forgiven &= ~event
            return True
        return False

    def _explain(self, event: int) -> Unreachable | PermissionDenied:
        """Say what it means that a connection ends with this event."""
        if event & _FAILED:
            told = event == zmq.EVENT_HANDSHAKE_FAILED_AUTH
            return (
                explain_refusal(self.url, self._address, self._keys, told)
                or self._find_stranger()
                or Unreachable(f"what listens at {self.url} does not speak ZeroMQ")
            )
        return Unreachable(f"the connection to {self.url} was lost{if_out_of_files()}")

    def _find_stranger(self) -> Unreachable | None:
        """Who listens there, if that can be known in time: who closes this waits for it."""
        left = self._deadline.left
        return find_stranger(self.url, ZMTP, min(_ASKING, left)) if left else None

    def _send_some(self, queue: deque[tuple[int, Message]]) -> None:
        while queue:
            number, message = queue[0]
            if number in self._pending:  # not cancelled meanwhile
                if not _look(self._shared) & zmq.POLLOUT:
                    return
                send(self._shared, NUMBER.pack(number), message)
            queue.popleft()

    def _settle_next(self) -> None:
        outcome: Message | Overloaded
        _, number, outcome = receive(self._shared)
        if number == DROPPED:
            number, outcome = _dropped(outcome), _explain_dropped(self.url)
        if len(number) == NUMBER.size:
            self._pending.settle(NUMBER.unpack(number)[0], outcome)
            if self._io is not threading.current_thread():
                raise _Relieved

    def _end(self, why: Closed | Unreachable | PermissionDenied) -> None:
        """Free everything; runs in the I/O thread, for a loss as for a close."""
        with self._lock:
            if self._why is None:
                self._why = why
            self._outbox.clear()
            lines = list(self._lines)
        self._met.set()
        self._pending.fail(self._copy_why())
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

    def abandon(self) -> None:
        """Forget everything, in a forked child, where the I/O thread is not."""
        leave_to_parent(self, self._local)
        if not self._ended:
            drop_sockets(peers=[(self._address.host, self._address.port)])
        self._why = explain_fork(self.url)
        self._lock = threading.Lock()  # whoever held it is not there
        self._ended = True
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
