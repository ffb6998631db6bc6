"""Stores of agentlace's four methods, as edgeml's server and client want to have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import edgeml.data
from agentlace.data.data_store import DataStoreBase
from agentlace.internal.values import LeftOut, unpack
from edgeml.data import Batch

__all__ = ["Inlet", "Outlet", "as_sent"]

_ATTEMPTS = 100  # to read a store between two inserts of another thread


class Inlet(edgeml.data.DataStoreBase):
    """A learner's side of a store: hands on what comes, and keeps nothing.

    Args:
        store: one of edgeml's, or one with `insert`, and `batch_insert` if it likes.
    """

    def __init__(self, store: Any) -> None:
        super().__init__(_capacity_of(store))
        self._store = store
        self._taken = 0

    def lead_to(self, store: Any) -> None:
        """Hand on to another store from now on."""
        with self.lock:
            self._store = store

    @property
    def learns(self) -> bool:
        """See the base class."""
        return bool(getattr(self._store, "learns", False))

    def __len__(self) -> int:
        return len(self._store)

    def latest_data_id(self) -> int:
        """Return how many items came; those of a store of edgeml's are counted by itself."""
        store = self._store
        return store.latest_data_id() if _is_edgemls(store) else self._taken

    def get_latest_data(self, from_id: int, *, limit: int | None = None) -> Batch:
        """Raise NotImplementedError: nothing is kept here."""
        raise NotImplementedError("read the store that was registered")

    def insert(self, item: Any) -> None:
        """Hand on one item."""
        self.batch_insert([item])

    def batch_insert(self, batch: Batch | Sequence[Any], lane: Any = None) -> None:
        """Hand on items; to a store without a `batch_insert` of its own one by one."""
        store = self._store
        if _is_edgemls(store):
            if isinstance(batch, Batch) and batch.columns is None:
                cuts, lanes = batch.cuts, batch.lanes
                batch = Batch.of([unpack(item) for item in batch]).cut(cuts).in_lanes(lanes)
            if lane is None:
                store.batch_insert(batch)
            else:
                store.insert_from(lane, batch)
            return
        # Each item its own: these stores keep what they are given.
        items = map(unpack, batch)
        if _one_by_one(store):
            for item in items:
                store.insert(item)
                self._taken += 1
        else:
            store.batch_insert(list(items))
            self._taken += len(batch)

    def interrupt(self, lane: Any = None) -> None:
        """Tell a store of edgeml's, which knows episodes."""
        if _is_edgemls(self._store):
            if lane is None:
                self._store.interrupt()
            else:
                self._store.interrupt_from(lane)


class Outlet(edgeml.data.DataStoreBase):
    """An actor's side of a store: hands out what it has, and lets it keep that.

    Args:
        store: with `latest_data_id`, `get_latest_data` and `__len__`, filled by whoever owns it.
        left_out: counts the parts of its items that can't be sent.

    Attributes:
        acknowledged: the store's own id up to which the learner has it.
    """

    def __init__(self, store: Any, left_out: LeftOut) -> None:
        super().__init__(_capacity_of(store))
        self._store = store
        self._left_out = left_out
        # Ids are from 1 here, and from 0 there, unless an empty store says otherwise.
        latest = int(store.latest_data_id())
        self._shift = 1 if len(store) else -latest
        self.acknowledged = -self._shift

    def __len__(self) -> int:
        return len(self._store)

    def latest_data_id(self) -> int:
        """Return the id of the newest item."""
        return int(self._store.latest_data_id()) + self._shift

    def insert(self, item: Any) -> None:
        """Insert into the store itself."""
        self._store.insert(item)

    def get_latest_data(self, from_id: int, *, limit: int | None = None) -> Batch:
        """Return what the store has past an id; see the base class."""
        for _ in range(_ATTEMPTS):
            newest = self.latest_data_id()
            items = list(self._store.get_latest_data(from_id - self._shift))
            if newest == self.latest_data_id():
                break
        else:
            raise RuntimeError("the store changes faster than it can be read; try again")
        items = items[max(0, len(items) - max(0, newest - from_id)) :]
        first = max(from_id, newest - len(items)) + 1
        batch = Batch.of(items[:limit], first, allocate=self.allocate)
        if batch.columns is None:
            batch = Batch.of([*map(self._left_out.keep_rest, items[:limit])], first)
        return batch

    def release(self, up_to_id: int) -> None:
        """Note how far the learner is; the store keeps its items for one that starts anew."""
        self.acknowledged = up_to_id - self._shift


def as_sent(store: Any, left_out: LeftOut) -> edgeml.data.DataStoreBase:
    """Return an actor's store as edgeml's client wants to have it; its own are that already."""
    return store if isinstance(store, edgeml.data.DataStoreBase) else Outlet(store, left_out)


def _is_edgemls(store: Any) -> bool:
    return isinstance(store, edgeml.data.DataStoreBase)


def _capacity_of(store: Any) -> int:
    capacity = getattr(store, "capacity", None)
    return max(1, capacity) if isinstance(capacity, int) else 1


def _one_by_one(store: Any) -> bool:
    plain = DataStoreBase.batch_insert
    return getattr(type(store), "batch_insert", plain) is plain
