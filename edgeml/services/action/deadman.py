"""The dead-man switch: when commands stop, the device itself does what is safe.

Each switch has a thread of its own, which waits for when it is due and runs the safe action. So no
handler holds it up, and no other key's safe action either.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Protocol

from edgeml.core.ending import tell_left_behind
from edgeml.core.forks import watch_forks
from edgeml.services.action.record import Record

__all__ = ["Due", "Switch", "Timekeeper"]

_log = logging.getLogger(__name__)

_GRACE = 2.0  # seconds that a safe action has to return when the server stops


class Due(Protocol):
    """Something to be done at times that may change."""

    def due(self) -> float:
        """When it is to be done next, on the clock `time.monotonic`; infinity for never."""

    def act(self, now: float) -> None:
        """Do it; it was due. Must not raise."""


class Timekeeper:
    """Does something when it is due, in a thread that is started when first needed.

    Args:
        name: of the thread.
        what: is done.
    """

    def __init__(self, name: str, what: Due) -> None:
        self._name = name
        self._what = what
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._acting = 0.0  # since when
        watch_forks(self)

    def abandon(self) -> None:
        """Leave it to the parent of this child, where the thread isn't."""
        self._changed = threading.Condition()
        self._closed = True
        self._thread = None

    def wake(self) -> None:
        """Take notice that it is due earlier than it was; not needed where it is due later.

        Raises:
            RuntimeError: the thread can't be started.
        """
        with self._changed:
            if self._closed:
                return
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                thread.start()
                self._thread = thread
            self._changed.notify()

    def _run(self) -> None:
        what = self._what
        while True:
            with self._changed:
                while (left := what.due() - time.monotonic()) > 0:
                    if self._closed:
                        return
                    self._changed.wait(None if left == math.inf else min(left, 1e6))
            self._acting = now = time.monotonic()
            try:
                what.act(now)
            except BaseException:  # it goes on
                _log.exception("%s failed", self._name)
            self._acting = 0.0

    def close(self) -> None:
        """End the thread, once nothing is due; waits for it, up to two seconds. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        thread.join(_GRACE)
        if thread.is_alive() and (since := self._acting):
            assert thread.ident is not None
            tell_left_behind(_log, self._name, time.monotonic() - since, thread.ident)


class Switch:
    """Calls the safe action of a key, once, so long after the last command.

    Args:
        key: of the actions.
        timeout: seconds.
        function: the safe action.
        record: where it is noted.
        lock: is held by whoever begins an action, and feeds this.

    Attributes:
        halts: how many times it was called.
    """

    def __init__(
        self,
        key: str,
        timeout: float,
        function: Callable[[str], object],
        record: Record,
        lock: threading.RLock,
    ) -> None:
        self.timeout = timeout
        self.halts = 0
        self._acting = False
        self._called = -math.inf  # when the safe action was last
        self._key = key
        self._function = function
        self._record = record
        self._lock = lock
        self._fed = 0.0  # when the last action began
        self._due = math.inf
        self._released = False
        self._keeper = Timekeeper(f"edgeml safe action of {key!r}", self)

    def abandon(self, lock: threading.RLock) -> None:
        """Never act in this child; a lock that is there is given anew."""
        self._lock = lock
        self._due = math.inf

    def bars(self, at: float) -> bool:
        """Whether an action that was to begin at some time may not, under the lock.

        So it is while the safe action runs, and after it for what was to begin before and was held
        up meanwhile: a thread may be, between a look at the clock and the lock.
        """
        return self._acting or at < self._called

    def feed(self, now: float) -> None:
        """Take notice that an action begins; under the lock.

        Raises:
            RuntimeError: there can be no thread to watch over it.
        """
        armed = self._due < math.inf
        self._fed = now
        self._due = now + self.timeout
        if self._released:  # after the look, as it may be just now, by a signal's handler
            self._due = -math.inf if armed else math.inf
        elif not armed:
            try:
                self._keeper.wake()
            except BaseException:
                self._due = math.inf
                raise

    def due(self) -> float:
        """See `Due`."""
        return self._due

    def act(self, now: float) -> None:
        """Call the safe action, unless an action has begun just now."""
        with self._lock:
            if now < self._due:
                return
            self._due = math.inf
            self._acting = True
            self._called = now
            self.halts += 1
            silent = now - self._fed
            entry = self._record.begin_halt(self._key, silent, now)
        try:
            self._function(self._key)
        except BaseException:
            _log.exception("the safe action of %r failed", self._key)
        finally:
            self._record.end_halt(entry)
            with self._lock:
                self._acting = False
        why = ", as the server stops" if self._released else ""
        text = "the safe action of %r was called%s: %.3f s had passed since the last action began"
        _log.warning(text, self._key, why, silent)

    def release(self) -> None:
        """Have the safe action called at once, if one is due at any time; then never again."""
        with self._lock:
            self._released = True
            if self._due == math.inf:
                return
            self._due = -math.inf
        self._keeper.wake()

    def close(self) -> None:
        """End the thread once the safe action, if it was to be called, has returned."""
        self._keeper.close()
