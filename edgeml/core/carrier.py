"""Who runs a loop: a thread of its own, or one that comes to carry it.

A thread hop costs 20 to 100 microseconds, and a user's handlers all belong in one thread. Both are
had if the loop comes to the handlers: their thread carries it, round by round, and runs a handler
between two rounds. When a handler takes long, `relieve` has the loop's own thread carry on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from threading import get_ident
from typing import Any

__all__ = ["Carrier", "Left", "Stay"]


class Left(SystemExit):
    """Ends a thread whose loop another one has taken over; all else a loop might swallow."""


_log = logging.getLogger(__name__)

_CALM = 1.0  # seconds after which a failure counts as the first of a row
_FEW = 3  # failures in a row; from then on there is a pause after each
_PAUSE = 0.05

Stay = Callable[[], bool]
"""Says whether to go on; asked before each round."""


class Carrier:
    """Passes one loop between threads, of which one runs it at a time.

    Args:
        name: of the loop's own thread.
        rounds: ``rounds(stay)`` runs at least one round of the loop, and more while ``stay()``; a
            round waits for nothing where ``stay()`` is false. Returns True when the loop is over.
        wake: makes a round that waits, now or next, end soon. Called under `turn`.
        end: is called once, by the thread in whose rounds the loop was over.
    """

    def __init__(
        self,
        name: str,
        rounds: Callable[[Stay], bool],
        wake: Callable[[], object],
        end: Callable[[], object],
    ) -> None:
        self._name = name
        self._rounds = rounds
        self._wake = wake
        self._end = end
        self._thread: threading.Thread | None = None
        self._forget()

    def _forget(self) -> None:
        self.turn = threading.RLock()
        """Held to do something in the loop between two rounds, and to pass the loop on."""
        self._changed = threading.Condition(self.turn)
        self._carrying = 0  # the thread that has the loop; 0 for none
        self._own = 0  # the loop's own thread
        self._in_round = False  # whether a visitor is in a round, or away
        self._visitors = 0  # who wait for the loop
        self._over = False
        self._failures = 0  # of rounds, in a row
        self._failed_at = 0.0
        self._ended = False  # and what is done at the end is done

    def start(self) -> None:
        """Run the loop in its own thread, from now on."""
        with self.turn:
            if self._thread is None and not self._over:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                thread.start()  # raises RuntimeError where there can be no more threads
                self._thread = thread

    @property
    def over(self) -> bool:
        """Whether the loop has ended."""
        return self._over

    @property
    def here(self) -> bool:
        """Whether the calling thread has the loop; under `turn` it may do things in it."""
        return self._carrying == get_ident()

    @property
    def in_round(self) -> bool:
        """Whether the calling thread is within a round of this loop."""
        me = get_ident()
        return self._carrying == me and (self._in_round or me == self._own)

    def _run(self) -> None:
        me = get_ident()
        over = False
        while not over:
            try:
                if not self._wait_alone(me):
                    return
                over = self._rounds(self._is_alone)
            except Left:
                return
            except BaseException:
                with suppress(BaseException):  # there may be no memory even to tell it
                    self._fail()
                continue
            with self._changed:
                self._carrying = 0
                self._over = over
                self._changed.notify_all()
        self._finish()

    def _wait_alone(self, me: int) -> bool:
        """Take the loop once nobody else has it or wants it; False if it is over."""
        with self._changed:
            if self._carrying == me:  # since rounds failed
                self._carrying = 0
                self._changed.notify_all()
            self._own = me
            while (self._carrying or self._visitors) and not self._over:
                self._changed.wait()
            if not self._over:
                self._carrying = me
            return not self._over

    def _fail(self) -> None:
        """Tell that rounds failed; pause where they do nothing else, so that no core is kept busy.

        They go on all the same: memory may be had again, or open files.
        """
        now = time.monotonic()
        if now - self._failed_at > _CALM:
            self._failures = 0
        self._failures += 1
        self._failed_at = now
        if not self._failures & (self._failures - 1):
            _log.exception(
                "%s: the loop failed, and goes on (%d in a row)", self._name, self._failures
            )
        if self._failures > _FEW:
            time.sleep(_PAUSE)

    def hand_over(self, take: Callable[..., object], *arguments: Any) -> None:
        """Call what takes requests, within a round; it may raise, but for Ctrl-C in a visitor."""
        try:
            take(*arguments)
        except BaseException as error:
            if not isinstance(error, Exception) and self._carrying != self._own:
                raise
            _log.exception("%s: on_request failed", self._name)

    def _is_alone(self) -> bool:
        return not self._visitors

    def carry(self, stay: Stay) -> bool:
        """Run the loop in the calling thread, at least one round; see `Endpoint.carry`."""
        me = get_ident()
        over = False
        try:
            with self.turn:  # within the `try`, as Ctrl-C may come when it is given back
                if self._carrying != me:
                    if not stay():
                        return not self._over
                    self._take(me)
                if self._over:
                    return False
                self._in_round = True
            over = self._rounds(stay)
        except Exception:
            with suppress(Exception):
                self._fail()
        finally:
            with self.turn:
                if self._carrying == me:
                    self._in_round = False
                    if over:
                        self._carrying = 0
                        self._over = True
                    if over or self._visitors:
                        self._changed.notify_all()
        if over:
            self._finish()
        return not over

    def _finish(self) -> None:
        try:
            self._end()
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _take(self, me: int) -> None:
        """Wait for the loop, which whoever runs it gives up after a round."""
        self._visitors += 1
        try:
            while self._carrying and not self._over:
                if not self._relieve():
                    self._wake()
                    self._changed.wait()
            if not self._over:
                self._carrying = me
        finally:
            self._visitors -= 1

    def wake(self) -> None:
        """Have whoever runs the loop look at its ``stay`` again, if it waits."""
        with self.turn:
            if not self._over:
                self._wake()

    def relieve(self) -> None:
        """Have the loop's own thread carry on, if whoever carried the loop is away from it."""
        with self.turn:
            self._relieve()

    def _relieve(self) -> bool:
        if not self._carrying or self._carrying == self._own or self._in_round or self._over:
            return False
        self._carrying = 0
        self._changed.notify_all()
        self.start()
        return True

    def strand(self) -> None:
        """Have a fresh thread carry on for the loop's own, which is stuck in a round.

        When that comes free it must raise `Left` before it touches the loop, for which it asks
        `here` under `turn`.
        """
        with self._changed:
            if self._carrying == self._own and not self._over:
                stuck, self._thread = self._thread, None
                self._carrying = 0
                try:
                    self.start()
                except RuntimeError:  # without a thread it waits for the one that is stuck
                    self._carrying, self._thread = self._own, stuck
                    _log.exception("%s: the loop waits for a callback to return", self._name)

    def rouse(self) -> None:
        """Have the loop take up what it was given, by its own thread if its carrier is away."""
        with self._changed:
            if not self._over:
                self._relieve()
                self._wake()

    def wait(self, timeout: float) -> bool:
        """Wait until the loop is over, but not within it; says whether it is."""
        if self.in_round:
            return False
        deadline = time.monotonic() + timeout
        with self._changed:
            while not self._ended and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))
        return self._ended

    def abandon(self) -> None:
        """Forget everything, in a forked child, where the threads are not."""
        self._forget()  # whoever held the lock is not there
        self._over = self._ended = True
