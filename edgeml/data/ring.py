"""Ids and rows of a ring: which row an item lies in, and which items are held."""

from __future__ import annotations

import numpy as np

from edgeml.data.tree import Array

__all__ = ["Ring"]


class Ring:
    """The newest items' places. Nothing here takes a lock.

    The item with the id i lies in row ``(i - 1) % n_rows``, until the ring comes round.

    Args:
        capacity: how many items are held at most.
        spare: how many rows there are beyond, of items that no longer count as held.

    Attributes:
        capacity: as given.
        n_rows: how many rows there are.
        latest: id of the newest item; to insert one is to write its row and count this up.
        before: id of the item before the first that counts as held.
        kept_from: id of the first item whose row was written.
    """

    def __init__(self, capacity: int, spare: int = 0) -> None:
        self.capacity = capacity
        self.n_rows = capacity + spare
        self.reset(1)

    def reset(self, next_id: int) -> None:
        """Forget all items; the next one gets this id."""
        self.latest = self.before = next_id - 1
        self.kept_from = next_id

    @property
    def held(self) -> int:
        """How many items are held."""
        return min(self.latest - self.before, self.capacity)

    @property
    def oldest_id(self) -> int:
        """Id of the oldest item held; the next id where there is none."""
        return self.latest + 1 - self.held

    @property
    def oldest_kept(self) -> int:
        """Id of the oldest item whose row is still as it was written."""
        return max(self.kept_from, self.latest + 1 - self.n_rows)

    def find_row(self, item_id: int) -> int:
        """Return the row of an item."""
        return (item_id - 1) % self.n_rows

    def find_rows(self, first_id: int, n: int) -> Array:
        """Return the rows of n items; shape (n,)."""
        return np.arange(first_id - 1, first_id - 1 + n) % self.n_rows

    def find_ids(self, rows: Array) -> Array:
        """Return the ids of the newest items that lie in these rows."""
        newest = (self.latest - 1) % self.n_rows
        return self.latest - (newest - rows) % self.n_rows

    def find_range(self, from_id: int, limit: int | None = None) -> tuple[int, int]:
        """Return the first id, and the number, of the items past ``from_id`` that are held."""
        first = max(from_id + 1, self.oldest_id)
        n = max(0, self.latest + 1 - first)
        return first, n if limit is None else max(0, min(n, limit))
