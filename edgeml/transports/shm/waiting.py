"""Waiting for sockets: polling for a short while where that pays, and then sleeping."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["IN", "LONGEST", "OUT", "Poller", "Waiter"]

IN, OUT = select.POLLIN, select.POLLOUT
LONGEST = float(1 << 30)
"""Milliseconds that a wait is told to last; the system counts them in 32 bits."""

_LONGEST = 200e-6  # seconds of polling; sleeping and waking costs 10 to 110 microseconds
_SHORTEST = 20e-6  # polling that short pays no more
_HELD_UP = 500e-6  # seconds between two looks, when somebody else needs the core or the GIL
_LEAST_REST, _MOST_REST = 8.0, 1024.0  # waits without polling, once it was in the way or a loss

T = TypeVar("T")

_yield: Callable[[], object] = getattr(os, "sched_yield", lambda: None)


class Waiter:
    """Polls before it sleeps if what it waits for has come soon of late.

    To wake a thread that sleeps is most of a small message's round trip. Polling never goes on for
    longer than that is worth. Between two looks it lets others have the core, for the peer may be
    waiting for this very one; a look gives the GIL up, too. So whoever needs the core or the GIL
    shows as a gap between two looks, and there is no polling for a while, twice as long each time
    that it happens again.
    """

    __slots__ = ("_backoff", "_patience", "_rest")

    def __init__(self) -> None:
        self._patience = 0.0  # seconds that polling goes on
        self._rest = 0.0  # waits without it
        self._backoff = _LEAST_REST

    def wait(self, look: Callable[[float], T], timeout: float) -> T:
        """Call ``look`` with seconds to wait at most, 0 among them, until it returns something."""
        clock = time.perf_counter
        began = now = clock()
        if self._patience:
            end = began + min(self._patience, timeout)
            while now < end:
                found = look(0)
                if found:
                    self._backoff = max(_LEAST_REST, 0.97 * self._backoff)
                    return found
                _yield()
                last, now = now, clock()
                if now - last > _HELD_UP:
                    self._give_in()
                    break
            else:
                self._patience /= 2
                if self._patience < _SHORTEST:
                    self._give_in()
        found = look(max(0.0, timeout - (now - began)))
        if self._rest > 0:
            self._rest -= 1
        elif found and clock() - began < _LONGEST:
            self._patience = _LONGEST
        return found

    def _give_in(self) -> None:
        self._patience = 0.0
        self._rest = self._backoff
        self._backoff = min(2 * self._backoff, _MOST_REST)


class Poller:
    """Which of many sockets can be read or written; to be changed by the thread that waits."""

    def __init__(self) -> None:
        self._epoll = select.epoll() if hasattr(select, "epoll") else None
        self._poll = self._epoll or select.poll()

    def set(self, fd: int, events: int, *, new: bool = False) -> None:
        """Wait for these events of a socket, `IN` and `OUT`, from now on."""
        if new:
            self._poll.register(fd, events)
        else:
            self._poll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Wait for this socket no more; before it is closed."""
        self._poll.unregister(fd)

    def look(self, timeout: float) -> list[tuple[int, int]]:
        """Wait for ``timeout`` seconds at most; returns sockets with their events."""
        if self._epoll is not None:
            return self._epoll.poll(timeout)
        return self._poll.poll(timeout * 1e3)

    def close(self) -> None:
        """Free it."""
        if self._epoll is not None:
            self._epoll.close()
