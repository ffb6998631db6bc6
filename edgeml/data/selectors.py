"""How items are chosen to be sampled: a part that a replay buffer is given.

Prioritized: Schaul et al. 2016, "Prioritized Experience Replay", arXiv 1511.05952; the
proportional variant.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgeml.core.errors import shown
from edgeml.data.ring import Ring
from edgeml.data.sumtree import SumTree
from edgeml.data.tree import Array

__all__ = ["PrioritizedSelector", "Selector", "UniformSelector"]


class Selector(ABC):
    """Chooses rows of a ring. It belongs to one buffer, which calls it under its lock.

    It is not told of inserts: it sees from `ring` what is new when it is asked.

    Attributes:
        ring: the buffer's, from `attach` on.
        added: what a sample has besides the keys of an item: the dtypes of one number each.
    """

    ring: Ring
    added: Mapping[str, np.dtype[Any]] = {}

    def attach(self, ring: Ring) -> None:
        """Choose among this ring's items from now on.

        Raises:
            ValueError: it has a ring already.
        """
        if hasattr(self, "ring"):
            raise ValueError("a selector serves one buffer: make another one")
        self.ring = ring

    @abstractmethod
    def draw(self, n: int, rng: np.random.Generator) -> Array:
        """Draw n items that are held, of which there is at least one.

        Returns:
            Their rows, (n,) int64; the caller may change the array.
        """

    @abstractmethod
    def draw_among(self, rows: Array, n: int, rng: np.random.Generator) -> Array:
        """Draw n of these rows only, as `draw` does of all."""

    def fill_added(self, rows: Array, outs: Mapping[str, Array]) -> None:
        """Write what `added` tells of the drawn rows into arrays: those that are wanted."""
        del rows, outs

    def mass(self) -> float:
        """Return what the probability of an item is a share of; here, how many are held."""
        return float(self.ring.held)

    def reset(self) -> None:
        """Forget all items, as the ring just has."""
        return  # it knows of none

    # What checkpoints need ------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what it knows beyond single items: plain values."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave, as far as it is there."""
        del state

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise where `set_state` is not to be given this, whoever made it."""
        del state

    def check_restore(self, n: int, extra: Mapping[str, Any]) -> None:
        """Raise where `restore` is not to be given this, whoever made it."""
        del n, extra

    def dump(self, first_id: int, n: int) -> dict[str, Any]:
        """Return what it knows of n items: plain values and arrays."""
        del first_id, n
        return {}

    def restore(self, n: int, extra: Mapping[str, Any]) -> None:
        """Take up what `dump` gave, as far as it is there, of the n newest items."""
        del n, extra


class UniformSelector(Selector):
    """Draws each item with the same probability."""

    def draw(self, n: int, rng: np.random.Generator) -> Array:
        """See `Selector.draw`."""
        ring = self.ring
        held = ring.held
        # Twice as fast as rng.integers, and as even: it is off by less than 2**-53 of the length.
        index = rng.random(n)
        index *= held
        rows = index.astype(np.int64)
        if held < ring.n_rows:  # or all rows are held, whichever the oldest is
            rows += (ring.latest - held) % ring.n_rows
            rows[rows >= ring.n_rows] -= ring.n_rows
        return rows

    def draw_among(self, rows: Array, n: int, rng: np.random.Generator) -> Array:
        """See `Selector.draw_among`."""
        return rng.choice(rows, n)


class PrioritizedSelector(Selector):
    """Draws items in proportion to their priorities; see `PrioritizedReplayBuffer`.

    Args:
        alpha: how much priorities count.
        beta: how far the weights make up for the uneven drawing.
        epsilon: added to every priority.

    Attributes:
        beta: as given; it may be set at any time.
        stale: how many priorities came too late: their items had been overwritten.
    """

    added: Mapping[str, np.dtype[Any]] = {
        "ids": np.dtype(np.int64),
        "weights": np.dtype(np.float32),
    }

    def __init__(self, alpha: float = 0.6, beta: float = 0.4, epsilon: float = 1e-6) -> None:
        if not (0 <= alpha < math.inf and 0 < epsilon < math.inf):
            raise ValueError(f"alpha is from 0 up and epsilon above, got {alpha} and {epsilon}")
        self.beta = beta
        self.stale = 0
        self._alpha, self._epsilon = alpha, epsilon
        self._highest = 1.0  # of all priorities ever given: new items get it, to be drawn soon

    def attach(self, ring: Ring) -> None:
        """See `Selector.attach`."""
        super().attach(ring)
        self.reset()

    def reset(self) -> None:
        """See `Selector.reset`."""
        self._tree = SumTree(self.ring.n_rows)
        self._in_tree = self.ring.latest  # the id up to which items have their place in the tree

    def draw(self, n: int, rng: np.random.Generator) -> Array:
        """See `Selector.draw`."""
        self._catch_up()
        # Not in their order in the ring, for a batch may be cut into smaller ones.
        return self._tree.find((rng.permutation(n) + rng.random(n)) * (self._tree.total / n))

    def draw_among(self, rows: Array, n: int, rng: np.random.Generator) -> Array:
        """See `Selector.draw_among`."""
        values = self._tree.get(rows)
        return rng.choice(rows, n, p=values / values.sum())

    def fill_added(self, rows: Array, outs: Mapping[str, Array]) -> None:
        """See `Selector.fill_added`."""
        if "ids" in outs:
            outs["ids"][:] = self.ring.find_ids(rows)
        if "weights" in outs:
            # n and the sum are the same in all weights, and so in the largest: they cancel.
            outs["weights"][:] = (self._tree.get(rows) / self._tree.smallest) ** -self.beta

    def mass(self) -> float:
        """See `Selector.mass`: here, the sum of all priorities to the power of alpha."""
        self._catch_up()
        return float(self._tree.total)

    def largest_weight(self) -> float:
        """Return the largest weight in the buffer as it is before weights are divided by it.

        That is without the number of items and the sum, which are the same in all of them.
        """
        self._catch_up()
        return float(self._tree.smallest**-self.beta) if self.ring.held else 0.0

    def set_priorities(self, ids: Array, priorities: Array) -> None:
        """Give items new priorities; those that are no longer held are counted in `stale`.

        Args:
            ids: (n,) int64, n from 1 up. Of one that comes twice, the last counts.
            priorities: (n,) float64, from 0 up.

        Raises:
            ValueError: an id that was never given, or a priority that is too high; nothing is
                changed then.
        """
        ring = self.ring
        if ids.min() < 1 or ids.max() > ring.latest:
            raise ValueError(f"ids are from 1 to {ring.latest}: take those of a sample")
        self._catch_up()
        held = ids >= ring.oldest_id
        stale = len(ids) - int(np.count_nonzero(held))
        if stale:
            ids, priorities = ids[held], priorities[held]
        if len(ids):
            with np.errstate(over="ignore"):  # the tree refuses what is infinite
                values = (priorities + self._epsilon) ** self._alpha
            self._tree.set((ids - 1) % ring.n_rows, values)
            self._highest = max(self._highest, float(priorities.max()))
        self.stale += stale

    def state(self) -> dict[str, Any]:
        """See `Selector.state`."""
        return {"highest": self._highest, "stale": self.stale}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """See `Selector.set_state`."""
        self._highest = float(state.get("highest", self._highest))
        self.stale = int(state.get("stale", 0))

    def check_state(self, state: Mapping[str, Any]) -> None:
        """See `Selector.check_state`."""
        highest = state.get("highest", 0.0)
        if type(highest) is not float or not highest >= 0:
            raise TypeError(f"the highest priority is a number from 0 up, not {shown(highest, 40)}")
        with np.errstate(over="ignore"):
            self._tree.check((np.float64(highest) + self._epsilon) ** self._alpha)

    def check_restore(self, n: int, extra: Mapping[str, Any]) -> None:
        """See `Selector.check_restore`."""
        priorities = np.asarray(extra.get("priorities", np.zeros(n)))
        if priorities.shape != (n,) or priorities.dtype != np.float64:
            raise TypeError(f"{n} items with priorities {priorities.shape} {priorities.dtype}")
        self._tree.check(priorities)

    def dump(self, first_id: int, n: int) -> dict[str, Any]:
        """See `Selector.dump`."""
        self._catch_up()
        return {"priorities": self._tree.get(self.ring.find_rows(first_id, n))}

    def restore(self, n: int, extra: Mapping[str, Any]) -> None:
        """See `Selector.restore`."""
        self._catch_up()
        if "priorities" in extra:
            kept = min(n, self.ring.held)
            rows = self.ring.find_rows(self.ring.latest + 1 - kept, kept)
            self._tree.set(rows, np.asarray(extra["priorities"])[n - kept :])

    def _catch_up(self) -> None:
        """Give new items their places in the tree, and take those of items that are gone."""
        ring = self.ring
        new = min(ring.latest - self._in_tree, ring.held)
        if new:
            first = ring.latest + 1 - new
            self._set(first, new, (self._highest + self._epsilon) ** self._alpha)
            # Rows that are kept for the frames of others.
            older = ring.oldest_kept
            self._set(older, ring.oldest_id - older, 0.0)
            self._in_tree = ring.latest

    def _set(self, first_id: int, n: int, value: float) -> None:
        n_rows = self.ring.n_rows
        start = (first_id - 1) % n_rows
        self._tree.set_range(start, min(start + n, n_rows), value)
        self._tree.set_range(0, max(0, start + n - n_rows), value)
