"""The server: listeners, the envelope, sessions and topics. The dispatcher runs the handlers."""

from __future__ import annotations

import errno
import hmac
import logging
import threading
import time
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from edgeml.core import wire
from edgeml.core.alarms import Alarms
from edgeml.core.codec import Codec, Spoken, Wrapping, limited
from edgeml.core.dispatch import Call, Caller, Dispatcher, Gatherer, Handler, unknown
from edgeml.core.door import Door
from edgeml.core.ending import run_at_end
from edgeml.core.episode import Episode
from edgeml.core.errors import (
    Closed,
    ConfigMismatch,
    EdgemlError,
    Malformed,
    NotReady,
    Overloaded,
    PermissionDenied,
    shown,
    text_of,
)
from edgeml.core.guests import Entrance, Known
from edgeml.core.limits import DEFAULT_LIMITS, Limits
from edgeml.core.message import Message
from edgeml.core.notices import Notices
from edgeml.core.plugins import load_codec, load_door, load_transport
from edgeml.core.security import ClientKey, Credentials, CredentialsLike, digest
from edgeml.core.state import ServerState
from edgeml.core.streams import Topic
from edgeml.core.transport import Endpoint, Peer, Reply
from edgeml.core.url import Url, is_loopback

__all__ = ["Server"]

_log = logging.getLogger(__name__)

Negotiate = Callable[[Any, Caller], Any]
"""``negotiate(asked, caller)`` answers what a client's hello asks of an extension: plain values of
MessagePack, both. It may raise ConfigMismatch, or Malformed for what is no question."""

Load = Callable[[Callable[[float, str], None]], object]
"""``load(report)`` makes a server able to answer; ``report(fraction, detail)`` tells how far it is.
"""

_TICK = wire.TICK  # seconds
_LOOK = 0.005  # seconds between two looks whether all is answered
_UNDER_WAY = 0.1  # seconds that a call may be on its way, or unread, when draining begins
_GOODBYES = 1.0  # seconds that those who leave a server which drains may take to say so
_DRAINING = "the server is draining: it answers what it has, and then stops; call another, or later"
_LONGEST = 1e6  # seconds that a caller may say that it waits
_LONGEST_DETAIL = 1000  # characters
_NOTHING = Message(b"")
_UNREAD = Message(
    wire.pack_error(
        Overloaded(
            "more calls come than this server can read in time: ask less often, with more time, or "
            "another server; this one was not looked at"
        )
    )
)
_MOST_IDS = 1 << 12  # client ids that are remembered to belong to one key
_PORT_TRIES = 16  # to find a port that is free for all transports
_FORGET = 30.0  # seconds without a sign of life after which a session ends
_BRIEFEST = 0.1  # seconds of silence after which a client may ask to be taken to be gone


class _Session(Known):
    """One client that speaks our envelope, from its hello on."""

    def __init__(
        self, hello: wire.Hello, peer: Peer, codec: Codec, proved: ClientKey | None
    ) -> None:
        super().__init__(hello.client_id, hello.label, peer, proved, _FORGET)
        self.codec = codec
        self.spoken = Spoken(codec, codec)
        self.paced = False  # whether it says how long its heartbeats are to be kept


class _EnvelopeCall(Call):
    """A call that came in an envelope."""

    __slots__ = ("_message", "_reply", "_spoken")

    def __init__(
        self,
        request: wire.Request,
        session: _Session,
        message: Message,
        reply: Reply,
        source: Endpoint | None,
    ) -> None:
        # As `Call` does, without the cost of asking it.
        self.name = request.name
        self.caller = session
        left = request.timeout
        if not 0.0 <= left <= _LONGEST:  # it is anybody's: infinite, or no number
            left = _LONGEST if left > _LONGEST else 0.0
        self.deadline = session.seen + left
        self.nbytes = message.nbytes
        self.source = source
        self.detail = ""
        self.arrived = session.seen
        self.ended = 0.0
        self.batch_size = 1
        self.version = 0
        self._open = [True]
        self.episode = session.join_episode()
        self._spoken = session.spoken
        self._message = Message(request.body, message.buffers)
        self._reply = reply

    def payload(self) -> Any:
        return self._spoken.decoder.decode(self._message)

    def drop_payload(self) -> None:
        self._message = _NOTHING

    @property
    def expired(self) -> bool:
        return time.monotonic() > self.deadline or self._reply.expired

    def _send(self, value: Any) -> None:
        encoded = self._spoken.encoder.encode(value)
        began = self.began
        compute = (self.ended or time.monotonic()) - began
        episode = self.episode
        kept = bool(episode.session or episode.id)
        served = wire.Served(self.version, self.batch_size, began - self.arrived, compute, kept)
        answer = wire.pack(wire.Result(wire.OK, encoded.header, 0, 0, served))
        self._reply(Message(answer, encoded.buffers))
        episode.leave()

    def _send_error(self, error: EdgemlError) -> None:
        self._reply(Message(wire.pack_error(error)))
        self.episode.leave()


class _Listener:
    """An endpoint, and what it calls."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.endpoint: Endpoint | None = None

    def __call__(self, message: Message, reply: Reply) -> None:
        self._server._on_request(self, message, reply)

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
        wrapping: what clients may have around these.
        workers: how many handlers may run at a time; see `Dispatcher` for where they do.
        rate_limit: calls per second and client; None for any number.
        limits: what clients may make it keep or do.
        credentials: see `Credentials.resolve`; a server's.
        on_connect: is called with each client that has come, or is back after it was taken to be
            gone: in a thread of its own, as `on_disconnect` is, one after the other.
        on_disconnect: is called with each client that has left, or is gone.
    """

    def __init__(
        self,
        service: str,
        urls: Sequence[Url],
        spare: Sequence[Url] = (),
        *,
        config: dict[str, Any] | None = None,
        codecs: Sequence[str] = ("msgpack",),
        wrapping: Wrapping | None = None,
        workers: int = 1,
        rate_limit: float | None = None,
        limits: Limits = DEFAULT_LIMITS,
        credentials: CredentialsLike = None,
        on_connect: Callable[[Caller], object] | None = None,
        on_disconnect: Callable[[Caller], object] | None = None,
    ) -> None:
        self.service = service
        self.epoch = time.time_ns()
        self._requested = [(url, True) for url in urls] + [(url, False) for url in spare]
        self._config = config or {}
        if isinstance(codecs, str):
            raise ValueError(f"codecs must be a list of names, not {codecs!r}")
        self._codecs = {name: limited(load_codec(name), limits) for name in codecs}
        given = Credentials.resolve(credentials)
        self._credentials = None if given is None else given.for_server()
        self._keyring = None if given is None else given.clients
        self._keys_wrong = ""
        self._limits = limits
        if self._credentials is None:
            for url, _ in self._requested:
                if not url.path and not is_loopback(url.host):
                    self._refuse_code_of_strangers(url)

        self.counts: Counter[str] = Counter()
        self._extensions: dict[str, Negotiate] = {}
        self._wrapping = wrapping
        if wrapping is not None:
            self.extend(wrapping.name, self._wrap)
        self._on_connect = on_connect
        self._on_disconnect = on_disconnect
        self._notices = Notices(f"edgeml {service} notices")
        self._alarms = Alarms(f"edgeml {service} alarms")
        self._ticked = time.monotonic()
        self.dispatcher = Dispatcher(service, self._alarms, workers, rate_limit, limits)
        self.dispatcher.at_end = self._run_last
        self._topics: dict[str, Topic] = {}
        self.topic(wire.HEARTBEAT)
        self._sessions: dict[bytes, Known] = {}
        self._near: Counter[tuple[str, str]] = Counter()  # sessions of each connection and address
        # All who have shown a key and may have calls here, also after their sessions.
        self._met: weakref.WeakSet[Known] = weakref.WeakSet()
        self._leavers: weakref.WeakSet[Caller] = weakref.WeakSet()  # that leave when it drains
        self.extend(wire.LEAVES, lambda asked, caller: self._leavers.add(caller))
        self._owners: dict[str, str] = {}  # of client ids, whose key they belong to
        self._owned: dict[str, OrderedDict[str, None]] = {}  # ids of each key, used last comes last
        self._ended_episodes: weakref.WeakSet[Episode] = weakref.WeakSet()
        self._due: deque[Callable[[], object]] = deque()  # in the handlers' thread, ...
        self._over = False  # ... which ends
        self._listeners: list[_Listener] = []
        self._doors: list[tuple[Url, Entrance, Callable[[], str]]] = []
        self._lock = threading.Lock()
        self.state = ServerState("starting", 0.0)
        """What the server is at."""
        self.failure: BaseException | None = None
        """Why loading failed."""
        self.at_close: Callable[[], object] = lambda: None
        """Called first of all when the server closes, before handlers are waited for."""
        self._loads: list[Load] = []
        self._open_to_calls = False
        self._draining = 0.0  # since when
        self._opened = False
        self._closed = False
        self._closer = 0  # the thread that closes
        self._ended = threading.Event()
        self._forget_end: Callable[[], object] = lambda: None

    def _refuse_code_of_strangers(self, url: Url) -> None:
        """Refuse what would let anybody on a network run code here."""
        for codec in self._codecs.values():
            if codec.executes:
                raise PermissionDenied(
                    f"codec {codec.name!r} runs code that the sender chooses, and {url} lets in "
                    "other machines, whoever they are; listen on 127.0.0.1, give credentials=, or "
                    "leave it out"
                )

    # What is served -----------------------------------------------------------------------

    def register(
        self,
        name: str,
        handler: Handler | Gatherer,
        lane: str = "",
        needs: str = "",
        newest_first: bool = False,
    ) -> None:
        """Serve calls of ``name`` by ``handler``; see `Dispatcher.register`."""
        self.dispatcher.register(name, handler, lane, needs, newest_first)

    def extend(self, name: str, negotiate: Negotiate) -> None:
        """Answer an extension in each hello that has it; before `open`."""
        self._extensions[name] = negotiate

    def topic(self, name: str, keep: int = 1, needs: str = "") -> Topic:
        """Make a stream that clients can subscribe to; see `Topic`."""
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        codecs = self._codecs.values() if name else ()
        check = None if self._wrapping is None else self._wrapping.check
        made = Topic(
            name, codecs, self.epoch, keep, self.allocate, check, needs=needs, limits=self._limits
        )
        self._topics[name] = made
        return made

    @property
    def urls(self) -> list[Url]:
        """Where clients reach this server, the real ports filled in; empty unless it is open."""
        return [end.url for end in self._endpoints()]

    def _endpoints(self) -> list[Endpoint]:
        return [each.endpoint for each in self._listeners if each.endpoint]

    @property
    def doors(self) -> list[Url]:
        """Where other people's clients reach this server, the real ports filled in."""
        return [each.endpoint.url for _, each, _ in self._doors if each.endpoint is not None]

    @property
    def callers(self) -> list[Caller]:
        """The clients that are there."""
        return [each for each in list(self._sessions.values()) if not each.gone]

    def stats(self) -> dict[str, int]:
        """Counts since the start: calls, and everything that was refused or dropped, by reason; and
        ``waiting``, the calls that wait for a handler now, and ``running``, the threads that are at
        one, or at a batch.
        """
        entrances = [each for _, each, _ in self._doors]
        ends = self._endpoints()
        ends += [each.endpoint for each in entrances if each.endpoint is not None]
        counts = self.counts + self.dispatcher.counts
        for end in ends:
            counts.update(end.counts)
        for each in entrances:
            counts.update(each.counts)
        return {
            **counts,
            "waiting": self.dispatcher.waiting,
            "running": self.dispatcher.running,
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
        self._forget_end = run_at_end(self.close)
        if self._loads:
            self.state = ServerState("loading", 0.0)
            self.dispatcher.do(self._run_loads)
        else:
            self.state = ServerState("ready")
            self._open_to_calls = True
        try:
            for tries in reversed(range(_PORT_TRIES)):
                if self._listen(raising=not tries):
                    break
        except BaseException:
            self.close()
            raise
        try:
            for door in self._doors:
                self._open_door(*door)
            self._check_reach()
        except BaseException:
            self.close()
            raise
        self._ticked = time.monotonic()
        self._alarms.after(_TICK, self._tick)
        _log.info("serving %s on %s", self.service, ", ".join(map(str, self.urls)))

    def _check_reach(self) -> None:
        """See, by what has been bound, that nobody gets in who shouldn't; say who does."""
        open_to_all = []
        for end in self._endpoints():
            if self._is_open_to_all(end):
                self._refuse_code_of_strangers(end.url)
                open_to_all.append(end.url)
            elif (
                not end.secured
                and self._keyring is None
                and any(codec.executes for codec in self._codecs.values())
            ):
                _log.warning(
                    "%s on %s: any user of this machine can run code as yours; use shm, give "
                    "credentials=, or leave such codecs out",
                    self.service,
                    end.url,
                )
        if open_to_all:
            self._warn_of(open_to_all)

    def _is_open_to_all(self, end: Endpoint) -> bool:
        """Whether others reach it, unprotected; raises PermissionDenied where there are keys."""
        if end.secured or end.local:
            return False
        if self._keyring is not None:
            raise PermissionDenied(
                f"{end.url} can't be protected by keys: {end.url.scheme} sends clear text; "
                "listen on 127.0.0.1, or by zmq or grpc, or tunnel it (see docs/security.md)"
            )
        return True

    def _warn_of(self, urls: list[Url]) -> None:
        _log.warning(
            "%s on %s: WHOEVER REACHES THIS MACHINE CAN USE IT, and all is sent in clear text. "
            "Make keys with `edgeml keygen keys --client NAME`, and give credentials='keys' "
            "here and the folder keys/clients/NAME to that client (see docs/security.md)",
            self.service,
            ", ".join(map(str, urls)),
        )

    def open_door(self, url: Url, entrance: Entrance, choose: Callable[[], str]) -> Url:
        """Let other people's clients in at ``url``, now or when the server starts.

        Args:
            url: where, and by its scheme which door.
            entrance: where it leads.
            choose: names the entrance's interface, once there are interfaces.

        Returns:
            Where that is: with the real port, once the server has started.

        Raises:
            PluginError, OSError, ValueError: it can't be opened.
            PermissionDenied: the server asks for keys, and the door can't protect them there.
            RuntimeError: the server has been stopped.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the server was stopped before; make a new one")
            opened = self._opened
            if not opened:
                self._doors.append((url, entrance, choose))
                return url
        self._open_door(url, entrance, choose)
        with self._lock:
            self._doors.append((url, entrance, choose))
            closed = self._closed
        if closed:
            entrance.close()
            raise Closed("the server has been stopped")
        assert entrance.endpoint is not None
        return entrance.endpoint.url

    def _open_door(self, url: Url, entrance: Entrance, choose: Callable[[], str]) -> None:
        entrance.interface = choose()
        door: Door = load_door(url.scheme)
        made = door.open(url, entrance, credentials=self._credentials, limits=self._limits)
        try:
            if self._is_open_to_all(made):
                self._warn_of([made.url])
        except PermissionDenied:
            made.close()
            raise
        entrance.endpoint = made
        _log.info("%s: %r is served on %s as well", self.service, entrance.interface, made.url)

    def _listen(self, *, raising: bool) -> bool:
        """Open every address. Where the system picks the port, all transports get the same one, so
        that a client can choose among them; False if it was not free for one of them.

        An address that another user has taken is done without, with a warning, if there are others:
        on this machine anybody may take a name first, and nobody is to stop a server by that.
        """
        picked: dict[bool, int] = {}  # the port, of those needed and of those spare
        taken: PermissionDenied | None = None  # by another user
        served = False  # at an address that is needed
        for url, needed in self._requested:
            pick = not url.port and not url.path
            listener = _Listener(self)
            transport = load_transport(url.scheme)
            try:
                made = transport.serve(
                    url.with_port(picked.get(needed, 0)) if pick else url,
                    listener,
                    credentials=self._credentials,
                    limits=self._limits,
                )
            except OSError as error:
                if isinstance(error, PermissionDenied) and error.errno == errno.EADDRINUSE:
                    _log.warning("%s; the server does without %s", error, url.scheme)
                    taken = error
                    continue
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
            served = served or needed
            self._listeners.append(listener)
            if self._closed:
                listener.endpoint.close()
                raise Closed("the server has been stopped")
        if taken is not None and not served:
            raise taken
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
                self._close()
            finally:
                self._ended.set()
                self._forget_end()
        elif me != self._closer and not self.dispatcher.inside:  # or it would wait for itself
            self._ended.wait(5.0)

    def _close(self) -> None:
        told = "" if self.failure is None else f"loading failed: {text_of(self.failure)}"
        with self._lock:
            self._open_to_calls = False
            self.state = ServerState("stopped", 0.0, told)
            sessions = list(self._sessions.values())
        try:
            self.at_close()
        except Exception:
            _log.exception("%s: what is to be done first of all failed", self.service)
        for topic in self._topics.values():
            topic.close()
        for session in sessions:
            self._end(session.episode)
        self.dispatcher.close()
        for _, entrance, _ in self._doors:
            entrance.close()
        for listener in self._listeners:
            if listener.endpoint is not None:
                listener.endpoint.close()
        self._alarms.close()
        self._notices.close()

    def _tick(self) -> None:
        try:
            for topic in self._topics.values():
                topic.tick()
            self._look_for_the_silent()
            self._check_keys()
            for _, entrance, _ in list(self._doors):
                entrance.look()
        finally:
            self._alarms.after(_TICK, self._tick)

    def _look_for_the_silent(self) -> None:
        """Take note of the clients that are gone, and forget those that stay away."""
        before, self._ticked = self._ticked, time.monotonic()
        # Who slept through what clients had to say doesn't hold it against them.
        passed = min(self._ticked - before, 2 * _TICK)
        with self._lock:
            sessions = list(self._sessions.values())
            for session in sessions:
                seen = session.seen
                if seen >= before:
                    session.note_lag(wire.IDLE * session.silence + 2 * _TICK)
                    session.quiet = 0.0
                session.quiet += min(passed, self._ticked - seen)
            gone = [
                s
                for s in sessions
                if s.quiet > s.patience and not s.gone and not self._is_sending(s)
            ]
            for session in gone:
                session.gone = True
            forgotten = [s for s in sessions if s.gone and s.quiet > s.forget]
            for session in forgotten:
                self._remove(session)
        for session in gone:
            self.counts["clients_lost"] += 1
            for topic in self._topics.values():
                topic.release(session.key)
            self._say(f"{session} is lost: silent for {session.silence:g} s")
            self._notices.tell(self._on_disconnect, session)
        for session in forgotten:
            self._end(session.episode)

    def _is_sending(self, session: Known) -> bool:
        """Whether something that takes long is just coming from a client."""
        heard = max((end.heard_from(session.peer) for end in self._endpoints()), default=0.0)
        return time.monotonic() - heard < session.silence

    def _come_back(self, session: Known) -> None:
        """Take note that a client that was taken to be gone is there."""
        with self._lock:
            gone, session.gone = session.gone, False
            session.quiet = 0.0  # which is not to be learned from
        if gone:
            self._say(f"{session} is back")
            self._notices.tell(self._on_connect, session)

    # Keys ---------------------------------------------------------------------------------

    def _identify(self, peer: Peer, token: object) -> ClientKey | None:
        """Whose key a client has shown, by its connection, its token, or both; None without keys.

        Raises:
            PermissionDenied: none, or none that is known here, or two that don't fit.
        """
        keys = self._keyring
        if keys is None:
            return None
        if peer.identity is None:
            if not isinstance(token, str):
                raise PermissionDenied(
                    "this server asks for keys: give credentials=, the folder that `edgeml keygen "
                    "DIR --client NAME` made there"
                )
            return keys.by_token(token)
        proved = keys.by_name(peer.identity)
        if proved.token is not None and (
            not isinstance(token, str) or not hmac.compare_digest(proved.token, digest(token))
        ):
            raise PermissionDenied(
                f"the key is that of {proved.name!r}, and the token "
                + ("is missing" if token is None else "another")
            )
        return proved

    def _check_keys(self) -> None:
        """Take in what has changed about the keys, and cut off those that were revoked."""
        keys = self._keyring
        if keys is None:
            return
        try:
            keys.refresh()
            wrong = ""
        except (OSError, ValueError, PermissionDenied) as error:
            wrong = str(error)
        if wrong and wrong != self._keys_wrong:
            _log.warning("%s: a key does not count: %s", self.service, wrong)
        self._keys_wrong = wrong
        with self._lock:
            met = list(self._met)
        for session in met:
            assert session.proved is not None
            try:
                now = keys.by_name(session.proved.name)
                if (now.curve, now.certificate, now.token) != session.proof:
                    raise PermissionDenied(f"the key of {now.name!r} has been replaced")
                session.role = now.role
            except PermissionDenied as error:
                if not session.revoked:
                    self._cut_off(session, error)

    def _cut_off(self, session: Known, why: PermissionDenied) -> None:
        with self._lock:
            session.revoked = True
            there = session.key in self._sessions
            self._remove(session)
        if not there:  # it has left, and some calls of it may wait
            return
        for topic in self._topics.values():
            topic.forget(session.key, why)
        self._end(session.episode)
        self.counts["PermissionDenied"] += 1
        _log.warning("%s: %s is cut off: %s", self.service, session, why)
        if not session.gone:
            self._notices.tell(self._on_disconnect, session)

    # Sessions -----------------------------------------------------------------------------

    def _add(self, session: Known) -> None:
        """Take a session in; under the lock.

        Raises:
            Overloaded: there are too many.
            PermissionDenied: its client id is that of another key.
        """
        limits, peer = self._limits, session.peer
        near = [("connection", peer.id), ("address", peer.host)]
        if len(self._sessions) >= limits.sessions:
            raise Overloaded(f"the server has {limits.sessions} clients already")
        if self._near[near[0]] >= limits.sessions_per_connection:
            raise Overloaded(f"there are {self._near[near[0]]} clients on this connection already")
        if peer.host and self._near[near[1]] >= limits.sessions_per_address:
            raise Overloaded(f"there are {self._near[near[1]]} clients at {peer.host} already")
        if session.identity is not None:
            self._claim(session.client_id, session.identity)
            self._met.add(session)
        self._near.update(near)
        self._sessions[session.key] = session

    def claim(self, client_id: str, identity: str) -> None:
        """Keep a client id for the key of this name, as if it had come with that.

        Raises:
            PermissionDenied: it is another's.
        """
        with self._lock:
            self._claim(client_id, identity)

    def _claim(self, client_id: str, identity: str) -> None:
        """Use a client id in the name of a key: it is that key's from the first time on.

        One that is the name of a key is that key's before: nobody can be first.
        """
        if client_id != identity and self._keyring is not None and client_id in self._keyring:
            raise PermissionDenied(
                f"the client id {client_id!r} is the name of another key than that of "
                f"{identity!r}: choose another client_id"
            )
        owner = self._owners.setdefault(client_id, identity)
        if owner != identity:
            raise PermissionDenied(
                f"the client id {client_id!r} belongs to another key than that of {identity!r}: "
                "choose another client_id"
            )
        ids = self._owned.setdefault(identity, OrderedDict())
        ids[client_id] = None
        ids.move_to_end(client_id)
        if len(ids) > _MOST_IDS:  # of random ids, one for each start of a program
            del self._owners[ids.popitem(last=False)[0]]

    def admit(
        self, peer: Peer, token: str | None, make: Callable[[ClientKey | None], Known]
    ) -> Known:
        """Take a client in that has come by a door; see `Dispatch.enter`."""
        if self._closed:
            raise Closed("the server has been stopped")
        if self._draining:
            raise NotReady(_DRAINING)
        try:
            if self._keyring is not None and not token and peer.identity is None:
                raise PermissionDenied(
                    "no token of a key was shown: it is the text of clients/NAME/token, which "
                    "`edgeml keygen DIR --client NAME` makes"
                )
            made = make(self._identify(peer, token))
            with self._lock:
                self._add(made)
        except EdgemlError as error:
            self._count_refusal(peer, error)
            raise
        self._say(f"{made} has come")
        self._notices.tell(self._on_connect, made)
        return made

    def dismiss(self, known: Known) -> None:
        """Forget a client, if it is there."""
        with self._lock:
            there = known.key in self._sessions
            self._remove(known)
        if there:
            self._end(known.episode)
            self._say(f"{known} has left")
            if not known.gone:
                self._notices.tell(self._on_disconnect, known)

    def _remove(self, session: Known) -> None:
        """Forget a session, if it is there; under the lock."""
        if self._sessions.pop(session.key, None) is None:
            return
        session.left = True
        for place in (("connection", session.peer.id), ("address", session.peer.host)):
            self._near[place] -= 1
            if not self._near[place]:
                del self._near[place]

    def begin_episode(self, caller: Caller, name: str) -> None:
        """Forget what is kept about a caller; calls that came before find it as it was."""
        old, caller.episode = caller.episode, Episode(name)
        self._end(old)

    def _end(self, episode: Episode) -> None:
        with self._lock:
            self._ended_episodes.add(episode)
        episode.end(self._run_soon)

    def _run_soon(self, function: Callable[[], object]) -> None:
        """Run a function in the handlers' thread, also when that is just ending."""
        with self._lock:
            over = self._over
            if not over:
                self._due.append(function)
        if over:
            function()
        else:
            self.dispatcher.do(self._run_due)

    def _run_due(self) -> None:
        while self._due:
            try:
                function = self._due.popleft()
            except IndexError:  # another worker has it
                return
            function()

    def _run_last(self) -> None:
        with self._lock:
            self._over = True
        self._run_due()

    def _resume(self, key: Any, session: _Session) -> Known | None:
        """Go on where a client's lost connection left off; nobody else knows that session's key.

        Returns:
            The session that this one takes the place of; None if it isn't there.
        """
        with self._lock:
            old = self._sessions.get(key) if isinstance(key, bytes) else None
            if old is None or old is session or old.client_id != session.client_id:
                return None
            self._remove(old)
            session.episode, session.turn = old.episode, old.turn
        for topic in self._topics.values():
            topic.forget(old.key)
        return old

    # States -------------------------------------------------------------------------------

    def load(self, function: Load) -> None:
        """Call ``function(report)`` in the handlers' thread before any call is answered.

        Raises:
            RuntimeError: the server has been started.
        """
        with self._lock:
            if self._opened:
                raise RuntimeError("the server was started before; say what it loads before that")
            self._loads.append(function)

    def _run_loads(self) -> None:
        """Run in the handlers' thread."""
        loads, self._loads = self._loads, []
        try:
            for number, function in enumerate(loads):

                def report(fraction: float, detail: str = "", number: int = number) -> None:
                    if self._closed:
                        raise Closed("the server has been stopped")
                    done = (number + min(max(float(fraction), 0.0), 1.0)) / len(loads)
                    with self._lock:
                        if self.state.state == "loading":
                            self.state = ServerState("loading", done, str(detail)[:_LONGEST_DETAIL])

                report(0.0)
                function(report)
        except BaseException as error:
            if not self._closed:  # or it was interrupted by that
                if not isinstance(error, KeyboardInterrupt):
                    self.failure = error
                    _log.exception("%s: loading failed, and the server stops", self.service)
                self.close()
            if not isinstance(error, Exception):
                raise
            return
        with self._lock:
            if self.state.state == "loading":  # and has not been stopped, and is not draining
                self.state = ServerState("ready")
                self._open_to_calls = True
        _log.info("%s is ready", self.service)

    def _is_late(self, call: Call) -> bool:
        """Whether a call may have been under way when draining began."""
        return self._draining > 0.0 and call.arrived <= self._draining + _UNDER_WAY

    def _not_ready(self) -> EdgemlError:
        if self._closed:
            return Closed("the server has been stopped")
        if self._draining:
            return NotReady(_DRAINING)
        return NotReady(
            f"the server is {self.state}: call again later (a client of edgeml's waits until it is "
            "ready with wait_for_server=)"
        )

    def drain(self, timeout: float) -> bool:
        """Answer what is under way, take nothing new, and then close; whether all was answered.

        In the handlers' thread, a signal's handler among it, this returns at once, with False, and
        the rest is done in the background.
        """
        with self._lock:
            if not self._draining and not self._closed:
                self._draining = time.monotonic()
                self.state = ServerState("draining", 1.0, "it answers what it has, and stops")
                self._open_to_calls = False
        self._topics[wire.HEARTBEAT].announce(wire.DRAINING)
        if self.dispatcher.inside or self.dispatcher.carries:
            threading.Thread(
                target=self._finish, args=(timeout,), name="edgeml drain", daemon=True
            ).start()
            return False
        return self._finish(timeout)

    def _finish(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        self._ended.wait(max(0.0, min(self._draining + _UNDER_WAY, deadline) - time.monotonic()))
        while (owing := self._owes_answers()) and time.monotonic() < deadline:
            if self._closed:
                break
            self._ended.wait(_LOOK)
        goodbyes = min(deadline, time.monotonic() + _GOODBYES)
        while self._has_leavers() and not self._closed and time.monotonic() < goodbyes:
            self._ended.wait(_LOOK)
        self.close()
        return not owing

    def _has_leavers(self) -> bool:
        """Whether clients are there that are about to leave."""
        with self._lock:
            return any(s in self._leavers and not s.gone for s in self._sessions.values())

    def _owes_answers(self) -> bool:
        """Whether any call that was taken has no answer yet."""
        with self._lock:
            episodes = [session.episode for session in self._sessions.values()]
            episodes += self._ended_episodes
        return any(episode.calls for episode in episodes)

    # Requests, in the transport's loop ----------------------------------------------------

    def _on_request(self, listener: _Listener, message: Message, reply: Reply) -> None:
        try:
            if self._closed:
                raise Closed("the server has been stopped")
            if len(message.header) > self._limits.hello_bytes and not self._knows(message.header):
                reply(Message(wire.pack(wire.Answer(wire.NO_SESSION))))
                return
            request = wire.unpack(wire.Request, message.header)
            if request.kind == wire.HELLO:
                reply(Message(self._hello(request.body, message, reply.peer)))
                return
            if request.kind == wire.PING:
                now = self.state
                pong = wire.Pong(
                    wire.PROTOCOL,
                    self.service,
                    time.time(),
                    now.state,
                    now.progress,
                    now.detail,
                )
                reply(Message(wire.pack(wire.Answer(wire.OK, wire.pack(pong)))))
                return
            session = self._sessions.get(request.session)
            if not isinstance(session, _Session):
                reply(Message(wire.pack(wire.Answer(wire.NO_SESSION))))
                return
            session.seen = time.monotonic()
            if session.gone:
                self._come_back(session)
            if request.kind == wire.CALL:
                end = listener.endpoint
                if (
                    end is not None
                    and self._open_to_calls
                    and self.dispatcher.has_no_time_for(request.name, request.timeout, end)
                ):
                    reply(_UNREAD)
                    return
                call = _EnvelopeCall(request, session, message, reply, listener.endpoint)
                self.submit(call)
            elif request.kind == wire.NEXT:
                credit = wire.unpack(wire.Credit, request.body)
                topic = self._topics.get(request.name)
                if topic is None:
                    raise unknown("topic", request.name, self._topics)
                if topic.needs:
                    session.require(topic.needs, topic.name)
                paced = session.paced and not request.name
                topic.park(
                    session.key,
                    session.spoken.encoder,
                    credit,
                    reply,
                    listener.answer,
                    request.timeout if paced else None,
                )
            elif request.kind == wire.GOODBYE:
                self.dismiss(session)
                for topic in self._topics.values():
                    topic.forget(session.key)
                reply(Message(wire.pack(wire.Answer(wire.OK))))
            else:
                raise Malformed(f"unknown kind of request: {request.kind}")
        except EdgemlError as error:
            self._fail(reply, error)

    def submit(self, call: Call) -> None:
        """Have a call answered, if the server is ready; never raises."""
        # The call is there before the look, since a server that drains waits for those that are.
        if self._open_to_calls or self._is_late(call):
            self.dispatcher.submit(call)
        else:
            self.dispatcher.refuse(call, self._not_ready())

    def _knows(self, header: bytes) -> bool:
        """Whether a large header is of a session, before anything of it is copied."""
        limits = self._limits
        if len(header) > limits.header_bytes:
            raise Malformed(
                f"a header of {len(header)} bytes, and {limits.header_bytes} are taken: send what "
                "is large as arrays or bytes"
            )
        head = wire.unpack(wire.Head, header)
        if head.kind in (wire.HELLO, wire.PING):
            raise Malformed(f"a hello of {len(header)} bytes, and {limits.hello_bytes} are taken")
        return head.session in self._sessions

    def _say(self, what: str) -> None:
        self.dispatcher.lines.write(logging.INFO, f"{self.service}: {what}")

    def _fail(self, reply: Reply, error: EdgemlError) -> None:
        self._count_refusal(reply.peer, error)
        reply(Message(wire.pack_error(error)))

    def _count_refusal(self, peer: Peer, error: EdgemlError) -> None:
        self.counts[type(error).__name__] += 1
        if isinstance(error, PermissionDenied):
            who = peer.host or peer.address  # or each of its connections would have a line
            text = f"{self.service}: {who} is refused: {text_of(error)}"
            self.dispatcher.lines.write_once(logging.WARNING, text)

    def _wrap(self, asked: Any, caller: Caller) -> Any:
        """Agree with a client on what is around its codec."""
        assert self._wrapping is not None
        assert isinstance(caller, _Session)
        answer, caller.spoken = self._wrapping.answer(asked, caller.codec, caller)
        return answer

    def _hello(self, body: bytes, message: Message, peer: Peer) -> bytes:
        if self._draining:
            raise NotReady(_DRAINING)
        if message.nbytes > self._limits.hello_bytes:
            raise Malformed(
                f"a hello of {message.nbytes} bytes, and {self._limits.hello_bytes} are taken"
            )
        hello = wire.unpack(wire.Hello, body)
        proved = self._identify(peer, hello.extensions.get(wire.TOKEN))
        differences = [
            f"{name}: the server has {ours!r}, the client has {theirs!r}"
            for name, ours, theirs in [
                ("protocol", wire.PROTOCOL, hello.protocol),
                ("service", self.service, hello.service),
                *((f, self._config.get(f), hello.config.get(f)) for f in self._config),
            ]
            if ours != theirs
        ]
        if hello.codec not in self._codecs:
            known = ", ".join(self._codecs)
            differences.append(f"codec: the server offers {known}, the client has {hello.codec}")
        if differences:
            raise ConfigMismatch("; ".join(differences))
        if len(hello.client_id) > 200 or len(hello.label) > 200:
            raise Malformed("a client id or label of over 200 characters")
        session = _Session(hello, peer, self._codecs[hello.codec], proved)
        answers = {
            name: self._negotiate(name, asked, session)
            for name, asked in hello.extensions.items()
            if name in self._extensions
        }
        if wire.ALIVE in hello.extensions:
            session.silence = _agree_on_silence(hello.extensions[wire.ALIVE], session.forget)
            answers[wire.ALIVE] = session.silence
            session.paced = True
        with self._lock:
            self._add(session)
        old = None
        if wire.RESUME in hello.extensions:
            old = self._resume(hello.extensions[wire.RESUME], session)
            answers[wire.RESUME] = old is not None
        self._say(f"{session} has come")
        if old is None or old.gone:  # and not where its connection alone is another
            self._notices.tell(self._on_connect, session)
        topics = {
            topic.name: topic.keep if _allows(session, topic) else 0
            for topic in self._topics.values()
        }
        ports = [url.port for url in self.urls]
        welcome = wire.Welcome(session.key, self.epoch, topics, ports, answers, hello.codec)
        return wire.pack(wire.Answer(wire.OK, wire.pack(welcome)))

    def _negotiate(self, name: str, asked: Any, session: _Session) -> Any:
        try:
            return self._extensions[name](asked, session)
        except EdgemlError:
            raise
        except Exception as error:  # the client is to be told, whatever it sent
            _log.exception("%s: %r could not be agreed with %s", self.service, name, session)
            raise Malformed(f"what was asked of {name!r} could not be agreed: {error}") from error


def _allows(session: _Session, topic: Topic) -> bool:
    return not topic.needs or session.role.allows(topic.needs, topic.name)


def _agree_on_silence(asked: object, most: float) -> float:
    """The silence after which a client is taken to be gone, of the one that it asks for."""
    if isinstance(asked, bool) or not isinstance(asked, (int, float)) or not asked > 0:
        raise Malformed(f"{wire.ALIVE!r} is a positive number of seconds, not {shown(asked)}")
    return min(max(float(asked), _BRIEFEST), most)
