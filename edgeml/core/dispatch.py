"""The second joint: calls by value, answered when ready.

A *call* says which interface is meant, who calls and until when, gives its payload, and takes one
answer, at any time, from any thread. Envelopes of a transport become such calls, and so may what
another protocol's server, a test or this very process asks for. The dispatcher decides when, where
and in which order handlers run.

Where they run. With one worker, all of a server's handlers run in one and the same thread, as many
things belong to a thread: a GL context, a database, what a library keeps in thread-locals. So that
this costs no thread hop, that thread carries the loop of the endpoint whose calls it answers
(`Endpoint.carry`), and runs what a round brought before the next round. When a handler takes long,
a watch has the endpoint's own thread carry on, and the loop comes back once there is nothing else
to do. Hellos, subscriptions and heartbeats are answered within the rounds, so they wait for a
handler for a moment at most.
"""

from __future__ import annotations

import inspect
import logging
import math
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

from edgeml.core.alarms import Alarm, Alarms
from edgeml.core.episode import Episode
from edgeml.core.errors import (
    Closed,
    ConfigMismatch,
    DeadlineExceeded,
    EdgemlError,
    Malformed,
    Overloaded,
    PermissionDenied,
    RemoteError,
    UnknownInterface,
    printable,
    shown,
    text_of,
)
from edgeml.core.interrupts import insisting
from edgeml.core.limits import DEFAULT_LIMITS, Limits
from edgeml.core.lines import Lines
from edgeml.core.security import ALL, Role
from edgeml.core.transport import Endpoint, Peer

__all__ = [
    "Call",
    "Caller",
    "Dispatcher",
    "Gatherer",
    "Handler",
    "LocalCall",
    "Turns",
    "answer_with",
    "require_plain",
]

_log = logging.getLogger(__name__)

_SHORT = 0.5e-3  # seconds; to have another thread carry a loop costs a good part of this
_ROUND = 1e-3  # seconds of handlers after which a loop gets a round, though more calls wait
_STUCK = 0.02  # seconds that a handler may take before the loop goes on elsewhere
_STREAK = 4  # calls that another endpoint brings in a row, after which its loop is carried
_SMALL = 1 << 16  # bytes of a call that takes next to no room
_MOST_ROUNDS = 64  # that are made for more calls of a batch
_QUIET = 5  # looks of the watch without a call, after which it rests
_TOO_LATE = "nobody waits for this call any more"
_GRACE = 2.0  # seconds that handlers have to return when the dispatcher is closed

# Raised by a handler, these reach the caller as they are; all else is a RemoteError.
_PASSED_ON = (UnknownInterface, Malformed, ConfigMismatch, PermissionDenied, Overloaded)


@dataclass(eq=False)
class Caller:
    """Who calls.

    Attributes:
        client_id: the identity that the client gave; random unless its user chose one.
        label: what the client calls itself, for people to read.
        peer: who the transport says it is.
        identity: the name of its key; None where the server asks for none.
        role: what that key may do.
        revoked: whether its key has been revoked since.
        episode: what handlers keep about it.
    """

    client_id: str
    label: str
    peer: Peer
    turn: float = 0.0  # when the next call may start, under a rate limit
    episode: Episode = field(default_factory=Episode)
    identity: str | None = None
    role: Role = ALL
    revoked: bool = False

    @property
    def group(self) -> str:
        """What it shares with others: its key, or else its machine, or else its connection."""
        return self.identity or self.peer.host or self.peer.id

    def join_episode(self) -> Episode:
        """Return the episode to which a call that comes now belongs, until it leaves it."""
        episode = self.episode
        episode.calls.append(None)  # before the look, so that its end either waits for this or was
        if episode.ended:
            episode.leave()
            episode = self.episode
            episode.calls.append(None)
        return episode

    def require(self, permission: str, name: str) -> None:
        """Raise PermissionDenied unless its key may do this.

        Args:
            permission: one of `edgeml.core.security.PERMISSIONS`.
            name: of what it is to be done with.
        """
        if self.role.allowed is not None and not self.role.allows(permission, name):
            raise PermissionDenied(
                f"the key of {self.identity!r} has the role {str(self.role)!r}, which lacks "
                f"{permission}:{printable(name)}"
            )

    def __str__(self) -> str:
        key = "" if self.identity is None else f" with the key of {self.identity}"
        return f"{printable(self.label or self.client_id)}{key} at {self.peer.address}"


_NOBODY = Caller("", "", Peer("", ""))


class Call(ABC):
    """One call of an interface, and the right to answer it: once, at any time, from any thread.

    Args:
        name: of the interface.
        caller: who calls.
        deadline: until when the caller waits, on the clock `time.monotonic`.
        nbytes: what the payload takes up while the call waits.
        source: the endpoint that brought it, which the handlers' thread may carry; None for none.

    Attributes:
        detail: what of the interface is meant, as a handler may say for the log: an action's key.
        episode: of the caller, when it came.
        arrived: when it came, on the clock `time.monotonic`.
        began: when its handler began.
        ended: when there was a result, if that was before it was answered; else 0.
        batch_size: calls that are answered together with this.
        version: of what answers it; 0 for none.
    """

    __slots__ = (
        "_open",
        "arrived",
        "batch_size",
        "began",
        "caller",
        "deadline",
        "detail",
        "ended",
        "episode",
        "name",
        "nbytes",
        "source",
        "version",
    )

    def __init__(
        self,
        name: str,
        caller: Caller,
        deadline: float,
        nbytes: int = 0,
        source: Endpoint | None = None,
    ) -> None:
        self.name = name
        self.caller = caller
        self.deadline = deadline
        self.nbytes = nbytes
        self.source = source
        self.detail = ""
        self.episode = caller.episode
        self.arrived = self.began = time.monotonic()
        self.ended = 0.0
        self.batch_size = 1
        self.version = 0
        self._open = [True]  # until it is answered; to pop from it happens once

    @abstractmethod
    def payload(self) -> Any:
        """Return what the caller sent, decoded now: call this in the thread that handles it.

        Raises:
            Malformed: it can't be decoded.
        """

    def drop_payload(self) -> None:  # noqa: B027 - most have nothing to let go of
        """Let go of the payload, which has been copied: it may lie in memory that others need."""

    @property
    def expired(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return time.monotonic() > self.deadline

    @property
    def answered(self) -> bool:
        """Whether it has had its answer."""
        return not self._open

    def answer(self, value: Any) -> None:
        """Give the caller this result; the value may be changed when this returns.

        Raises:
            NotEncodable: the value can't be carried; an answer is still due.
            RuntimeError: there was an answer before.
        """
        self._settle(value, self._send)

    def fail(self, error: EdgemlError) -> None:
        """Give the caller this error in place of a result.

        Raises:
            RuntimeError: there was an answer before.
        """
        self._settle(error, self._send_error)

    def _settle(self, what: Any, send: Callable[[Any], None]) -> None:
        try:
            self._open.pop()
        except IndexError:
            raise RuntimeError(f"a call of {self.name!r} is answered twice") from None
        try:
            send(what)
        except BaseException:
            self._open.append(True)
            raise

    @abstractmethod
    def _send(self, value: Any) -> None:
        """Encode a result and give it to the caller."""

    @abstractmethod
    def _send_error(self, error: EdgemlError) -> None:
        """Give an error to the caller."""


class LocalCall(Call):
    """A call from this very process: the payload and the result are passed as they are.

    Args:
        name: of the interface.
        payload: any value.
        timeout: seconds until nobody waits any more.
        caller: who calls; somebody in this process by default.

    Attributes:
        future: gives the result, or raises what the handler's end does.
    """

    __slots__ = ("_payload", "future")

    def __init__(
        self, name: str, payload: Any, timeout: float = 10.0, caller: Caller | None = None
    ) -> None:
        who = caller or Caller("local", "local", Peer("local", "this process"))
        super().__init__(name, who, time.monotonic() + timeout)
        self.future: Future[Any] = Future()
        self._payload = payload

    def payload(self) -> Any:
        """See `Call.payload`."""
        return self._payload

    @property
    def expired(self) -> bool:
        """See `Call.expired`."""
        return self.future.done() or super().expired

    def _send(self, value: Any) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(value)

    def _send_error(self, error: EdgemlError) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


Handler = Callable[[Call], None]
"""Takes a call, and answers it or keeps it to answer later. What it raises is the answer."""


class Gatherer(ABC):
    """Takes an interface's calls as they come, and answers many at a time, in turns.

    While a turn runs, calls go on coming: so the next is prepared beside it.
    """

    @abstractmethod
    def attach(self, turns: Turns) -> None:
        """Be registered: ask for turns here, from now on."""

    @abstractmethod
    def take(self, call: Call) -> None:
        """Take a call, and ask for a turn when there is to be one; must not raise.

        Runs in the thread that brought the call, which may be a loop's: be quick. Calls come from
        several threads.
        """

    @abstractmethod
    def run(self) -> None:
        """Answer some of the calls; runs in the handlers' thread, one turn at a time."""

    @abstractmethod
    def has_enough(self) -> bool:
        """Whether the next turn is full, so that nobody needs to look for more calls."""

    @abstractmethod
    def close(self) -> list[Call]:
        """Give back all calls that wait, which will be refused, and take no more."""


class _Turn(Call):
    """Has a gatherer run; no client waits for an answer."""

    __slots__ = ()

    def payload(self) -> Any:
        return None

    def _send(self, value: Any) -> None:
        pass

    def _send_error(self, error: BaseException) -> None:
        pass

    def report(self, error: BaseException) -> None:
        """Tell somebody that this failed."""
        _log.error("%r failed", self.name, exc_info=error)


class _Job(_Turn):
    """Has something done between two calls, which somebody in this process waits for."""

    __slots__ = ("function", "future")

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__("job", _NOBODY, math.inf)
        self.function = function
        self.future: Future[Any] = Future()

    def _send(self, value: Any) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(value)

    def _send_error(self, error: BaseException) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

    def report(self, error: BaseException) -> None:
        self._send_error(error)


def _do_job(call: Call) -> None:
    assert isinstance(call, _Job)
    call.answer(call.function())


class Turns:
    """What a gatherer may ask of its dispatcher. Safe to use from any thread."""

    def __init__(self, dispatcher: Dispatcher, interface: _Interface, gatherer: Gatherer) -> None:
        self._dispatcher = dispatcher
        self._interface = interface
        self._turn = _Interface(
            interface.name, lambda _: gatherer.run(), interface.lane, gatherer=gatherer
        )
        self._turn.fresh = False

    def ask(self, source: Endpoint | None) -> None:
        """Have `Gatherer.run` called, in its turn; once for each time asked.

        Args:
            source: the endpoint that brought the newest of the calls, if one did.
        """
        turn = _Turn(self._interface.name, _NOBODY, math.inf, source=source)
        self._dispatcher._put_turn(turn, self._turn)

    def after(self, delay: float, action: Callable[[], None]) -> Alarm:
        """Do something quick in so many seconds, in a thread for such things."""
        return self._dispatcher._alarms.after(delay, action)

    def begin(self, call: Call) -> bool:
        """Say that a call waits no longer; False if nobody waits for it, which is refused then."""
        self._dispatcher._leave_gatherer(call, self._interface.lane)
        if (why := self._dispatcher._check_call(call, self._interface)) is not None:
            self._dispatcher.refuse(call, why)
            return False
        self._dispatcher._count(call, self._interface)
        return True

    def refuse(self, call: Call, error: EdgemlError) -> None:
        """Answer a call that waits with an error."""
        self._dispatcher._leave_gatherer(call, self._interface.lane)
        self._dispatcher.refuse(call, error)

    def fail(self, call: Call, error: BaseException) -> None:
        """Answer with what a handler raised, and log it; a call that waits has to `begin` first."""
        self._dispatcher._fail(call, self._interface, error)

    def relieve(self) -> None:
        """Have calls go on coming by another thread while this turn runs, as it takes long."""
        carried = self._dispatcher._carried
        if carried is not None and get_ident() == self._dispatcher._carrying:
            carried.relieve()


def answer_with(function: Callable[[Any, Caller], Any]) -> Handler:
    """Return a handler that answers with ``function(payload, caller)``."""

    def handle(call: Call) -> None:
        call.answer(function(call.payload(), call.caller))

    return handle


def require_plain(what: str, function: object) -> None:
    """Raise a TypeError for what nobody here would run: no function at all, or an ``async def``."""
    if not callable(function):
        raise TypeError(f"{what} needs a function, not {shown(function)}")
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - the method itself, of an object
    ):
        raise TypeError(
            f"{what} is an `async def`, and handlers run in a thread, not in an event loop: give a "
            "plain function, which may call asyncio.run"
        )


class _Interface:
    __slots__ = ("fresh", "gatherer", "handler", "lane", "name", "needs", "typical")

    def __init__(
        self,
        name: str,
        handler: Handler,
        lane: _Lane,
        needs: str = "",
        gatherer: Gatherer | None = None,
    ) -> None:
        self.gatherer = gatherer
        self.name = name
        self.handler = handler
        self.lane = lane
        self.needs = needs
        self.fresh = not name.startswith("/")  # not called yet; our own are not worth a line
        self.typical = 1.0  # seconds that it takes, of late; long until it has shown otherwise


class _Line:
    """What waits, of each connection in the order in which it came.

    Groups of connections take turns, and in each group its connections: who opens many of them
    gets no more turns for that.
    """

    def __init__(self) -> None:
        # Whose turn is next comes first.
        self._groups: dict[str, dict[str, deque[tuple[Call, _Interface]]]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, call: Call, interface: _Interface) -> None:
        self._count += 1
        caller = call.caller
        group = self._groups.get(caller.group)
        if group is None:
            self._groups[caller.group] = group = {}
        line = group.get(caller.peer.id)
        if line is None:
            group[caller.peer.id] = line = deque()
        line.append((call, interface))

    def popleft(self) -> tuple[Call, _Interface]:
        self._count -= 1
        name = next(iter(self._groups))
        group = self._groups.pop(name)
        peer = next(iter(group))
        line = group.pop(peer)
        first = line.popleft()
        if line:
            group[peer] = line
        if group:
            self._groups[name] = group
        return first

    def clear(self) -> list[Call]:
        """Empty it, and return what calls there were."""
        groups, self._groups, self._count = self._groups, {}, 0
        return [c for group in groups.values() for line in group.values() for c, _ in line]


class _Share:
    """What somebody has waiting."""

    __slots__ = ("calls", "nbytes")

    def __init__(self) -> None:
        self.calls = self.nbytes = 0


_NONE = _Share()


class _Lane:
    """Calls that wait, and the threads that take them, one each at a time."""

    def __init__(self, limits: Limits) -> None:
        self.waiting = _Line()
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.idle = 0  # threads that wait for `changed`, and have not been notified
        self.early: set[Call] = set()  # whose turn, under a rate limit, is still to come
        self.gathered = 0  # calls that gatherers have, and have not begun
        # Of all three:
        self.nbytes = 0
        self._connections: dict[str, _Share] = {}
        self._groups: dict[str, _Share] = {}
        self._limits = limits

    @property
    def length(self) -> int:
        """Calls that wait, in any way."""
        return len(self.waiting) + len(self.early) + self.gathered

    def enter(self, call: Call) -> EdgemlError | None:
        """Count a call that is to wait here, or return why it can't; under the lock.

        One call is always taken, however large: of each group as far as all have room, and of all.
        A small one of a connection that has none waiting is taken as long as all have room, so that
        nobody is kept out by others of its group.
        """
        limits, size = self._limits, call.nbytes
        connection = self._connections.get(call.caller.peer.id, _NONE)
        group = self._groups.get(call.caller.group, _NONE)
        if connection.calls and (
            connection.calls >= limits.calls_per_client
            or connection.nbytes + size > limits.bytes_per_client
        ):
            most = limits.calls_per_client, limits.bytes_per_client
            return _too_many("of this client", connection.calls, connection.nbytes, *most)
        half = limits.calls // 2, limits.bytes // 2
        if (connection.calls and group.calls >= half[0]) or (
            group.calls and group.nbytes + size > half[1] and (connection.calls or size > _SMALL)
        ):
            return _too_many("of one key or machine", group.calls, group.nbytes, *half)
        waiting = self.length
        if waiting >= limits.calls or (waiting and self.nbytes + size > limits.bytes):
            return _too_many("of all clients", waiting, self.nbytes, limits.calls, limits.bytes)
        if connection is _NONE:
            self._connections[call.caller.peer.id] = connection = _Share()
        if group is _NONE:
            self._groups[call.caller.group] = group = _Share()
        for share in (connection, group):
            share.calls += 1
            share.nbytes += size
        self.nbytes += size
        return None

    def leave(self, call: Call) -> None:
        """Count a call no longer; under the lock."""
        if isinstance(call, _Turn):
            return
        self.nbytes -= call.nbytes
        caller = call.caller
        for shares, name in ((self._connections, caller.peer.id), (self._groups, caller.group)):
            share = shares.get(name)
            if share is None:  # all were refused meanwhile, as this has been closed
                return
            share.calls -= 1
            share.nbytes -= call.nbytes
            if not share.calls:
                del shares[name]

    def clear(self) -> list[Call]:
        """Forget all, and return what calls there were, gatherers' apart; under the lock."""
        calls = [*self.waiting.clear(), *self.early]
        self.early.clear()
        self._connections.clear()
        self._groups.clear()
        self.nbytes = self.gathered = 0
        return calls


def _check_role(call: Call, interface: _Interface) -> PermissionDenied | None:
    """Why its caller's key doesn't allow a call, if so."""
    if interface.needs and call.caller.role.allowed is not None:
        try:
            call.caller.require(interface.needs, call.name)
        except PermissionDenied as error:
            return error
    return None


def _too_many(whose: str, waiting: int, held: int, calls: int, nbytes: int) -> Overloaded:
    return Overloaded(
        f"calls waiting already: {waiting}, of {held / 1e6:.1f} MB; {whose} at most {calls}, or "
        f"{nbytes / 1e6:.0f} MB, may wait"
    )


def _never() -> bool:
    return False


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _answer_nothing(call: Call) -> None:
    raise AssertionError(f"{call.name!r} is answered by a gatherer")


class Dispatcher:
    """Runs handlers.

    Args:
        service: the kind of server, for threads' names and the log.
        alarms: does things later.
        workers: how many calls may be handled at a time. With 1, in one thread: the one that called
            `run`. With more, in that one and ``workers - 1`` of the dispatcher's.
        rate_limit: calls per second and caller; None for any number. Those beyond wait their turn
            within their deadline.
        limits: of what may wait.

    Attributes:
        counts: calls handled, and refusals by the name of their error.
        lines: of the log, that clients cause.
        at_end: what `run` calls, in its thread, when it has handled the last call.
    """

    def __init__(
        self,
        service: str,
        alarms: Alarms,
        workers: int = 1,
        rate_limit: float | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, not {workers}")
        if rate_limit is not None and not rate_limit > 0:
            raise ValueError(f"rate_limit must be positive or None, not {rate_limit}")
        self.counts: Counter[str] = Counter()
        self.at_end: Callable[[], object] = lambda: None
        self._service = service
        self._alarms = alarms
        self._interval = 1 / rate_limit if rate_limit else 0.0
        self._interfaces: dict[str, _Interface] = {}
        self._limits = limits
        self.lines = Lines(_log)
        self._main = _Lane(limits)
        self._lanes = {"": self._main}
        self._jobs = _Interface("job", _do_job, self._main)
        self._parallel = workers > 1
        self._workers = workers
        self._threads: list[threading.Thread] = []
        self._running: dict[int, float] = {}  # threads in a handler, and since when
        self._returned = threading.Condition()  # one of them came out
        self._closed = False

        # Of the thread that carries loops.
        self._carrying = 0  # its ident
        self._carried: Endpoint | None = None  # whose loop it has, or had before it was relieved
        self._wanted: Endpoint | None = None  # whose calls came last, ...
        self._streak = 0  # ... how many in a row
        self._in_rounds = False  # whether it may wait in a loop now
        self._at_hand: tuple[Call, _Interface] | None = None  # what its round brought
        self._looked = 0.0  # when its last round was, ...
        self._done = 0.0  # ... and its last handler
        self._watched = False
        self._calls_seen = 0
        self._quiet = 0

    # What is served -----------------------------------------------------------------------

    def register(
        self, name: str, handler: Handler | Gatherer, lane: str = "", needs: str = ""
    ) -> None:
        """Serve calls of ``name`` by ``handler``, from now on, in place of any other.

        Args:
            name: of the interface.
            handler: see `Handler` and `Gatherer`; `answer_with` makes one of a plain function.
            lane: the interfaces of each lane but the first, ``""``, have a thread of their own,
                and wait for no handler of another. To be named before `run`.
            needs: the permission, for this name, without which a call is refused before its payload
                is looked at; empty for none, where the handler asks `Caller.require` itself.
        """
        if lane not in self._lanes:
            self._lanes[lane] = _Lane(self._limits)
            self._parallel = True
        if isinstance(handler, Gatherer):
            made = _Interface(name, _answer_nothing, self._lanes[lane], needs, handler)
            handler.attach(Turns(self, made, handler))
        else:
            made = _Interface(name, handler, self._lanes[lane], needs)
        self._interfaces[name] = made

    @property
    def names(self) -> list[str]:
        """Of the interfaces."""
        return list(self._interfaces)

    def submit(self, call: Call) -> None:
        """Have a call handled, in its turn; never raises: what is wrong is the call's answer."""
        interface = self._interfaces.get(call.name)
        if interface is None:
            self.refuse(call, unknown("interface", call.name, self._interfaces))
            return
        if (denied := _check_role(call, interface)) is not None:
            self.refuse(call, denied)
            return
        if self._interval:
            caller = call.caller
            now = time.monotonic()
            turn = max(caller.turn, now)
            if turn > call.deadline:
                self.refuse(
                    call,
                    Overloaded(
                        f"over the rate limit of {1 / self._interval:g} calls/s: the next turn is "
                        f"in {turn - now:.2f} s, beyond the deadline"
                    ),
                )
                return
            caller.turn = turn + self._interval
            if turn > now:
                self._put_early(call, interface, turn - now)
                return
        self._put(call, interface)

    def do(self, function: Callable[[], Any]) -> Future[Any]:
        """Call ``function()`` in the handlers' thread, in its turn among the clients' calls.

        Returns:
            A future of what it returns or raises, which is Closed where it comes to nothing.
        """
        job = _Job(function)
        if self._closed:
            job.fail(Closed("the server has been stopped"))
        else:
            self._put_turn(job, self._jobs)
        return job.future

    def refuse(self, call: Call, error: EdgemlError) -> None:
        """Answer with an error, and count it."""
        if not isinstance(call, _Turn):
            self.counts[type(error).__name__] += 1
            if isinstance(error, PermissionDenied):
                text = f"{call.caller} may not call {call.name!r}: {text_of(error)}"
                self.lines.write_once(logging.WARNING, f"{self._service}: {text}")
        try:
            call.fail(error)
        except RuntimeError:
            _log.exception("%s: an error came after the answer", self._service)
        except Exception:  # it is anybody's code, and handlers go on
            _log.exception("%s: an error did not reach its caller", self._service)

    def _put(self, call: Call, interface: _Interface) -> None:
        lane = interface.lane
        if interface.gatherer is not None:
            with lane.lock:
                refused = self._enter(lane, call)
                if refused is None:
                    lane.gathered += 1
            if refused is not None:
                self.refuse(call, refused)
            else:
                interface.gatherer.take(call)
            return
        if self._put_at_hand(call, interface):
            return
        with lane.lock:
            refused = self._enter(lane, call)
            if refused is None:
                self._queue(call, interface)
        if refused is not None:
            self.refuse(call, refused)

    def _put_at_hand(self, call: Call, interface: _Interface) -> bool:
        """Leave a call to this very thread, which takes it when its round is over, if it may."""
        mine = self._in_rounds and get_ident() == self._carrying
        free = mine and interface.lane is self._main and call.source is self._wanted
        if free and self._is_idle():
            self._at_hand = call, interface
            return True
        return False

    def _put_turn(self, turn: _Turn, interface: _Interface) -> None:
        """Have a gatherer run, in its turn; there is always room for that."""
        if self._put_at_hand(turn, interface):
            return
        with interface.lane.lock:
            if not self._closed:
                self._queue(turn, interface)
                return
        self.refuse(turn, Closed("the server has been stopped"))

    def _leave_gatherer(self, call: Call, lane: _Lane) -> None:
        with lane.lock:
            lane.gathered -= 1
            lane.leave(call)

    def _put_early(self, call: Call, interface: _Interface, delay: float) -> None:
        """Take a call whose turn comes in so many seconds."""
        lane = interface.lane
        with lane.lock:
            refused = self._enter(lane, call)
            if refused is None:
                lane.early.add(call)
        if refused is not None:
            self.refuse(call, refused)
        else:
            self._alarms.after(delay, lambda: self._queue_early(call, interface))

    def _queue_early(self, call: Call, interface: _Interface) -> None:
        lane = interface.lane
        with lane.lock:
            if call not in lane.early:  # it has been closed meanwhile
                return
            lane.early.remove(call)
            if interface.gatherer is None:
                self._queue(call, interface)
                return
            lane.gathered += 1
        interface.gatherer.take(call)

    def _enter(self, lane: _Lane, call: Call) -> EdgemlError | None:
        """Count a call that is to wait, or return why it can't; under the lane's lock."""
        if self._closed:
            return Closed("the server has been stopped")
        return lane.enter(call)

    def _queue(self, call: Call, interface: _Interface) -> None:
        """Have a thread take a call; under its lane's lock."""
        lane = interface.lane
        lane.waiting.append(call, interface)
        if lane is self._main:
            if call.source is self._wanted:
                self._streak += 1
            else:
                self._wanted, self._streak = call.source, 1
        carried = self._carried
        if lane.idle:
            lane.idle -= 1  # now, or the next call would be left to the same thread
            lane.changed.notify()
        elif (
            lane is self._main
            and self._in_rounds
            and carried is not None
            and get_ident() != self._carrying
        ):
            carried.wake()

    # Threads ------------------------------------------------------------------------------

    def run(self) -> None:
        """Handle calls in the calling thread until `close`; once."""
        self._carrying = get_ident()
        for number in range(1, self._workers):
            self._start(self._work, self._main, f"edgeml {self._service} worker {number}")
        for name, lane in self._lanes.items():
            if lane is not self._main:
                self._start(self._work, lane, f"edgeml {self._service} {name}")
        try:
            with insisting(lambda: self._in_rounds):
                while (taken := self._next()) is not None:
                    self._handle(*taken)
                    del taken  # or the buffers live until the next call
        finally:
            if self._carried is not None:
                self._carried.relieve()
            if self._at_hand is not None:
                self.refuse(self._at_hand[0], Closed("the server has been stopped"))
            self.at_end()

    def start(self) -> None:
        """Handle calls in a thread of its own; once."""
        self._start(lambda _: self.run(), self._main, f"edgeml {self._service} handlers")

    def _start(self, target: Callable[[_Lane], None], lane: _Lane, name: str) -> None:
        thread = threading.Thread(target=target, args=(lane,), name=name, daemon=True)
        thread.start()
        self._threads.append(thread)  # only now, since `close` joins it

    def _work(self, lane: _Lane) -> None:
        while True:
            with lane.lock:
                while not lane.waiting and not self._closed:
                    lane.idle += 1
                    lane.changed.wait()
                taken = self._take(lane)
            if taken is None:
                return
            self._handle(*taken)
            del taken

    def _take(self, lane: _Lane) -> tuple[Call, _Interface] | None:
        """The next that waits, if any; under its lock."""
        if not lane.waiting:
            return None
        taken = lane.waiting.popleft()
        lane.leave(taken[0])
        return taken

    def _next(self) -> tuple[Call, _Interface] | None:
        """What the carrying thread handles next; None when the dispatcher is closed."""
        lane = self._main
        while not self._closed:
            carried = self._carried
            stay = self._is_idle
            if carried is not None and self._done - self._looked > _ROUND:
                stay = _never  # all that came meanwhile is taken in first, hellos among it
            elif lane.waiting:
                with lane.lock:
                    if (taken := self._take(lane)) is not None:
                        return taken
                continue
            elif self._wanted is not carried and (carried is None or self._streak >= _STREAK):
                if carried is not None:
                    carried.relieve()
                carried = self._carried = self._wanted
            if carried is not None:
                self._in_rounds = True
                try:
                    # Its own thread may have the loop; it is taken back when nothing else is to do.
                    if not carried.carry(stay):
                        self._carried = None
                        if self._wanted is carried:
                            self._wanted = None
                finally:
                    self._in_rounds = False
                self._looked = time.monotonic()
                if (taken := self._at_hand) is not None:
                    if taken[1].gatherer is not None:
                        self._gather_more(carried, taken[1].gatherer)
                    self._at_hand = None
                    return taken
                continue
            with lane.lock:
                if not lane.waiting and not self._closed and self._wanted is None:
                    lane.idle += 1
                    lane.changed.wait()
        return None

    def _gather_more(self, carried: Endpoint, gatherer: Gatherer) -> None:
        """Make rounds for calls that came with the one that was at hand, until there are none."""
        lane = self._main
        self._in_rounds = True
        try:
            for _ in range(_MOST_ROUNDS):  # of some loops each brings one call of a client
                before = lane.gathered
                if gatherer.has_enough():
                    break
                carried.carry(_never)
                if lane.gathered == before:
                    break
        finally:
            self._in_rounds = False

    def _is_idle(self) -> bool:
        return not (self._at_hand or self._main.waiting or self._closed)

    # Handlers -----------------------------------------------------------------------------

    def _handle(self, call: Call, interface: _Interface) -> None:
        """Carry out a call; whatever its handler does, this returns, but for Ctrl-C in `run`."""
        began = time.monotonic()
        if self._closed:
            self.refuse(call, Closed("the server has been stopped"))
            return
        if not isinstance(call, _Turn):
            if (why := self._check_call(call, interface)) is not None:
                self.refuse(call, why)
                return
            self._count(call, interface)
        me = get_ident()
        carries = me == self._carrying
        if carries and self._carried is not None:
            if self._parallel and interface.typical > _SHORT:
                self._carried.relieve()  # or other calls would wait, which another thread may take
            elif not self._watched:
                self._watched = True
                self._alarms.after(_STUCK, self._watch)
        self._running[me] = call.began = began
        try:
            interface.handler(call)
        except BaseException as error:
            self._fail(call, interface, error)
            # Ctrl-C, and whatever else a signal's handler raises to end the program.
            if carries and not isinstance(error, Exception) and _in_main_thread():
                raise
        finally:
            del self._running[me]
            if self._closed:
                with self._returned:
                    self._returned.notify_all()
        ended = time.monotonic()
        if carries:
            self._done = ended
        took = ended - began
        # Quickly down, and slowly up: a busy machine makes a short handler look long now and then.
        interface.typical += (took - interface.typical) * (0.5 if took < interface.typical else 0.1)

    @staticmethod
    def _check_call(call: Call, interface: _Interface) -> EdgemlError | None:
        """Why a call that may have waited is not to be handled any more, if so."""
        caller = call.caller
        if caller.revoked:
            return PermissionDenied(f"the key of {caller.identity!r} has been revoked")
        if (denied := _check_role(call, interface)) is not None:
            return denied
        return DeadlineExceeded(_TOO_LATE) if call.expired else None

    def _count(self, call: Call, interface: _Interface) -> None:
        self.counts["calls"] += 1
        if interface.fresh:
            interface.fresh = False
            text = "%s %r is called for the first time, by %s"
            _log.info(text, self._service, call.name, call.caller)

    def _fail(self, call: Call, interface: _Interface, error: BaseException) -> None:
        if isinstance(call, _Turn):
            call.report(error)
        elif call.answered:
            _log.exception("%s %r failed after its answer", self._service, interface.name)
        elif isinstance(error, _PASSED_ON):
            self.refuse(call, error)
        elif isinstance(error, KeyboardInterrupt) and _in_main_thread():  # which ends the program
            self.refuse(call, Closed("the server has been stopped"))
        else:
            told = f"{type(error).__qualname__}: {text_of(error)}"
            what = f"{interface.name} {call.detail}".strip()
            text = f"{self._service} {what!r} failed for {call.caller}: {told}"
            self.lines.write(logging.WARNING, text)
            _log.debug("the traceback, which the client gets as well:", exc_info=True)
            try:
                trace = "".join(traceback.format_exception(error))[-20_000:]
            except Exception:  # Python 3.11 may fail where two threads format at once (gh-106905)
                trace = ""
            name = type(error).__qualname__
            self.refuse(call, RemoteError(name, text_of(error), trace))

    def _watch(self) -> None:
        """Have a loop go on elsewhere while a handler takes long; rests when no calls come."""
        since = self._running.get(self._carrying)
        carried = self._carried
        if since is not None and time.monotonic() - since > _STUCK and carried is not None:
            carried.relieve()
        calls = self.counts["calls"]
        self._quiet = 0 if calls != self._calls_seen or since is not None else self._quiet + 1
        self._calls_seen = calls
        if self._quiet < _QUIET:
            self._alarms.after(_STUCK, self._watch)
        else:
            self._watched = False

    # The end ------------------------------------------------------------------------------

    def close(self) -> None:
        """Refuse all that waits, and end the threads; idempotent.

        Handlers that still run are waited for, up to two seconds, and may answer; one that runs on
        is left behind.
        """
        self._closed = True
        deadline = time.monotonic() + _GRACE
        gatherers = [i.gatherer for i in self._interfaces.values() if i.gatherer is not None]
        gathered = [call for gatherer in gatherers for call in gatherer.close()]
        for call in gathered:
            self.refuse(call, Closed("the server has been stopped"))
        for lane in self._lanes.values():
            with lane.lock:
                lane.idle = 0
                lane.changed.notify_all()
                refused = lane.clear()
            for call in refused:
                self.refuse(call, Closed("the server has been stopped"))
        carried = self._carried
        if carried is not None and self._in_rounds:
            carried.wake()
        me = get_ident()
        with self._returned:
            while any(ident != me for ident in list(self._running)):
                left = deadline - time.monotonic()
                if left <= 0:
                    text = "one %s handler is still running; it is left behind"
                    _log.warning(text, self._service)
                    break
                self._returned.wait(min(left, 0.1))
        for thread in self._threads:
            if thread.ident != me:
                thread.join(max(0.1, deadline - time.monotonic()))

    @property
    def waiting(self) -> int:
        """How many calls wait for a thread to handle them, or for their turn."""
        return sum(lane.length for lane in self._lanes.values())

    @property
    def carries(self) -> bool:
        """Whether the calling thread is the one that `run` was called in."""
        return get_ident() == self._carrying

    @property
    def inside(self) -> bool:
        """Whether the calling thread is in a handler."""
        return get_ident() in self._running


def unknown(what: str, name: str, known: Any) -> UnknownInterface:
    """Return the error of a name that isn't known, with those that are."""
    # The heartbeat has no name, and what starts with a slash is not for users.
    names = ", ".join(sorted(n for n in known if n and n[0] != "/")) or "none"
    return UnknownInterface(f"there is no {what} {name!r}; known: {names}")
