"""The client: one link to a server, kept alive and made anew, with calls and subscriptions on it.

A link is a connection and the session that the server gave for it. A keeper thread always has one
heartbeat credit parked at the server, so a server that dies or freezes is noticed within
`edgeml.core.wire.SILENCE` seconds on any transport, and it makes a new link in the background.
A call that finds no link makes one itself, so that the first call after a restart just works.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from edgeml.core import wire
from edgeml.core.alarms import Alarm, Alarms
from edgeml.core.codec import Codec
from edgeml.core.errors import (
    Closed,
    ConfigMismatch,
    DeadlineExceeded,
    EdgemlError,
    Overloaded,
    PermissionDenied,
    UnknownInterface,
    Unreachable,
)
from edgeml.core.message import Message
from edgeml.core.plugins import load_codec, load_transport
from edgeml.core.streams import Subscription
from edgeml.core.transport import Credentials, Requester
from edgeml.core.url import Url

__all__ = ["Client", "ping"]

_log = logging.getLogger(__name__)

_IMPATIENCE = 0.05  # seconds; the first pause between two attempts to connect
_PATIENCE = 2.0  # seconds; the longest pause between two attempts to connect in the background
_GOODBYE = 3.0  # seconds that a server which stops may take to answer what it has begun
_LONGEST = 1e6  # seconds; of a timeout, as a transport may count milliseconds in 32 bits
_NOTHING = Message(b"")
_FAREWELL = 0.2  # seconds that closing may spend on telling the server
_MOST_UNSENT = 1 << 12  # asynchronous calls that wait for a connection


@dataclass(eq=False)
class _Link:
    """A connection with its session; see `edgeml.core.streams.Link`."""

    requester: Requester
    session: bytes
    codec: Codec
    topics: dict[str, int]
    epoch: int
    why_lost: EdgemlError | None = None
    retired: bool = False
    counted: bool = False  # its figures are among those of the client

    @property
    def lost(self) -> bool:
        return self.why_lost is not None or self.requester.lost

    def lose(self, why: EdgemlError) -> None:
        """Use it no more; a server that says so itself may still answer what is under way."""
        if self.why_lost is None:
            self.why_lost = why
        if not isinstance(why, Closed):
            self.requester.close()


@dataclass(eq=False)
class _Asynchronous:
    """A call whose caller has a future."""

    future: Future[Any]
    name: str
    encoded: Message
    deadline: float
    alarm: Alarm
    request: Future[Message] | None = None  # under way

    def settled(self, future: Future[Any]) -> None:
        """The caller's future is done, one way or another: let go of everything."""
        self.alarm.cancel()
        if future.cancelled():
            future.set_running_or_notify_cancel()  # tells those who wait for it among others
        if self.request is not None:
            self.request.cancel()
        self.encoded = _NOTHING  # for the future may be kept, and it refers to this


class Client:
    """Calls and subscriptions. Safe to use from several threads.

    Args:
        service: the kind of server wanted.
        urls: where it is; the first that answers is taken.
        config: what the server's configuration must equal, field by field.
        client_id: an identity that outlives this object; random by default.
        label: for people to read in the server's list of clients.
        codec: the codec's name.
        timeout: seconds that a call, or the first connection, may take unless told otherwise.
        wait: seconds to go on trying when nobody serves there yet.
        writable: whether received arrays are private copies rather than read-only views.
        credentials: given to the transport.

    Raises:
        Unreachable: nobody answers there.
        ConfigMismatch: the server is of another kind, or configured differently.
    """

    def __init__(
        self,
        service: str,
        urls: Sequence[Url],
        *,
        config: dict[str, Any] | None = None,
        client_id: str | None = None,
        label: str = "",
        codec: str = "msgpack",
        timeout: float = 10.0,
        wait: float = 0.0,
        writable: bool = False,
        credentials: Credentials = None,
    ) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout must be positive, not {timeout}")
        self.client_id = client_id or secrets.token_hex(8)
        self.timeout = float(min(timeout, _LONGEST))
        self._urls = list(urls)
        self._codec = load_codec(codec)
        self._hello = wire.pack(
            wire.Hello(wire.PROTOCOL, service, self.client_id, label, codec, config or {})
        )
        self._writable = writable
        self._credentials = credentials
        self._link: _Link | None = None
        self._retired: weakref.WeakSet[Requester] = weakref.WeakSet()
        self._attempt: Requester | None = None  # a connection whose handshake is under way
        self._connecting = threading.Lock()
        self._changed = threading.Condition()  # of the link, and of being closed
        self._closed = False
        self._subscriptions: weakref.WeakSet[Subscription] = weakref.WeakSet()
        self._numbers = itertools.count(1)  # of subscriptions
        self._unsent: deque[_Asynchronous] = deque()
        self._copied = 0  # on the connections before this one
        self._sender: threading.Thread | None = None
        self._alarms = Alarms("edgeml client alarms")
        self._connect_first(wait)
        self._keeper = threading.Thread(target=self._keep, name="edgeml keeper", daemon=True)
        self._keeper.start()

    @property
    def epoch(self) -> int:
        """A number that each start of the server has anew; of the one last connected to."""
        link = self._link
        return 0 if link is None else link.epoch

    # Links --------------------------------------------------------------------------------

    def _connect_first(self, wait: float) -> None:
        deadline = time.monotonic() + wait
        pause = _IMPATIENCE
        while True:
            try:
                self._connected(self.timeout)
                return
            except (Unreachable, Closed):  # or one that is just stopping
                left = deadline - time.monotonic()
                if left <= 0:
                    raise
                if pause == _IMPATIENCE:
                    _log.warning("waiting for a server at %s", self._urls[0])
            time.sleep(min(pause, left))
            pause = min(2 * pause, _PATIENCE)

    def _connected(self, timeout: float) -> _Link:
        """The link, made anew if it is lost."""
        link = self._link
        if link is not None and not link.lost:
            return link
        deadline = time.monotonic() + timeout
        if not self._connecting.acquire(timeout=timeout):
            raise DeadlineExceeded(f"no connection to {self._urls[0]} within {timeout:g} s")
        try:
            link = self._link
            if link is not None and not link.lost:
                return link
            if self._closed:
                raise Closed("this client has been closed")
            if link is not None:
                self._retire(link)
            made = self._connect(deadline)
            with self._changed:
                if self._closed:
                    made.requester.close()
                    raise Closed("this client has been closed")
                self._link = made
                self._changed.notify_all()
            return made
        finally:
            self._connecting.release()

    def _retire(self, link: _Link) -> None:
        """Close a lost connection, but one on which the server may still answer in a while."""
        if not link.counted:
            link.counted = True
            self._copied += link.requester.copied
        if not isinstance(link.why_lost, Closed):
            link.requester.close()
        elif not link.retired:
            link.retired = True
            self._retired.add(link.requester)
            self._alarms.after(_GOODBYE, link.requester.close)

    def _connect(self, deadline: float) -> _Link:
        failures: list[EdgemlError] = []
        for tried, url in enumerate(self._urls):
            # None may use up the time of those that come after it.
            left = max(0.01, (deadline - time.monotonic()) / (len(self._urls) - tried))
            try:
                requester = load_transport(url.scheme).connect(
                    url, left, credentials=self._credentials
                )
            except (Unreachable, PermissionDenied) as error:
                failures.append(error)
                continue
            with self._changed:
                self._attempt = requester
                closed = self._closed
            try:
                if closed:
                    raise Closed("this client has been closed")
                return self._greet(requester, time.monotonic() + left)
            except (DeadlineExceeded, Unreachable) as error:
                requester.close()
                told = f"no handshake with {url}: {error}"
                if isinstance(error, DeadlineExceeded):
                    told += "; it is busy, or at its limit of open files (see `edgeml doctor`)"
                failures.append(Unreachable(told))
            except BaseException:
                requester.close()
                raise
            finally:
                self._attempt = None
        if len(failures) == 1:
            raise failures[0]
        raise Unreachable("; ".join(map(str, failures)))

    def _greet(self, requester: Requester, deadline: float) -> _Link:
        header = wire.pack(wire.Request(wire.HELLO, b"", "", 0.0, self._hello))
        left = max(0.01, deadline - time.monotonic())
        reply = wire.unpack(wire.Reply, requester.call(Message(header), left).header)
        if reply.status != wire.OK:
            raise wire.error_of(reply)
        welcome = wire.unpack(wire.Welcome, reply.body)
        return _Link(requester, welcome.session, self._codec, welcome.topics, welcome.epoch)

    def _keep(self) -> None:
        """Keep a heartbeat under way, and make a new link when one is lost."""
        pause = 0.05
        while not self._closed:
            try:
                self._beat(self._connected(self.timeout))
                pause = 0.05
            except Exception as error:
                if isinstance(error, (ConfigMismatch, PermissionDenied)):
                    _log.warning("the server came back, but: %s", error)
                    pause = _PATIENCE
                elif not isinstance(error, EdgemlError):  # no file descriptor is left, say
                    _log.exception("the connection to the server failed, and is tried again")
                    if self._link is not None:
                        self._link.lose(Unreachable(f"the connection failed: {error}"))
                with self._changed:
                    if not self._closed:
                        self._changed.wait(pause)
                pause = min(2 * pause, _PATIENCE)

    def _beat(self, link: _Link) -> None:
        """Send one heartbeat credit, and lose the link if the answer isn't as it should be.

        It is a call, since a transport may give the keeper's thread a connection of its own: there
        it never waits behind a large publication that a slow network takes a minute for.
        """
        credit = wire.pack(wire.Credit(0, 0, 0))
        header = wire.pack(
            wire.Request(wire.NEXT, link.session, wire.HEARTBEAT, wire.SILENCE, credit)
        )
        try:
            reply = wire.unpack(wire.Reply, self._ask(link, Message(header)).header)
            if reply.status != wire.NOTHING_YET:
                raise wire.error_of(reply)
        except Overloaded:  # by calls, each of which has its own deadline
            with self._changed:
                if not self._closed:
                    self._changed.wait(0.1)
        except EdgemlError as error:
            link.lose(error)
            raise

    def _ask(self, link: _Link, message: Message) -> Message:
        """Twice, so that a process which was itself held up gets another chance."""
        try:
            return link.requester.call(message, wire.SILENCE / 2)
        except DeadlineExceeded:
            pass
        try:
            return link.requester.call(message, wire.SILENCE / 2)
        except DeadlineExceeded:
            raise Unreachable(
                f"no heartbeat from {link.requester.url} in {wire.SILENCE:g} s"
            ) from None

    def _next_link(self) -> _Link | None:
        """Wait for a link that works; None once this client is closed."""
        with self._changed:
            while not self._closed:
                if self._link is not None and not self._link.lost:
                    return self._link
                self._changed.wait()
        return None

    # Calls --------------------------------------------------------------------------------

    def call(self, name: str, payload: Any, timeout: float | None = None) -> Any:
        """Call an interface of the server and return its result.

        The payload's arrays may be changed when this returns, and when it raises.

        Args:
            name: of the interface.
            payload: any value that the codec carries.
            timeout: seconds; the client's own by default. The server learns it, and drops what
                nobody waits for any more.

        Raises:
            RemoteError: the handler raised.
            DeadlineExceeded: no answer in time.
            Unreachable: nobody answers, or the connection was lost while this call was under way.
            UnknownInterface, Overloaded, PermissionDenied, Malformed: as the server says.
            NotEncodable: the payload, before anything is sent.
            Closed: this client has been closed, or the server is stopping.
        """
        left = limit = self._limit(timeout)
        deadline = time.monotonic() + limit
        encoded = self._codec.encode(payload)
        while True:
            link = self._link
            if link is None or link.lost:
                link = self._connected(left)
                left = max(0.01, deadline - time.monotonic())
            header = wire.pack(wire.Request(wire.CALL, link.session, name, left, encoded.header))
            try:
                message = link.requester.call(Message(header, encoded.buffers), left)
            except Unreachable as error:
                link.lose(error)
                raise
            except Closed:
                raise self._why_closed(link) from None
            reply = wire.unpack(wire.Reply, message.header)
            if reply.status != wire.NO_SESSION:
                return self._value(reply, message)
            link.lose(wire.error_of(reply))  # not carried out, so it can be sent again
            left = deadline - time.monotonic()
            if left <= 0:
                raise DeadlineExceeded(f"no answer to {name!r} within {limit:g} s")

    def _limit(self, timeout: float | None) -> float:
        return self.timeout if timeout is None else float(max(0.0, min(timeout, _LONGEST)))

    def _value(self, reply: wire.Reply, message: Message) -> Any:
        if reply.status != wire.OK:
            raise wire.error_of(reply)
        return self._codec.decode(Message(reply.body, message.buffers), writable=self._writable)

    def _why_closed(self, link: _Link) -> EdgemlError:
        """What to tell a caller whose connection was closed under it."""
        if self._closed:
            return Closed("this client has been closed")
        return Unreachable(str(link.why_lost or "the connection was lost"))

    def call_async(self, name: str, payload: Any, timeout: float | None = None) -> Future[Any]:
        """Call an interface and return a future of its result, which raises what `call` does.

        The payload's arrays may be changed when this returns. Callbacks of the future run in the
        transport's thread and should be quick.

        Raises:
            NotEncodable: the payload.
            Overloaded: too many calls are under way.
            Closed: this client has been closed.
        """
        limit = self._limit(timeout)
        encoded = self._codec.encode_owned(payload, self.allocate)
        if self._closed:
            raise Closed("this client has been closed")
        future: Future[Any] = Future()

        def expire() -> None:
            _settle(future, DeadlineExceeded(f"no answer to {name!r} within {limit:g} s"))

        alarm = self._alarms.after(limit, expire)
        call = _Asynchronous(future, name, encoded, time.monotonic() + limit, alarm)
        future.add_done_callback(call.settled)
        try:
            link = self._link
            if link is not None and not link.lost and not self._unsent:
                with suppress(Unreachable):
                    self._send(call, link)
                    return future
            self._send_later(call)
        except EdgemlError:
            alarm.cancel()
            raise
        return future

    def _send(self, call: _Asynchronous, link: _Link) -> None:
        """Send it, or raise what shows that it was not sent."""
        left = max(0.01, call.deadline - time.monotonic())
        header = wire.pack(
            wire.Request(wire.CALL, link.session, call.name, left, call.encoded.header)
        )
        try:
            call.request = link.requester.request(Message(header, call.encoded.buffers))
        except Closed:
            raise self._why_closed(link) from None
        except Unreachable as error:
            link.lose(error)
            raise
        call.request.add_done_callback(lambda done: self._receive(call, link, done))
        if call.future.done():  # meanwhile
            call.request.cancel()

    def _receive(self, call: _Asynchronous, link: _Link, done: Future[Message]) -> None:
        """Settle a call with what came for it; runs in the transport's thread."""
        if done.cancelled():
            return
        try:
            message = done.result()
            reply = wire.unpack(wire.Reply, message.header)
            if reply.status == wire.NO_SESSION:
                link.lose(wire.error_of(reply))  # not carried out, so it can be sent again
                self._send_later(call)
            else:
                _settle(call.future, self._value(reply, message))
        except Closed as error:
            _settle(call.future, self._why_closed(link) if done.exception() else error)
        except Exception as error:
            _settle(call.future, error)

    def _send_later(self, call: _Asynchronous) -> None:
        """Leave a call to a thread that connects first, which takes time."""
        with self._changed:
            if self._closed:
                raise Closed("this client has been closed")
            if len(self._unsent) >= _MOST_UNSENT:
                raise Overloaded(f"{_MOST_UNSENT} calls wait for a connection already")
            self._unsent.append(call)
            if self._sender is None:
                self._sender = threading.Thread(
                    target=self._send_unsent, name="edgeml sender", daemon=True
                )
                self._sender.start()

    def _send_unsent(self) -> None:
        while True:
            with self._changed:
                if not self._unsent:
                    self._sender = None
                    return
                call = self._unsent[0]
            try:
                if not call.future.done():
                    left = max(0.01, call.deadline - time.monotonic())
                    self._send(call, self._connected(left))
            except Exception as error:
                _settle(call.future, error)
            self._unsent.popleft()  # only now, so that none overtakes it
            del call  # or the buffers live until the next call

    def allocate(self, nbytes: int) -> memoryview | None:
        """Memory that is sent without a copy, if there is such; see `Endpoint.allocate`."""
        link = self._link
        return None if link is None or link.lost else link.requester.allocate(nbytes)

    def stats(self) -> dict[str, int]:
        """Counts since the start; ``replies_copied``: see `Endpoint.copied`."""
        link = self._link
        now = link.requester.copied if link is not None and not link.counted else 0
        return {"replies_copied": self._copied + now}

    # Subscriptions ------------------------------------------------------------------------

    def subscribe(self, topic: str, function: Callable[[Any], None]) -> Subscription:
        """Call ``function`` with what the server publishes, from now on; see `Subscription`.

        Raises:
            UnknownInterface: the server has no such topic.
            Unreachable, Closed: as for `call`.
        """
        topics = self._connected(self.timeout).topics
        if topic not in topics:
            known = ", ".join(sorted(filter(None, topics))) or "none"
            raise UnknownInterface(f"there is no topic {topic!r}; known: {known}")
        with self._changed:
            number = next(self._numbers)
            made = Subscription(topic, number, function, self._next_link, self._writable)
            self._subscriptions.add(made)  # and its thread keeps it until it is closed
        return made

    # Life ---------------------------------------------------------------------------------

    def close(self) -> None:
        """End every thread and wake blocked callers with `Closed`; idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            link, attempt, sender = self._link, self._attempt, self._sender
            subscriptions = list(self._subscriptions)
        if link is not None:
            if not link.lost:
                self._say_goodbye(link)
            link.lose(Closed("this client has been closed"))
            link.requester.close()
        for requester in [attempt, *self._retired]:
            if requester is not None:
                requester.close()
        for subscription in subscriptions:
            subscription.end()
        deadline = time.monotonic() + 1.0
        for subscription in subscriptions:
            subscription.join(max(0.0, deadline - time.monotonic()))
        self._alarms.close()
        for thread in (self._keeper, sender):
            if thread is not None and thread is not threading.current_thread():
                thread.join(2.0)

    def _say_goodbye(self, link: _Link) -> None:
        """Let the server forget this client now, not after half a minute of silence."""
        header = wire.pack(wire.Request(wire.GOODBYE, link.session, "", _FAREWELL, b""))
        with suppress(EdgemlError):
            link.requester.call(Message(header), _FAREWELL)


def ping(requester: Requester, timeout: float) -> tuple[wire.Pong, float, float]:
    """Ask the server at the other end of a connection who it is; needs no session.

    Returns:
        What it says, the round trip in seconds, and how many seconds its clock is ahead of ours:
        to half a round trip exactly, and better the more alike the two ways are (RFC 5905).

    Raises:
        DeadlineExceeded, Unreachable, Closed: as for `Requester.call`.
        Malformed: what answers is no edgeml server.
    """
    header = wire.pack(wire.Request(wire.PING, b"", "", timeout, b""))
    began, clock = time.perf_counter(), time.time()
    reply = wire.unpack(wire.Reply, requester.call(Message(header), timeout).header)
    took = time.perf_counter() - began
    if reply.status != wire.OK:
        raise wire.error_of(reply)
    pong = wire.unpack(wire.Pong, reply.body)
    return pong, took, pong.clock - (clock + took / 2)


def _settle(future: Future[Any], result: Any) -> None:
    """Complete a future, unless somebody did before."""
    with suppress(InvalidStateError):
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
