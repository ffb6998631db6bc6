"""Sessions: a connection that a server has welcomed; made, greeted, kept and lost.

A keeper thread always has one heartbeat credit parked at the server, so a server that dies or
freezes is noticed within `edgeml.core.wire.SILENCE` seconds on any transport, and it makes a new
session in the background. Whoever needs one before makes it at once, so that the first call after
a restart just works.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec

from edgeml.core import wire
from edgeml.core.alarms import Alarms
from edgeml.core.codec import Codec, Spoken, Wrapping
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
from edgeml.core.plugins import load_transport
from edgeml.core.security import Credentials
from edgeml.core.transport import Requester
from edgeml.core.url import Url

__all__ = ["Session", "SessionKeeper"]

_log = logging.getLogger(__name__)

_IMPATIENCE = 0.05  # seconds; the first pause between two attempts to connect
_PATIENCE = 2.0  # seconds; the longest pause between two attempts to connect in the background
_GOODBYE = 3.0  # seconds that a server which stops may take to answer what it has begun
_FAREWELL = 0.2  # seconds that closing may spend on telling the server


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
        why_lost: None as long as it works.
    """

    requester: Requester
    key: bytes
    spoken: Spoken
    topics: dict[str, int]
    epoch: int
    extensions: dict[str, Any] = field(default_factory=dict)
    why_lost: EdgemlError | None = None
    retired: bool = False
    counted: bool = False  # its figures are among those of the keeper

    @property
    def lost(self) -> bool:
        """Whether it is to be used no more."""
        return self.why_lost is not None or self.requester.lost

    def lose(self, why: EdgemlError) -> None:
        """Use it no more; a server that says so itself may still answer what is under way."""
        if self.why_lost is None:
            self.why_lost = why
        if not isinstance(why, Closed):
            self.requester.close()


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
    ) -> None:
        self.closed = False
        self.current: Session | None = None
        """The newest session, which may be lost."""
        self._urls = list(urls)
        self._hello = hello
        self._needed = needed
        self._codec = codec
        self._wrapping = wrapping
        self._alarms = alarms
        self._timeout = timeout
        self._credentials = credentials
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

    def begin(self, wait: float = 0.0) -> None:
        """Make the first session, and keep one from now on.

        Args:
            wait: seconds to go on trying when nobody serves there yet.

        Raises:
            Unreachable: nobody answers there.
            ConfigMismatch: the server is of another kind, or configured differently.
            Closed: this was closed meanwhile.
        """
        self._connect_first(wait)
        with self._changed:
            if self.closed:
                raise Closed("this client has been closed")
            self._thread = threading.Thread(target=self._keep, name="edgeml keeper", daemon=True)
            self._thread.start()

    def _connect_first(self, wait: float) -> None:
        deadline = time.monotonic() + wait
        pause = _IMPATIENCE
        while True:
            try:
                self.connect(self._timeout)
                return
            except (Unreachable, Closed):  # or one that is just stopping
                if self.closed:
                    raise Closed("this client has been closed") from None
                left = deadline - time.monotonic()
                if left <= 0:
                    raise
                if pause == _IMPATIENCE:
                    _log.warning("waiting for a server at %s", self._urls[0])
            with self._changed:
                self._changed.wait_for(lambda: self.closed, min(pause, left))
            pause = min(2 * pause, _PATIENCE)

    def connect(self, timeout: float) -> Session:
        """Return the session, made anew if it is lost."""
        session = self.current
        if session is not None and not session.lost:
            return session
        deadline = time.monotonic() + timeout
        if not self._connecting.acquire(timeout=timeout):
            raise DeadlineExceeded(f"no connection to {self._urls[0]} within {timeout:g} s")
        try:
            session = self.current
            if session is not None and not session.lost:
                return session
            if self.closed:
                raise Closed("this client has been closed")
            if session is not None:
                self._retire(session)
            made = self._greet_first(deadline)
            with self._changed:
                if self.closed:
                    made.requester.close()
                    raise Closed("this client has been closed")
                self.current = made
                self._changed.notify_all()
            return made
        finally:
            self._connecting.release()

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

    def _greet_first(self, deadline: float) -> Session:
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
                closed = self.closed
            try:
                if closed:
                    raise Closed("this client has been closed")
                self._check_reach(requester)
                return self._greet(requester, time.monotonic() + left)
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

    def _greet(self, requester: Requester, deadline: float) -> Session:
        extensions = dict(self._hello.extensions)
        if self.current is not None:
            extensions[wire.RESUME] = self.current.key
        if self._credentials is not None and self._credentials.token is not None:
            extensions[wire.TOKEN] = self._credentials.token
        hello = msgspec.structs.replace(self._hello, extensions=extensions)
        header = wire.pack(wire.Request(wire.HELLO, b"", "", 0.0, wire.pack(hello)))
        left = max(0.01, deadline - time.monotonic())
        reply = wire.unpack(wire.Answer, requester.call(Message(header), left).header)
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
        return Session(
            requester,
            welcome.session,
            spoken,
            welcome.topics,
            welcome.epoch,
            welcome.extensions,
        )

    def _keep(self) -> None:
        """Keep a heartbeat under way, and make a new session when one is lost."""
        pause, told = 0.05, ""
        while not self.closed:
            try:
                self._beat(self.connect(self._timeout))
                pause, told = 0.05, ""
            except Exception as error:
                if isinstance(error, (ConfigMismatch, PermissionDenied)):
                    if told != (told := str(error)):
                        _log.warning("the server came back, but: %s", error)
                    pause = _PATIENCE
                elif not isinstance(error, EdgemlError):  # no file descriptor is left, say
                    _log.exception("the connection to the server failed, and is tried again")
                    if self.current is not None:
                        self.current.lose(Unreachable(f"the connection failed: {error}"))
                with self._changed:
                    if not self.closed:
                        self._changed.wait(pause)
                pause = min(2 * pause, _PATIENCE)

    def _beat(self, session: Session) -> None:
        """Send one heartbeat credit, and lose the session if the answer isn't as it should be.

        It is a call, since a transport may give the keeper's thread a connection of its own: there
        it never waits behind a large publication that a slow network takes a minute for.
        """
        credit = wire.pack(wire.Credit(0, 0, 0))
        header = wire.pack(
            wire.Request(wire.NEXT, session.key, wire.HEARTBEAT, wire.SILENCE, credit)
        )
        try:
            reply = wire.unpack(wire.Answer, self._ask(session, Message(header)).header)
            if reply.status != wire.NOTHING_YET:
                raise wire.error_of(reply)
        except Overloaded:  # by calls, each of which has its own deadline
            with self._changed:
                if not self.closed:
                    self._changed.wait(0.1)
        except EdgemlError as error:
            session.lose(error)
            raise

    def _ask(self, session: Session, message: Message) -> Message:
        """Twice, so that a process which was itself held up gets another chance."""
        try:
            return session.requester.call(message, wire.SILENCE / 2)
        except DeadlineExceeded:
            pass
        try:
            return session.requester.call(message, wire.SILENCE / 2)
        except DeadlineExceeded:
            raise Unreachable(
                f"no heartbeat from {session.requester.url} in {wire.SILENCE:g} s"
            ) from None

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
        if session is not None:
            if not session.lost:
                self._say_goodbye(session)
            session.lose(Closed("this client has been closed"))
            session.requester.close()
        for requester in [attempt, *self._retired]:
            if requester is not None:
                requester.close()

    def join(self) -> None:
        """Wait for the end of the thread, unless this is it."""
        if self._thread not in (None, threading.current_thread()):
            self._thread.join(2.0)

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
