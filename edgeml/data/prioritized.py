"""A replay buffer from which more is drawn of what there is most to learn from."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from edgeml.data.replay import ReplayBuffer
from edgeml.data.selectors import PrioritizedSelector

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
        self._priorities = PrioritizedSelector(alpha, beta, epsilon)
        super().__init__(capacity, selector=self._priorities, **options)

    @property
    def beta(self) -> float:
        """How far the weights make up for the uneven drawing."""
        return self._priorities.beta

    @beta.setter
    def beta(self, beta: float) -> None:
        self._priorities.beta = beta

    @property
    def stale(self) -> int:
        """How many priorities came too late: their items had been overwritten."""
        return self._priorities.stale

    @property
    def largest_weight(self) -> float:
        """The largest ``p ** (-alpha * beta)`` of an item that is held, 0 where none is.

        Samples' ``weights`` are divided by it. Those of several buffers are made those of one by
        multiplying each buffer's by its own, and dividing all by the largest.
        """
        with self.lock:
            return self._priorities.largest_weight()

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
            self._priorities.set_priorities(ids, priorities)
