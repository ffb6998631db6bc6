"""What decides whether an action begins, when its turn has come."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

from edgeml.core.dispatch import Call
from edgeml.core.errors import Closed, Stale
from edgeml.core.forks import watch_forks
from edgeml.services.action.deadman import Switch
from edgeml.services.action.record import Entry, Record
from edgeml.services.action.stamps import Stamp, age_of

__all__ = ["Gate"]

_AHEAD = 5e-3  # seconds by which an age may be below 0; beyond that it is of another clock
_MOST_STREAMS = 1 << 10  # whose order is remembered


class Gate:
    """Where the actions of one key begin: in order, not too old, and by nobody but one.

    Args:
        key: their name.
        timeout: seconds of age at which an action may begin that says nothing of its own, and after
            which the safe action is due; None for no bound.
        halt: the safe action.
        record: where what begins is noted.

    Attributes:
        stale: actions refused as too old, or while the safe action ran.
        disordered: actions refused since a later one had come before.
    """

    def __init__(
        self,
        key: str,
        timeout: float | None,
        halt: Callable[[str], object] | None,
        record: Record,
    ) -> None:
        self.stale = 0
        self.disordered = 0
        self._key = key
        self._timeout = math.inf if timeout is None else timeout
        self._record = record
        self._lock = threading.RLock()  # a signal's handler may stop the server within it
        self._stream = -1  # whose action began last, ...
        self._last = 0  # ... and its number
        self._streams: dict[int, int] = {}  # the last numbers of the others, in the order of use
        self._closed = False
        self._switch: Switch | None = None
        if timeout is not None and halt is not None:
            self._switch = Switch(key, timeout, halt, record, self._lock)
        watch_forks(self)

    def abandon(self) -> None:
        """Leave it to the parent of this child, which is no device."""
        self._lock = threading.RLock()
        self._closed = True
        if self._switch is not None:
            self._switch.abandon(self._lock)

    @property
    def halts(self) -> int:
        """How many times the safe action was called."""
        return 0 if self._switch is None else self._switch.halts

    @property
    def has_switch(self) -> bool:
        """Whether there is a safe action."""
        return self._switch is not None

    def begin(self, call: Call, stamp: Stamp | None, at: float) -> Entry:
        """Begin an action, which is to run as soon as this returns.

        Args:
            call: the action's.
            stamp: what came with it.
            at: when it is, on the clock `time.monotonic`.

        Raises:
            Stale: it is too old, or a later one came before, or the safe action runs or just ran.
            Closed: the server stops.
        """
        with self._lock:
            switch = self._switch
            if switch is not None and switch.bars(at):
                self.stale += 1
                raise Stale(f"the safe action of {self._key!r} is just running: try again after it")
            now = int(at * 1e9)
            valid = self._timeout
            if stamp is None:
                number = 0
                policy: str | None = None
                observation: int | None = None
                age = at - call.arrived
            else:
                number, policy, observation = stamp.number, stamp.policy, stamp.observation
                if stamp.stream != self._stream:
                    self._turn_to(stamp.stream)
                if number <= self._last:
                    self._refuse_disordered(number)
                if stamp.valid is not None:
                    valid = stamp.valid
                age = age_of(stamp, now, at - call.arrived)
            if not 0 <= age <= valid:
                age = self._refuse_old(age, valid)
            if stamp is not None:
                self._last = number
            if switch is not None:
                switch.feed(at)
            if self._closed:  # also where it is just now, by a signal's handler in this thread
                raise Closed("the server has been stopped")
            who = call.caller
            return self._record.begin(
                Entry(
                    self._key,
                    who.client_id,
                    who.label,
                    who.identity,
                    number,
                    policy,
                    observation,
                    age,
                    at,
                )
            )

    def _turn_to(self, stream: int) -> None:
        """Go on with the order of another client's actions."""
        streams = self._streams
        streams.pop(self._stream, None)
        streams[self._stream] = self._last
        if len(streams) > _MOST_STREAMS:
            del streams[next(iter(streams))]
        self._stream, self._last = stream, streams.get(stream, 0)

    def _refuse_disordered(self, number: int) -> None:
        self.disordered += 1
        raise Stale(
            f"action {number} of {self._key!r} comes after this client's action {self._last}, "
            "which was sent later, so it isn't taken"
        )

    def _refuse_old(self, age: float, valid: float) -> float:
        """Refuse an action by its age, or return 0 where that is just below."""
        if age > valid:
            self.stale += 1
            raise Stale(
                f"an action of {self._key!r} is {age:.3f} s old, and is valid for {valid:.3f} s "
                "only: observe anew, and send a newer one"
            )
        if age < -_AHEAD and valid < math.inf:
            self.stale += 1
            raise Stale(
                f"an action of {self._key!r} is from {-age:.3f} s ahead of the device's clock, so "
                "from before that was started: observe it anew, and send another"
            )
        return 0.0

    def close(self) -> None:
        """Let nothing begin any more, and have the safe action called if there is one due."""
        with self._lock:
            self._closed = True
        if self._switch is not None:
            self._switch.release()

    def join(self) -> None:
        """Wait for that."""
        if self._switch is not None:
            self._switch.close()
