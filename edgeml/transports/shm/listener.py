"""The server's end: one loop for all who connect."""

# ruff: noqa: D102 - what has no docstring is described in `edgeml.core.transport`

from __future__ import annotations

import errno
import logging
import os
import secrets
import socket
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress

from edgeml.core import (
    Deadline,
    EdgemlError,
    Endpoint,
    Limits,
    Message,
    OnRequest,
    Overloaded,
    Peer,
    PermissionDenied,
    Reply,
    Url,
    own,
)
from edgeml.core.advice import what_to_do
from edgeml.core.carrier import Stay
from edgeml.core.forks import watch_forks
from edgeml.core.refusals import Refusals
from edgeml.core.url import require_this_machine
from edgeml.transports.shm.channel import Channel
from edgeml.transports.shm.memory import Account, Pool, limit_of_environment
from edgeml.transports.shm.reactor import Reactor
from edgeml.transports.shm.sockets import (
    LONGEST_PATH,
    Lost,
    Records,
    accept,
    listen,
    unlink,
)

__all__ = ["Listener", "check_address"]

_log = logging.getLogger(__name__)

_PATIENCE = 10.0  # seconds in which a name server tells whether a host is this machine


class _Reply:
    __slots__ = ("_channel", "_listener", "_number")

    def __init__(self, listener: Listener, channel: Channel, number: int) -> None:
        self._listener = listener
        self._channel = channel
        self._number = number

    @property
    def peer(self) -> Peer:
        channel = self._channel
        if channel.peer is None:
            channel.peer = _peer(channel)
        return channel.peer

    @property
    def expired(self) -> bool:
        return self._channel.lost

    def __call__(self, message: Message) -> None:
        try:
            self._channel.send(self._number, message)
        except (Lost, Overloaded) as error:
            self._listener.drop(error)
            if isinstance(error, Overloaded):
                why = Overloaded(f"the reply could not be given: {error}")
                with suppress(Lost, Overloaded):  # or it would be waited for
                    self._channel.refuse(self._number, why)


class Listener(Endpoint):
    """Serves at one address; see `Endpoint`.

    Args:
        url: where.
        on_request: is given the requests.
        users: whose processes may connect.
        limits: what they may have.
    """

    local = secured = True

    def __init__(
        self, url: Url, on_request: OnRequest, users: frozenset[int], limits: Limits
    ) -> None:
        self._on_request = on_request
        self._users = users
        self._limits = limits
        self._pool = Pool(limit_of_environment())
        self._socket, self.url = _listen(url, to_all=len(users) > 1)
        self._lock = threading.Lock()
        self._name = secrets.token_bytes(16)
        self._accounts: weakref.WeakValueDictionary[bytes | int, Account] = (
            weakref.WeakValueDictionary()
        )
        self._connected: Counter[int] = Counter()  # sockets, by user
        self._refusals = Refusals(self.url, self.counts)
        self._at_limit = False  # of open files
        self._copied = 0
        self._reactor = Reactor(
            f"edgeml {self.url}", self._receive, self._lose, self._tick, self._end
        )
        self._reactor.listen(self._socket, self._accept)
        self._reactor.start()
        watch_forks(self)

    @property
    def copied(self) -> int:
        return self._copied + sum(channel.copied for channel in self._reactor.channels)

    def drop(self, why: Exception) -> None:
        """Count a reply that can't be given."""
        with self._lock:
            self.dropped += 1
        _log.debug("%s: a reply is dropped: %s", self.url, why)

    def _accept(self) -> Channel | None:
        try:
            records = accept(self._socket)
        except OSError as error:
            advice = what_to_do(error.errno)
            if not self._at_limit:
                self._at_limit = True
                _log.warning("%s: nobody can connect now: %s%s", self.url, error, advice)
            raise
        self._at_limit = False
        if records is None:
            return None
        channel = Channel(records, self._pool, limits=self._limits)
        refused = self._refusal(records)
        with suppress(Lost, Overloaded):
            if refused is None:
                channel.greet(self._name)
                self._connected[records.user] += 1
                return channel
            self._note(records, refused)
            channel.refuse(0, refused)
        channel.close()
        return None

    def _refusal(self, records: Records) -> EdgemlError | None:
        """Why somebody may not connect."""
        user = records.user
        if user not in self._users:
            return PermissionDenied(
                f"{self.url} is served by user {os.geteuid()}, who doesn't talk to user {user}: "
                "list him there in Credentials.users, or in the file `users` among the keys"
            )
        most = self._limits.connections_per_address
        if self._connected[user] >= most:
            return Overloaded(
                f"user {user} has {most} connections to {self.url}, and may have no more: see "
                "Limits.connections_per_address"
            )
        return None

    def _note(self, records: Records, why: Exception, kind: str = "") -> None:
        """Count who was refused or cut off, and log it."""
        kind = kind or type(why).__name__
        user = f"user {records.user}"
        self._refusals.note(kind, f"process {records.process} of {user}", user, why)

    def _receive(self, channel: Channel, number: int, message: Message | EdgemlError) -> None:
        if channel.account is None and channel.connection is not None:
            channel.join(self._open_account(channel))
        if isinstance(message, Message):
            self._on_request(message, _Reply(self, channel, number))
        else:  # it is larger than it may be
            self._note(channel.records, message)
            with suppress(Lost, Overloaded):
                channel.refuse(number, message)

    def _open_account(self, channel: Channel) -> Account:
        """One for all sockets of a connection; for all connections of another user, who could
        otherwise have as many as he likes.
        """
        whose = channel.records.user if channel.records.foreign else channel.connection
        assert whose is not None
        account = self._accounts.get(whose)
        if account is None:
            self._accounts[whose] = account = self._pool.open_account()
        return account

    def _lose(self, channel: Channel, why: Lost) -> None:
        self._connected[channel.records.user] -= 1
        if why.kind:
            self._note(channel.records, why, why.kind)
        unsent = channel.close()
        with self._lock:
            self._copied += channel.copied
            self.dropped += unsent

    def _tick(self) -> None:
        self._pool.tidy()
        now = time.monotonic()
        for channel in self._reactor.channels:
            what, seconds = channel.half_said(now)
            if channel.connection is None and seconds > self._limits.handshake:
                kind = "HandshakeTimeout"
            elif seconds > self._limits.stall:
                kind = "Stalled"
            else:
                continue
            self._reactor.lose(channel, Lost(f"it hasn't said {what} in {seconds:.0f} s", kind))

    def _end(self) -> None:
        self._socket.close()
        unlink(self.url.port, self.url.path)
        self._pool.close()

    def allocate(self, nbytes: int) -> memoryview | None:
        return self._pool.allocate(nbytes)

    def reply_many(self, replies: Iterable[Reply], message: Message) -> None:
        message = own(message, self.allocate)
        for reply in replies:
            reply(message)

    @property
    def behind(self) -> float:
        return self._reactor.backlog.seconds

    def carry(self, stay: Stay) -> bool:
        return self._reactor.carry(stay)

    def wake(self) -> None:
        self._reactor.wake()

    def relieve(self) -> None:
        self._reactor.relieve()

    def close(self) -> None:
        self._reactor.stop()

    def abandon(self) -> None:
        """Forget everything, in a forked child."""
        self._reactor.abandon()
        self._socket.close()


def _peer(channel: Channel) -> Peer:
    """Who is on the other side, as the system tells."""
    records = channel.records
    name = (channel.connection or b"").hex()
    whose = f" of user {records.user}" if records.foreign else ""
    # The name is the peer's own choice, and must not be another user's.
    return Peer(
        f"{records.user}-{name}", f"shm, process {records.process}{whose}", f"user {records.user}"
    )


def _listen(url: Url, *, to_all: bool) -> tuple[socket.socket, Url]:
    check_address(url, Deadline(_PATIENCE))
    chosen = bool(url.path or url.port)
    for _ in range(1 if chosen else 100):
        port = url.port if chosen else 49152 + secrets.randbelow(65536 - 49152)
        try:
            return listen(port, url.path, to_all=to_all), url.with_port(port)
        except OSError as error:
            last = error
    kind = PermissionDenied if isinstance(last, PermissionDenied) else OSError
    hint = "another address may be free" if chosen else "no port is free"
    raise kind(last.errno, f"cannot serve {url}: {last.strerror or last}; {hint}") from last


def check_address(url: Url, deadline: Deadline) -> None:
    """Raise an OSError for an address that no socket of this machine can have."""
    if url.path:
        size = len(os.fsencode(url.path))
        if size > LONGEST_PATH:
            raise OSError(
                errno.ENAMETOOLONG,
                f"the path of {url} has {size} bytes, and that of a socket {LONGEST_PATH} at most: "
                "choose a shorter one, in /tmp or /run for example",
            )
        return
    try:
        require_this_machine(url.host, deadline)
    except OSError as error:
        raise OSError(f"{url} is not on this machine, and shm reaches no other: {error}") from None
