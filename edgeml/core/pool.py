"""Several servers behind one client: which of them a call, a session and a subscription go to.

A pool has a `SessionKeeper` for each server, and stands where a client of one server has the only
one: it gives the client a session to ask by, and hears what came of it. How calls are encoded, sent
and waited for, and what their deadlines are, is written once, in `edgeml.core.client`; and no
transport knows of any of this.

- A call goes to the better of two servers chosen at random, by what this client has under way there
  (M. Mitzenmacher, *The power of two choices in randomized load balancing*, 2001). That is nearly
  as good as to ask all, needs nothing of the others' load, and can't have a thousand clients run to
  the same one. Where it has as many under way in both, as one that calls and waits always has,
  the better is the one whose queue must be shorter by now, by how long a call waited there last.
- Once a server keeps something for this client, as `wire.Served` tells, all calls go there: to its
  *home*. Before an interface's first answer nobody knows, so until then its calls go to one server,
  the *lead*. The call that begins a session, `reset`, has a new home chosen.
- What a server refused before it began goes to another, within the call's own deadline.
"""

from __future__ import annotations

import functools
import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from edgeml.core import wire
from edgeml.core.alarms import Alarms
from edgeml.core.deadline import Deadline
from edgeml.core.errors import (
    Closed,
    ConfigMismatch,
    EdgemlError,
    Interrupted,
    NotReady,
    Overloaded,
    PermissionDenied,
    PluginError,
    UnknownInterface,
    Unreachable,
    copy_error,
)
from edgeml.core.forks import watch_forks
from edgeml.core.message import Message
from edgeml.core.notices import Notices
from edgeml.core.resolver import Asker, Place, Watch
from edgeml.core.session import Session, SessionKeeper, make_heartbeat
from edgeml.core.state import ServerState, state_of
from edgeml.core.url import Url, resolve

__all__ = ["MakeKeeper", "Pool"]

_log = logging.getLogger(__name__)

_MOST_SERVERS = 64  # that one client connects to
_TOGETHER = 0.25  # seconds that the first connection waits for those to the other servers
_REUNION = 0.5  # seconds that a server which was lost with a session has to be there again
_LOOK = 0.1  # seconds between two looks for a server, where there is none
_SOON = 0.01  # seconds between two looks whether a server that drains has answered all
_PAUSE = 0.5  # seconds between two questions to a resolver, or a server, that has no answer yet
_LONGEST_LEAVE = 30.0  # seconds that calls under way in a server that is listed no more may take
_CLOSING = 1.0  # seconds that parting from a server may take
_LEAST = 0.01  # seconds that whatever is begun is given

MakeKeeper = Callable[[Sequence[Url], Callable[[], object]], SessionKeeper]
"""Makes what keeps a session with the server at these URLs, and calls a function at changes."""

_QUEUE = 0.001  # seconds that a call waited, below which that tells of no queue

_REFUSALS = (ConfigMismatch, PermissionDenied)


class _Member:
    """One server of a pool.

    Attributes:
        place: where it is, and what for.
        keeper: has the session with it.
        refusing: the session in which it said that it is not ready.
        heard: the session in which it is listened to, should it say that it is draining.
        state: what it is at, where it is not ready.
        calls: given to it.
        moved: sessions that had to leave it.
        left: whether it is listed no more.
    """

    def __init__(self, place: Place, keeper: SessionKeeper) -> None:
        self.place = place
        self.keeper = keeper
        self.refusing: Session | None = None
        self.heard: Session | None = None
        self.state = ServerState("ready")
        self.calls = 0
        self.moved = 0
        self.left = False

    def usable(self, avoid: Session | None = None) -> Session | None:
        """Return the session by which it can be asked, if there is one."""
        session = self.keeper.current
        if session is None or session is avoid or session is self.refusing or session.lost:
            return None
        return session

    @property
    def connected(self) -> Session | None:
        """The session with it, ready or not."""
        session = self.keeper.current
        return None if session is None or session.lost else session

    @property
    def refusal(self) -> EdgemlError | None:
        """Why it won't have this client."""
        why = self.keeper.failure
        return why if isinstance(why, _REFUSALS) else None

    @property
    def under_way(self) -> int:
        """Calls that have no answer from it yet."""
        session = self.keeper.current
        return 0 if session is None else len(session.under_way) + len(session.asking)

    def tell_state(self) -> str:
        """Name what it is at."""
        if self.refusal is not None:
            return "refused"
        session = self.connected
        if session is None:
            return "lost"
        return self.state.state if session is self.refusing else "ready"

    def explain(self) -> str:
        """Tell people where it is, and why it can't be asked."""
        session, why = self.keeper.current, self.keeper.failure
        if self.connected is not None:
            return f"{self.place.url} is {self.state}"
        if why is None and session is not None:
            why = session.why_lost
        return f"{self.place.url}: {why or 'not connected yet'}"


_Ready = tuple[_Member, Session]


class Pool:
    """Has a session with each of several servers, and gives a client one to ask by.

    It is used in the place of a `SessionKeeper`, which says what those methods do that both have.

    Args:
        watch: tells of the servers.
        asker: who asks, and how long the first answer may take.
        make: makes what keeps a session with one server.
        alarms: does things later.
        begins: the interface that begins a session, and given an empty text ends it; "" for none.
        stays: whether all calls go to one server as long as that is there, whatever it keeps.
        on_disconnect: is called, in a thread of its own, when no server is left that takes calls.
        on_reconnect: is called, in the same thread, when there is one again.
        on_move: is called likewise, with two URLs, when a session had to begin anew: where it was,
            and where it is. They are equal where the same server came back without it.
    """

    def __init__(
        self,
        watch: Watch,
        asker: Asker,
        make: MakeKeeper,
        alarms: Alarms,
        *,
        begins: str = "",
        stays: bool = False,
        on_disconnect: Callable[[], object] | None = None,
        on_reconnect: Callable[[], object] | None = None,
        on_move: Callable[[str, str], object] | None = None,
    ) -> None:
        self.closed = False
        self._watch = watch
        self._asker = asker
        self._make = make
        self._alarms = alarms
        self._begins = begins
        self._stays = stays
        self._on_disconnect = on_disconnect
        self._on_reconnect = on_reconnect
        self._on_move = on_move
        self._notices = Notices("edgeml notices")
        self._random = random.Random()
        self._changed = threading.Condition()  # of all that follows
        self._members: dict[Place, _Member] = {}
        self._leaving: set[_Member] = set()
        self._ready: tuple[_Ready, ...] = ()  # that take calls
        self._connected: bool | None = None  # whether one does; None before the first
        self._latest: Session | None = None
        self._free: set[str] = set()  # interfaces that are known to keep nothing
        self._lead: _Member | None = None
        self._counting = threading.Lock()  # of calls
        self._home: _Member | None = None
        self._home_now: _Ready | None = None  # as it was asked last
        self._home_begun = 0  # which of its keeper's sessions
        self._orphaned: tuple[_Member, int] | None = None  # the home that was lost
        self._source: _Member | None = None  # of publications
        self._changes = 0  # seen by `_look`
        self._hurried = 0.0  # when
        self._copied = 0  # by those that have left
        self._stop_watching: Callable[[], None] = lambda: None
        self._forked = False
        watch_forks(self)

    def abandon(self) -> None:
        """Take notice that this is a forked child, where no thread connects anew by itself."""
        self._changed = threading.Condition()  # whoever held it is not there
        self._forked = True

    # Which servers there are --------------------------------------------------------------

    def begin(self, deadline: Deadline | None = None) -> None:
        """Connect to the servers, and stay connected from now on; see `SessionKeeper.begin`."""
        own = Deadline(self._asker.timeout) if deadline is None else deadline
        self._find_servers(own, deadline is not None)
        first, told = 0.0, False
        while True:
            with self._changed:
                if self.closed:
                    raise Closed("this client has been closed")
                seen = self._changes
                members = list(self._members.values())
                ready = [m for m in members if m.place.calls and m.connected]
                pending = [m for m in members if not m.connected and m.keeper.failure is None]
            now = time.monotonic()
            first = first or (now if ready else 0.0)
            if ready and (not pending or now - first > _TOGETHER):
                break
            if not pending and not ready:
                self._raise_if_refused()
            if not own.left or (deadline is None and not pending and not ready):
                raise self.explain_none(own.timeout)
            if not pending and not told:
                told = True
                _log.warning("waiting for a server: %s", self.explain_none(own.timeout))
            self._wait(min(_LOOK, own.left), seen)
        self._look()
        if self._stays:  # so that all know from the first call on which server it is
            with self._changed:
                if (home := self._choose(None)) is not None:
                    self._settle(home, None)

    def _find_servers(self, deadline: Deadline, insist: bool) -> None:
        """Have the resolver tell of the servers from now on."""
        told = ""
        while True:
            try:
                stop = self._watch(self._take, self._asker)
                break
            except (Unreachable, UnknownInterface) as error:  # of which the latter may be yet
                if not insist or not deadline.left or self.closed:
                    raise
                if told != (told := str(error)):
                    _log.warning("waiting for servers: %s", told)
            with self._changed:
                self._changed.wait_for(lambda: self.closed, min(_PAUSE, deadline.left))
        with self._changed:
            self._stop_watching = stop
            closed = self.closed
        if closed:
            stop()
            raise Closed("this client has been closed")

    def _take(self, places: Sequence[Place]) -> None:
        """Take in which servers there are now."""
        with self._changed:
            if self.closed:
                return
            wanted = self._choose_places(places)
            gone = [
                self._members.pop(place) for place in list(self._members) if place not in wanted
            ]
            new = [place for place in wanted if place not in self._members]
            for member in gone:
                member.left = True
                self._leaving.add(member)
            for place in new:
                if (made := self._join(place)) is not None:
                    self._members[place] = made
            self._find_ready()
        for member in gone:
            _log.info("%s is listed no more, and gets no more calls", member.place.url)
            self._leave(member, Deadline(_LONGEST_LEAVE))
        self._look()

    def _choose_places(self, places: Iterable[Place]) -> list[Place]:
        """Return the places that are used: of too many those that are, and others at random."""
        wanted = list(dict.fromkeys(places))
        if len(wanted) > _MOST_SERVERS:
            _log.warning("of %d servers this client uses %d", len(wanted), _MOST_SERVERS)
            self._random.shuffle(wanted)
            wanted.sort(key=lambda place: place not in self._members)
            del wanted[_MOST_SERVERS:]
        self._random.shuffle(wanted)  # so that not all clients connect to the same one first
        return wanted

    def _join(self, place: Place) -> _Member | None:
        try:
            urls = resolve(place.url, "127.0.0.1", 0)
            if any(not url.port and not url.path for url in urls):
                raise ValueError("it has no port")
            made = _Member(place, self._make(urls, self._look))
        except ValueError as error:
            _log.warning("a server at %r is left out: %s", place.url[:200], error)
            return None
        made.keeper.start()
        return made

    def _leave(self, member: _Member, deadline: Deadline) -> None:
        """Close a connection once nothing is under way on it, or it has taken too long."""
        with self._changed:
            if self.closed or member not in self._leaving:
                return
            over = not member.under_way or not deadline.left
            if over:
                self._leaving.discard(member)
                self._copied += member.keeper.copied
        if over:
            threading.Thread(
                target=member.keeper.close, name="edgeml leaves a server", daemon=True
            ).start()
        else:
            self._alarms.after(_LOOK, functools.partial(self._leave, member, deadline))

    def _look(self) -> None:
        """Take in what has changed about the servers."""
        with self._changed:
            members = list(self._members.values())
            for member in members:
                session = member.keeper.current
                if session is not None and session is not member.heard and not session.lost:
                    member.heard = session
                    self._alarms.after(0.0, functools.partial(self._listen, member, session))
                if session is not member.refusing:
                    member.refusing = None
                if session is not None and (
                    self._latest is None or session.welcomed > self._latest.welcomed
                ):
                    self._latest = session
            self._find_ready()
            connected = any(m.place.calls and m.connected is not None for m in members)
            if self._connected is None:  # the first connection is told to nobody
                self._connected = connected or None
            elif connected is not self._connected and not self.closed:
                self._connected = connected
                self._notices.tell(self._on_reconnect if connected else self._on_disconnect)
            self._changes += 1
            self._changed.notify_all()

    def _find_ready(self) -> None:
        """Take in which servers take calls; under the lock."""
        members = self._members.values()
        self._ready = tuple(
            (member, session)
            for member in members
            if member.place.calls and (session := member.usable()) is not None
        )

    def _wait(self, seconds: float, seen: int) -> None:
        """Wait for a change beyond those seen, and have those that are lost tried meanwhile."""
        with self._changed:
            if self.closed:
                raise Closed("this client has been closed")
            now = time.monotonic()
            lost = []
            if now - self._hurried > _LOOK:
                self._hurried = now
                lost = [m for m in self._members.values() if m.connected is None]
        for member in lost:
            if self._forked:
                with suppress(EdgemlError):
                    member.keeper.connect(max(_LEAST, seconds))
            else:
                member.keeper.hurry()
        with self._changed:
            self._changed.wait_for(lambda: self.closed or self._changes != seen, seconds)

    # Which of them is asked -----------------------------------------------------------------

    def pick(self, name: str, avoid: Session | None = None) -> Session | None:
        """See `SessionKeeper.pick`; None where there is no server, or the session has to move."""
        if avoid is None:
            # The hot path takes no lock: who sees here that a server isn't left has an entry in
            # its session before `_leave` looks whether there are any.
            chosen: _Ready | None = None
            if self._home is not None:
                if name != self._begins:
                    chosen = self._home_now
            elif name in self._free and self._orphaned is None:
                chosen = self._draw()
            if chosen is not None:
                member, session = chosen
                if not session.lost and session is not member.refusing:
                    session.asking.append(None)
                    if not member.left:
                        with self._counting:
                            member.calls += 1
                        return session
                    session.asking.pop()
        return self._pick_anew(name, avoid)

    def _draw(self) -> _Ready | None:
        """Return the better of two servers; None where there is none."""
        ready = self._ready
        n = len(ready)
        if n < 2:
            return ready[0] if n else None
        i, j = divmod(int(self._random.random() * (n * (n - 1))), n - 1)
        one, other = ready[i], ready[j + (j >= i)]
        a, b = one[1], other[1]
        more = len(a.asking) + len(a.under_way) - len(b.asking) - len(b.under_way)
        if more > 0 or (not more and a.free_at > b.free_at and a.free_at > time.monotonic()):
            return other
        return one

    def _pick_anew(self, name: str, avoid: Session | None) -> Session | None:
        """As `pick`, where something has changed."""
        ended: _Member | None = None
        member: _Member | None
        with self._changed:
            if name == self._begins and name:
                member = self._choose(avoid)
                if member is None:
                    return None
                ended, self._orphaned = self._home, None
                self._home, self._home_begun = member, member.keeper.begun
                self._home_now = None
            elif self._home is not None:
                member = self._home
                if member.left or member.usable(avoid) is None:
                    return None
                if member.keeper.begun != self._home_begun:
                    self._settle(member, (member, self._home_begun))
            elif self._stays or self._orphaned is not None:
                member = self._choose(avoid)
                if member is None:
                    return None
                self._settle(member, self._orphaned)
            elif name in self._free:
                member = self._choose(avoid)
            else:
                member = self._lead
                if member is None or member.left or member.usable(avoid) is None:
                    member = self._lead = self._choose(avoid)
            session = None if member is None else member.usable(avoid)
            if session is None:
                return None
            assert member is not None
            if member is self._home:
                self._home_now = member, session
            with self._counting:
                member.calls += 1
            session.asking.append(None)
        if ended is not None and ended is not member:
            self._end_session(ended)
        return session

    def _choose(self, avoid: Session | None) -> _Member | None:
        """Return the better of two servers that can be asked now; None where there is none."""
        drawn = self._draw()
        if drawn is not None and drawn[0].usable(avoid) is not None:
            return drawn[0]
        usable = [member for member, _ in self._ready if member.usable(avoid) is not None]
        return self._random.choice(usable) if usable else None

    def _settle(self, member: _Member, before: tuple[_Member, int] | None) -> None:
        """Have a server as home from now on, in the place of another; under the lock."""
        now = member, member.keeper.begun
        self._home, self._home_begun = now
        self._home_now = None
        self._orphaned = None
        if before is None or before == now:
            return
        before[0].moved += 1
        old, new = before[0].place.url, member.place.url
        _log.warning(
            "the session with %s is lost%s",
            old,
            ", and began anew there" if old == new else f": it begins anew with {new}",
        )
        self._notices.tell(self._on_move, old, new)

    def _end_session(self, member: _Member) -> None:
        """Tell a server that the session which it keeps is over."""
        session = member.connected
        if session is None:
            return
        with suppress(EdgemlError):
            ended = session.spoken.encoder.encode("")
            request = wire.Request(
                wire.CALL, session.key, self._begins, self._asker.timeout, ended.header
            )
            session.requester.request(Message(wire.pack(request), ended.buffers))

    def wait(self, name: str, timeout: float, avoid: Session | None = None) -> Session:
        """See `SessionKeeper.wait`.

        Raises:
            Unreachable, NotReady: no server is left, nor comes back in time; the text lists them.
            ConfigMismatch, PermissionDenied: all of them refuse this client.
            Closed: this client has been closed.
        """
        deadline = Deadline(timeout)
        while True:
            seen = self._changes
            if name != self._begins:
                self._leave_home(deadline)
            session = self.pick(name, avoid)
            if session is not None:
                return session
            self._raise_if_refused()
            if not deadline.left:
                raise self.explain_none(timeout)
            self._wait(min(_LOOK, deadline.left), seen)
            avoid = None  # by now it may well answer

    def _leave_home(self, deadline: Deadline) -> None:
        """Give a home that is lost a moment to be there again, and then look for another."""
        home = self._home
        if home is None or (not home.left and home.usable() is not None):
            return
        if not home.left and home.connected is None and not self.closed:
            with suppress(EdgemlError):
                home.keeper.connect(max(_LEAST, min(deadline.left, _REUNION)))
        with self._changed:
            if self._home is home and (home.left or home.usable() is None):
                self._home, self._orphaned = None, (home, self._home_begun)
                self._home_now = None

    def note_answer(self, session: Session, name: str, served: wire.Served | None) -> None:
        """See `SessionKeeper.note_answer`."""
        if served is None:
            return
        session.free_at = session.heard + served.queue if served.queue > _QUEUE else 0.0
        if self._home is not None or self._stays:
            return
        if served.kept is False:
            if name not in self._free:
                self._free.add(name)
            return
        with self._changed:
            if self._home is None:
                for member in self._members.values():
                    if member.keeper.current is session:
                        self._home, self._home_begun = member, member.keeper.begun

    def passes_on(
        self, session: Session, name: str, error: EdgemlError, avoid: Session | None
    ) -> bool:
        """See `SessionKeeper.passes_on`."""
        if isinstance(error, NotReady):
            self._note_not_ready(session)
            return True
        if isinstance(error, Closed) and not isinstance(error, Interrupted):
            session.lose(error)
            return not self.closed
        if not isinstance(error, Overloaded) or avoid is not None:
            return False
        with self._changed:
            home = self._home
            if home is not None and home.keeper.current is session and name != self._begins:
                return False
            return any(member.usable(session) is not None for member, _ in self._ready)

    def _note_not_ready(self, session: Session) -> None:
        """Have a server asked no more until it says that it is ready."""
        with self._changed:
            members = [m for m in self._members.values() if m.keeper.current is session]
            for member in members:
                if member.refusing is session:
                    return
                member.refusing = session
                member.state = ServerState("draining")
        self._look()
        for member in members:
            self._ask_state(member, session)

    def _ask_state(self, member: _Member, session: Session) -> None:
        """Ask a server what it is at, and again after a while, until it's ready or lost."""
        if self.closed or member.left or session.lost:
            return
        header = wire.pack(wire.Request(wire.PING, b"", "", 1.0, b""))
        with suppress(EdgemlError):
            asked = session.requester.request(Message(header))
            asked.add_done_callback(functools.partial(self._take_state, member, session))

    def _take_state(self, member: _Member, session: Session, done: Future[Message]) -> None:
        """Take in what a server is at; runs in the transport's thread."""
        with suppress(EdgemlError):
            if done.cancelled():
                return
            reply = wire.unpack(wire.Answer, done.result().header)
            if reply.status != wire.OK:
                raise wire.error_of(reply)
            pong = wire.unpack(wire.Pong, reply.body)
            state = ServerState(state_of(pong.state), pong.progress, pong.detail)
            with self._changed:
                member.state = state
                if state.state == "ready" and member.refusing is session:
                    member.refusing = None
            if state.state == "ready":
                self._look()
                return
        self._alarms.after(_LOOK, functools.partial(self._ask_state, member, session))

    def _listen(self, member: _Member, session: Session) -> None:
        """Have a server tell at once when it begins to drain; else this is asked again."""
        if self.closed or session.lost:
            return
        with suppress(EdgemlError):
            asked = session.requester.request(make_heartbeat(session, wire.HOLD))
            asked.add_done_callback(functools.partial(self._hear, member, session))
            return
        self._alarms.after(_PAUSE, functools.partial(self._listen, member, session))

    def _hear(self, member: _Member, session: Session, done: Future[Message]) -> None:
        """Take in whether a server is draining; runs in the transport's thread."""
        with suppress(EdgemlError):
            if done.cancelled():
                return
            reply = wire.unpack(wire.Answer, done.result().header)
            if reply.status != wire.NOTHING_YET:
                error = wire.error_of(reply)
                if isinstance(error, Closed):  # it stops, and may still answer what is under way
                    session.lose(error)
                    self._look()
                    return
            elif reply.body == wire.DRAINING.encode():
                with self._changed:
                    member.refusing, member.state = session, ServerState("draining")
                self._look()
                self._leave_draining(member, session)
                return
        self._alarms.after(_PAUSE, functools.partial(self._listen, member, session))

    def _leave_draining(self, member: _Member, session: Session) -> None:
        """Say goodbye to a server that drains, once it has answered all: it waits for that."""
        if self.closed or member.left or session.lost:
            return
        if member.under_way:
            again = functools.partial(self._leave_draining, member, session)
            self._alarms.after(_SOON, again)
            return
        why = Unreachable("the server is draining")
        threading.Thread(
            target=member.keeper.leave,
            args=(session, why),
            name="edgeml leaves a server",
            daemon=True,
        ).start()

    # What the client asks of it -------------------------------------------------------------

    @property
    def current(self) -> Session | None:
        """The session at home, where there is one, or the newest; it may be lost."""
        home = self._home
        return self._latest if home is None else home.keeper.current

    @property
    def copied(self) -> int:
        """See `SessionKeeper.copied`."""
        with self._changed:
            members = [*self._members.values(), *self._leaving]
            return self._copied + sum(member.keeper.copied for member in members)

    def list_connected(self, timeout: float) -> list[Session]:
        """See `SessionKeeper.list_connected`; those that are ready come first."""
        deadline = Deadline(timeout)
        while True:
            with self._changed:
                seen = self._changes
                members = [m for m in self._members.values() if m.place.calls]
                members.sort(key=lambda member: member.usable() is None)
                found = [session for m in members if (session := m.connected) is not None]
            if found:
                return found
            self._raise_if_refused()
            if not deadline.left:
                raise self.explain_none(timeout)
            self._wait(min(_LOOK, deadline.left), seen)

    def find_source(self, timeout: float) -> Session:
        """See `SessionKeeper.find_source`."""
        deadline = Deadline(timeout)
        while True:
            seen = self._changes
            if (session := self._find_source()) is not None:
                return session
            self._raise_if_refused()
            if not deadline.left:
                raise self._explain_none(timeout, "publishes", lambda place: place.topics)
            self._wait(min(_LOOK, deadline.left), seen)

    def _find_source(self) -> Session | None:
        with self._changed:
            source = self._source
            if source is not None and not source.left and (session := source.usable()) is not None:
                return session
            members = [m for m in self._members.values() if m.place.topics and m.connected]
            ready = [m for m in members if m.usable() is not None]
            if self._home in ready:
                ready = [self._home]
            if not members:
                return None
            self._source = self._random.choice(ready or members)
            return self._source.connected

    def next(self) -> Session | None:
        """Wait for a session by which publications come; None once this is closed."""
        with self._changed:
            while not self.closed:
                if (session := self._find_source()) is not None:
                    return session
                self._changed.wait(_PAUSE)
        return None

    def explain(self, session: Session) -> EdgemlError:
        """See `SessionKeeper.explain`."""
        if self.closed:
            return Closed("this client has been closed")
        if isinstance(session.why_lost, PermissionDenied):
            return copy_error(session.why_lost)
        return self.explain_lost(Unreachable(str(session.why_lost or "the connection was lost")))

    def explain_lost(self, error: Unreachable) -> Unreachable:
        """See `SessionKeeper.explain_lost`."""
        told = Unreachable(f"{error}; it had been asked, so this may have been carried out")
        return told.with_traceback(error.__traceback__)

    def explain_none(self, timeout: float) -> EdgemlError:
        """See `SessionKeeper.explain_none`."""
        return self._explain_none(timeout, "takes calls", lambda place: place.calls)

    def _explain_none(
        self, timeout: float, does: str, wanted: Callable[[Place], bool]
    ) -> EdgemlError:
        with self._changed:
            listed = list(self._members.values())
        if not listed:
            return Unreachable("there is no server: none is listed at present")
        members = [member for member in listed if wanted(member.place)]
        if not members:
            urls = ", ".join(member.place.url for member in listed)
            return Unreachable(f"no server that is listed at present {does}: {urls}")
        told = "; ".join(member.explain() for member in members)
        kinds = {type(member.keeper.failure) for member in members}
        kind: type[EdgemlError] = Unreachable
        if any(member.connected is not None for member in members):
            kind = NotReady
        elif len(kinds) == 1 and (only := kinds.pop()) in (*_REFUSALS, PluginError, NotReady):
            kind = only
        return kind(f"no server could be asked within {round(timeout, 3):g} s: {told}")

    def _raise_if_refused(self) -> None:
        """Raise why, where all servers refuse this client."""
        with self._changed:
            members = list(self._members.values())
            refusals = [m.refusal for m in members if m.connected is None]
        if members and len(refusals) == len(members) and all(refusals):
            first = refusals[0]
            assert first is not None
            raise type(first)("; ".join(member.explain() for member in members))

    def count(self) -> dict[str, dict[str, Any]]:
        """Tell of each server, by its URL: ``state``, ``under_way``, ``calls``, ``moved``."""
        with self._changed:
            return {
                member.place.url: {
                    "state": member.tell_state(),
                    "under_way": member.under_way,
                    "calls": member.calls,
                    "moved": member.moved,
                }
                for member in self._members.values()
            }

    # Life -------------------------------------------------------------------------------------

    def close(self) -> None:
        """Part from all servers, and wake all who wait with `Closed`; idempotent."""
        with self._changed:
            if self.closed:
                return
            self.closed = True
            stop = self._stop_watching
            self._changed.notify_all()
        self._notices.close(0.0)
        try:
            stop()
        except Exception:
            _log.exception("a resolver could not be stopped")
        closing = [member.keeper.close for member in self._all()]
        threads = []
        while len(closing) > 1:  # together, since one that has frozen is waited for
            thread = threading.Thread(
                target=closing[-1], name="edgeml leaves a server", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:  # no more, as the program ends
                break
            threads.append(thread)
            closing.pop()
        for close in closing:
            close()
        for thread in threads:
            thread.join(_CLOSING)

    def _all(self) -> list[_Member]:
        with self._changed:
            return [*self._members.values(), *self._leaving]

    def join(self, seconds: float) -> None:
        """Wait for the end of the threads, unless this is one of them."""
        deadline = Deadline(seconds)
        self._notices.close()
        for member in self._all():
            member.keeper.join(deadline.left)
