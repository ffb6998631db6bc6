"""The client's end of a lease: asks for it, keeps it, and knows whether it is there.

A thread asks the device again and again, and the device answers when there is something to tell, or
after a fifth of the lease's seconds: so each question is a sign of life, and one may be late
without harm. An action that the device took is a sign as well.

By this client's own clock the lease ends as many seconds after a question that was answered was
*sent*. That is never later than by the device's, which counts from when it came.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from edgeml.core.client import Client
from edgeml.core.deadline import Deadline
from edgeml.core.dispatch import require_plain
from edgeml.core.ending import run_at_end
from edgeml.core.errors import (
    Closed,
    DeadlineExceeded,
    EdgemlError,
    Malformed,
    NotHolder,
    NotReady,
    Overloaded,
    Unreachable,
    copy_error,
    shown,
)
from edgeml.core.notices import Notices
from edgeml.core.owned import ClosedAtExit, Unpicklable
from edgeml.services.action.leases import LONGEST_TTL

__all__ = ["Lease"]

_log = logging.getLogger(__name__)

_QUESTIONS = 5  # in the seconds of a lease
_IMPATIENCE = 0.02  # seconds; the first pause before a device that failed to answer is asked again
_PATIENCE = 0.5  # seconds; the longest
_LONGEST_HOLD = 1.0  # seconds that a question is to be kept
_LATE = 1.0, 5.0  # seconds that an answer may be late at least and at most, before it is asked anew
_FAREWELL = 0.5  # seconds that giving a lease back may take

_PASSING = (Closed, DeadlineExceeded, NotReady, Overloaded, Unreachable)
"""What may be over when the device is asked again."""


class Lease(ClosedAtExit, Unpicklable):
    """The right to act on one key, alone: to be had from `edgeml.ActionClient.lease`.

    It may be lost, to a client of a higher priority or by silence, and then is asked for again, by
    itself, until it is released; leaving a ``with`` block does that. Safe to use from any thread.

    Attributes:
        key: the action's name.
        since: counts how many times it was had, from 1; 0 before the first. So it rises whenever it
            has come back, and what was decided before that is old.
    """

    def __init__(
        self,
        client: Client,
        key: str,
        priority: int,
        ttl: float,
        on_change: Callable[[bool], object] | None,
        on_release: Callable[[], object],
    ) -> None:
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise TypeError(f"priority is a whole number, not {shown(priority)}")
        if not -(1 << 31) <= priority < 1 << 31:
            raise ValueError(f"priority is a number of 32 bits, not {priority}")
        if isinstance(ttl, bool) or not 0 < ttl <= LONGEST_TTL:
            raise ValueError(f"ttl is above 0 and at most {LONGEST_TTL:g} seconds, not {ttl!r}")
        if on_change is not None:
            require_plain("on_change", on_change)
        self.key = key
        self.since = 0
        self.token = 1 + secrets.randbits(62)
        self._client = client
        self._priority = priority
        self._ttl = float(ttl)
        self._on_change = on_change
        self._on_release = on_release
        self._notices = Notices("edgeml lease notices")
        self._changed = threading.Condition()
        self._released = False
        self._grant = 0  # the number that the device gave it
        self._until = -math.inf  # when it ends, by this client's clock
        self._told = 0  # of which `since` the user was told that it is held; 0 for none
        self._in_the_way = ""  # who has it, as the device says
        self._error: EdgemlError | None = None  # why it is not known whether it is held
        self._asked: Future[Any] | None = None
        self._thread = threading.Thread(target=self._keep, name="edgeml lease", daemon=True)
        self._thread.start()
        self._forget_end = run_at_end(self.release)

    @property
    def held(self) -> bool:
        """Whether this client has it now, as far as it knows; the device decides."""
        return time.monotonic() < self._until

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is held; returns whether it is.

        Args:
            timeout: seconds; None for ever.

        Raises:
            UnknownInterface, PermissionDenied, ConfigMismatch: the device refuses to lend it.
            Closed: it has been released, or its client was stopped.
        """
        deadline = Deadline(math.inf if timeout is None else max(0.0, timeout))
        with self._changed:
            while not self.held:
                if self._released or self._client.sessions.closed:
                    raise Closed(f"the lease of {self.key!r} has been released")
                if self._error is not None and not isinstance(self._error, _PASSING):
                    raise copy_error(self._error)
                if not (left := deadline.left):
                    return False
                self._changed.wait(min(left, threading.TIMEOUT_MAX))
        return True

    def note_action(self, asked: float) -> None:
        """Take notice that the device took an action of this client that was sent at that time."""
        with self._changed:
            if self._until > time.monotonic():
                self._until = max(self._until, asked + self._ttl)

    def require(self, timeout: float | None = None) -> None:
        """Wait until it is held; at most so many seconds, by default the client's timeout.

        Raises:
            NotHolder: another client had it all the time; the text says who.
            DeadlineExceeded, Unreachable: no answer.
            What `wait` raises.
        """
        seconds = self._client.timeout if timeout is None else timeout
        if self.wait(seconds):
            return
        with self._changed:
            if self._error is not None:
                raise copy_error(self._error)
            if self._in_the_way:
                raise NotHolder(
                    f"{self._in_the_way}, and that was so for {seconds:g} s: wait longer; a higher "
                    "priority takes a lease at once, once no action runs"
                )
            raise DeadlineExceeded(f"no lease of {self.key!r} within {seconds:g} s")

    def release(self) -> None:
        """Give it back, and ask for it no more; idempotent."""
        with self._changed:
            if self._released:
                return
            self._released = True
            self._until = -math.inf
            self._changed.notify_all()
        self._forget_end()
        self._notices.close(0.0)
        if self._thread is not threading.current_thread():
            self._thread.join(_FAREWELL + 0.1)
        self._on_release()

    def _leave(self) -> None:
        self.release()

    # In the thread that keeps it ----------------------------------------------------------

    def _keep(self) -> None:
        pause = _IMPATIENCE
        hold = 0.0  # at first, to learn soon who has it
        while not self._released and not self._client.sessions.closed:
            began = time.monotonic()
            known = self._grant
            error = self._ask(began, hold)
            with self._changed:
                failed, self._error = self._error is not None, error
                self._changed.notify_all()
            if error is not None:
                if not failed:
                    _log.warning("the lease of %r can't be kept: %s", self.key, error)
                self._rest(pause)
                pause = min(2 * pause, _PATIENCE)
                continue
            pause = _IMPATIENCE
            if self._grant == known and time.monotonic() - began < hold / 2:
                self._rest(_IMPATIENCE)  # it doesn't keep questions, and would be asked all day
            # An answer that came too late to count is asked for anew, and at once.
            hold = min(self._ttl / _QUESTIONS, _LONGEST_HOLD)
            if self._grant and not self.held:
                hold = 0.0
        with self._changed:
            self._changed.notify_all()
        if self._asked is not None:
            # From the thread that has asked, so that this is the last that the device hears of it.
            with suppress(EdgemlError, RuntimeError):  # as no thread starts while the program ends
                self._client.call("lease", self._question(0.0, 0.0), _FAREWELL)
            self._asked.cancel()

    def _question(self, ttl: float, hold: float) -> list[Any]:
        return [self.key, self.token, self._priority, ttl, self._grant, hold]

    def _ask(self, now: float, hold: float) -> EdgemlError | None:
        """Ask the device once, and take in what it says, or return why it didn't."""
        try:
            late = min(max(self._ttl, _LATE[0]), _LATE[1])
            asked = self._client.call_async("lease", self._question(self._ttl, hold), hold + late)
        except EdgemlError as error:
            return error
        except RuntimeError as error:  # as no thread starts while the program ends
            return Closed(str(error))
        self._asked = asked
        asked.add_done_callback(self._wake)
        with self._changed:
            while not asked.done() and not self._released:
                self._wait()
        if self._released:
            return None
        try:
            answer = asked.result(0)
        except EdgemlError as error:
            return error
        match answer:
            case [int(grant), str(told), *_]:
                self._take_in(grant, told, now)
                return None
        return Malformed(f"the device answered with {shown(answer)} about a lease")

    def _wake(self, done: Future[Any]) -> None:
        with self._changed:
            self._changed.notify_all()

    def _wait(self, until: float = math.inf) -> None:
        """Wait for a change, and take notice if the lease ends meanwhile; under the lock."""
        now = time.monotonic()
        if self._told and now >= self._until:
            self._tell(0)
        left = min(until, self._until if self._told else math.inf) - now
        self._changed.wait(min(max(left, 0.0), threading.TIMEOUT_MAX))

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        with self._changed:
            while not self._released and time.monotonic() < until:
                self._wait(until)

    def _take_in(self, grant: int, told: str, asked: float) -> None:
        """Take in an answer to a question that was sent at that time."""
        with self._changed:
            now = time.monotonic()
            lasted = grant == self._grant and now < self._until
            self._grant, self._in_the_way = grant, told
            until = asked + self._ttl if grant else -math.inf
            if lasted:
                until = max(until, self._until)  # by a later action
            elif now < until:
                self.since += 1
            if not self._released:
                self._until = until
            self._tell(self.since if now < until else 0)

    def _tell(self, since: int) -> None:
        """Tell the user whether it is held, if that is news; under the lock."""
        before, self._told = self._told, since
        if before == since or self._released:
            return
        who = self._in_the_way or "the device was not heard of in time"
        if before:
            _log.info("the lease of %r is lost: %s", self.key, who)
            self._notices.tell(self._on_change, False)
        if since:
            _log.info("the lease of %r is held", self.key)
            self._notices.tell(self._on_change, True)
        self._changed.notify_all()
