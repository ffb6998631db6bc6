"""The client's end: a socket for each thread that calls, and one for all requests."""

# ruff: noqa: D102 - what has no docstring is described in `edgeml.core.transport`

from __future__ import annotations

import secrets
import select
import threading
import weakref
from collections import deque
from concurrent.futures import Future
from contextlib import suppress

from edgeml.core import (
    Closed,
    Deadline,
    DeadlineExceeded,
    EdgemlError,
    Message,
    Overloaded,
    Pending,
    Requester,
    Unreachable,
    Url,
)
from edgeml.core.errors import copy_error
from edgeml.core.forks import explain_fork, watch_forks
from edgeml.transports.shm.channel import Channel
from edgeml.transports.shm.memory import Pool, limit_of_environment
from edgeml.transports.shm.reactor import Reactor
from edgeml.transports.shm.sockets import Lost, connect
from edgeml.transports.shm.waiting import IN, LONGEST, OUT, Waiter

__all__ = ["Connection"]

_GRACE = 0.3  # seconds that a call under way is given to take its last reply


class _Line:
    """The socket of one calling thread."""

    def __init__(self, connection: Connection, channel: Channel, number: int) -> None:
        self.channel = channel
        self._number = number  # of the last call on this socket
        self._orphans = connection.orphans
        self._lock = threading.Lock()
        self._url = connection.url
        self._waiter = Waiter()
        self._poll = select.poll()
        self._poll.register(self.channel.records.fd, IN)

    def call(self, message: Message, deadline: Deadline) -> Message:
        with self._lock:
            self._number = number = self._number + 1
            channel = self.channel
            channel.send(number, message)
            while True:
                left = deadline.left
                if not left:
                    why = f"{self._url} gave no reply within {deadline.timeout:g} s"
                    raise DeadlineExceeded(why)
                if channel.full:
                    self._flush(left)
                    continue
                got = self._waiter.wait(self._look, left)
                if got is not None and got[0] == number:  # not a late one
                    if isinstance(got[1], EdgemlError):
                        raise got[1]
                    return got[1]

    def _look(self, seconds: float) -> tuple[int, Message | EdgemlError] | None:
        # Not by a socket's own timeout, which begins anew behind each signal that has a handler.
        if self._poll.poll(min(seconds * 1e3, LONGEST)):
            return self.channel.receive()
        return None

    def _flush(self, left: float) -> None:
        """Send what found no room in the socket; others of this thread's calls are before it."""
        fd = self.channel.records.fd
        self._poll.modify(fd, IN | OUT)
        try:
            self._poll.poll(min(left * 1e3, LONGEST))
        finally:
            self._poll.modify(fd, IN)
        self.channel.flush()
        self.channel.receive()  # late, or no message

    def tidy(self) -> None:
        """Between calls, take and give back what is due: the next may be long in coming."""
        if self._lock.acquire(blocking=False):
            try:
                with suppress(Lost):  # whoever calls next is told
                    self.channel.tidy()
                    while self._poll.poll(0):
                        self.channel.receive()
            finally:
                self._lock.release()

    def end(self) -> None:
        """Close the socket, once a call under way has taken notice."""
        self.channel.end()
        if self._lock.acquire(timeout=_GRACE):
            self.channel.close()
            self._lock.release()

    def __del__(self) -> None:
        # Its thread has ended. This may run at any moment, so what takes locks is done elsewhere.
        self._orphans.append((self.channel, self._number))


class Connection(Requester):
    """One connection, over several sockets; see `Requester`.

    Args:
        url: where to.
        deadline: by which the peer is to have said hello.
        users: whose processes may be on the other side.
    """

    local = secured = True
    tells_loss = True

    def __init__(self, url: Url, deadline: Deadline, users: frozenset[int]) -> None:
        self.url = url
        self._users = users
        self.orphans: deque[tuple[Channel, int]] = deque()
        """The sockets of threads that have ended, with the number of the last call on each."""
        self._name = secrets.token_bytes(16)
        self._pool = Pool(limit_of_environment())
        self._account = self._pool.open_account()
        self._lock = threading.Lock()
        self._local = threading.local()
        self._lines: weakref.WeakSet[_Line] = weakref.WeakSet()
        self._pending = Pending()
        self._copied = 0
        self._why: Closed | Unreachable | None = None  # set once, when it is over
        self._peer: bytes | None = None  # the name that it has given itself
        self._opening: set[Channel] = set()  # whose peer hasn't said hello
        self._shared = self.open_channel(deadline)
        try:
            self._reactor = Reactor(
                f"edgeml to {url}",
                lambda _, number, message: self._pending.settle(number, message),
                lambda _, why: self._lose(str(why)),
                self._tidy,
                self._end,
            )
        except BaseException:
            self._shared.close()
            raise
        self._reactor.add(self._shared)
        self._reactor.start()
        watch_forks(self)

    def open_channel(self, deadline: Deadline) -> Channel:
        """Another socket to the peer, once it has said hello.

        Raises:
            PermissionDenied: one side does not talk to the other's user.
            Overloaded: the peer has too many connections.
        """
        records = connect(self.url, deadline, self._users)
        channel = Channel(records, self._pool, self._account)
        poll = select.poll()
        poll.register(records.fd, IN)
        try:
            with self._lock:
                if self._why is not None:
                    raise self._copy_why()
                self._opening.add(channel)
            while channel.connection is None:  # the peer speaks first, or says why it doesn't
                if not poll.poll(min(deadline.left * 1e3, LONGEST)):
                    why = f"{self.url} did not answer within {deadline.timeout:g} s"
                    raise DeadlineExceeded(why)
                refused = channel.receive()
                if refused is not None and isinstance(refused[1], EdgemlError):
                    raise refused[1]
            channel.greet(self._name)
            if self._peer is None:
                self._peer = channel.connection
            if channel.connection != self._peer:  # it has restarted, and a new connection is due
                raise Lost("the peer has gone, and another answers in its place")
        except BaseException:
            channel.close()
            raise
        finally:
            with self._lock:
                self._opening.discard(channel)
        return channel

    @property
    def lost(self) -> bool:
        return self._why is not None

    @property
    def copied(self) -> int:
        channels = [line.channel for line in list(self._lines)]
        open_ones = {self._shared, *channels, *(channel for channel, _ in list(self.orphans))}
        return self._copied + sum(channel.copied for channel in open_ones)

    def _copy_why(self) -> Exception:
        why = self._why or Unreachable(f"the connection to {self.url} was lost")
        return copy_error(why)

    def call(self, message: Message, timeout: float) -> Message:
        deadline = Deadline(timeout)
        if self._why is not None:
            raise self._copy_why()
        if self._pending.unanswered:  # a socket of its own would overtake them
            if self._reactor.inside:  # in a future's callback
                self._reactor.strand()
            return self.wait_for(self.request(message), deadline)
        line: _Line | None = getattr(self._local, "line", None)
        try:
            if line is None:
                line = self._new_line(deadline)
            return line.call(message, deadline)
        except Lost as error:
            if line is not None:
                line.channel.close()
            self._lose(str(error))
            raise self._copy_why() from None
        except (Overloaded, Unreachable):
            if self._why is not None:  # there is no memory left since it was closed, say
                raise self._copy_why() from None
            raise

    def _new_line(self, deadline: Deadline) -> _Line:
        try:  # threads may come and go faster than the loop looks
            channel, number = self.orphans.pop()
        except IndexError:
            channel, number = self.open_channel(deadline), 0
        line = _Line(self, channel, number)
        with self._lock:
            if self._why is None:
                self._lines.add(line)
                self._local.line = line
                return line
        line.channel.close()
        raise self._copy_why()

    def request(self, message: Message) -> Future[Message]:
        number, future = self._pending.add()
        try:
            if self._why is not None:
                raise self._copy_why()
            self._shared.send(number, message)
        except Lost as error:
            future.cancel()
            self._lose(str(error))
            raise self._copy_why() from None
        except BaseException as error:
            future.cancel()
            if self._why is not None and isinstance(error, Overloaded):
                raise self._copy_why() from None  # there is no memory left since it was closed
            raise
        return future

    def allocate(self, nbytes: int) -> memoryview | None:
        return self._pool.allocate(nbytes)

    def _lose(self, why: str) -> None:
        with self._lock:
            if self._why is None:
                self._why = Unreachable(f"the connection to {self.url} was lost: {why}")
        self._reactor.stop_soon()

    def _tidy(self) -> None:
        with suppress(IndexError):  # the last one is closed
            while True:
                channel, _ = self.orphans.popleft()
                channel.close()
                self._copied += channel.copied
        for line in list(self._lines):
            line.tidy()
        self._pool.tidy()

    def _end(self) -> None:
        """Free everything; the loop's last act, for a loss as for a close."""
        self._lose("it ended")  # if it isn't known yet why
        self._shared.close()
        self._pending.fail(self._copy_why())
        with self._lock:
            opening, lines = list(self._opening), list(self._lines)
        for channel in opening:
            channel.end()
        for line in lines:
            line.end()
        self._tidy()
        self._pool.close()

    def close(self) -> None:
        with self._lock:
            if self._why is None:
                self._why = Closed(f"the connection to {self.url} has been closed")
            channels = [*self._opening, *(line.channel for line in self._lines)]
        for channel in channels:
            channel.end()
        self._reactor.stop()

    def abandon(self) -> None:
        """Forget everything, in a forked child."""
        self._why = explain_fork(self.url)
        self._lock = threading.Lock()  # whoever held it is not there
        self._reactor.abandon()
        for line in list(self._lines):
            line.channel.abandon()
        for channel in [*self._opening, *(channel for channel, _ in self.orphans)]:
            channel.abandon()
        self._local = threading.local()
