"""The client: calls, futures and subscriptions, over the session that a keeper or a pool has."""

from __future__ import annotations

import functools
import itertools
import logging
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from edgeml.core import wire
from edgeml.core.alarms import Alarm, Alarms
from edgeml.core.codec import Codec, Wrapping
from edgeml.core.deadline import Deadline
from edgeml.core.errors import (
    Closed,
    DeadlineExceeded,
    EdgemlError,
    NotCarriedOut,
    NotReady,
    Overloaded,
    UnknownInterface,
    Unreachable,
)
from edgeml.core.message import Message
from edgeml.core.ping import ping
from edgeml.core.plugins import load_codec
from edgeml.core.pool import Pool
from edgeml.core.resolver import Asker, Watch
from edgeml.core.security import Credentials, CredentialsLike
from edgeml.core.session import Session, SessionKeeper
from edgeml.core.state import ServerState, state_of
from edgeml.core.streams import Subscription
from edgeml.core.url import Url

__all__ = ["Client", "Timing"]

_log = logging.getLogger(__name__)

_LONGEST = 1e6  # seconds; of a timeout, as a transport may count milliseconds in 32 bits
_LEAST = 0.01  # seconds that whatever is sent is given
_MOMENT = 0.5  # seconds that closing waits for threads; one may be amid connecting, or a callback
_NOTHING = Message(b"")
_IMPATIENCE = 0.02  # seconds; the first pause between two looks whether a server is ready
_PATIENCE = 0.5  # seconds; the longest
_MOST_UNSENT = 1 << 12  # asynchronous calls that wait for a connection


@dataclass(frozen=True)
class Timing:
    """How a call was served, as the server tells; what is left of the round trip is the way.

    Attributes:
        version: of the function that answered: counts from 1, and rises when it is replaced.
        batch_size: calls that were answered by the same run of it.
        queue: seconds from the call's arrival at the server until its turn came.
        compute: seconds that the function took.
        round_trip: seconds from the call until its answer was here.
    """

    version: int
    batch_size: int
    queue: float
    compute: float
    round_trip: float


def _tell_timing(reply: wire.Result, began: float) -> Timing:
    served = reply.served or wire.Served(0, 1, 0.0, 0.0)
    took = time.monotonic() - began
    return Timing(served.version, served.batch_size, served.queue, served.compute, took)


@dataclass(eq=False)
class _Asynchronous:
    """A call whose caller has a future."""

    future: Future[Any]
    name: str
    encoder: Codec
    encoded: Message
    deadline: Deadline
    sessions: SessionKeeper | Pool
    alarm: Alarm | None = None
    request: Future[Message] | None = None  # under way, ...
    session: Session | None = None  # ... in this
    avoid: Session | None = None  # in which it was refused
    sent: float = 0.0  # when

    def expire(self) -> None:
        """No answer has come in time."""
        error: EdgemlError | None = None
        if self.request is None:
            error = self.sessions.explain_none(self.deadline.timeout)
        if error is None:
            error = _explain_late(self.name, self.deadline)
        if self.session is not None and not self.future.done():
            self.session.note_refused(self.name, self.deadline.timeout, error)
        _settle(self.future, error)

    def settled(self, future: Future[Any]) -> None:
        """The caller's future is done, one way or another: let go of everything."""
        if self.alarm is not None:
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
        urls: where it is; the first that answers is taken. Of several servers, what tells of them.
        config: what the server's configuration must equal, field by field.
        extensions: what is said to parts of the server that it may not have, by name.
        needed: names of those that it must have.
        client_id: an identity that outlives this object; random by default.
        label: for people to read in the server's list of clients.
        codec: the codec's name.
        wrapping: what is to be around that codec, where the server knows of it.
        timeout: seconds that a call, or the first connection, may take unless told otherwise.
        wait: seconds that the first connection may take in its place, as one that goes on trying
            when nobody serves there yet, or the server is not ready; 0 for not to do so.
        writable: whether received arrays are private copies rather than read-only views.
        credentials: see `Credentials.resolve`; a client's.
        on_disconnect: called, without arguments, when the connection is lost; see `SessionKeeper`.
        on_reconnect: called, without arguments, when there is one again.
        on_move: of several servers: see `Pool`; and so are
        begins:
        stays:
        on_connecting: is given, before it connects, what gives that up, from any thread.

    Raises:
        Closed: connecting was given up.
        Unreachable: nobody answers there.
        ConfigMismatch: the server is of another kind, or configured differently.
    """

    def __init__(
        self,
        service: str,
        urls: Sequence[Url] | Watch,
        *,
        config: dict[str, Any] | None = None,
        extensions: dict[str, Any] | None = None,
        needed: Collection[str] = (),
        client_id: str | None = None,
        label: str = "",
        codec: str = "msgpack",
        wrapping: Wrapping | None = None,
        timeout: float = 10.0,
        wait: float = 0.0,
        writable: bool = False,
        credentials: CredentialsLike = None,
        on_disconnect: Callable[[], object] | None = None,
        on_reconnect: Callable[[], object] | None = None,
        on_move: Callable[[str, str], object] | None = None,
        begins: str = "",
        stays: bool = False,
        on_connecting: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout must be positive, not {timeout}")
        self.client_id = client_id or secrets.token_hex(8)
        deadline = Deadline(wait) if wait > 0 else None
        self.timeout = float(min(timeout, _LONGEST))
        spoken = load_codec(codec)
        asked = {} if wrapping is None else {wrapping.name: wrapping.ask()}
        if callable(urls):
            asked[wire.LEAVES] = None
        hello = wire.Hello(
            wire.PROTOCOL,
            service,
            self.client_id,
            label,
            codec,
            config or {},
            {**(extensions or {}), **asked},
        )
        given = Credentials.resolve(credentials)
        self._writable = writable
        self._closed = False
        self._changed = threading.Condition()  # of what is unsent, and of being closed
        self._subscriptions: weakref.WeakSet[Subscription] = weakref.WeakSet()
        self._numbers = itertools.count(1)  # of subscriptions
        self._unsent: deque[_Asynchronous] = deque()
        self._sender: threading.Thread | None = None
        self._held_back = 0
        self._alarms = Alarms("edgeml client alarms")
        shown = None if given is None else given.for_client()
        make = functools.partial(
            SessionKeeper,
            hello=hello,
            codec=spoken,
            alarms=self._alarms,
            needed=needed,
            wrapping=wrapping,
            timeout=self.timeout,
            credentials=shown,
        )
        self.sessions: SessionKeeper | Pool
        if callable(urls):
            self.sessions = Pool(
                urls,
                Asker(service, self.client_id, self.timeout, shown),
                lambda ways, on_change: make(ways, on_change=on_change),
                self._alarms,
                begins=begins,
                stays=stays,
                on_disconnect=on_disconnect,
                on_reconnect=on_reconnect,
                on_move=on_move,
            )
        else:
            self.sessions = make(urls, on_disconnect=on_disconnect, on_reconnect=on_reconnect)
        try:
            if on_connecting is not None:
                on_connecting(self.close)
            self.sessions.begin(deadline)
            if deadline is not None:
                self._wait_until_ready(deadline)
        except BaseException:
            self.close()
            raise

    def _wait_until_ready(self, deadline: Deadline) -> None:
        pause, told = _IMPATIENCE, ""
        now: ServerState | None = None
        error: EdgemlError | None = None
        while True:
            try:
                now, error = self.state(min(self.timeout, deadline.left)), None
            except (Unreachable, Closed) as failure:
                now, error = None, failure  # it failed to load, say; another may take its place
            except DeadlineExceeded as failure:
                # By the end it may have had no time to answer: then what was known says more.
                if deadline.left or (now is None and error is None):
                    error = failure
                elif now is not None:
                    error = None
            if now is not None and now.state == "ready":
                return
            left = deadline.left
            if not left:
                raise error or NotReady(
                    f"the server at {self.url} is still {now}, and there is no time left to wait"
                )
            if told != (told := str(now or error)):
                _log.info("waiting for the server at %s, which is %s", self.url, told)
            with self._changed:
                if self._changed.wait_for(lambda: self._closed, min(pause, left)):
                    raise Closed("this client has been closed")
            pause = min(2 * pause, _PATIENCE)

    def state(self, timeout: float | None = None) -> ServerState:
        """Ask the server what it is at; it answers while it loads, too. Of several, one that is
        ready, if there is one.

        Raises:
            Unreachable, DeadlineExceeded: it doesn't answer.
        """
        deadline = Deadline(self._limit(timeout))
        told: ServerState | None = None
        failure: EdgemlError | None = None
        for session in self.sessions.list_connected(deadline.left):
            try:
                now = self._ask_state(session, deadline)
            except EdgemlError as error:
                failure = error
                continue
            if now.state == "ready":
                return now
            told = told or now
        if told is None:
            assert failure is not None
            raise failure
        return told

    def _ask_state(self, session: Session, deadline: Deadline) -> ServerState:
        try:
            pong, _, _ = ping(session.requester, max(_LEAST, deadline.left))
        except DeadlineExceeded:  # of what was left
            raise _explain_late("state", deadline) from None
        except Unreachable as error:
            session.lose(error)
            raise
        except Closed:
            raise self.sessions.explain(session) from None
        return ServerState(state_of(pong.state), pong.progress, pong.detail)

    @property
    def closed(self) -> bool:
        """Whether it has been closed."""
        return self._closed

    @property
    def url(self) -> Url:
        """Where the server is, of the session that there is or was last."""
        session = self.sessions.current
        assert session is not None  # there was one, or this would not have been made
        return session.requester.url

    @property
    def epoch(self) -> int:
        """A number that each start of the server has anew; of the one last connected to."""
        session = self.sessions.current
        return 0 if session is None else session.epoch

    # Calls --------------------------------------------------------------------------------

    def call(self, name: str, payload: Any, timeout: float | None = None) -> Any:
        """Call an interface of the server and return its result; see `call_timed`."""
        session, reply, message = self._ask(name, payload, timeout)
        return self._value(session, reply, message)

    def call_timed(
        self, name: str, payload: Any, timeout: float | None = None
    ) -> tuple[Any, Timing]:
        """Call an interface of the server, and return its result and how it was served.

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
        began = time.monotonic()
        session, reply, message = self._ask(name, payload, timeout)
        timing = _tell_timing(reply, began)
        return self._value(session, reply, message), timing

    def _ask(
        self, name: str, payload: Any, timeout: float | None
    ) -> tuple[Session, wire.Result, Message]:
        deadline = Deadline(self._limit(timeout))
        sessions = self.sessions
        encoder: Codec | None = None
        avoid: Session | None = None
        began = deadline.began
        while True:
            session = sessions.pick(name, avoid)
            if session is None:
                session = sessions.wait(name, deadline.left, avoid)
                began = time.monotonic()
            try:
                if encoder is not session.spoken.encoder:
                    encoder = session.spoken.encoder
                    encoded = encoder.encode(payload)
                left = deadline.left
                if not left:
                    raise _explain_late(name, deadline)
                there = session.left_there(left)
                header = wire.pack(
                    wire.Request(wire.CALL, session.key, name, there, encoded.header)
                )
                message = session.requester.call(Message(header, encoded.buffers), left)
                session.note_life(began)
                reply = wire.unpack(wire.Result, message.header)
                if reply.status == wire.OK:
                    session.note_way(session.heard - began, reply.served)
                    sessions.note_answer(session, name, reply.served)
                    return session, reply, message
            except NotCarriedOut as error:
                session.lose(error)
            except DeadlineExceeded:  # of what was left
                raise _explain_late(name, deadline) from None
            except Unreachable as error:
                session.lose(error)
                raise sessions.explain_lost(error) from error.__cause__
            except Closed:
                raise sessions.explain(session) from None
            else:
                why = wire.error_of(reply)
                if reply.status == wire.NO_SESSION:
                    session.lose(why)
                elif sessions.passes_on(session, name, why, avoid):
                    avoid = session
                else:
                    session.note_way(session.heard - began, None)
                    raise why
            finally:
                session.asking.pop()
            # It was not carried out, so it can be sent again.
            began = time.monotonic()

    def _limit(self, timeout: float | None) -> float:
        return self.timeout if timeout is None else float(max(0.0, min(timeout, _LONGEST)))

    def _value(self, session: Session, reply: wire.Result, message: Message) -> Any:
        body = Message(reply.body, message.buffers)
        return session.spoken.decoder.decode(body, writable=self._writable)

    def call_async(self, name: str, payload: Any, timeout: float | None = None) -> Future[Any]:
        """Call an interface and return a future of its result, which raises what `call` does.

        The payload's arrays may be changed when this returns. Callbacks of the future run in the
        transport's thread and should be quick. Once it has a result it has a `Timing`, too, as the
        attribute ``timing``.

        Where most of an interface's calls are refused, or have no answer in time, not all that wait
        no longer than those are sent while others are under way: of the rest the future has the
        error at once.

        Raises:
            NotEncodable: the payload.
            Overloaded: too many calls are under way.
            Closed: this client has been closed.
        """
        deadline = Deadline(self._limit(timeout))
        future: Future[Any] = Future()
        session = self._pick_for(name, deadline)
        if isinstance(session, EdgemlError):
            self._held_back += 1
            future.set_exception(session)
            return future
        try:
            known = session or self.sessions.current
            assert known is not None  # there was one, or this would not have been made
            encoder = known.spoken.encoder
            allocate = self.allocate if session is None else session.requester.allocate
            encoded = encoder.encode_owned(payload, allocate)
            if self._closed:
                raise Closed("this client has been closed")
            call = _Asynchronous(future, name, encoder, encoded, deadline, self.sessions)
            call.alarm = self._alarms.after(deadline.left, call.expire)
            future.add_done_callback(call.settled)
            try:
                if session is not None and not session.lost and not self._unsent:
                    with suppress(Unreachable):
                        self._send(call, session)
                        return future
                self._send_later(call)
            except EdgemlError:
                call.alarm.cancel()
                raise
        finally:
            if session is not None:
                session.asking.pop()
        return future

    def _pick_for(self, name: str, deadline: Deadline) -> Session | EdgemlError | None:
        """Return the session that an asynchronous call is sent in, or why it isn't worth sending;
        None where one has to be made first.
        """
        session = self.sessions.pick(name)
        if session is None or (why := session.hold_back(name, deadline)) is None or self._closed:
            return session
        session.asking.pop()
        other = self.sessions.pick(name, session)
        if other is None:
            return why
        if other.hold_back(name, deadline) is None:
            return other
        other.asking.pop()
        return why

    def _send(self, call: _Asynchronous, session: Session) -> None:
        """Send it, or raise what shows that it was not sent."""
        encoder = session.spoken.encoder
        if encoder is not call.encoder:  # another server, or the same one started differently
            value = call.encoder.decode(call.encoded)
            call.encoded = encoder.encode_owned(value, self.allocate)
            call.encoder = encoder
        left = session.left_there(max(_LEAST, call.deadline.left))
        header = wire.pack(
            wire.Request(wire.CALL, session.key, call.name, left, call.encoded.header)
        )
        try:
            call.request = session.requester.request(Message(header, call.encoded.buffers))
        except Closed:
            raise self.sessions.explain(session) from None
        except Unreachable as error:
            session.lose(error)
            raise
        call.session = session
        call.sent = time.monotonic()
        session.under_way.append(None)
        call.request.add_done_callback(lambda done: self._receive(call, session, done))
        if call.future.done():  # meanwhile
            call.request.cancel()

    def _receive(self, call: _Asynchronous, session: Session, done: Future[Message]) -> None:
        """Settle a call with what came for it; runs in the transport's thread."""
        session.under_way.pop()
        if done.cancelled():
            return
        try:
            try:
                message = done.result()
            except NotCarriedOut as error:
                session.lose(error)
                self._send_later(call)
                return
            session.note_life(call.sent)
            reply = wire.unpack(wire.Result, message.header)
            if reply.status == wire.NO_SESSION:
                session.lose(wire.error_of(reply))  # not carried out, so it can be sent again
                self._send_later(call)
                return
            began = call.deadline.began
            call.future.timing = _tell_timing(reply, began)  # type: ignore[attr-defined]
            if reply.status != wire.OK:
                why = wire.error_of(reply)
                if isinstance(why, (Overloaded, DeadlineExceeded)):
                    session.note_refused(call.name, call.deadline.timeout, why)
                if self.sessions.passes_on(session, call.name, why, call.avoid):
                    call.avoid, call.request = session, None
                    self._send_later(call)
                    return
                session.note_way(session.heard - call.sent, None)
                raise why
            session.note_way(session.heard - call.sent, reply.served)
            self.sessions.note_answer(session, call.name, reply.served)
            session.note_answered(call.name)
            _settle(call.future, self._value(session, reply, message))
        except Closed as error:
            _settle(call.future, self.sessions.explain(session) if done.exception() else error)
        except Unreachable as error:
            _settle(call.future, self.sessions.explain_lost(error) if done.exception() else error)
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
                while not call.future.done():
                    left = max(_LEAST, call.deadline.left)
                    session = self.sessions.wait(call.name, left, call.avoid)
                    try:
                        self._send(call, session)
                        break
                    except Unreachable as error:
                        session.lose(error)
                    finally:
                        session.asking.pop()
            except Exception as error:
                _settle(call.future, error)
            self._unsent.popleft()  # only now, so that none overtakes it
            del call  # or the buffers live until the next call

    def allocate(self, nbytes: int) -> memoryview | None:
        """Memory that is sent without a copy, if there is such; see `Endpoint.allocate`."""
        session = self.sessions.current
        return None if session is None or session.lost else session.requester.allocate(nbytes)

    def stats(self) -> dict[str, Any]:
        """Counts since the start; ``replies_copied``: see `Endpoint.copied`; ``calls_held_back``:
        see `call_async`; of several servers also ``servers``: see `Pool.count`.
        """
        counts = {"replies_copied": self.sessions.copied, "calls_held_back": self._held_back}
        if isinstance(self.sessions, Pool):
            return {**counts, "servers": self.sessions.count()}
        return counts

    # Subscriptions ------------------------------------------------------------------------

    def subscribe(
        self, topic: str, function: Callable[..., None], tell_taken: bool = False
    ) -> Subscription:
        """Call ``function`` with what the server publishes, from now on; see `Subscription`.

        Args:
            topic: what the server calls it.
            function: is given each publication.
            tell_taken: whether it is also given when that was taken, in ns of the server's clock;
                0 where the server doesn't tell.

        Raises:
            UnknownInterface: the server has no such topic.
            PermissionDenied: the role of this client's key lacks it.
            Unreachable, Closed: as for `call`.
        """
        deadline = Deadline(self.timeout)
        session = self.sessions.find_source(self.timeout)
        topics = session.topics
        if topic not in topics:
            known = ", ".join(sorted(filter(None, topics))) or "none"
            raise UnknownInterface(f"there is no topic {topic!r}; known: {known}")
        if not topics[topic]:  # our key lacks it: have the server say so, and count it
            credit = wire.pack(wire.Credit(0, 0, 0))
            left = max(_LEAST, deadline.left)
            header = wire.pack(wire.Request(wire.NEXT, session.key, topic, left, credit))
            reply = session.requester.call(Message(header), left)
            raise wire.error_of(wire.unpack(wire.Answer, reply.header))
        with self._changed:
            number = next(self._numbers)
            made = Subscription(
                topic, number, function, self.sessions.next, self._writable, tell_taken
            )
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
            sender = self._sender
            subscriptions = list(self._subscriptions)
        self.sessions.close()
        for subscription in subscriptions:
            subscription.end()
        deadline = Deadline(_MOMENT)
        for subscription in subscriptions:
            subscription.join(deadline.left)
        self._alarms.close()
        self.sessions.join(deadline.left)
        if sender is not None and sender is not threading.current_thread():
            sender.join(deadline.left)


def _explain_late(what: str, deadline: Deadline) -> DeadlineExceeded:
    return DeadlineExceeded(f"no answer to {what!r} within {deadline.timeout:g} s")


def _settle(future: Future[Any], result: Any) -> None:
    """Complete a future, unless somebody did before."""
    with suppress(InvalidStateError):
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
