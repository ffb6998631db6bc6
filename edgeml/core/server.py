"""The server: handshake, calls and streams over any number of transports.

Where handlers run. The hello, subscriptions and heartbeats are always answered by the transport's
loop. A user's handler starts on a worker thread; once calls of its kind have shown themselves
short, the next ones run in the loop, which saves two thread hops, and if one then isn't short, a
tick notices and the transport carries on in another thread (`Endpoint.relieve`). A busy machine
makes a short handler look longer now and then, so trust is lost by degrees.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import msgspec

from edgeml.core import wire
from edgeml.core.alarms import Alarms
from edgeml.core.codec import Codec
from edgeml.core.errors import (
    Closed,
    ConfigMismatch,
    DeadlineExceeded,
    EdgemlError,
    Malformed,
    NotEncodable,
    Overloaded,
    PermissionDenied,
    RemoteError,
    UnknownInterface,
)
from edgeml.core.message import Message
from edgeml.core.plugins import load_codec, load_transport
from edgeml.core.streams import Topic
from edgeml.core.transport import Credentials, Endpoint, Peer, Reply
from edgeml.core.url import Url, is_loopback

__all__ = ["Handler", "Server", "Session"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

_SHORT = 0.5e-3  # seconds; a hop to a worker and back costs a good part of this
_LONG = 5e-3  # seconds; more than being preempted once explains
_TRUSTED = 3  # the score at which a kind of call runs in the loop: a short run adds 1, up to ...
_MOST_TRUSTED = 12  # ... this; one that isn't takes 4 away, a long one all
_STUCK = 0.1  # seconds that a call may take in the loop before the loop goes on elsewhere
_TICK = 0.25  # seconds
_MOST_SESSIONS = 1 << 16
_MOST_WAITING = 1 << 12  # calls that wait for a worker
_MOST_WAITING_BYTES = 1 << 30
_GRACE = 2.0  # seconds that handlers have to return when the server is stopped
_PORT_TRIES = 16  # to find a port that is free for all transports
_FORGET = 30.0  # seconds without a sign of life after which a session ends


@dataclass(slots=True)
class Session:
    """One client, from its hello on.

    Attributes:
        client_id: the identity that the client gave; random unless its user chose one.
        label: what the client calls itself, for people to read.
        peer: who the transport says it is.
        codec: what it speaks.
    """

    key: bytes
    client_id: str
    label: str
    peer: Peer
    codec: Codec
    seen: float
    turn: float = 0.0  # when the next call may start, under a rate limit
    waiting: int = 0  # calls that workers have been given, and have not answered


Handler = Callable[[Any, Session], Any]
"""Takes a call's payload and who calls; returns the result, or raises."""

# Raised by a service's own code, these reach the client as they are; all else is a RemoteError.
_PASSED_ON = (UnknownInterface, Malformed, PermissionDenied, Overloaded)


@dataclass(slots=True)
class _Interface:
    name: str
    handler: Handler
    short_runs: dict[tuple[int, int], int] = field(default_factory=dict)

    def kind(self, message: Message) -> tuple[int, int]:
        """Calls alike in size are taken to be alike in duration: a new shape may compile anew."""
        return len(message.header).bit_length(), sum(map(len, message.buffers))

    def trusts(self, kind: tuple[int, int]) -> bool:
        """Whether calls of this kind have shown themselves short."""
        return self.short_runs.get(kind, 0) >= _TRUSTED

    def took(self, kind: tuple[int, int], seconds: float) -> None:
        runs = self.short_runs
        if len(runs) > 256:
            runs.clear()
        score = runs.get(kind, 0)
        if seconds < _SHORT:
            runs[kind] = min(score + 1, _MOST_TRUSTED)
        else:
            runs[kind] = max(0, score - 4) if seconds < _LONG else 0


class _Call(msgspec.Struct, frozen=True):
    interface: _Interface
    session: Session
    body: bytes
    message: Message
    reply: Reply
    deadline: float
    kind: tuple[int, int]


class _Listener:
    """An endpoint, and what it calls."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.endpoint: Endpoint | None = None
        self._lock = threading.Lock()
        self._busy: list[float] | None = None  # since when a handler runs in the loop

    def __call__(self, message: Message, reply: Reply) -> None:
        self._server._on_request(self, message, reply)

    def enter(self, now: float) -> list[float]:
        """A handler starts in the loop; returns what to `leave` with."""
        self._busy = mark = [now]
        return mark

    def leave(self, mark: list[float]) -> None:
        """That handler has returned; from here on the loop must not be relieved of it."""
        with self._lock:
            if self._busy is mark:  # else this loop has been relieved, and the next may be busy
                self._busy = None

    def relieve(self, now: float) -> bool:
        """Carry on in another thread if a handler does not return; says whether it was so."""
        with self._lock:
            if self._busy is None or self.endpoint is None or now - self._busy[0] <= _STUCK:
                return False
            self._busy = None
            self.endpoint.relieve()
            return True

    def answer(self, replies: Iterable[Reply], message: Message) -> None:
        if self.endpoint is not None:
            self.endpoint.reply_many(replies, message)
        else:  # it is only just being opened
            for reply in replies:
                reply(message)


class Server:
    """Answers calls and carries streams, at several addresses if need be.

    Args:
        service: the kind of server, which a client must name: ``"action"``, say.
        urls: where to listen.
        spare: where to listen as well; an address that is taken is done without, with a warning.
        config: what the client's configuration must equal, field by field.
        codecs: names of the codecs that clients may speak.
        workers: how many handlers may run at a time.
        rate_limit: calls per second and client; None for any number.
        credentials: given to the transports.
    """

    def __init__(
        self,
        service: str,
        urls: Sequence[Url],
        spare: Sequence[Url] = (),
        *,
        config: dict[str, Any] | None = None,
        codecs: Sequence[str] = ("msgpack",),
        workers: int = 1,
        rate_limit: float | None = None,
        credentials: Credentials = None,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, not {workers}")
        if rate_limit is not None and not rate_limit > 0:
            raise ValueError(f"rate_limit must be positive or None, not {rate_limit}")
        self.service = service
        self.epoch = time.time_ns()
        self.counts: Counter[str] = Counter()
        self._requested = [(url, True) for url in urls] + [(url, False) for url in spare]
        self._config = config or {}
        if isinstance(codecs, str):
            raise ValueError(f"codecs must be a list of names, not {codecs!r}")
        self._codecs = {name: load_codec(name) for name in codecs}
        self._interval = 1 / rate_limit if rate_limit else 0.0
        self._credentials = credentials
        for codec in self._codecs.values():
            self._refuse_strangers(codec)

        self._interfaces: dict[str, _Interface] = {}
        self._topics: dict[str, Topic] = {}
        self.topic(wire.HEARTBEAT)
        self._sessions: dict[bytes, Session] = {}
        self._listeners: list[_Listener] = []
        self._alarms = Alarms(f"edgeml {service} alarms")
        self._lock = threading.Lock()
        self._opened = False
        self._closed = False
        self._closer = 0  # the thread that closes
        self._ended = threading.Event()

        self._workers = workers
        self._threads: list[threading.Thread] = []
        self._waiting: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._waiting_bytes = 0
        # Whoever runs a handler, worker or loop, holds one of these.
        self._slots = threading.Lock() if workers == 1 else threading.Semaphore(workers)
        self._first = threading.Lock()  # held by whoever is next to take a slot
        self._brief = False  # whether a worker runs a call that should be short
        self._running: set[int] = set()  # the threads that do

    def _refuse_strangers(self, codec: Codec) -> None:
        if not codec.executes or self._credentials is not None:
            return
        for url, _ in self._requested:
            if not url.path and not is_loopback(url.host):
                raise PermissionDenied(
                    f"codec {codec.name!r} runs code that the sender chooses, and {url} lets in "
                    "other machines without credentials; listen on 127.0.0.1, or leave it out"
                )

    # What is served -----------------------------------------------------------------------

    def register(self, name: str, handler: Handler) -> None:
        """Serve calls of ``name`` by ``handler``, from now on, in place of any other."""
        self._interfaces[name] = _Interface(name, handler)

    def topic(self, name: str, keep: int = 1) -> Topic:
        """Make a stream that clients can subscribe to; see `Topic`."""
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        made = Topic(name, self._codecs.values() if name else (), self.epoch, keep, self.allocate)
        self._topics[name] = made
        return made

    @property
    def urls(self) -> list[Url]:
        """Where clients reach this server, the real ports filled in; empty unless it is open."""
        return [end.url for end in self._endpoints()]

    def _endpoints(self) -> list[Endpoint]:
        return [each.endpoint for each in self._listeners if each.endpoint]

    @property
    def sessions(self) -> list[Session]:
        """The clients that have been heard from of late."""
        return list(self._sessions.values())

    def stats(self) -> dict[str, int]:
        """Counts since the start: calls, and everything that was refused or dropped, by reason."""
        ends = self._endpoints()
        return {
            **self.counts,
            "replies_dropped": sum(end.dropped for end in ends),
            "requests_copied": sum(end.copied for end in ends),
        }

    def allocate(self, nbytes: int) -> memoryview | None:
        """Memory that is sent without a copy, if a transport has such; see `Endpoint.allocate`."""
        for end in self._endpoints():
            place = end.allocate(nbytes)
            if place is not None:
                return place
        return None

    # Life ---------------------------------------------------------------------------------

    def open(self) -> None:
        """Listen at every address that isn't spare, or at none: raises OSError if one is taken."""
        with self._lock:
            if self._opened or self._closed:
                done = "stopped" if self._closed else "started"
                raise RuntimeError(f"the server was {done} before; make a new one")
            self._opened = True
        try:
            for tries in reversed(range(_PORT_TRIES)):
                if self._listen(raising=not tries):
                    break
        except BaseException:
            self.close()
            raise
        self._alarms.after(_TICK, self._tick)

    def _listen(self, *, raising: bool) -> bool:
        """Open every address. Where the system picks the port, all transports get the same one, so
        that a client can choose among them; False if it was not free for one of them.
        """
        picked: dict[bool, int] = {}  # the port, of those needed and of those spare
        for url, needed in self._requested:
            pick = not url.port and not url.path
            listener = _Listener(self)
            transport = load_transport(url.scheme)
            try:
                made = transport.serve(
                    url.with_port(picked.get(needed, 0)) if pick else url,
                    listener,
                    credentials=self._credentials,
                )
            except OSError as error:
                if needed and (raising or needed not in picked or not pick):
                    raise
                if needed:
                    for opened in self._listeners:
                        if opened.endpoint is not None:
                            opened.endpoint.close()
                    self._listeners.clear()
                    return False
                _log.warning("%s; the server does without this second port", error)
                continue
            if pick:
                picked.setdefault(needed, made.url.port)
            listener.endpoint = made
            self._listeners.append(listener)
            if self._closed:
                listener.endpoint.close()
                raise Closed("the server has been stopped")
        return True

    def close(self) -> None:
        """Tell every client, stop listening and end every thread; idempotent and quick.

        Handlers that still run are waited for, up to two seconds, and may answer; the thread of
        one that runs on ends with it. Whoever calls this second waits for the first, too.
        """
        me = threading.get_ident()
        with self._lock:
            first = not self._closed
            if first:
                self._closed = True
                self._closer = me
        if first:
            try:
                self._close(me)
            finally:
                self._ended.set()
        elif me != self._closer and me not in self._running:  # or it would wait for itself
            self._ended.wait(5.0)

    def _close(self, me: int) -> None:
        deadline = time.monotonic() + _GRACE
        for topic in self._topics.values():
            topic.close()
        with suppress(queue.Empty):
            while call := self._waiting.get_nowait():
                self._fail(call.reply, Closed("the server has been stopped"))
        for _ in self._threads:
            self._waiting.put(None)
        free = 0
        for _ in range(self._workers - (me in self._running)):
            if not self._slots.acquire(timeout=max(0.0, deadline - time.monotonic())):
                _log.warning("one %s handler is still running; it is left behind", self.service)
                break
            free += 1
        for _ in range(free):
            self._slots.release()
        for thread in self._threads:
            if thread.ident != me:
                thread.join(max(0.1, deadline - time.monotonic()))
        for listener in self._listeners:
            if listener.endpoint is not None:
                listener.endpoint.close()
        self._alarms.close()

    def _tick(self) -> None:
        try:
            now = time.monotonic()
            for listener in self._listeners:
                if listener.relieve(now):
                    self.counts["relieved"] += 1
            for topic in self._topics.values():
                topic.tick()
            with self._lock:
                for key, session in list(self._sessions.items()):
                    if now - session.seen > _FORGET:
                        del self._sessions[key]
        finally:
            self._alarms.after(_TICK, self._tick)

    # Requests, in the transport's loop ----------------------------------------------------

    def _on_request(self, listener: _Listener, message: Message, reply: Reply) -> None:
        try:
            if self._closed:
                raise Closed("the server has been stopped")
            request = wire.unpack(wire.Request, message.header)
            if request.kind == wire.HELLO:
                reply(Message(self._hello(request.body, reply.peer)))
                return
            if request.kind == wire.PING:
                pong = wire.Pong(wire.PROTOCOL, self.service, time.time())
                reply(Message(wire.pack(wire.Reply(wire.OK, wire.pack(pong)))))
                return
            session = self._sessions.get(request.session)
            if session is None:
                reply(Message(wire.pack(wire.Reply(wire.NO_SESSION))))
                return
            session.seen = now = time.monotonic()
            if request.kind == wire.CALL:
                self._call(listener, request, session, now, message, reply)
            elif request.kind == wire.NEXT:
                credit = wire.unpack(wire.Credit, request.body)
                topic = _named(self._topics, request.name, "topic")
                topic.park(session.key, session.codec.name, credit, reply, listener.answer)
            elif request.kind == wire.GOODBYE:
                with self._lock:
                    self._sessions.pop(session.key, None)
                for topic in self._topics.values():
                    topic.forget(session.key)
                reply(Message(wire.pack(wire.Reply(wire.OK))))
            else:
                raise Malformed(f"unknown kind of request: {request.kind}")
        except EdgemlError as error:
            self._fail(reply, error)

    def _fail(self, reply: Reply, error: EdgemlError) -> None:
        self.counts[type(error).__name__] += 1
        reply(Message(wire.pack_error(error)))

    def _hello(self, body: bytes, peer: Peer) -> bytes:
        hello = wire.unpack(wire.Hello, body)
        for name, ours, theirs in [
            ("protocol", wire.PROTOCOL, hello.protocol),
            ("service", self.service, hello.service),
            *((f, self._config.get(f), hello.config.get(f)) for f in self._config),
        ]:
            if ours != theirs:
                raise ConfigMismatch(f"{name}: the server has {ours!r}, the client has {theirs!r}")
        if hello.codec not in self._codecs:
            raise ConfigMismatch(
                f"codec: the server offers {', '.join(self._codecs)}, the client has {hello.codec}"
            )
        if len(hello.client_id) > 200 or len(hello.label) > 200:
            raise Malformed("a client id or label of over 200 characters")
        session = Session(
            secrets.token_bytes(16),
            hello.client_id,
            hello.label,
            peer,
            self._codecs[hello.codec],
            time.monotonic(),
        )
        with self._lock:
            if len(self._sessions) >= _MOST_SESSIONS:
                raise Overloaded(f"the server has {_MOST_SESSIONS} clients already")
            self._sessions[session.key] = session
        topics = {topic.name: topic.keep for topic in self._topics.values()}
        ports = [url.port for url in self.urls]
        return wire.pack(
            wire.Reply(wire.OK, wire.pack(wire.Welcome(session.key, self.epoch, topics, ports)))
        )

    def _call(
        self,
        listener: _Listener,
        request: wire.Request,
        session: Session,
        now: float,
        message: Message,
        reply: Reply,
    ) -> None:
        interface = _named(self._interfaces, request.name, "interface")
        deadline = now + request.timeout
        kind = interface.kind(message)
        call = _Call(interface, session, request.body, message, reply, deadline, kind)
        if self._interval:
            turn = max(session.turn, now)
            if turn > deadline:
                raise Overloaded(
                    f"over the rate limit of {1 / self._interval:g} calls/s: the next turn is in "
                    f"{turn - now:.2f} s, beyond the deadline"
                )
            session.turn = turn + self._interval
            if turn > now:
                self._alarms.after(turn - now, partial(self._queue, call))
                return
        if not interface.trusts(kind) or session.waiting or not self._take_slot():
            self._queue(call)
            return
        try:
            self._run(call, listener)
        finally:
            self._slots.release()

    def _take_slot(self) -> bool:
        """Whether the loop may run a handler now.

        It waits for short calls that workers are running: were its own calls to queue up behind
        them instead, a busy server would never come back from its workers.
        """
        if self._slots.acquire(blocking=False):
            return True
        if not self._brief or not self._first.acquire(timeout=_LONG):
            return False
        try:
            self._brief = self._slots.acquire(timeout=_LONG)  # else that call isn't short after all
            return self._brief
        finally:
            self._first.release()

    # Handlers, in a worker or in the loop -------------------------------------------------

    def _queue(self, call: _Call) -> None:
        with self._lock:
            closed = self._closed
            fits = self._waiting_bytes + call.message.nbytes <= _MOST_WAITING_BYTES
            if self._waiting.qsize() < _MOST_WAITING and fits and not closed:
                call.session.waiting += 1
                self._waiting_bytes += call.message.nbytes
                self._waiting.put(call)
                if len(self._threads) < self._workers:
                    name = f"edgeml {self.service} worker"
                    thread = threading.Thread(target=self._work, name=name, daemon=True)
                    self._threads.append(thread)
                    thread.start()
                return
        if closed:
            self._fail(call.reply, Closed("the server has been stopped"))
        else:
            self._fail(call.reply, Overloaded(f"{self._waiting.qsize()} calls are waiting already"))

    def _work(self) -> None:
        while call := self._waiting.get():
            with self._lock:
                self._waiting_bytes -= call.message.nbytes
            with self._first:
                self._slots.acquire()
            self._brief = call.interface.trusts(call.kind)
            try:
                self._run(call)
            except Exception:
                _log.exception("an answer of %s could not be given", self.service)
            finally:
                self._brief = False
                self._slots.release()
                with self._lock:
                    call.session.waiting -= 1
            del call  # or the buffers live until the next call

    def _run(self, call: _Call, listener: _Listener | None = None) -> None:
        """Carry out a call and answer it; ``listener`` is given in its loop."""
        began = time.monotonic()
        if self._closed:
            self._fail(call.reply, Closed("the server has been stopped"))
            return
        if began > call.deadline or call.reply.expired:
            self._fail(call.reply, DeadlineExceeded("nobody waits for this call any more"))
            return
        self.counts["calls"] += 1
        me = threading.get_ident()
        self._running.add(me)
        mark = listener.enter(began) if listener else None
        try:
            try:
                outcome = self._outcome(call)
            finally:
                if listener and mark:
                    listener.leave(mark)
            # Still in its slot, for the next handler may use the same output arrays again.
            try:
                if isinstance(outcome, Message):
                    call.reply(outcome)
                else:
                    self._fail(call.reply, outcome)
            except NotEncodable as error:  # too much for this transport
                self._fail(call.reply, error)
        finally:
            self._running.discard(me)
        call.interface.took(call.kind, time.monotonic() - began)

    def _outcome(self, call: _Call) -> Message | EdgemlError:
        """Run the handler; whatever it does, this returns."""
        codec, interface = call.session.codec, call.interface
        try:
            payload = codec.decode(Message(call.body, call.message.buffers))
            encoded = codec.encode(interface.handler(payload, call.session))
            return Message(wire.pack(wire.Reply(wire.OK, encoded.header)), encoded.buffers)
        except _PASSED_ON as error:
            return error
        except BaseException as error:  # a SystemExit, too: it would end a thread that all need
            told = f"{type(error).__qualname__}: {wire.text_of(error)}"
            _log.warning("%s %r failed: %s", self.service, interface.name, told)
            _log.debug("the traceback, which the client gets as well:", exc_info=True)
            try:
                trace = traceback.format_exc()[-20_000:]
            except Exception:  # Python 3.11 may fail where two threads format at once (gh-106905)
                trace = ""
            return RemoteError(type(error).__qualname__, wire.text_of(error), trace)


def _named(known: dict[str, T], name: str, what: str) -> T:
    try:
        return known[name]
    except KeyError:
        # The heartbeat has no name, and what starts with a slash is not for users.
        names = ", ".join(sorted(n for n in known if n and n[0] != "/")) or "none"
        raise UnknownInterface(f"there is no {what} {name!r}; known: {names}") from None
