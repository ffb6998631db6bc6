"""Things to do later: one thread for all the deadlines and ticks of a server or a client."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

__all__ = ["Alarm", "Alarms"]

_log = logging.getLogger(__name__)

_TIDY = 1024  # entries from which on those cancelled are looked for


class Alarm:
    """One thing to do later."""

    __slots__ = ("action",)

    def __init__(self, action: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        """Don't do it; what the action refers to is let go of at once."""
        self.action = None


class Alarms:
    """Runs actions at their time, in one thread that is started when first needed."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._heap: list[tuple[float, int, Alarm]] = []
        self._order = itertools.count()
        self._tidy_at = _TIDY  # entries
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def after(self, delay: float, action: Callable[[], None]) -> Alarm:
        """Run ``action`` in ``delay`` seconds, unless closed before; it should return quickly.

        Raises:
            RuntimeError: the thread can't be started, as while Python 3.12 ends the program.
        """
        alarm = Alarm(action)
        entry = (time.monotonic() + delay, next(self._order), alarm)
        with self._changed:
            if self._closed:
                return alarm
            if len(self._heap) >= self._tidy_at:
                # Those cancelled go when they reach the top, which may be a day from now.
                self._heap = [held for held in self._heap if held[2].action is not None]
                heapq.heapify(self._heap)
                self._tidy_at = max(_TIDY, 2 * len(self._heap))
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                thread.start()
                self._thread = thread
            heapq.heappush(self._heap, entry)
            if self._heap[0] is entry:
                self._changed.notify()
        return alarm

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed:
                    # Those cancelled go at once: most alarms are deadlines that were met.
                    while self._heap and self._heap[0][2].action is None:
                        heapq.heappop(self._heap)
                    wait = self._heap[0][0] - time.monotonic() if self._heap else None
                    if wait is not None and wait <= 0:
                        break
                    self._changed.wait(wait)
                if self._closed:
                    return
                action = heapq.heappop(self._heap)[2].action
            try:
                if action is not None:
                    action()
            except Exception:
                _log.exception("%s: an alarm's action failed", self._name)
            del action

    def close(self) -> None:
        """Forget all alarms and end the thread; idempotent."""
        with self._changed:
            self._closed = True
            self._heap.clear()
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(1.0)
