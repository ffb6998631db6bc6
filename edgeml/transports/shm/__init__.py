"""Shared memory between the processes of one user on one machine.

``shm://127.0.0.1:PORT`` names a Unix socket that is gone with its process; ``shm:///run/robot.sock``
one at a path, for containers that share a folder. What is large lies in memory that both sides
map (`memory`); what is small goes through the socket, together with the word where the rest is
(`channel`). A message is copied once, into that memory; to many peers it is copied once for all.

Threads. A listener has one loop. A connection gives each calling thread a socket of its own, on
which `call` sends and waits without a thread hop; what `request` sends has one socket and one loop.
Whoever sends a message writes it to the socket itself.

Only processes of the same user are talked to, which the system vouches for. They are trusted not to
change what they have sent, as any process of the same user could do worse, but nothing else of what
they send is.
"""

from __future__ import annotations

import logging
import os
import secrets
import select
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import ClassVar

from edgeml.core import (
    Closed,
    Credentials,
    DeadlineExceeded,
    Endpoint,
    Message,
    OnRequest,
    Overloaded,
    Peer,
    Pending,
    PermissionDenied,
    Reply,
    Requester,
    Transport,
    Unreachable,
    Url,
    hookimpl,
    own,
)
from edgeml.transports.shm.channel import Channel
from edgeml.transports.shm.loop import Loop
from edgeml.transports.shm.memory import Account, Pool
from edgeml.transports.shm.sockets import Lost, accept, connect, listen, unlink
from edgeml.transports.shm.waiting import IN, OUT, Waiter

__all__ = ["ShmTransport", "edgeml_transport"]

_log = logging.getLogger(__name__)

_SMALL = 16 << 10  # bytes; below, there is nothing to be gained from room
_GRACE = 0.3  # seconds that a call under way is given to take its last reply
_LONGEST = float(1 << 30)  # ms that a wait is told to last
_LEAST_LIMIT, _MOST_LIMIT = 1 << 28, 1 << 31  # bytes, of the limit that nobody has chosen


def _limit() -> int:
    """Bytes that may be lent to one peer at a time, as the environment says."""
    given = os.environ.get("EDGEML_SHM_LIMIT_MB")
    if given:
        try:
            megabytes = int(given)
        except ValueError:
            megabytes = 0
        if megabytes < 1:
            raise ValueError(f"EDGEML_SHM_LIMIT_MB must be a number from 1, not {given!r}")
        return megabytes << 20
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(_LEAST_LIMIT, min(_MOST_LIMIT, memory // 4))


class _Reply:
    __slots__ = ("_channel", "_listener", "_number")

    def __init__(self, listener: _Listener, channel: Channel, number: int) -> None:
        self._listener = listener
        self._channel = channel
        self._number = number

    @property
    def peer(self) -> Peer:
        return self._listener.peer(self._channel)

    @property
    def expired(self) -> bool:
        return self._channel.lost

    def __call__(self, message: Message) -> None:
        try:
            self._channel.send(self._number, message)
        except (Lost, Overloaded) as error:
            self._listener.drop(error)


class _Listener(Endpoint):
    def __init__(self, url: Url, on_request: OnRequest) -> None:
        self._on_request = on_request
        self._limit = _limit()
        self._socket, self.url = _listen(url)
        self._pool = Pool()
        self._lock = threading.Lock()
        self._name = secrets.token_bytes(16)
        self._accounts: weakref.WeakValueDictionary[bytes, Account] = weakref.WeakValueDictionary()
        self._pids: weakref.WeakKeyDictionary[Channel, int] = weakref.WeakKeyDictionary()
        self._copied = 0
        self._loop = Loop(
            f"edgeml {self.url}", self._receive, self._lose, self._pool.tidy, self._end
        )
        self._loop.listen(self._socket, self._accept)
        self._loop.start()
        _open_ends.add(self)

    @property
    def copied(self) -> int:
        return self._copied + sum(channel.copied for channel in self._loop.channels)

    def peer(self, channel: Channel) -> Peer:
        pid = self._pids.get(channel, 0)
        return Peer((channel.connection or b"").hex(), f"shm, process {pid}")

    def drop(self, why: Exception, count: int = 1) -> None:
        with self._lock:
            self.dropped += count
        _log.debug("%s: a reply is dropped: %s", self.url, why)

    def _accept(self) -> Channel | None:
        try:
            found = accept(self._socket)
        except PermissionDenied as error:
            _log.warning("%s: somebody is refused: %s", self.url, error)
            return None
        except OSError as error:  # too many open files; or they went away meanwhile
            _log.warning("%s: somebody could not connect: %s", self.url, error)
            time.sleep(0.01)
            return None
        if found is None:
            return None
        records, pid = found
        channel = Channel(records, self._pool)
        self._pids[channel] = pid
        try:
            channel.greet(self._name)
        except Lost:
            channel.close()
            return None
        return channel

    def _receive(self, channel: Channel, number: int, message: Message) -> None:
        if channel.account is None and channel.connection is not None:
            # One for all the sockets of a connection.
            channel.account = self._accounts.get(channel.connection)
            if channel.account is None:
                channel.account = self._pool.account(self._limit)
                self._accounts[channel.connection] = channel.account
        self._on_request(message, _Reply(self, channel, number))

    def _lose(self, channel: Channel, why: str) -> None:
        _log.debug("%s: lost %s: %s", self.url, self.peer(channel).address, why)
        unsent = channel.close()
        with self._lock:
            self._copied += channel.copied
            self.dropped += unsent

    def _end(self) -> None:
        self._socket.close()
        unlink(self.url.port, self.url.path)
        self._pool.close()

    def room(self, nbytes: int) -> memoryview | None:
        return _room(self._pool, nbytes)

    def reply_many(self, replies: Iterable[Reply], message: Message) -> None:
        message = own(message, self.room)
        for reply in replies:
            reply(message)

    def relieve(self) -> None:
        self._loop.relieve()

    def close(self) -> None:
        self._loop.stop()

    def forked(self) -> None:
        self._loop.forked()
        self._socket.close()


def _room(pool: Pool, nbytes: int) -> memoryview | None:
    if nbytes <= _SMALL:
        return None
    try:
        return pool.room(nbytes)
    except Overloaded:  # ordinary memory will do
        return None


def _listen(url: Url) -> tuple[socket.socket, Url]:
    if url.path:
        return listen(0, url.path), url
    _require_local(url)
    if url.port:
        try:
            return listen(url.port, ""), url
        except OSError as error:
            reason = f"cannot serve {url}: {error}; another port, or 0, may be free"
            raise OSError(error.errno, reason) from error
    for _ in range(100):
        port = 49152 + secrets.randbelow(65536 - 49152)
        try:
            return listen(port, ""), url.with_port(port)
        except OSError as error:
            last = error
    raise OSError(last.errno, f"cannot serve {url}: no free port: {last}")


def _require_local(url: Url) -> None:
    """Raise an OSError for the address of another machine."""
    host = url.host or "localhost"
    if host in ("localhost", "127.0.0.1", "0.0.0.0", "::", "::1", socket.gethostname()):
        return
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)  # which works for this machine's addresses alone
    except (OSError, UnicodeError) as error:
        raise OSError(f"{url} is not on this machine, and shm reaches no other: {error}") from None


class _Line:
    """The socket of one calling thread."""

    def __init__(self, connection: _Connection, timeout: float) -> None:
        self.channel = connection.open_channel(timeout)
        self._orphans = connection.orphans
        self._lock = threading.Lock()
        self._url = connection.url
        self._waiter = Waiter()
        self._poll = select.poll()
        self._poll.register(self.channel.records.fd, IN)
        self._number = 0

    def call(self, message: Message, timeout: float) -> Message:
        deadline = time.monotonic() + timeout
        with self._lock:
            self._number = number = self._number + 1
            channel = self.channel
            channel.send(number, message)
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise DeadlineExceeded(f"{self._url} gave no reply within {timeout:g} s")
                if channel.full:
                    self._flush(left)
                    continue
                got = self._waiter.wait(self._look, left)
                if got is not None and got[0] == number:  # not a late one
                    return got[1]

    def _look(self, seconds: float) -> tuple[int, Message] | None:
        if seconds or self._poll.poll(0):  # cheaper than to receive nothing
            return self.channel.receive(seconds)
        return None

    def _flush(self, left: float) -> None:
        """Send what found no room in the socket; others of this thread's calls are before it."""
        fd = self.channel.records.fd
        self._poll.modify(fd, IN | OUT)
        try:
            self._poll.poll(min(left * 1e3, _LONGEST))
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
        with suppress(AttributeError):  # it was never connected
            self._orphans.append(self.channel)


class _Connection(Requester):
    def __init__(self, url: Url, timeout: float) -> None:
        self.url = url
        self.orphans: deque[Channel] = deque()
        self._name = secrets.token_bytes(16)
        self._pool = Pool()
        self._account = self._pool.account(_limit())
        self._lock = threading.Lock()
        self._local = threading.local()
        self._lines: weakref.WeakSet[_Line] = weakref.WeakSet()
        self._pending = Pending()
        self._copied = 0
        self._why: Closed | Unreachable | None = None  # set once, when it is over
        self._peer: bytes | None = None  # the name that it has given itself
        self._shared = self.open_channel(timeout)
        try:
            self._loop = Loop(
                f"edgeml to {url}",
                lambda _, number, message: self._pending.settle(number, message),
                lambda _, why: self._lose(why),
                self._tidy,
                self._end,
            )
        except BaseException:
            self._shared.close()
            raise
        self._loop.add(self._shared)
        self._loop.start()
        _open_ends.add(self)

    def open_channel(self, timeout: float) -> Channel:
        """Another socket to the peer, once it has said hello."""
        deadline = time.monotonic() + timeout
        channel = Channel(connect(self.url, timeout), self._pool, self._account)
        try:
            channel.greet(self._name)
            while channel.connection is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise DeadlineExceeded(f"{self.url} did not answer within {timeout:g} s")
                channel.receive(left)
            if self._peer is None:
                self._peer = channel.connection
            if channel.connection != self._peer:  # it has restarted, and a new connection is due
                raise Lost("the peer has gone, and another answers in its place")
        except BaseException:
            channel.close()
            raise
        return channel

    @property
    def lost(self) -> bool:
        return self._why is not None

    @property
    def copied(self) -> int:
        lines = [line.channel.copied for line in list(self._lines)]
        return self._copied + self._shared.copied + sum(lines)

    def _over(self) -> Exception:
        why = self._why or Unreachable(f"the connection to {self.url} was lost")
        return type(why)(*why.args)

    def call(self, message: Message, timeout: float) -> Message:
        if self._why is not None:
            raise self._over()
        line: _Line | None = getattr(self._local, "line", None)
        try:
            if line is None:
                deadline = time.monotonic() + timeout
                line = self._new_line(timeout)
                timeout = deadline - time.monotonic()
            return line.call(message, timeout)
        except Lost as error:
            if line is not None:
                line.channel.close()
            self._lose(str(error))
            raise self._over() from None
        except (Overloaded, Unreachable):
            if self._why is not None:  # there is no memory left since it was closed, say
                raise self._over() from None
            raise

    def _new_line(self, timeout: float) -> _Line:
        line = _Line(self, timeout)
        with self._lock:
            if self._why is None:
                self._lines.add(line)
                self._local.line = line
                return line
        line.channel.close()
        raise self._over()

    def request(self, message: Message) -> Future[Message]:
        number, future = self._pending.add()
        try:
            if self._why is not None:
                raise self._over()
            self._shared.send(number, message)
        except Lost as error:
            future.cancel()
            self._lose(str(error))
            raise self._over() from None
        except BaseException as error:
            future.cancel()
            if self._why is not None and isinstance(error, Overloaded):
                raise self._over() from None  # there is no memory left since it was closed
            raise
        return future

    def room(self, nbytes: int) -> memoryview | None:
        return _room(self._pool, nbytes)

    def _lose(self, why: str) -> None:
        with self._lock:
            if self._why is None:
                self._why = Unreachable(f"the connection to {self.url} was lost: {why}")
        self._loop.stop_soon()

    def _tidy(self) -> None:
        while self.orphans:
            channel = self.orphans.popleft()
            self._copied += channel.copied
            channel.close()
        for line in list(self._lines):
            line.tidy()
        self._pool.tidy()

    def _end(self) -> None:
        """Free everything; the loop's last act, for a loss as for a close."""
        self._lose("it ended")  # if it isn't known yet why
        self._shared.close()
        self._pending.fail(self._over())
        with self._lock:
            lines = list(self._lines)
        for line in lines:
            line.end()
        self._tidy()
        self._pool.close()

    def close(self) -> None:
        with self._lock:
            if self._why is None:
                self._why = Closed(f"the connection to {self.url} has been closed")
            lines = list(self._lines)
        for line in lines:
            line.channel.end()
        self._loop.stop()

    def forked(self) -> None:
        """Forget everything, in a forked child."""
        self._why = Closed(f"the connection to {self.url} belongs to the process before the fork")
        self._lock = threading.Lock()  # whoever held it is not there
        self._loop.forked()
        for line in list(self._lines):
            line.channel.forked()
        self._local = threading.local()


_open_ends: weakref.WeakSet[_Listener | _Connection] = weakref.WeakSet()


def _forked() -> None:
    for end in list(_open_ends):
        end.forked()


os.register_at_fork(after_in_child=_forked)


class ShmTransport(Transport):
    """``shm://127.0.0.1:PORT`` or ``shm:///path``: between the processes of one user."""

    name: ClassVar[str] = "shm"

    def serve(
        self, url: Url, on_request: OnRequest, *, credentials: Credentials = None
    ) -> Endpoint:
        """See `Transport.serve`; the system itself tells who connects, so credentials are unused.

        ``$EDGEML_SHM_LIMIT_MB`` is how much memory may be lent to one peer at a time, in MiB; by
        default a quarter of the machine's, and 2048 at most.
        """
        return _Listener(url, on_request)

    def connect(self, url: Url, timeout: float, *, credentials: Credentials = None) -> Requester:
        """See `Transport.connect`.

        Raises:
            PermissionDenied: another user's process serves there.
        """
        if not url.path:
            try:
                _require_local(url)
            except OSError as error:
                raise Unreachable(str(error)) from None
        try:
            return _Connection(url, timeout)
        except (Lost, DeadlineExceeded) as error:
            raise Unreachable(f"no connection to {url}: {error}") from None


@hookimpl
def edgeml_transport() -> type[Transport]:
    """Answer the plugin hook."""
    return ShmTransport
