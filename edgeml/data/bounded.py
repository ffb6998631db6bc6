"""What queues do where there is no room for what comes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from edgeml.core.errors import DeadlineExceeded, Overloaded
from edgeml.data.base import DataStoreBase

__all__ = ["BoundedQueue", "OnFull"]

OnFull = Literal["drop_oldest", "block", "raise"]


class BoundedQueue(DataStoreBase):
    """A first-in, first-out queue that holds so many items at most.

    Args:
        capacity: how many.
        on_full: what an insert does where there is no room.
        timeout: for "block", how many seconds it waits.
    """

    _named = ""  # for people, where one of many is meant

    def __init__(self, capacity: int, on_full: OnFull, timeout: float) -> None:
        super().__init__(capacity)
        if on_full not in get_args(OnFull):
            raise ValueError(f"on_full is one of {get_args(OnFull)}, got {on_full!r}")
        self._on_full = on_full
        self._timeout = timeout
        self._not_full = threading.Condition(self.lock)
        self._held = 0
        self._dropped = 0

    @property
    def dropped(self) -> int:
        """How many items were overwritten before they were released."""
        return self._dropped

    def __len__(self) -> int:
        with self.lock:
            return self._held

    def _has_room(self, n: int) -> bool:
        return self._held + n <= self._capacity

    def _await_space(self, n: int) -> None:
        """Raise where there is no room for n items, or none in time; under the lock."""
        if n > self._capacity:
            raise ValueError(f"a batch of {n} can't fit in a store of {self._capacity}")
        if self._on_full == "raise" and not self._has_room(n):
            name = self._named or "the store"
            raise Overloaded(f"{name} is full: {self._held} of {self._capacity} not taken yet")
        if not self._not_full.wait_for(lambda: self._has_room(n), self._timeout):
            where = f" in {self._named}" if self._named else ""
            raise DeadlineExceeded(
                f"no room for {n} in {self._timeout} s{where}: "
                f"{self._held} of {self._capacity} not taken yet"
            )

    @contextmanager
    def _overwriting(self) -> Iterator[None]:
        """Let the oldest items go, uncounted, where there is no room; under the lock."""
        kept = self._on_full, self._dropped
        self._on_full = "drop_oldest"
        try:
            yield
        finally:
            self._on_full, self._dropped = kept
