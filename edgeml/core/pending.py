"""Requests under way on one connection, by number: what most transports need to match replies."""

from __future__ import annotations

import itertools
import logging
import threading
from concurrent.futures import Future

from edgeml.core.errors import Overloaded, copy_error
from edgeml.core.message import Message

__all__ = ["Pending"]

_log = logging.getLogger(__name__)


class _Asked:
    """How far the requests of one thread are."""

    __slots__ = ("answered", "newest")

    def __init__(self) -> None:
        self.newest = 0
        self.answered = 0  # the newest that was


class _Future(Future[Message]):
    """A request under way; to cancel it is to forget it."""

    def __init__(self, requests: dict[int, _Future], number: int, asked: _Asked) -> None:
        super().__init__()
        self._requests = requests
        self._number = number
        self.asked = asked

    def cancel(self) -> bool:
        self._requests.pop(self._number, None)  # whoever pops it settles it
        return super().cancel()


class Pending:
    """The futures of requests under way. Safe to use from any thread.

    Args:
        most: how many there may be at a time.
    """

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._numbers = itertools.count(1)
        self._requests: dict[int, _Future] = {}
        self._local = threading.local()

    def __contains__(self, number: int) -> bool:
        """Whether the request is still waited for."""
        return number in self._requests

    @property
    def unanswered(self) -> bool:
        """Whether the newest of this thread's requests has had no answer, so that what goes another
        way might overtake it. What is answered has arrived, and so have those before it.
        """
        asked: _Asked | None = getattr(self._local, "asked", None)
        return asked is not None and asked.answered < asked.newest

    def add(self) -> tuple[int, Future[Message]]:
        """Begin a request; returns its number, and the future of its reply.

        Raises:
            Overloaded: too many are under way.
        """
        if len(self._requests) >= self._most:
            raise Overloaded(f"{self._most} requests are under way on this connection")
        asked: _Asked | None = getattr(self._local, "asked", None)
        if asked is None:
            asked = self._local.asked = _Asked()
        number = asked.newest = next(self._numbers)
        future = self._requests[number] = _Future(self._requests, number, asked)
        return number, future

    def settle(self, number: int, outcome: Message | Exception) -> bool:
        """Give a request its reply, or an error in its place; False if nobody waits any more."""
        future = self._requests.pop(number, None)
        if future is None:
            return False
        future.asked.answered = max(future.asked.answered, number)
        if not future.set_running_or_notify_cancel():
            return False
        _give(future, outcome)
        return True

    def fail(self, why: Exception) -> None:
        """Have every request raise an error like this one, since nothing more will come."""
        while self._requests:
            _, future = self._requests.popitem()
            if future.set_running_or_notify_cancel():
                _give(future, copy_error(why))


def _give(future: Future[Message], outcome: Message | Exception) -> None:
    """Settle a future; its callbacks run here, and must not end the thread that all depend on."""
    try:
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except SystemExit:  # all other exceptions are logged by the future
        _log.exception("a future's callback called sys.exit(), which does nothing here")
