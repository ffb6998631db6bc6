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
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from threading import get_ident
from typing import Any

from edgeml.core.alarms import Alarm, Alarms
from edgeml.core.call import NOBODY, Call, Caller, LocalCall
from edgeml.core.ending import tell_left_behind
from edgeml.core.errors import (
    Closed,
    ConfigMismatch,
    EdgemlError,
    Interrupted,
    Malformed,
    NotHolder,
    Overloaded,
    PermissionDenied,
    RemoteError,
    Stale,
    UnknownInterface,
    shown,
    text_of,
)
from edgeml.core.interrupts import insisting
from edgeml.core.limits import DEFAULT_LIMITS, Limits
from edgeml.core.lines import Lines
from edgeml.core.pace import UNREAD, Pace
from edgeml.core.transport import Endpoint
from edgeml.core.waiting import Lane, Queue

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
_MOST_ROUNDS = 64  # that are made for more calls of a batch
_UNREAD = 0.25  # the part of its time that a call may have lain unread, where others are refused
_QUIET = 5  # looks of the watch without a call, after which it rests
_GRACE = 2.0  # seconds that handlers have to return when the dispatcher is closed

# Raised by a handler, these reach the caller as they are; all else is a RemoteError.
_PASSED_ON = (
    UnknownInterface,
    Malformed,
    ConfigMismatch,
    PermissionDenied,
    Overloaded,
    Stale,
    NotHolder,
)


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
        super().__init__("job", NOBODY, math.inf)
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
        turn = _Turn(self._interface.name, NOBODY, math.inf, source=source)
        self._dispatcher._put_turn(turn, self._turn)

    def after(self, delay: float, action: Callable[[], None]) -> Alarm:
        """Do something quick in so many seconds, in a thread for such things."""
        return self._dispatcher._alarms.after(delay, action)

    def begin(self, call: Call) -> bool:
        """Say that a call waits no longer; False if nobody waits for it, which is refused then."""
        self._dispatcher._leave_gatherer(call, self._interface.lane)
        if self._dispatcher._is_barred(call, self._interface, time.monotonic()):
            return False
        self._dispatcher._count(call, self._interface)
        return True

    def refuse(self, call: Call, error: EdgemlError, reason: str = "") -> None:
        """Answer a call that waits with an error; counted by the reason as well, if one is given.

        Where that is for want of time, those that have none to spare are refused for a while.
        """
        if reason:
            self._dispatcher.counts[reason] += 1
            self._interface.lane.press()
        self._dispatcher._leave_gatherer(call, self._interface.lane)
        self._dispatcher.refuse(call, error)

    @property
    def pace(self) -> Pace:
        """What a turn takes that answers calls: for the gatherer to tell, and to refuse by."""
        return self._interface.pace

    @property
    def pressed(self) -> bool:
        """Whether of late some calls could not make it."""
        return self._interface.lane.pressed > 0

    def note_late(self, calls: int) -> None:
        """Count calls that have been answered too late."""
        for _ in range(calls):
            self._dispatcher._note_late(self._interface.lane)

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
    __slots__ = (
        "fresh",
        "gatherer",
        "handler",
        "lane",
        "name",
        "needs",
        "newest_first",
        "pace",
    )

    def __init__(
        self,
        name: str,
        handler: Handler,
        lane: Lane[_Interface],
        needs: str = "",
        gatherer: Gatherer | None = None,
        newest_first: bool = False,
    ) -> None:
        self.gatherer = gatherer
        self.name = name
        self.handler = handler
        self.lane = lane
        self.needs = needs
        self.fresh = not name.startswith("/")  # not called yet; our own are not worth a line
        self.newest_first = newest_first
        self.pace = Pace()


def _check_role(call: Call, interface: _Interface) -> PermissionDenied | None:
    """Why its caller's key doesn't allow a call, if so."""
    if interface.needs and call.caller.role.allowed is not None:
        try:
            call.caller.require(interface.needs, call.name)
        except PermissionDenied as error:
            return error
    return None


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
        self._main: Lane[_Interface] = Lane(limits, workers)
        self._lanes = {"": self._main}
        self._jobs = _Interface("job", _do_job, self._main)
        self._parallel = workers > 1
        self._workers = workers
        self._threads: list[threading.Thread] = []
        self._running: dict[int, tuple[Call, _Interface]] = {}  # by the thread that is at it
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
        self,
        name: str,
        handler: Handler | Gatherer,
        lane: str = "",
        needs: str = "",
        newest_first: bool = False,
    ) -> None:
        """Serve calls of ``name`` by ``handler``, from now on, in place of any other.

        Args:
            name: of the interface.
            handler: see `Handler` and `Gatherer`; `answer_with` makes one of a plain function.
            lane: the interfaces of each lane but the first, ``""``, have a thread of their own,
                and wait for no handler of another. To be named before `run`.
            needs: the permission, for this name, without which a call is refused before its payload
                is looked at; empty for none, where the handler asks `Caller.require` itself.
            newest_first: whether of the calls of one connection that wait the newest is taken
                first, rather than the oldest; a gatherer has its own order.
        """
        if lane not in self._lanes:
            self._lanes[lane] = Lane(self._limits)
            self._parallel = True
        if isinstance(handler, Gatherer):
            made = _Interface(name, _answer_nothing, self._lanes[lane], needs, handler)
            handler.attach(Turns(self, made, handler))
        else:
            made = _Interface(name, handler, self._lanes[lane], needs, None, newest_first)
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

    def has_no_time_for(self, name: str, timeout: float, source: Endpoint) -> bool:
        """Whether to refuse a call unseen, as too many lie unread to look at each; counts it then.

        Args:
            name: of the interface.
            timeout: seconds that its caller waits.
            source: the endpoint that brings it.
        """
        interface = self._interfaces.get(name)
        if interface is None or not interface.lane.pressed or not interface.lane.length:
            return False
        if source.behind < timeout * _UNREAD:
            return False
        interface.lane.press()
        self.counts[Overloaded.__name__] += 1
        self.counts[UNREAD] += 1
        return True

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
        elif lane.refused:
            self._tell_refused(lane)

    def _tell_refused(self, lane: Lane[_Interface]) -> None:
        """Tell those that can't make it; not under the lane's lock."""
        while True:
            try:
                call, error, reason = lane.refused.popleft()
            except IndexError:
                return
            self.counts[reason] += 1
            self.refuse(call, error)

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

    def _leave_gatherer(self, call: Call, lane: Lane[_Interface]) -> None:
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
            else:
                lane.gathered += 1
        if interface.gatherer is not None:
            interface.gatherer.take(call)
        elif lane.refused:
            self._tell_refused(lane)

    def _enter(self, lane: Lane[_Interface], call: Call) -> EdgemlError | None:
        """Count a call that is to wait, or return why it can't; under the lane's lock."""
        if self._closed:
            return Closed("the server has been stopped")
        return lane.enter(call)

    def _queue(self, call: Call, interface: _Interface) -> None:
        """Have a thread take a call, if it can make it; under its lane's lock."""
        lane = interface.lane
        queue = lane.waiting.append(call, interface)
        if not lane.idle and self._is_refused(queue, interface):
            return
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

    def _is_refused(self, queue: Queue[_Interface], interface: _Interface) -> bool:
        """Refuse what just came to wait, where that can't make it; under its lane's lock."""
        lane = interface.lane
        now = time.monotonic()
        if not lane.is_short(now):
            return False
        call = queue.calls[-1][0]
        lane.check(queue, now, self._free_in(lane, now))
        return not queue.calls or queue.calls[-1][0] is not call

    def _free_in(self, lane: Lane[_Interface], now: float) -> float:
        """Seconds until one of a lane's threads will have nothing to do."""
        running = [each for each in list(self._running.values()) if each[1].lane is lane]
        if len(running) < lane.threads:
            return 0.0
        return max(0.0, min(call.began + each.pace.usual for call, each in running) - now)

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

    def _start(
        self, target: Callable[[Lane[_Interface]], None], lane: Lane[_Interface], name: str
    ) -> None:
        thread = threading.Thread(target=target, args=(lane,), name=name, daemon=True)
        thread.start()
        self._threads.append(thread)  # only now, since `close` joins it

    def _work(self, lane: Lane[_Interface]) -> None:
        while not self._closed:
            with lane.lock:
                while not lane.waiting and not self._closed:
                    lane.idle += 1
                    lane.changed.wait()
                taken = lane.take(time.monotonic())
            if lane.refused:
                self._tell_refused(lane)
            if taken is not None:
                self._handle(*taken)
            del taken

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
                    taken = lane.take(time.monotonic())
                if lane.refused:
                    self._tell_refused(lane)
                if taken is not None:
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
            if self._is_barred(call, interface, began):
                return
            self._count(call, interface)
        me = get_ident()
        carries = me == self._carrying
        lane, pace = interface.lane, interface.pace
        if carries and self._carried is not None:
            # Or other calls would wait, which another thread may take, or which can't make it.
            if (self._parallel or lane.pressed) and not 0 < pace.usual < _SHORT:
                self._carried.relieve()
            elif not self._watched:
                self._watched = True
                self._alarms.after(_STUCK, self._watch)
        call.began = began
        self._running[me] = call, interface
        done = False
        try:
            interface.handler(call)
            done = True
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
        if done:
            pace.add(ended - began, ended)
            if lane.pressed:
                lane.ease()
            if ended > call.deadline and call.answered:
                self._note_late(lane)

    def _note_late(self, lane: Lane[_Interface]) -> None:
        """Count an answer that came too late."""
        self.counts["answered_too_late"] += 1
        lane.press()

    def _is_barred(self, call: Call, interface: _Interface, now: float) -> bool:
        """Refuse a call that may have waited, where it is not to be handled any more."""
        caller, pace = call.caller, interface.pace
        why: EdgemlError | None = None
        if caller.revoked:
            why = PermissionDenied(f"the key of {caller.identity!r} has been revoked")
        elif (denied := _check_role(call, interface)) is not None:
            why = denied
        elif pace.rules_out(call.deadline - now, now) or call.expired:
            why, reason = pace.refusal(call, now)
            self.counts[reason] += 1
        if why is None:
            return False
        self.refuse(call, why)
        return True

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
            self.refuse(call, Interrupted("the server has been stopped"))
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
        running = self._running.get(self._carrying)
        carried = self._carried
        stuck = running is not None and time.monotonic() - running[0].began > _STUCK
        if stuck and carried is not None:
            carried.relieve()
        calls = self.counts["calls"]
        self._quiet = 0 if calls != self._calls_seen or running is not None else self._quiet + 1
        self._calls_seen = calls
        if self._quiet < _QUIET:
            self._alarms.after(_STUCK, self._watch)
        else:
            self._watched = False

    # The end ------------------------------------------------------------------------------

    def close(self) -> None:
        """Refuse all that waits, and end the threads; idempotent.

        Handlers that still run are waited for, up to two seconds, and may answer; those that run on
        are told of in the log, with where each of them is, and left behind.
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
            self._tell_refused(lane)
        carried = self._carried
        if carried is not None and self._in_rounds:
            carried.wake()
        me = get_ident()
        with self._returned:
            while any(ident != me for ident in list(self._running)):
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._returned.wait(min(left, 0.1))
        stuck = {ident: each for ident, each in list(self._running.items()) if ident != me}
        for ident, (call, interface) in stuck.items():
            what = f"{self._service} {interface.name!r}, called by {call.caller},"
            tell_left_behind(_log, what, time.monotonic() - call.began, ident)
        for thread in self._threads:
            if thread.ident != me and thread.ident not in stuck:
                thread.join(max(0.1, deadline - time.monotonic()))

    @property
    def waiting(self) -> int:
        """How many calls wait for a thread to handle them, or for their turn."""
        return sum(lane.length for lane in self._lanes.values())

    @property
    def running(self) -> int:
        """How many threads are at a call, or at a batch of them."""
        return len(self._running)

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
