"""In which order requests are passed on: HTTP/2 lets a small one overtake a large one.

A client names a *lane* for each of its threads and numbers what the thread sends, in metadata. The
server holds back what comes before its turn: each request says which one it comes after. That is
the newest that was under way when it was sent, and so a thread with nothing under way, which is the
rule, says nothing at all. It may have been given up meanwhile and never come, as whatever was sent
to a server that stood still; so each request also says which one is the oldest under way, and
nobody waits for one before that.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import threading
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from edgeml.core import Malformed

__all__ = ["Lane", "Turns"]

_KEY = "edgeml-order"
_OLDEST = "edgeml-oldest"
_MOST_LANES = 1 << 14  # that a server remembers; beyond these the oldest are forgotten
_LONGEST = 100  # characters; the name of a lane is remembered
_PATIENCE = 5.0  # seconds that a request waits for one that was cancelled, and so may never come

_Metadata = tuple[tuple[str, str], ...]


class Lane:
    """What one thread of a client has under way."""

    def __init__(self) -> None:
        self._name = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._newest = 0
        self._under_way: dict[int, None] = {}  # in order

    @property
    def busy(self) -> bool:
        """Whether something is under way."""
        return bool(self._under_way)

    def enter(self) -> tuple[int, _Metadata]:
        """Number one more request; returns the number, and what goes with the request."""
        with self._lock:
            self._newest += 1
            after = next(reversed(self._under_way), 0)
            self._under_way[self._newest] = None
            order = f"{self._name} {self._newest} {after}"
            return self._newest, ((_KEY, order), (_OLDEST, str(next(iter(self._under_way)))))

    def leave(self, number: int) -> None:
        """Note that a request was answered, or given up."""
        with self._lock:
            self._under_way.pop(number, None)


class _Turns:
    """How far one lane is."""

    def __init__(self) -> None:
        self.passed_on = 0  # the newest, of those that will be
        # Sorted by the number that each comes after; the second number tells equal ones apart.
        self.waiting: list[tuple[int, int, asyncio.Future[None]]] = []


class Turns:
    """Has requests wait for those that were sent before them; for a server, in its event loop."""

    def __init__(self) -> None:
        self._lanes: OrderedDict[str, _Turns] = OrderedDict()
        self._serial = itertools.count()

    async def take(
        self,
        metadata: Iterable[tuple[str, str | bytes]] | None,
        hold: Callable[[], AbstractContextManager[object]],
    ) -> None:
        """Return when it is a request's turn; it is to be passed on before anything is awaited.

        Args:
            metadata: of the request.
            hold: gives what is entered while the request waits, or raises what it is refused with.

        Raises:
            Malformed: the metadata makes no sense.
        """
        said = {key: str(value) for key, value in metadata or () if key in (_KEY, _OLDEST)}
        if _KEY in said:
            await self._take(said[_KEY], said.get(_OLDEST, "0"), hold)

    async def _take(
        self, value: str, first: str, hold: Callable[[], AbstractContextManager[object]]
    ) -> None:
        if max(len(value), len(first)) > _LONGEST:
            raise Malformed(f"{_KEY} of {len(value)} characters; {_LONGEST} are the most")
        try:
            name, *numbers = value.split(" ")
            number, after = map(int, numbers)
            oldest = int(first)
        except ValueError:
            raise Malformed(
                f"{_KEY} is not a name and two numbers, or {_OLDEST} is no number"
            ) from None
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = _Turns()
            if len(self._lanes) > _MOST_LANES:
                self._lanes.popitem(last=False)
        else:
            self._lanes.move_to_end(name)
        self._pass_on(lane, min(oldest, number) - 1)
        if after > lane.passed_on:
            with hold():
                await self._wait(lane, after)
        self._pass_on(lane, number)

    def _pass_on(self, lane: _Turns, number: int) -> None:
        """Let those go that wait for this one, or for one before it."""
        lane.passed_on = max(lane.passed_on, number)
        ready = bisect_left(lane.waiting, (lane.passed_on + 1,))
        for *_, turn in lane.waiting[:ready]:
            turn.set_result(None)
        del lane.waiting[:ready]

    async def _wait(self, lane: _Turns, after: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (after, next(self._serial), turn)
        insort(lane.waiting, entry)
        try:
            await asyncio.wait((turn,), timeout=_PATIENCE)
        finally:
            if not turn.done():  # it waits no more, but is still there
                del lane.waiting[bisect_left(lane.waiting, entry)]
