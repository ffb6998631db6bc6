"""Prioritized replay: items are drawn in proportion to how much is to be learned from them.

Schaul et al. 2016, "Prioritized Experience Replay", arXiv 1511.05952; the proportional variant.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from edgeml.data.batch import Batch
from edgeml.data.replay import ReplayBuffer
from edgeml.data.sumtree import SumTree
from edgeml.data.tree import Array

__all__ = ["PrioritizedReplayBuffer"]


class PrioritizedReplayBuffer(ReplayBuffer):
    """A replay buffer that draws item i with probability ``p_i ** alpha / sum(p ** alpha)``.

    Samples have two more keys: ``ids`` (int64), for `update_priorities`, and ``weights``
    (float32), by which the loss of each item is multiplied to make up for its being drawn more
    often: ``(n * P(i)) ** -beta``, divided by the largest that an item in the buffer has, so that
    they are at most 1. The batch is *stratified*: one item from each of equal parts of the sum.
    With ``n_step`` a priority is that of the first of the n transitions. ::

        batch = store.sample(256)
        errors = update(batch)  # weighs each item's loss with batch["weights"]
        store.update_priorities(batch["ids"], np.abs(errors))

    Args:
        capacity: how many items are held at most.
        alpha: how much priorities count: 0 not at all, 1 fully (default 0.6).
        epsilon: added to every priority, so that an item without error is drawn again some time
            (default 1e-6).
        options: those of `ReplayBuffer`.

    Attributes:
        beta: how far the weights make up for the uneven drawing, from 0 to 1 (default 0.4). The
            paper lets it grow to 1 over the training; set it as you please.
    """

    def __init__(
        self,
        capacity: int,
        *,
        alpha: float = 0.6,
        beta: float = 0.4,
        epsilon: float = 1e-6,
        **options: Any,
    ) -> None:
        if not (0 <= alpha < math.inf and 0 < epsilon < math.inf):
            raise ValueError(f"alpha is from 0 up and epsilon above, got {alpha} and {epsilon}")
        self.beta = beta
        self._alpha, self._epsilon = alpha, epsilon
        super().__init__(capacity, **options)
        self._tree = SumTree(self._n_rows)
        self._in_tree = 0  # the id up to which items have their place in the tree
        self._highest = 1.0  # of all priorities ever given: new items get it, to be drawn soon
        self._stale = 0

    @property
    def stale(self) -> int:
        """How many priorities came too late: their items had been overwritten."""
        return self._stale

    def update_priorities(self, ids: ArrayLike, priorities: ArrayLike) -> None:
        """Give items new priorities; those that are no longer held are counted in `stale`.

        Args:
            ids: shape (n,), as a sample has them. Of one that comes twice, the last counts.
            priorities: shape (n,), from 0 up, such as absolute temporal-difference errors.

        Raises:
            ValueError: of different lengths, ids that are no integers or were never given, or
                priorities that are negative, not finite or, to the power of alpha, above 1e308 /
                capacity; nothing is changed then.
        """
        ids = np.asarray(ids)
        priorities = np.asarray(priorities, np.float64)
        if ids.ndim != 1 or ids.shape != priorities.shape:
            raise ValueError(
                f"ids and priorities of one length, got {ids.shape}, {priorities.shape}"
            )
        if not len(ids):
            return
        if ids.dtype.kind not in "iu":  # float32 would take one id for another
            raise ValueError(f"ids are whole numbers, got {ids.dtype}")
        ids = ids.astype(np.int64, copy=False)
        if not (np.isfinite(priorities) & (priorities >= 0)).all():
            raise ValueError("priorities are finite numbers from 0 up")
        with self.lock:
            if ids.min() < 1 or ids.max() > self._latest:
                raise ValueError(f"ids are from 1 to {self._latest}: take those of a sample")
            self._catch_up()
            held = ids > self._latest - len(self)
            stale = len(ids) - int(np.count_nonzero(held))
            if stale:
                ids, priorities = ids[held], priorities[held]
            if len(ids):
                with np.errstate(over="ignore"):  # the tree refuses what is infinite
                    values = (priorities + self._epsilon) ** self._alpha
                self._tree.set((ids - 1) % self._n_rows, values)
                self._highest = max(self._highest, float(priorities.max()))
            self._stale += stale

    def reset(self, next_id: int | None = None) -> None:
        """Forget all items; see the base class."""
        with self.lock:
            super().reset(next_id)
            self._tree = SumTree(self._n_rows)
            self._in_tree = self._latest

    def state(self) -> Any:
        """Return what the store knows beyond its items."""
        return {**super().state(), "highest": self._highest, "stale": self._stale}

    def set_state(self, state: Any) -> None:
        """Take up what `state` gave."""
        super().set_state(state)
        # That of another kind of buffer has none.
        self._highest = float(state.get("highest", self._highest))
        self._stale = int(state.get("stale", 0))

    def dump(self, from_id: int, *, limit: int | None = None) -> tuple[Batch, Any]:
        """Return items as `ReplayBuffer.dump` does, and their priorities."""
        with self.lock:
            self._catch_up()
            batch, extra = super().dump(from_id, limit=limit)
            rows = self._rows_of(batch.first_id, len(batch))
            return batch, {**(extra or {}), "priorities": self._tree.get(rows)}

    def restore(self, batch: Batch, extra: Any) -> None:
        """Insert what `dump` gave."""
        with self.lock:
            super().restore(batch, extra)
            self._catch_up()
            if extra is not None and "priorities" in extra:  # of another kind of buffer: none
                kept = min(len(batch), len(self))
                rows = self._rows_of(self._latest + 1 - kept, kept)
                self._tree.set(rows, np.asarray(extra["priorities"])[len(batch) - kept :])

    def _adds(self) -> list[tuple[str, np.dtype[Any]]]:
        return [
            *super()._adds(),
            ("ids", np.dtype(np.int64)),
            ("weights", np.dtype(np.float32)),
        ]

    def _catch_up(self) -> None:
        """Give new items their places in the tree, and take those of items that are gone."""
        new = min(self._latest - self._in_tree, len(self))
        if new:
            first = self._latest + 1 - new
            self._set(first, new, (self._highest + self._epsilon) ** self._alpha)
            # Rows that are kept for the frames of others.
            older = max(self._kept_from, self._latest + 1 - self._n_rows)
            self._set(older, self._latest + 1 - len(self) - older, 0.0)
            self._in_tree = self._latest

    def _set(self, first_id: int, n: int, value: float) -> None:
        start = (first_id - 1) % self._n_rows
        self._tree.set_range(start, min(start + n, self._n_rows), value)
        self._tree.set_range(0, max(0, start + n - self._n_rows), value)

    def _draw_rows(self, n: int, rng: np.random.Generator) -> Array:
        self._catch_up()
        # Not in their order in the ring, for a batch may be cut into smaller ones.
        return self._tree.find((rng.permutation(n) + rng.random(n)) * (self._tree.total / n))

    def _choose(self, rows: Array, n: int, rng: np.random.Generator) -> Array:
        values = self._tree.get(rows)
        return rng.choice(rows, n, p=values / values.sum())

    def _fill(self, outs: dict[int, Array], index: Array) -> None:
        outs = dict(outs)
        ids, weights = (outs.pop(self._added_leaf(key), None) for key in ("ids", "weights"))
        super()._fill(outs, index)
        if ids is not None:
            ids[:] = self._ids_of(index)
        if weights is not None:
            # n and the sum are the same in all weights, and so in the largest: they cancel.
            weights[:] = (self._tree.get(index) / self._tree.smallest) ** -self.beta
