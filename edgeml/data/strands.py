"""Trajectories whose rows lie among each other in a ring, as several lanes' steps come by turns.

`edgeml.data.spans` is for those that follow each other, and needs to look at none of the rows.
Here each row knows its trajectory's number. To sort the rows by it puts each trajectory in one
piece, and tells where in the ring its rows are. That is done when steps are drawn, once for all
that came in.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeml.data.spans import Spans
from edgeml.data.tree import Array

__all__ = ["Strands"]


class Strands:
    """The trajectories of a ring. Nothing here takes a lock.

    Args:
        spans: the same, up to now.

    Attributes:
        next_id: of the row that comes next.
        ranges: of steps, as `Spans` has them.
    """

    def __init__(self, spans: Spans) -> None:
        self.ranges = spans.ranges
        self._capacity = spans.capacity
        self.next_id, self._first = spans.next_id, spans.oldest_id
        # Of each row the number of its trajectory.
        self._of = np.zeros(self._capacity, np.int64)
        n = self.next_id - self._first
        self._of[self._find_rows(self._first, n)] = np.cumsum(spans.begins(self._first, n))
        self._next = n + 1  # the number of a trajectory that begins
        self._sorted_at = 0  # the next id when rows were sorted

    @property
    def newest(self) -> int:
        """The number of the newest row's trajectory."""
        return int(self._of[(self.next_id - 2) % self._capacity])

    @property
    def oldest_id(self) -> int:
        """Id of the oldest row held; the next id where there is none."""
        return max(self._first, self.next_id - self._capacity)

    def add_range(self, range_: tuple[int, int]) -> int:
        """Prepare to draw steps as `Spans.add_range` does."""
        return self.ranges.add(range_)

    def count_short(self, opened: set[int]) -> int:
        """Return how many trajectories, but for those of these numbers, are too short to draw."""
        self._sort()
        short = np.flatnonzero(self._lengths < self.ranges.min_length)
        numbers = self._of[self.rows[self._starts[short]]].tolist()
        return sum(number not in opened for number in numbers)

    def continue_with(self, begins: Array, places: Array, number: int) -> int:
        """Take up rows of one lane; `extend` counts them, after those of all lanes.

        Args:
            begins: of each whether a trajectory begins there, (k,) bool.
            places: of each how many rows there are from the next id on before it, (k,).
            number: of the trajectory that goes on if the first doesn't begin one.

        Returns:
            The number of the last one's trajectory.
        """
        counts = np.cumsum(begins)
        numbers = np.where(counts == 0, number, self._next + counts - 1)
        self._next += int(counts[-1])
        kept = slice(max(0, len(places) - self._capacity), None)
        self._of[(self.next_id - 1 + places[kept]) % self._capacity] = numbers[kept]
        return int(numbers[-1])

    def extend(self, n: int) -> None:
        """Count n rows more, for all of which `continue_with` has been called."""
        self.next_id += n

    def draw(self, range_number: int, n: int, rng: np.random.Generator) -> Array | None:
        """Draw steps uniformly from all that fit the range, with replacement.

        Returns:
            Of each step where in `rows` its trajectory begins, its position in that, and the
            trajectory's length; shape (3, n) int64. None where no step fits.
        """
        self._sort()
        range_ = self.ranges[range_number]
        sums = np.cumsum(self.ranges.count_fitting(self._lengths, range_))
        if not len(sums) or not sums[-1]:
            return None
        numbers = rng.integers(0, sums[-1], n)
        found = sums.searchsorted(numbers, "right")
        before = np.where(found > 0, sums[found - 1], 0)
        return np.stack([self._starts[found], numbers - before - range_[0], self._lengths[found]])

    def locate(self, range_number: int, ids: Array) -> Array:
        """Return what `draw` does, of these steps.

        Raises:
            ValueError: a step that `draw` would never give.
        """
        self._sort()
        self.ranges.check_held(ids, self.oldest_id, self.next_id)
        place_of = np.empty(len(self._places), np.int64)
        place_of[self._places] = np.arange(len(self._places))
        places = place_of[ids - self.oldest_id]
        found = self._starts.searchsorted(places, "right") - 1
        at = np.stack([self._starts[found], places - self._starts[found], self._lengths[found]])
        self.ranges.check(range_number, ids, at)
        return at

    def sort_held(self) -> tuple[Array, Array]:
        """Return the rows held, sorted by trajectory, as positions from the oldest one on.

        Returns:
            They, (n,), and which of them begin trajectories, as positions among them.
        """
        self._sort()
        return self._places, self._starts

    def _sort(self) -> None:
        if self._sorted_at == self.next_id:
            return
        first = self.oldest_id
        n = self.next_id - first
        rows = self._find_rows(first, n)
        # In the order of their first rows held, so that a loaded store draws as the saved one.
        _, firsts, which = np.unique(self._of[rows], return_index=True, return_inverse=True)
        self._places = np.argsort(firsts[which], kind="stable")
        firsts = firsts[which[self._places]]
        self._starts = np.flatnonzero(np.append(True, firsts[1:] != firsts[:-1])[:n])
        self._lengths = np.diff(np.append(self._starts, n))
        # Not written to again, for a device may use this very memory.
        self.rows = np.zeros(self._capacity, np.int32)
        self.rows[:n] = rows[self._places]
        self._sorted_at = self.next_id

    def _find_rows(self, first_id: int, n: int) -> Any:
        return np.arange(first_id - 1, first_id - 1 + n) % self._capacity
