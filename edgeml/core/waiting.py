"""Calls that wait for a thread: in which order they are taken, which can't make it, how many may.

*Fair.* Keys (machines, where there are no keys) take turns, and within each its connections: next
is the one that was served longest ago, also where it had nothing waiting meanwhile. So clients that
call at the same beat get equal shares, though there is room for few of them at a time.

*In time.* A call that can't have its answer in time is refused as soon as that shows, rather than
when its turn comes: by what comes before it, and by what runs take of late (`Pace`). For some runs
after each such refusal the lane is *pressed*: calls that have time to spare are taken rather than
those that might just make it, since there are enough of them.

Nothing here reads a clock or has a lock of its own.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from edgeml.core.call import NOBODY, Call
from edgeml.core.errors import EdgemlError, Overloaded
from edgeml.core.limits import Limits
from edgeml.core.pace import OVERTAKEN, Pace, overtaken

__all__ = ["Lane", "Line", "Queue", "Refusal"]

_SMALL = 1 << 16  # bytes of a call that takes next to no room
_LOOK = 64  # connections that are looked at, of those whose turn is next
_PRESSED = 16  # runs for which calls that could not make it are remembered
_REMEMBERED = 1 << 13  # connections and groups whose last turn is known


class Served(Protocol):
    """What calls are for.

    Attributes:
        pace: of its runs.
        newest_first: whether a connection's newest call is taken before its older ones.
    """

    pace: Pace
    newest_first: bool


S = TypeVar("S", bound=Served)


class Refusal(NamedTuple):
    """A call that waits no longer, what it is to be told, and the reason to count it by."""

    call: Call
    error: EdgemlError
    reason: str


class Queue(Generic[S]):
    """What waits of one connection, in the order in which it came."""

    __slots__ = ("calls", "group", "name", "turn")

    def __init__(self, name: str, group: _Group[S], turn: int) -> None:
        self.name = name
        self.group = group
        self.turn = turn
        self.calls: deque[tuple[Call, S]] = deque()

    @property
    def next(self) -> int:
        """Which of them is to be taken: the oldest, or the newest of as many for the same."""
        calls = self.calls
        first = calls[0][1]
        if not first.newest_first:
            return 0
        at = len(calls) - 1
        while calls[at][1] is not first:
            at -= 1
        return at


class _Group(Generic[S]):
    """Connections of one key or machine, of which something waits."""

    __slots__ = ("name", "order", "queues", "turn")

    def __init__(self, name: str, turn: int) -> None:
        self.name = name
        self.turn = turn
        self.queues: dict[str, Queue[S]] = {}
        self.order: list[tuple[int, Queue[S]]] = []


class Line(Generic[S]):
    """What waits, in the order in which it is to be taken.

    Attributes:
        work: seconds that all of it takes, as it was expected when it came.
        earliest: hardly any call has a deadline before this.
        connections: of which something waits.
    """

    def __init__(self) -> None:
        self._groups: dict[str, _Group[S]] = {}
        self._order: list[tuple[int, _Group[S]]] = []
        self._count = 0
        self._turn = 0
        # When each was served last, or came first; those longest ago come first.
        self._turns: dict[str | tuple[str, str], int] = {}
        self.work = 0.0
        self.earliest = math.inf
        self.connections = 0

    def __len__(self) -> int:
        return self._count

    def _last_turn(self, key: str | tuple[str, str]) -> int:
        turn = self._turns.get(key)
        return self._next_turn(key) if turn is None else turn

    def _next_turn(self, key: str | tuple[str, str]) -> int:
        turns = self._turns
        turns.pop(key, None)
        self._turn += 1
        turns[key] = self._turn
        if len(turns) > _REMEMBERED:
            del turns[next(iter(turns))]
        return self._turn

    def append(self, call: Call, what: S) -> Queue[S]:
        """Add a call, and return its connection's."""
        caller = call.caller
        name, peer = caller.group, caller.peer.id
        group = self._groups.get(name)
        if group is None:
            self._groups[name] = group = _Group(name, self._last_turn(name))
            insort(self._order, (group.turn, group))
        queue = group.queues.get(peer)
        if queue is None:
            group.queues[peer] = queue = Queue(peer, group, self._last_turn((name, peer)))
            insort(group.order, (queue.turn, queue))
            self.connections += 1
        queue.calls.append((call, what))
        self._count += 1
        call.cost = what.pace.usual
        self.work += call.cost
        if call.deadline < self.earliest:
            self.earliest = call.deadline
        return queue

    def first(self) -> Queue[S]:
        """Return the connection whose turn is next; there has to be one."""
        return self._order[0][1].order[0][1]

    def in_turn(self) -> list[Queue[S]]:
        """Return the connections whose turns are next: the first of each group, the second, ..."""
        return list(islice(self._in_turn(), _LOOK))

    def _in_turn(self) -> Iterator[Queue[S]]:
        orders = [group.order for _, group in self._order[:_LOOK]]
        for rank in range(_LOOK):
            there = False
            for order in orders:
                if rank < len(order):
                    there = True
                    yield order[rank][1]
            if not there:
                return

    def remove(self, queue: Queue[S], at: int, served: bool = False) -> tuple[Call, S]:
        """Take one of a connection's calls out; where it is served, that was its turn."""
        calls, group = queue.calls, queue.group
        taken = calls[at]
        if at:
            del calls[at]
        else:
            calls.popleft()
        self._count -= 1
        self.work -= taken[0].cost
        if served or not calls:
            _take_out(group.order, queue)
            if served:
                queue.turn = self._next_turn((group.name, queue.name))
            if calls:
                group.order.append((queue.turn, queue))
            else:
                del group.queues[queue.name]
                self.connections -= 1
        if served or not group.order:
            _take_out(self._order, group)
            if served:
                group.turn = self._next_turn(group.name)
            if group.order:
                self._order.append((group.turn, group))
            else:
                del self._groups[group.name]
        if not self._count:
            self.work, self.earliest = 0.0, math.inf
        return taken

    def clear(self) -> list[Call]:
        """Empty it, and return what calls there were."""
        groups, self._groups, self._order = self._groups, {}, []
        self._count = self.connections = 0
        self.work, self.earliest = 0.0, math.inf
        queues = [queue for group in groups.values() for queue in group.queues.values()]
        return [call for queue in queues for call, _ in queue.calls]


def _take_out(order: list[tuple[int, Any]], each: Any) -> None:
    """Take a connection or a group out of those that are in the order of their turns."""
    if order[0][1] is each:
        del order[0]
    else:
        del order[bisect_left(order, (each.turn,))]


class _Share:
    """What somebody has waiting."""

    __slots__ = ("calls", "nbytes")

    def __init__(self) -> None:
        self.calls = self.nbytes = 0


_NONE = _Share()


class Lane(Generic[S]):
    """Calls that wait, and the threads that take them, one each at a time.

    Args:
        limits: of what may wait.
        threads: how many there are.

    Attributes:
        threads: how many there are.
        pressed: runs until it is taken that all make it again; 0 for as long as they do.
        refused: calls that wait no longer, and have not been told.
    """

    def __init__(self, limits: Limits, threads: int = 1) -> None:
        self.waiting: Line[S] = Line()
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.idle = 0  # threads that wait for `changed`, and have not been notified
        self.early: set[Call] = set()  # whose turn, under a rate limit, is still to come
        self.gathered = 0  # calls that gatherers have, and have not begun
        self.pressed = 0
        self.refused: deque[Refusal] = deque()
        self.threads = threads
        # Of all three:
        self.nbytes = 0
        self._connections: dict[str, _Share] = {}
        self._groups: dict[str, _Share] = {}
        self._limits = limits

    @property
    def length(self) -> int:
        """Calls that wait, in any way."""
        return len(self.waiting) + len(self.early) + self.gathered

    def press(self) -> None:
        """Note that a call could not make it, or did not."""
        self.pressed = _PRESSED

    def ease(self) -> None:
        """Note a run, where this is pressed."""
        self.pressed = max(0, self.pressed - 1)

    # In time --------------------------------------------------------------------------------

    def is_short(self, now: float) -> bool:
        """Whether the time that is left might be too short for some of what waits."""
        line = self.waiting
        return self.pressed > 0 or now + 2 * line.work > line.earliest

    def check(self, queue: Queue[S], now: float, free_in: float) -> None:
        """Refuse a connection's newest call, which has just come, if it can't make it.

        Args:
            queue: its connection's.
            now: the time.
            free_in: seconds until the next thread has nothing to do.
        """
        line = self.waiting
        call, what = queue.calls[-1]
        ahead = free_in
        in_order = not what.newest_first and len(queue.calls) > 1
        if not in_order:
            for each in line.in_turn():
                if each is queue:
                    break
                ahead += self._look_at(each, now, ahead) / self.threads
        else:
            # While each of its own that came before has its turn, so have all others.
            turns = (len(queue.calls) - 1) * line.connections
            share = min(1.0, turns / (len(line) - 1))
            ahead += (line.work - call.cost) / self.threads * share
        left = call.deadline - now - ahead
        pace = what.pace
        if pace.rules_out(left, now) or (
            in_order and self.pressed and pace.is_risky(call, left, ahead)
        ):
            self._refuse(queue, len(queue.calls) - 1, now, ahead)
        elif self.pressed and what.newest_first:
            self._overtake(queue, what)

    def _overtake(self, queue: Queue[S], what: S) -> None:
        """Refuse a connection's calls for this but the newest: there is no time for those."""
        for at in reversed(range(len(queue.calls) - 1)):
            if queue.calls[at][1] is what:
                call, _ = self.waiting.remove(queue, at)
                self._drop(call, overtaken(call), OVERTAKEN)

    def _look_at(self, queue: Queue[S], now: float, ahead: float) -> float:
        """Refuse a connection's calls that can't make it; what its next call takes, if any is left.

        Args:
            queue: the connection's.
            now: the time.
            ahead: seconds until its turn.
        """
        calls = queue.calls
        for oldest in (True, False):  # where the newest is next, the others are looked at as well
            while calls:
                at = 0 if oldest else queue.next
                call, what = calls[at]
                if not what.pace.rules_out(call.deadline - now - ahead, now):
                    break
                self._refuse(queue, at, now, ahead)
        return calls[queue.next][0].cost if calls else 0.0

    def _refuse(self, queue: Queue[S], at: int, now: float, ahead: float) -> None:
        call, what = self.waiting.remove(queue, at)
        self.press()
        self._drop(call, *what.pace.refusal(call, now, ahead))

    def _drop(self, call: Call, error: EdgemlError, reason: str) -> None:
        self.leave(call)
        self.refused.append(Refusal(call, error, reason))

    def take(self, now: float) -> tuple[Call, S] | None:
        """Return what is to be handled next, if anything is; under the lock.

        What can't make it is refused, see `refused`.
        """
        line = self.waiting
        taken: tuple[Call, S] | None = None
        if self.is_short(now):
            taken = self._choose(now)
        elif line:
            queue = line.first()
            taken = line.remove(queue, queue.next, served=True)
        if taken is not None:
            self.leave(taken[0])
        return taken

    def _choose(self, now: float) -> tuple[Call, S] | None:
        line = self.waiting
        ahead, earliest = 0.0, math.inf
        able: list[Queue[S]] = []
        queues = line.in_turn()
        for queue in queues:
            ahead += self._look_at(queue, now, ahead) / self.threads
            if queue.calls:
                able.append(queue)
                earliest = min(earliest, queue.calls[0][0].deadline)
        if not able:
            return None
        if len(queues) == line.connections:
            line.earliest = earliest
        best = self._choose_easily(able, now) if self.pressed else able[0]
        return line.remove(best, best.next, served=True)

    def _choose_easily(self, able: list[Queue[S]], now: float) -> Queue[S]:
        """Return the first whose next call has time to spare, or else the one with the most."""
        best, most = able[0], -math.inf
        for queue in able:
            calls = queue.calls
            grade = _grade(*calls[queue.next], now)
            # Of those that come in order, an older one gives way to one that has time to spare.
            while grade < 1 and len(calls) > 1 and queue.next == 0 and _grade(*calls[1], now) >= 1:
                self._refuse(queue, 0, now, 0.0)
                grade = _grade(*calls[queue.next], now)
            if grade >= 1:
                return queue
            if grade > most:
                best, most = queue, grade
        return best

    # How many -------------------------------------------------------------------------------

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
        if call.caller is NOBODY:
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


def _grade(call: Call, what: Served, now: float) -> float:
    """How much time a call has left; 1 for enough to spare."""
    comfort = what.pace.comfort(call)
    return (call.deadline - now) / comfort if comfort > 0 else 1.0


def _too_many(whose: str, waiting: int, held: int, calls: int, nbytes: int) -> Overloaded:
    return Overloaded(
        f"calls waiting already: {waiting}, of {held / 1e6:.1f} MB; {whose} at most {calls}, or "
        f"{nbytes / 1e6:.0f} MB, may wait"
    )
