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
from collections.abc import Iterable
from contextlib import suppress

from edgeml.core import (
    Endpoint,
    Message,
    OnRequest,
    Overloaded,
    Peer,
    PermissionDenied,
    Reply,
    Url,
    own,
)
from edgeml.core.carrier import Stay
from edgeml.core.forks import watch_forks
from edgeml.core.url import require_this_machine
from edgeml.transports.shm.channel import Channel
from edgeml.transports.shm.memory import Account, Pool, limit_of_environment
from edgeml.transports.shm.reactor import Reactor
from edgeml.transports.shm.sockets import LONGEST_PATH, Lost, accept, listen, unlink

__all__ = ["Listener", "check_address"]

_log = logging.getLogger(__name__)


class _Reply:
    __slots__ = ("_channel", "_listener", "_number")

    def __init__(self, listener: Listener, channel: Channel, number: int) -> None:
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
            if isinstance(error, Overloaded):
                with suppress(Lost, Overloaded):  # or it would be waited for
                    self._channel.refuse(self._number, f"the reply could not be given: {error}")


class Listener(Endpoint):
    """Serves at one address; see `Endpoint`."""

    local = secured = True

    def __init__(self, url: Url, on_request: OnRequest) -> None:
        self._on_request = on_request
        self._pool = Pool(limit_of_environment())
        self._socket, self.url = _listen(url)
        self._lock = threading.Lock()
        self._name = secrets.token_bytes(16)
        self._accounts: weakref.WeakValueDictionary[bytes, Account] = weakref.WeakValueDictionary()
        self._pids: weakref.WeakKeyDictionary[Channel, int] = weakref.WeakKeyDictionary()
        self._copied = 0
        self._reactor = Reactor(
            f"edgeml {self.url}", self._receive, self._lose, self._pool.tidy, self._end
        )
        self._reactor.listen(self._socket, self._accept)
        self._reactor.start()
        watch_forks(self)

    @property
    def copied(self) -> int:
        return self._copied + sum(channel.copied for channel in self._reactor.channels)

    def peer(self, channel: Channel) -> Peer:
        """Who is on the other side, as the system tells."""
        pid = self._pids.get(channel, 0)
        return Peer((channel.connection or b"").hex(), f"shm, process {pid}")

    def drop(self, why: Exception) -> None:
        """Count a reply that can't be given."""
        with self._lock:
            self.dropped += 1
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

    def _receive(self, channel: Channel, number: int, message: Message | Overloaded) -> None:
        if channel.account is None and channel.connection is not None:
            # One for all the sockets of a connection.
            account = self._accounts.get(channel.connection)
            if account is None:
                self._accounts[channel.connection] = account = self._pool.open_account()
            channel.join(account)
        if isinstance(message, Message):  # nobody else refuses anything
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

    def allocate(self, nbytes: int) -> memoryview | None:
        return self._pool.allocate(nbytes)

    def reply_many(self, replies: Iterable[Reply], message: Message) -> None:
        message = own(message, self.allocate)
        for reply in replies:
            reply(message)

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


def _listen(url: Url) -> tuple[socket.socket, Url]:
    check_address(url)
    chosen = bool(url.path or url.port)
    for _ in range(1 if chosen else 100):
        port = url.port if chosen else 49152 + secrets.randbelow(65536 - 49152)
        try:
            return listen(port, url.path), url.with_port(port)
        except OSError as error:
            last = error
    kind = PermissionDenied if isinstance(last, PermissionDenied) else OSError
    hint = "another address may be free" if chosen else "no port is free"
    raise kind(last.errno, f"cannot serve {url}: {last.strerror or last}; {hint}") from last


def check_address(url: Url) -> None:
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
        require_this_machine(url.host)
    except OSError as error:
        raise OSError(f"{url} is not on this machine, and shm reaches no other: {error}") from None
