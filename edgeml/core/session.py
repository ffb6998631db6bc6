"""Sessions: a connection that a server has welcomed; made, greeted, kept and lost.

Any answer is a sign of life. Where none has come for a while, a keeper thread asks for one: a
heartbeat, which the server keeps for a second before it answers, so that a connection that breaks
meanwhile is noticed at once. A server that dies, freezes or is cut off is noticed within
`edgeml.core.wire.SILENCE` seconds on any transport, and the keeper makes a new session in the
background. Whoever needs one before makes it at once, so that the first call after a restart just
works.

What this process sleeps through, suspended, starved of a processor or with the GIL held by somebody
else, is no silence of the server's: who is given up was asked once more, by a process that ran.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec

from edgeml.core import wire
from edgeml.core.alarms import Alarms
from edgeml.core.codec import Codec, Spoken, Wrapping
from edgeml.core.deadline import Deadline
from edgeml.core.errors import (
    Closed,
    ConfigMismatch,
    DeadlineExceeded,
    EdgemlError,
    NotReady,
    Overloaded,
    PermissionDenied,
    Unreachable,
    copy_error,
)
from edgeml.core.message import Message
from edgeml.core.notices import Notices
from edgeml.core.plugins import load_transport
from edgeml.core.security import Credentials
from edgeml.core.throttle import Throttle
from edgeml.core.transport import Requester
from edgeml.core.url import Url

__all__ = ["Session", "SessionKeeper", "make_heartbeat"]

_log = logging.getLogger(__name__)

_IMPATIENCE = 0.05  # seconds; the first pause between two attempts to connect
_PATIENCE = 2.0  # seconds; the longest pause between two attempts to connect in the background
_ATTEMPT = 3.0  # seconds that the first attempt to connect in the background may take
_LONGEST_ATTEMPT = 10.0  # seconds that a later one may take at least
_FIRST_ASKED = 0.4  # the part of what is left that the answer to a heartbeat may be late
_CALM = 0.9  # the part of a lag that still counts after the next answer
_LATE = 0.1  # seconds from when a wait should have ended, beyond which we ourselves were held up
_EACH = 0.003  # seconds that each call under way, which a server may be at first, lengthens that by
_WAY = 0.001  # seconds by which what is known of the way may at least grow
_GOODBYE = 3.0  # seconds that a server which stops may take to answer what it has begun
_FAREWELL = 0.2  # seconds that closing may spend on telling the server
_LEAST = 0.01  # seconds that whatever is begun is given


def _do_nothing() -> None:
    """Stand in for somebody who is to be told."""


@dataclass(eq=False)
class Session:
    """A connection that the server has welcomed.

    Attributes:
        requester: the connection.
        key: what the server knows the session by.
        spoken: what encodes and decodes.
        topics: what can be subscribed to, and how many publications the server keeps of each.
        epoch: of this start of the server.
        extensions: what the server answers to those of the hello.
        silence: seconds without a sign of life after which each end takes the other to be gone.
        lag: seconds that the server took of late to answer what it answers at once.
        way: seconds that calls take of late beyond what the server says that they took there.
        free_at: when the server will have done what was before this client's last call there, if
            that takes as long again; of several servers.
        asked: when the newest request was sent that has had an answer.
        heard: when an answer last came.
        welcomed: when it was made.
        under_way: has as many entries as asynchronous calls without an answer; see `Episode`.
        asking: has as many as blocking calls without one, and calls that are about to be sent.
        throttles: of the interfaces of which asynchronous calls were refused.
        why_lost: None as long as it works.
        over: set when it is lost.
        told: whether the user has been told that.
    """

    requester: Requester
    key: bytes
    spoken: Spoken
    topics: dict[str, int]
    epoch: int
    extensions: dict[str, Any] = field(default_factory=dict)
    silence: float = wire.OLD_SILENCE
    lag: float = 0.0
    way: float = 0.0
    free_at: float = 0.0
    asked: float = field(default_factory=time.monotonic)
    heard: float = field(default_factory=time.monotonic)
    welcomed: float = field(default_factory=time.monotonic)
    under_way: list[None] = field(default_factory=list)
    asking: list[None] = field(default_factory=list)
    throttles: dict[str, Throttle] = field(default_factory=dict)
    why_lost: EdgemlError | None = None
    over: threading.Event = field(default_factory=threading.Event)
    told: bool = False
    retired: bool = False
    counted: bool = False  # its figures are among those of the keeper

    @property
    def lost(self) -> bool:
        """Whether it is to be used no more."""
        return self.why_lost is not None or self.requester.lost

    @property
    def slowness(self) -> float:
        """Seconds by which an answer may be later than one of a server that has time."""
        return 2 * self.lag + _EACH * len(self.under_way)

    def note_life(self, asked: float) -> None:
        """Take notice that a request has just been answered which was sent at that time, or later.

        So the server had a sign of life, too, by then: what counts for when it is due the next.
        """
        self.heard = time.monotonic()
        if asked > self.asked:
            self.asked = asked

    def note_way(self, took: float, served: wire.Served | None) -> None:
        """Take notice of what a call took that had an answer, to know what the way takes of it.

        Quickly down, and slowly up: a machine that was held up tells nothing of the way.

        Args:
            took: seconds until the answer was there.
            served: what of them the server tells to be its own; None where it refused the call.
        """
        if served is None:
            self.way = min(self.way, took)
            return
        known = self.way
        way = took - served.queue - served.compute
        if way > known:
            most = 2 * known + _WAY
            self.way = known + ((way if way < most else most) - known) / 10
        else:
            self.way = (known + way) / 2 if way > 0 else known / 2

    def left_there(self, left: float) -> float:
        """Return what the server has of the time that is left for a call, or half of that."""
        half = left / 2
        return left - self.way if self.way < half else half

    def note_answered(self, name: str) -> None:
        """Take notice that an asynchronous call had its answer in time."""
        if self.throttles and (throttle := self.throttles.get(name)) is not None:
            throttle.note_answered(time.monotonic())

    def note_refused(self, name: str, timeout: float, why: EdgemlError) -> None:
        """Take notice that an asynchronous call was refused, or had no answer in time."""
        throttle = self.throttles.get(name) or self.throttles.setdefault(name, Throttle())
        throttle.note_refused(timeout, time.monotonic(), why)

    def hold_back(self, name: str, deadline: Deadline) -> EdgemlError | None:
        """Return why an asynchronous call that begins now is not worth sending, if so.

        One that waits for no other is: who asks one after the other sends no more than can be read.
        """
        if not self.throttles or not self.under_way:
            return None
        throttle = self.throttles.get(name)
        if throttle is None:
            return None
        return throttle.refusal(deadline.timeout, deadline.began)

    def note_lag(self, seconds: float) -> None:
        """Take notice how long an answer took: the longest counts, less and less as time goes."""
        self.lag = min(max(seconds, _CALM * self.lag, 0.0), self.silence / 2)

    def lose(self, why: EdgemlError) -> None:
        """Use it no more; a server that says so itself may still answer what is under way."""
        if self.why_lost is None:
            self.why_lost = why
        if not isinstance(why, Closed):
            self.requester.close()
        self.over.set()


class SessionKeeper:
    """Has one session with a server, makes it anew when it is lost, and sends its heartbeats.

    Args:
        urls: where the server is; the first that answers is taken.
        hello: what it is greeted with.
        codec: what the hello says is spoken.
        wrapping: what the hello asks to have around it.
        alarms: does things later.
        needed: extensions of the hello that the server must answer.
        timeout: seconds that making a session in the background may take.
        credentials: given to the transport.
        on_disconnect: is called when a session is lost, in a thread of its own, and
        on_reconnect: when there is one again, in the same way: one after the other. Neither is
            called for the first session, nor when this is closed.
        on_change: is called, without a lock, by whoever notices that there is a session, that it is
            lost, or that none could be made.
    """

    def __init__(
        self,
        urls: Sequence[Url],
        hello: wire.Hello,
        codec: Codec,
        alarms: Alarms,
        *,
        needed: Collection[str] = (),
        wrapping: Wrapping | None = None,
        timeout: float,
        credentials: Credentials | None = None,
        on_disconnect: Callable[[], object] | None = None,
        on_reconnect: Callable[[], object] | None = None,
        on_change: Callable[[], object] = _do_nothing,
    ) -> None:
        self.closed = False
        self.current: Session | None = None
        """The newest session, which may be lost."""
        self.failure: EdgemlError | None = None
        """Why none could be made, since there was one last."""
        self.begun = 0
        """How many there were that did not go on with the one before."""
        self._urls = list(urls)
        self._hello = hello
        self._needed = needed
        self._codec = codec
        self._wrapping = wrapping
        self._alarms = alarms
        self._timeout = timeout
        self._credentials = credentials
        self._on_disconnect = on_disconnect
        self._on_reconnect = on_reconnect
        self._on_change = on_change
        self._notices = Notices("edgeml notices")
        self._retired: weakref.WeakSet[Requester] = weakref.WeakSet()
        self._attempt: Requester | None = None  # a connection whose handshake is under way
        self._connecting = threading.Lock()
        self._changed = threading.Condition()  # of the session, and of being closed
        self._copied = 0  # on the connections before this one
        self._thread: threading.Thread | None = None

    @property
    def copied(self) -> int:
        """Replies that came as private copies since the start; see `Endpoint.copied`."""
        session = self.current
        now = session.requester.copied if session is not None and not session.counted else 0
        return self._copied + now

    def begin(self, deadline: Deadline | None = None) -> None:
        """Make the first session, and keep one from now on.

        Args:
            deadline: by which somebody is to serve there; None to try once only, for as long as
                one attempt may take.

        Raises:
            Unreachable: nobody answers there.
            ConfigMismatch: the server is of another kind, or configured differently.
            Closed: this was closed meanwhile.
        """
        self._connect_first(deadline)
        self.start()

    def start(self) -> None:
        """Make a session in the background, and keep one from now on.

        Raises:
            Closed: this was closed meanwhile.
        """
        with self._changed:
            if self.closed:
                raise Closed("this client has been closed")
            self._thread = threading.Thread(target=self._keep, name="edgeml keeper", daemon=True)
            self._thread.start()

    def _connect_first(self, deadline: Deadline | None) -> None:
        pause = _IMPATIENCE
        while True:
            try:
                left = self._timeout if deadline is None else deadline.left
                self.connect(min(self._timeout, left))
                return
            except (Unreachable, Closed):  # or one that is just stopping
                if self.closed:
                    raise Closed("this client has been closed") from None
                left = 0.0 if deadline is None else deadline.left
                if not left:
                    raise
                if pause == _IMPATIENCE:
                    _log.warning("waiting for a server at %s", self._urls[0])
            with self._changed:
                self._changed.wait_for(lambda: self.closed, min(pause, left))
            pause = min(2 * pause, _PATIENCE)

    def connect(self, timeout: float) -> Session:
        """Return the session, made anew if it is lost, which may take ``timeout`` seconds."""
        session = self.current
        if session is not None and not session.lost:
            return session
        deadline = Deadline(timeout)
        if not self._connecting.acquire(timeout=timeout):
            raise DeadlineExceeded(
                f"no connection to {self._urls[0]} within {round(timeout, 3):g} s"
            )
        try:
            session = self.current
            if session is not None and not session.lost:
                return session
            if self.closed:
                raise Closed("this client has been closed")
            if session is not None:
                self._tell_lost(session)
                self._retire(session)
            try:
                made = self._greet_first(deadline)
            except EdgemlError as error:
                self.failure = error
                raise
            with self._changed:
                if self.closed:
                    made.requester.close()
                    raise Closed("this client has been closed")
                if made.extensions.get(wire.RESUME) is not True:
                    self.begun += 1
                self.current, self.failure = made, None
                self._changed.notify_all()
            if session is not None:
                self._notices.tell(self._on_reconnect)
            return made
        finally:
            self._connecting.release()
            self._on_change()

    # As `edgeml.core.pool.Pool` has it, of several servers ----------------------------------

    def pick(self, name: str, avoid: Session | None = None) -> Session | None:
        """Return the session by which an interface is asked; None where it has to be made first.

        Whoever is given it takes one entry of its ``asking`` away, once it has asked.

        Args:
            name: of the interface.
            avoid: a session whose server has refused the call.
        """
        del name
        session = self.current
        if session is None or session.lost or session is avoid:
            return None
        session.asking.append(None)
        return session

    def wait(self, name: str, timeout: float, avoid: Session | None = None) -> Session:
        """As `pick`, but that it takes up to so many seconds to make one, and raises why not."""
        del name, avoid
        session = self.connect(timeout)
        session.asking.append(None)
        return session

    def list_connected(self, timeout: float) -> list[Session]:
        """Return a session with each server that there is one with; at least one, or raise."""
        return [self.connect(timeout)]

    def find_source(self, timeout: float) -> Session:
        """Return the session by which publications come."""
        return self.connect(timeout)

    def note_answer(self, session: Session, name: str, served: wire.Served | None) -> None:
        """Take notice of an answer; ``served`` is None where it was an error."""

    def passes_on(
        self, session: Session, name: str, error: EdgemlError, avoid: Session | None
    ) -> bool:
        """Whether a call that a server refused before it began goes to another.

        Args:
            session: in which it was refused.
            name: of the interface.
            error: what it was told.
            avoid: in which it was refused before.
        """
        return False

    def explain_lost(self, error: Unreachable) -> Unreachable:
        """Return what a caller is told whose call was under way as the connection was lost."""
        return error

    def explain_none(self, timeout: float) -> EdgemlError | None:
        """Return why no server could be asked within so many seconds; None if that isn't known."""
        del timeout
        return None

    # In the background ----------------------------------------------------------------------

    def _tell_lost(self, session: Session) -> None:
        """Tell the user that a session is lost, once; not of an end that is the user's own."""
        with self._changed:
            told, session.told = session.told, True
            if not told and not self.closed:
                self._notices.tell(self._on_disconnect)
        if not told:
            self._on_change()

    def _retire(self, session: Session) -> None:
        """Close a lost connection; later, where the server may still answer."""
        if not session.counted:
            session.counted = True
            self._copied += session.requester.copied
        if not isinstance(session.why_lost, Closed):
            session.requester.close()
        elif not session.retired:
            session.retired = True
            self._retired.add(session.requester)
            self._alarms.after(_GOODBYE, session.requester.close)

    def _greet_first(self, deadline: Deadline) -> Session:
        failures: list[EdgemlError] = []
        for tried, url in enumerate(self._urls):
            # None may use up the time of those that come after it.
            own = Deadline(max(_LEAST, deadline.left / (len(self._urls) - tried)))
            try:
                requester = load_transport(url.scheme).connect(
                    url, own.left, credentials=self._credentials
                )
            except (Unreachable, PermissionDenied) as error:
                failures.append(error)
                continue
            with self._changed:
                self._attempt = requester
                closed = self.closed
            try:
                if closed:
                    raise Closed("this client has been closed")
                self._check_reach(requester)
                return self._greet(requester, own)
            except NotReady as error:  # it is draining
                requester.close()
                failures.append(error)
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
        kind: type[EdgemlError] = Unreachable
        if any(isinstance(each, NotReady) for each in failures):
            kind = NotReady
        elif all(isinstance(each, PermissionDenied) for each in failures):
            kind = PermissionDenied
        raise kind("; ".join(map(str, failures)))

    def _check_reach(self, requester: Requester) -> None:
        """See that nobody else is told our token, or could have us run code."""
        if requester.secured:
            return
        if self._credentials is not None and not requester.local:
            raise PermissionDenied(
                f"{requester.url} can't be protected by keys: {requester.url.scheme} sends clear "
                "text; connect by zmq or grpc, or through a tunnel (see docs/security.md)"
            )
        if self._codec.executes and not requester.local:
            raise PermissionDenied(
                f"codec {self._codec.name!r} runs code that the sender chooses, and nobody knows "
                f"who answers at {requester.url}; give credentials=, or leave it out"
            )

    def _greet(self, requester: Requester, deadline: Deadline) -> Session:
        extensions = dict(self._hello.extensions)
        if self.current is not None:
            extensions[wire.RESUME] = self.current.key
        if self._credentials is not None and self._credentials.token is not None:
            extensions[wire.TOKEN] = self._credentials.token
        extensions[wire.ALIVE] = wire.SILENCE
        hello = msgspec.structs.replace(self._hello, extensions=extensions)
        header = wire.pack(wire.Request(wire.HELLO, b"", "", 0.0, wire.pack(hello)))
        began = time.monotonic()
        left = max(_LEAST, deadline.left)
        reply = wire.unpack(wire.Answer, requester.call(Message(header), left).header)
        took = time.monotonic() - began
        if reply.status != wire.OK:
            raise wire.error_of(reply)
        welcome = wire.unpack(wire.Welcome, reply.body)
        if unknown := [name for name in self._needed if name not in welcome.extensions]:
            raise ConfigMismatch(
                f"the server at {requester.url} knows nothing of {' and '.join(unknown)}, which "
                "this client relies on: bring the server's edgeml to this one's version"
            )
        if self._codec.executes and welcome.codec != self._codec.name:
            raise ConfigMismatch(
                f"the server at {requester.url} does not say that it speaks {self._codec.name!r}"
            )
        spoken = Spoken(self._codec, self._codec)
        if self._wrapping is not None:
            answered = welcome.extensions.get(self._wrapping.name)
            spoken = self._wrapping.accept(answered, self._codec, requester.url)
        agreed = welcome.extensions.pop(wire.ALIVE, None)
        made = Session(
            requester,
            welcome.session,
            spoken,
            welcome.topics,
            welcome.epoch,
            welcome.extensions,
            silence=float(agreed) if isinstance(agreed, (int, float)) else wire.OLD_SILENCE,
            asked=began,
        )
        made.note_lag(took)
        return made

    def _keep(self) -> None:
        """Watch over the session, and make a new one when it is lost."""
        pause, told = _IMPATIENCE, ""
        attempt = min(self._timeout, _ATTEMPT)
        while not self.closed:
            try:
                session, began = self.connect(attempt), time.monotonic()
                attempt = min(self._timeout, _ATTEMPT)
                try:
                    self._watch(session)
                finally:
                    self._tell_lost(session)
                    if time.monotonic() - began > _PATIENCE:  # it was no sham
                        pause, told = _IMPATIENCE, ""
            except Exception as error:
                if isinstance(error, (ConfigMismatch, PermissionDenied)):
                    if told != (told := str(error)):
                        came = "the server came back, but"
                        if self.current is None:
                            came = f"the server at {self._urls[0]} is left out"
                        _log.warning("%s: %s", came, error)
                    pause = _PATIENCE
                elif not isinstance(error, EdgemlError):  # no file descriptor is left, say
                    why = self.failure = Unreachable(f"the connection failed: {error}")
                    if told != (told := str(error)):
                        _log.exception("the connection to the server failed, and is tried again")
                    if self.current is not None:
                        self.current.lose(why)
                with self._changed:
                    if not self.closed:
                        self._changed.wait(pause)
                pause = min(2 * pause, _PATIENCE)
                # A server that is too busy for one attempt may answer a longer one.
                attempt = min(2 * attempt, max(self._timeout, _LONGEST_ATTEMPT))

    def _watch(self, session: Session) -> None:
        """Raise why a session is lost, once it is."""
        hold = 0.0
        parked: Future[Message] | None = None
        while not session.lost and not self.closed:
            idle = session.silence * wire.IDLE
            left = session.asked + idle - time.monotonic()
            if left > 0:  # something has been answered
                if not session.requester.tells_loss and (parked is None or parked.done()):
                    parked = self._park(session)
                session.over.wait(left)
                hold = 0.0
            else:
                self._beat(session, hold)
                hold = idle
        raise self.explain(session)

    def _park(self, session: Session) -> Future[Message] | None:
        """Keep a request under way, which fails when the connection breaks."""
        try:
            future = session.requester.request(make_heartbeat(session, wire.HOLD))
        except Overloaded:
            return None
        except EdgemlError as error:
            session.lose(error)
            raise
        future.add_done_callback(functools.partial(_lose_by, session))
        return future

    def _beat(self, session: Session, hold: float) -> None:
        """Ask for a sign of life; lose the session if none comes.

        Args:
            session: whose server is asked.
            hold: seconds that the server is to wait before it answers.
        """
        requester = session.requester
        spare = session.silence * (1 - wire.IDLE) - wire.TICK
        slow = session.slowness
        first, wait = _FIRST_ASKED * spare, (1 - _FIRST_ASKED) * spare + slow
        if self._ask(session, hold, hold + wire.TICK + first):
            return
        while wait > 0:
            began = time.monotonic()
            if self._ask(session, 0.0, wait) or session.lost:
                return
            ended = time.monotonic()
            if ended - began <= wait + _LATE:  # or we were held up ourselves, and ask once more
                slow = max(slow, session.slowness)  # what was cancelled is a server's work as well
                heard = max(session.heard, requester.heard)
                wait = heard + session.silence + slow - ended
        lost = Unreachable(f"no heartbeat from {requester.url} in {session.silence:g} s")
        session.lose(lost)
        raise lost

    def _ask(self, session: Session, hold: float, wait: float) -> bool:
        """Send one heartbeat; whether it was answered in time. Lose the session if it is refused.

        It is a call, since a transport may give the keeper's thread a connection of its own: there
        it never waits behind a large publication that a slow network takes a minute for.
        """
        began = time.monotonic()
        try:
            _check_heartbeat(session.requester.call(make_heartbeat(session, hold), wait))
        except DeadlineExceeded:
            return False
        except Overloaded:  # by calls, each of which has its own deadline
            session.over.wait(0.1)
        except EdgemlError as error:
            session.lose(error)
            raise
        session.note_life(began)
        late = time.monotonic() - began - hold
        session.note_lag(late - wire.TICK if hold else late)
        return True

    def leave(self, session: Session, why: EdgemlError) -> None:
        """Part from the server, which is about to stop; and connect anew, as after a loss."""
        if not session.lost:
            self._say_goodbye(session)
            session.lose(why)

    def hurry(self) -> None:
        """Try at once to connect, if that is what is waited for."""
        with self._changed:
            self._changed.notify_all()

    def next(self) -> Session | None:
        """Wait for a session that works; None once this client is closed."""
        with self._changed:
            while not self.closed:
                if self.current is not None and not self.current.lost:
                    return self.current
                self._changed.wait()
        return None

    def close(self) -> None:
        """Part from the server, and wake all who wait with `Closed`; idempotent."""
        with self._changed:
            if self.closed:
                return
            self.closed = True
            self._changed.notify_all()
            session, attempt = self.current, self._attempt
        self._notices.close(0.0)
        if session is not None:
            if not session.lost:
                self._say_goodbye(session)
            session.lose(Closed("this client has been closed"))
            session.requester.close()
        for requester in [attempt, *self._retired]:
            if requester is not None:
                requester.close()

    def join(self, seconds: float) -> None:
        """Wait for the end of the threads, unless this is one of them."""
        self._notices.close()
        if self._thread not in (None, threading.current_thread()):
            self._thread.join(seconds)

    def explain(self, session: Session) -> EdgemlError:
        """Return what to tell a caller whose connection was closed under it."""
        if self.closed:
            return Closed("this client has been closed")
        if isinstance(session.why_lost, PermissionDenied):  # our key was revoked
            return copy_error(session.why_lost)
        return Unreachable(str(session.why_lost or "the connection was lost"))

    def _say_goodbye(self, session: Session) -> None:
        """Let the server forget this client now, not after half a minute of silence."""
        header = wire.pack(wire.Request(wire.GOODBYE, session.key, "", _FAREWELL, b""))
        with suppress(EdgemlError):
            session.requester.call(Message(header), _FAREWELL)


def make_heartbeat(session: Session, hold: float) -> Message:
    """Make a request that is answered "nothing yet" after so many seconds, or with news of it."""
    credit = wire.pack(wire.Credit(0, 0, 0))
    return Message(wire.pack(wire.Request(wire.NEXT, session.key, wire.HEARTBEAT, hold, credit)))


def _check_heartbeat(answer: Message) -> None:
    reply = wire.unpack(wire.Answer, answer.header)
    if reply.status != wire.NOTHING_YET:
        raise wire.error_of(reply)


def _lose_by(session: Session, parked: Future[Message]) -> None:
    """Lose a session by what became of a request that was kept under way."""
    try:
        if not parked.cancelled():
            _check_heartbeat(parked.result())
    except Overloaded:
        pass
    except EdgemlError as error:
        session.lose(error)
