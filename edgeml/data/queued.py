"""A queue of any items, for what is to be handed on rather than kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Any

from edgeml.data.batch import Batch, join
from edgeml.data.bounded import BoundedQueue, OnFull
from edgeml.data.lanes import Lane, Numbers
from edgeml.data.tree import copy_item

__all__ = ["QueuedDataStore"]

_NOTHING = Batch.of([])
_RUN = 256  # single items are kept in runs of so many, which a reader skips whole


class QueuedDataStore(BoundedQueue):
    """A first-in, first-out queue of any items that a codec carries.

    Items stay until `release` says that they have been taken; when it is full, ``on_full``
    decides. Containers and arrays in an item are copied when it is inserted, anything with
    ``__array__`` as a numpy array, and other objects by `copy.deepcopy`.

    Args:
        capacity: how many items are held at most.
        on_full: "drop_oldest" (default) overwrites the oldest items, and counts them in
            `dropped`; "block" waits for `release`; "raise" raises Overloaded at once.
        timeout: for "block", how many seconds an insert waits (default 10).

    Raises:
        Overloaded: by the inserts of "raise", where there is no room.
        DeadlineExceeded: by the inserts of "block", where there was no room in time.
        ValueError: by the inserts of both, for a batch larger than the capacity.
    """

    def __init__(
        self, capacity: int, on_full: OnFull = "drop_oldest", *, timeout: float = 10.0
    ) -> None:
        super().__init__(capacity, on_full, timeout)
        self._chunks: deque[Batch | deque[Any]] = deque()  # batches of columns, and runs of items
        self._latest = 0

    def latest_data_id(self) -> int:
        """Return the id of the newest item ever inserted; 0 where there was none."""
        return self._latest

    def insert(self, item: Any, lane: Lane = None) -> None:
        """Insert a copy of one item; the class tells what it raises.

        Args:
            item: any that a codec carries.
            lane: which of several environments' it is, a text or a number (default: all items are
                of one). Whoever gets it is told, so that its episodes go on across others' items.
        """
        if lane is None:
            self._append([copy_item(item)], 1)
            return
        with self.lock:
            self._append([copy_item(item)], 1, (), self._lanes.find(lane))

    def batch_insert(self, batch: Batch | Sequence[Any], lane: Lane = None) -> None:
        """Insert copies of items in one step; `insert` and the class tell the rest."""
        if not isinstance(batch, Batch):
            if isinstance(batch, (dict, str)):
                raise TypeError(f"a batch is a sequence of items, got a {type(batch).__name__}")
            batch = list(batch)
        copied, told = self._copy(batch), batch if isinstance(batch, Batch) else _NOTHING
        with self.lock:
            numbers, cuts = self.number_lanes(told, lane)
            self._append(copied, len(batch), cuts, numbers)

    def _copy(self, batch: Batch | list[Any]) -> Batch | list[Any]:
        """Return copies of the last of some items, as many as can be held."""
        kept = batch[-self.capacity :]
        if isinstance(kept, Batch) and kept.columns is not None:
            return Batch.from_columns(copy_item(kept.columns))
        return [copy_item(item) for item in kept]

    def get_latest_data(self, from_id: int, *, limit: int | None = None) -> Batch:
        """Return the items with ids above ``from_id`` that are still held; see the base class."""
        with self.lock:
            oldest = self._latest + 1 - self._held
            first = max(from_id + 1, oldest)
            skip, left = first - oldest, self._latest + 1 - first
            if limit is not None:
                left = min(left, limit)
            parts: list[Batch | list[Any]] = []
            for chunk in self._chunks:
                if left <= 0:
                    break
                if skip >= len(chunk):
                    skip -= len(chunk)
                    continue
                end = skip + left
                if isinstance(chunk, Batch):
                    parts.append(chunk[skip:end])
                elif parts and isinstance(parts[-1], list):
                    parts[-1] += islice(chunk, skip, end)
                else:
                    parts.append([*islice(chunk, skip, end)])
                left -= min(len(chunk) - skip, left)
                skip = 0
            n = sum(map(len, parts))
            cuts, lanes = self.cuts_within(first, n), self.lanes_within(first, n)
        # What is held is never changed, so the rest needs no lock.
        allocate = self.allocate
        batches = [p if isinstance(p, Batch) else Batch.of(p, allocate=allocate) for p in parts]
        batch = join(batches, first, allocate)
        if batch.columns is None:
            batch = Batch.of([copy_item(i) for i in batch], first)
        return batch.cut(cuts).in_lanes(lanes)

    def interrupt(self, lane: Lane = None) -> None:
        """Tell that what comes next does not follow upon what came last.

        Args:
            lane: in which (default: in all).
        """
        with self.lock:
            if lane is None:
                super().interrupt()
            else:
                self._lanes.close(lane)

    def reset(self, next_id: int | None = None) -> None:
        """Forget all items; see the base class."""
        with self.lock:
            next_id = self.forget_cuts(next_id)
            self._chunks.clear()
            self._held, self._latest = 0, next_id - 1
            self._not_full.notify_all()

    def restore(self, batch: Batch, extra: Any) -> None:
        """Insert what `dump` gave; where there is no room, the oldest items go."""
        lanes = 0 if batch.lanes is None else batch.lanes
        with self.lock, self._overwriting():
            self._append(self._copy(batch), len(batch), batch.cuts, lanes)

    def release(self, up_to_id: int) -> None:
        """Free the items up to this id: they have reached their destination."""
        with self.lock:
            self._forget(up_to_id - (self._latest - self._held))
            self._not_full.notify_all()

    def hand_on(self) -> None:
        """Count an item that is somewhere else already, under the lock, as inserted and released.

        Only where nothing is held.
        """
        self._latest += 1

    def _append(
        self,
        items: Batch | list[Any],
        n: int,
        cuts: Sequence[int] = (),
        numbers: Numbers = 0,
    ) -> None:
        """Append the last of n items, with the cuts and lanes of all n.

        The others are too many to be held.
        """
        with self.lock:
            if self._on_full != "drop_oldest":
                self._await_space(n)
            excess = self._held + n - self._capacity
            if excess > 0:
                self._dropped += excess
                self._forget(excess)
            if isinstance(items, Batch):
                self._chunks.append(items)
            else:
                tail = self._chunks[-1] if self._chunks else None
                if not isinstance(tail, deque) or len(tail) >= _RUN:
                    tail = deque()
                    self._chunks.append(tail)
                tail.extend(items)
            self._held += len(items)
            self._latest += n
            first = self._latest + 1 - n
            self.take_cuts(cuts, first)
            self.take_lanes(numbers, first, n)

    def _forget(self, count: int) -> None:
        """Let go of the oldest items, up to ``count`` of them."""
        while count > 0 and self._chunks:
            chunk = self._chunks[0]
            gone = min(count, len(chunk))
            if gone == len(chunk):
                self._chunks.popleft()
            elif isinstance(chunk, Batch):
                self._chunks[0] = chunk[gone:]
            else:
                for _ in range(gone):
                    chunk.popleft()
            self._held -= gone
            count -= gone
