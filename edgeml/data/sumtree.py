"""Numbers that are drawn from in proportion to their size: the sum tree of prioritized replay."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from edgeml.data.memory import zeros
from edgeml.data.tree import Array

__all__ = ["SumTree"]

# Found by measurement at a million leaves. What costs is the prefix sums, of as many numbers for
# each draw as a node has children, and of the whole top once after a change.
_CHILDREN = 16  # of a node
_TOP = 4096  # nodes at most in the top level, which is searched as one


class SumTree:
    """An array of numbers that finds where a running sum over them passes a given mass.

    Schaul et al. 2016 (Prioritized Experience Replay, arXiv 1511.05952) draw items in proportion
    to their priorities with it: cut [0, `total`) into equal parts and `find` the leaf under a
    random mass from each. Here a node has many children, not two, and all masses go down a level
    in one step. What a node holds is always computed anew from its children, so rounding errors
    don't add up however long the tree is used.

    All leaves are 0 at first. A value is from 0 to 1e308 / capacity, so that sums stay finite.
    Not thread-safe: its owner has a lock.

    Args:
        capacity: the number of leaves.

    Raises:
        ValueError: capacity is below 1, or, by the methods, a value or a mass is out of its range
            or of a shape that doesn't fit. The tree is as it was.
        IndexError: by the methods, for a leaf that isn't there. The tree is as it was.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self._capacity = capacity
        self._largest = 1e308 / capacity
        # Leaves first. A level is padded with zeros, to full nodes of the level above it.
        width = _pad_to_nodes(capacity)
        self._leaves = zeros((width,), np.dtype(np.float64))
        # Beside each level's sums, the smallest positive value below; 0 or inf where none is.
        self._levels = [(self._leaves, self._leaves)]
        while width > _TOP:
            width = _pad_to_nodes(width // _CHILDREN)
            self._levels.append((np.zeros(width), np.zeros(width)))
        # A range that was set is added up only when needed, so setting it bit by bit is cheap.
        self._start = self._stop = 0
        self._prefix: Array | None = None  # of the top level, with a 0 before; None: out of date
        self._smallest = math.inf

    def __len__(self) -> int:
        return self._capacity

    @property
    def total(self) -> float:
        """The sum of all values."""
        return float(self._refresh()[-1])

    @property
    def smallest(self) -> float:
        """The smallest positive value; inf where all are 0."""
        self._refresh()
        return self._smallest

    def set(self, index: Array, value: Array | float) -> None:
        """Set leaves.

        Args:
            index: (n,) int64; of a leaf that is in it twice, the last value counts.
            value: (n,) float64, or one number for all.
        """
        index = self._check_indices(index)
        self._leaves[index] = self.check(value)
        self._prefix = None
        node = index
        for (sums, smallest), above in pairwise(self._levels):
            node = node // _CHILDREN
            above[0][node] = _sum(_children_of(node, sums))
            above[1][node] = _smallest_positive(_children_of(node, smallest))

    def set_range(self, start: int, stop: int, value: Array | float) -> None:
        """Set the leaves from ``start`` to before ``stop``: (stop - start,) float64, or one."""
        if not 0 <= start <= stop <= self._capacity:
            raise IndexError(f"no range {start}:{stop} in a sum tree of {self._capacity}")
        self._leaves[start:stop] = self.check(value)
        self._prefix = None
        if stop < self._start or self._stop < start:  # not side by side
            self._add_up_range()
            self._start, self._stop = start, stop
        else:
            self._start, self._stop = min(start, self._start), max(stop, self._stop)

    def get(self, index: Array) -> Array:
        """Return the values of leaves: (n,) int64 -> (n,) float64."""
        return self._leaves.take(self._check_indices(index), mode="clip")

    def find(self, mass: Array) -> Array:
        """Return for each mass the leaf in whose part of the running sum it lies.

        That is the leaf i with ``sum(values[:i]) <= mass < sum(values[:i + 1])``, within rounding.
        It is never one of value 0. A mass of `total` or above is taken as one just below it.

        Args:
            mass: (n,) float64, from 0.

        Returns:
            (n,) int64

        Raises:
            ValueError: a mass is negative or not a number, or all values are 0.
        """
        mass = np.asarray(mass, np.float64)
        if not (mass >= 0).all():
            raise ValueError("a mass must be 0 or above")
        prefix = self._refresh()
        if not prefix[-1]:
            raise ValueError("nothing can be found in a sum tree whose values are all 0")
        # What is left of a mass is below the sum of the node that it is in, but for rounding. Held
        # to that, it always has a child to go to, the first whose prefix sum is above it; and that
        # child's sum is not 0, since the prefix sum before it is lower.
        mass = np.minimum(mass, np.nextafter(prefix[-1], 0))
        node = prefix.searchsorted(mass, "right") - 1
        mass -= prefix[node]
        row = np.arange(len(mass))
        inner = np.zeros((len(mass), 1 + _CHILDREN))  # the children's prefix sums, 0 before them
        for sums, _ in self._levels[-2::-1]:
            _children_of(node, sums).cumsum(axis=1, out=inner[:, 1:])
            np.minimum(mass, np.nextafter(inner[:, -1], 0), out=mass)
            child = (inner[:, 1:] > mass[:, None]).argmax(axis=1)
            mass -= inner[row, child]
            node *= _CHILDREN
            node += child
        return node

    def _check_indices(self, index: Array) -> Array:
        index = np.asarray(index, np.int64)
        # Negative ones are the largest when seen as unsigned.
        if index.size and index.view(np.uint64).max() >= self._capacity:
            raise IndexError(f"an index is not within a sum tree of {self._capacity}")
        return index

    def check(self, value: Array | float) -> Array | float:
        """Return values as they are if leaves can have them.

        Raises:
            ValueError: they can't.
        """
        if isinstance(value, float):  # several microseconds less than as an array
            low = high = value
        else:
            value = np.asarray(value, np.float64)
            low, high = value.min(initial=0.0), value.max(initial=0.0)
        if not (low >= 0 and high <= self._largest):  # so that nan is refused, too
            raise ValueError(f"a value must be from 0 to {self._largest}")
        return value

    def _add_up_range(self) -> None:
        start, stop = self._start, self._stop
        self._start = self._stop = 0
        if start == stop:
            return
        for (sums, smallest), above in pairwise(self._levels):
            start, stop = start // _CHILDREN, -(-stop // _CHILDREN)
            children = slice(start * _CHILDREN, stop * _CHILDREN)
            above[0][start:stop] = _sum(sums[children].reshape(-1, _CHILDREN))
            above[1][start:stop] = _smallest_positive(smallest[children].reshape(-1, _CHILDREN))

    def _refresh(self) -> Array:
        """Bring everything up to date and return the prefix sums of the top level."""
        if self._prefix is None:
            self._add_up_range()
            sums, smallest = self._levels[-1]
            self._prefix = np.zeros(1 + len(sums))
            sums.cumsum(out=self._prefix[1:])
            self._smallest = float(_smallest_positive(smallest[None])[0])
        return self._prefix


def _pad_to_nodes(children: int) -> int:
    return -(-children // _CHILDREN) * _CHILDREN


def _children_of(node: Array, level: Array) -> Array:
    # mode="raise" is slower, and the nodes are in range.
    return level.reshape(-1, _CHILDREN).take(node, axis=0, mode="clip")


def _sum(children: Array) -> Array:
    # numpy reduces columns three times as fast as short rows.
    sums: Array = np.ascontiguousarray(children.T).sum(axis=0)
    return sums


def _smallest_positive(children: Array) -> Array:
    children = np.ascontiguousarray(children.T)
    smallest: Array = children.min(axis=0, where=children > 0, initial=math.inf)
    return smallest
