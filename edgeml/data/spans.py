"""Which ids make up a trajectory, and steps drawn uniformly from all trajectories held.

A ring holds the newest rows, numbered by consecutive ids, and trajectories follow each other
without a gap. So a sorted table of first ids tells them all, and beside it stands, for each way
of drawing, how many steps could be drawn from the trajectories before. A number drawn uniformly
below the last of these sums is looked up in them, and that is a step: nothing is rejected, and
an insert changes nothing but the end of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgeml.data.tree import Array

__all__ = ["Ranges", "Spans"]

_LEAST = 64  # columns of the table


class Ranges(list[tuple[int, int]]):
    """The ways of drawing: steps i for which i + a to i + b - 1, and i, are in one trajectory.

    Args:
        min_length: a trajectory of which fewer rows are held is not drawn from.
    """

    def __init__(self, min_length: int) -> None:
        super().__init__()
        self.min_length = min_length

    def add(self, range_: tuple[int, int]) -> int:
        """Add one, unless it is there; returns its number."""
        a, b = min(range_[0], 0), max(range_[1], 1)  # step i itself is always needed
        if (a, b) not in self:
            self.append((a, b))
        return self.index((a, b))

    def count_fitting(self, length: Any, range_: tuple[int, int]) -> Any:
        """Return how many steps of a trajectory of this length, or of these, fit a range."""
        width = range_[1] - range_[0]
        return (length - width + 1) * (length >= max(width, self.min_length))

    def check_held(self, ids: Array, oldest_id: int, next_id: int) -> None:
        """Raise ValueError where steps are not held."""
        fits = (oldest_id <= ids) & (ids < next_id)
        if not fits.all():
            raise ValueError(
                f"id {ids[~fits][0]} is not held: ids {oldest_id} to {next_id - 1} are"
            )

    def check(self, range_number: int, ids: Array, at: Array) -> None:
        """Raise ValueError where steps, found where `Spans.draw` says, can't be drawn."""
        a, b = self[range_number]
        _, position, length = at
        fits = (position + a >= 0) & (position + b <= length) & (length >= self.min_length)
        if not fits.all():
            i = np.flatnonzero(~fits)[0]
            raise ValueError(
                f"id {ids[i]} can't be sampled: of its trajectory {length[i]} steps are held, of "
                f"which it is the one at {position[i]}; it takes at least {self.min_length}, and "
                f"those at {position[i] + a} to {position[i] + b - 1} among them"
            )


class Spans:
    """The trajectories of a ring. Nothing here takes a lock.

    Args:
        capacity: how many rows the ring holds.
        ranges: of steps to be drawn.

    Attributes:
        next_id: of the row that comes next.
    """

    def __init__(self, capacity: int, ranges: Ranges) -> None:
        self.capacity = capacity
        self.ranges = ranges
        self.reset(1)

    def reset(self, next_id: int) -> None:
        """Forget all rows; the next one gets this id."""
        self.next_id = self._first = next_id
        # Of each trajectory the first id, and below, one row for each range, the sums. The last
        # column that counts is the trajectory that goes on, and the one after it is spare.
        self._table = np.zeros((1 + len(self.ranges), _LEAST), np.int64)
        self._table[0, 0] = next_id
        self._head = self._tail = 0  # columns of the oldest trajectory, and of the newest

    @property
    def oldest_id(self) -> int:
        """Id of the oldest row held; the next id where there is none."""
        return max(self._first, self.next_id - self.capacity)

    @property
    def is_open(self) -> bool:
        """Whether the next row goes on with the trajectory of the last one."""
        return bool(self.next_id > self._table[0, self._tail])

    @property
    def short(self) -> int:
        """How many trajectories have ended, and hold too few rows to be drawn from."""
        self._settle()
        firsts = np.maximum(self._table[0, self._head : self._tail + 1], self.oldest_id)
        return int((np.diff(firsts) < self.ranges.min_length).sum())

    def extend(self, n: int, firsts: Sequence[int] | Array = ()) -> None:
        """Take up the next n rows.

        Args:
            n: how many.
            firsts: ids with which new trajectories begin, ascending; the one after the last row's
                may be among them.
        """
        begun = np.asarray(firsts, np.int64)
        if len(begun):
            begun = begun[begun > self._table[0, self._tail]]
        if len(begun):
            self._grow_table(len(begun))
            at, end = self._tail, self._tail + len(begun)
            self._table[0, at + 1 : end + 1] = begun
            lengths = np.diff(self._table[0, at : end + 1])
            for sums, range_ in zip(self._table[1:], self.ranges, strict=True):
                sums[at + 1 : end + 1] = sums[at] + np.cumsum(
                    self.ranges.count_fitting(lengths, range_)
                )
            self._tail = end
        self.next_id += n

    def end(self) -> None:
        """Let the next row begin a new trajectory."""
        self.extend(0, [self.next_id])

    def begins(self, first_id: int, n: int) -> Array:
        """For each of n rows held whether a trajectory begins there; shape (n,) bool."""
        begins = np.zeros(n, np.bool_)
        firsts = self._table[0, self._head : self._tail + 1]
        low, high = np.searchsorted(firsts, [first_id, first_id + n])
        begins[firsts[low:high] - first_id] = True
        return begins

    def add_range(self, range_: tuple[int, int]) -> int:
        """Prepare to draw steps i for which i + a to i + b - 1 are in the same trajectory.

        Returns:
            The number by which `draw` and `locate` know it.
        """
        number = self.ranges.add(range_)
        if number + 1 == len(self._table):
            sums = np.zeros((1, self._table.shape[1]), np.int64)
            lengths = np.diff(self._table[0, : self._tail + 1])
            sums[0, 1 : self._tail + 1] = np.cumsum(
                self.ranges.count_fitting(lengths, self.ranges[number])
            )
            self._table = np.concatenate([self._table, sums])
        return number

    def draw(self, range_number: int, n: int, rng: np.random.Generator) -> Array | None:
        """Draw steps uniformly from all that fit the range, with replacement.

        Returns:
            Of each step the row in which its trajectory begins, as far as that is held, its
            position in that, and the trajectory's length; shape (3, n) int64. None where no step
            fits.
        """
        self._settle()
        range_ = self.ranges[range_number]
        firsts = self._table[0, self._head : self._tail + 2]
        sums = self._table[1 + range_number, self._head : self._tail + 2]
        # The oldest trajectory may have lost its beginning, and so the smallest of its numbers.
        oldest = self.oldest_id
        low = int(sums[1]) - self.ranges.count_fitting(
            int(firsts[1]) - max(int(firsts[0]), oldest), range_
        )
        high = int(sums[-1])
        if low == high:
            return None
        numbers = rng.integers(low, high, n)
        after = sums.searchsorted(numbers, "right")
        ends = firsts.take(after)
        # The last step that fits is `range_[1]` before the end, and has the highest number.
        ids = ends - (sums.take(after) - numbers) + (1 - range_[1])
        return self._find(np.maximum(firsts.take(after - 1), oldest), ids, ends)

    def locate(self, range_number: int, ids: Array) -> Array:
        """Return what `draw` does, of these steps.

        Raises:
            ValueError: a step that `draw` would never give.
        """
        self._settle()
        firsts = self._table[0, self._head : self._tail + 2]
        self.ranges.check_held(ids, self.oldest_id, self.next_id)
        found = np.searchsorted(firsts[:-1], ids, "right") - 1
        at = self._find(np.maximum(firsts[found], self.oldest_id), ids, firsts[found + 1])
        self.ranges.check(range_number, ids, at)
        return at

    def _find(self, begins: Array, ids: Array, ends: Array) -> Array:
        return np.stack([(begins - 1) % self.capacity, ids - begins, ends - begins])

    def _settle(self) -> None:
        """Skip the trajectories that are gone, and close the newest for now, in the spare column.

        That column is written anew before each use.
        """
        firsts, tail, oldest = self._table[0], self._tail, self.oldest_id
        self._head += int(firsts[self._head : tail + 1].searchsorted(oldest, "right")) - 1
        firsts[tail + 1] = self.next_id
        length = self.next_id - max(int(firsts[tail]), oldest)
        for sums, range_ in zip(self._table[1:], self.ranges, strict=True):
            sums[tail + 1] = sums[tail] + self.ranges.count_fitting(length, range_)

    def _grow_table(self, n: int) -> None:
        if self._tail + n + 2 > self._table.shape[1]:
            self._settle()
            live = self._table[:, self._head : self._tail + 1]
            size = max(_LEAST, 2 * (live.shape[1] + n + 1))
            self._table = np.zeros((len(live), size), np.int64)
            self._table[:, : live.shape[1]] = live
            self._tail -= self._head
            self._head = 0
