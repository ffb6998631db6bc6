"""Stores: what an actor fills and a learner reads."""

from __future__ import annotations

import copy
import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable
from itertools import islice
from typing import Any

__all__ = ["DataStoreBase", "QueuedDataStore"]


class DataStoreBase:
    """What a store has; subclass it, or don't: the methods are what counts.

    Args:
        capacity: how many items are held at most.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    @abstractmethod
    def latest_data_id(self) -> Any:
        """Return the id of the newest item; they are counted from 0, and -1 is none."""

    @abstractmethod
    def get_latest_data(self, from_id: Any) -> list[Any]:
        """Return the items past an id that are still held."""

    @abstractmethod
    def __len__(self) -> int:
        """How many items are held."""

    @abstractmethod
    def insert(self, data: Any) -> None:
        """Insert one item."""

    def batch_insert(self, batch_data: Iterable[Any]) -> None:
        """Insert items; one by one, unless a store knows better."""
        for data in batch_data:
            self.insert(data)


class QueuedDataStore(DataStoreBase):
    """A queue of the newest items of any kind, which keeps what was sent.

    Args:
        capacity: how many items are held at most; the oldest go.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.latest_seq_id = -1
        self._data_queue: deque[Any] = deque(maxlen=capacity)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._data_queue)

    def latest_data_id(self) -> int:
        """Return the id of the newest item, counted from 0; -1 for none."""
        return self.latest_seq_id

    def insert(self, data: Any) -> None:
        """Insert a copy of one item, so that its arrays may be filled again."""
        data = copy.deepcopy(data)
        with self._lock:
            self._data_queue.append(data)
            self.latest_seq_id += 1

    def get_latest_data(self, from_id: int) -> list[Any]:
        """Return the items past an id that are still held, the oldest first."""
        with self._lock:
            held = len(self._data_queue)
            past = min(held, max(0, self.latest_seq_id - from_id))
            return list(islice(self._data_queue, held - past, None))
