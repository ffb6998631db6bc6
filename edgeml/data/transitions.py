"""Transitions: sums of rewards over n steps and stacks of frames, beside the ring they lie in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeml.data.columns import Columns
from edgeml.data.ring import Ring
from edgeml.data.schema import Schema
from edgeml.data.spaces import zeros_of
from edgeml.data.tree import Array, leaves_of, paths_of

__all__ = ["Leaves", "Transitions", "transition_example"]


@dataclass(frozen=True)
class Leaves:
    """The numbers of a transition's leaves.

    Attributes:
        pairs: of each part of an observation, and the same part of the next one.
    """

    pairs: list[tuple[int, int]]
    rewards: int
    masks: int
    dones: int

    @property
    def at_the_end(self) -> list[int]:
        """Leaves that with n steps come from the last of them."""
        return [self.masks, self.dones, *(following for _, following in self.pairs)]

    @classmethod
    def find(cls, schema: Schema) -> Leaves | None:
        """Find them, or return None: these items are something else."""
        keyed = schema.keyed
        scalars = [keyed.get(name) for name in ("rewards", "masks", "dones")]
        if not all(type(leaf) is int and schema.shapes[leaf] == () for leaf in scalars):
            return None
        if "observations" not in keyed or "next_observations" not in keyed:
            return None
        now, following = keyed["observations"], keyed["next_observations"]
        # By their paths, since dicts may have the same keys in another order.
        numbers = dict(zip(paths_of(following), leaves_of(following, following), strict=True))
        paths = paths_of(now)
        if numbers.keys() != set(paths):
            return None
        pairs = [(a, numbers[path]) for a, path in zip(leaves_of(now, now), paths, strict=True)]
        for a, b in pairs:
            if (schema.shapes[a], schema.dtypes[a]) != (schema.shapes[b], schema.dtypes[b]):
                return None
        return cls(pairs, *scalars)


class Transitions:
    """Knows where episodes end in a ring of transitions, and looks ahead and back within them.

    Nothing here takes a lock.

    Args:
        ring: where the items lie.
        schema: of the items.
        n_step, discount, frame_stack: as for `ReplayBuffer`.

    Attributes:
        leaves: of a transition; None where items are none, and neither n_step nor frame_stack
            asks that they are.
        added: what a sample has besides the keys of an item: the dtypes of one number each.
        is_plain: a sample has what an item has, and no more.

    Raises:
        ValueError: n_step or frame_stack with items that are no transitions, or whose rewards are
            integers.
    """

    def __init__(
        self, ring: Ring, schema: Schema, n_step: int, discount: float, frame_stack: int
    ) -> None:
        self.leaves = Leaves.find(schema)
        self.is_plain = n_step == frame_stack == 1
        self.added: dict[str, np.dtype[Any]] = {}
        if self.leaves is None and not self.is_plain:
            raise ValueError(
                "n_step and frame_stack need items with observations, next_observations (alike), "
                "rewards, masks and dones"
            )
        if n_step > 1:
            self.added["discounts"] = np.dtype(np.float32)
            if self.leaves and schema.dtypes[self.leaves.rewards].kind in "biu":
                raise ValueError("discounted sums are no whole numbers: give rewards as floats")
        self._ring = ring
        self._n_step, self._discount, self._stack = n_step, discount, frame_stack
        # Of each row: whether its episode goes no further, and the id of that episode's first item.
        self._ends, self._begins = np.zeros(ring.n_rows, np.bool_), np.empty(0, np.int64)
        if frame_stack > 1:
            self._begins = np.zeros(ring.n_rows, np.int64)

    def shape_of(self, leaf: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that an item's part of a leaf has in a sample."""
        if self._stack > 1 and self.leaves and any(leaf in pair for pair in self.leaves.pairs):
            return (self._stack, *shape)
        return shape

    # What comes in --------------------------------------------------------------------------

    def mark(self, row: int, leaves: Sequence[Any]) -> None:
        """Note the episode of the item that gets the next id."""
        if self.leaves is None or self.is_plain:
            return
        if self._stack > 1:
            goes_on = self._goes_on(self._ring.latest + 1)
            self._begins[row] = self._begins[row - 1] if goes_on else self._ring.latest + 1
        self._ends[row] = leaves[self.leaves.dones]

    def mark_many(self, first_id: int, leaves: Sequence[Array], cuts: Sequence[int]) -> None:
        """Note the episodes of items from ``first_id`` on, before the ring knows of them."""
        if self.leaves is None or self.is_plain:
            return
        dones = np.asarray(leaves[self.leaves.dones], np.bool_)
        rows = self._ring.find_rows(first_id, len(dones))
        if 0 in cuts and first_id == self._ring.latest + 1:
            self._ends[rows[0] - 1] = True
        starts = np.zeros(len(dones), np.bool_)
        starts[1:] = dones[:-1]
        starts[0] = not self._goes_on(first_id)
        starts[list(cuts)] = True
        if self._stack > 1:
            ids = np.arange(first_id, first_id + len(dones))
            begins = np.where(starts, ids, 0 if starts[0] else self._begins[rows[0] - 1])
            self._begins[rows] = np.maximum.accumulate(begins)
        self._ends[rows] = dones
        self._ends[rows[:-1]] |= starts[1:]

    def interrupt(self) -> None:
        """End the episode under way."""
        if self._ring.latest >= self._ring.kept_from:
            self._ends[self._ring.find_row(self._ring.latest)] = True

    def _goes_on(self, item_id: int) -> bool:
        """Whether an item belongs to the episode of the one before, which must be the newest."""
        newest = self._ring.latest
        if item_id != newest + 1 or newest < self._ring.kept_from:
            return False
        return not self._ends[self._ring.find_row(newest)]

    # What goes out --------------------------------------------------------------------------

    def take(self, columns: Columns, index: Array, outs: Mapping[int, Array], added: int) -> None:
        """Write the transitions that begin in these rows into a batch.

        Args:
            columns: that they are in.
            index: (n,) rows.
            outs: arrays by the numbers of their leaves.
            added: the leaf of ``discounts``.
        """
        leaves = self.leaves
        assert leaves is not None
        outs = dict(outs)
        rows, taken = self._look_ahead(index)
        last = rows[np.arange(len(index)), taken - 1]
        if leaves.rewards in outs:
            within = np.arange(self._n_step) < taken[:, None]
            rewards = columns.look(leaves.rewards, rows).astype(np.float64)
            powers = self._discount ** np.arange(self._n_step)
            outs.pop(leaves.rewards)[:] = np.where(within, rewards * powers, 0).sum(axis=1)
        if added in outs:
            outs.pop(added)[:] = self._discount**taken * columns.look(leaves.masks, last)
        ahead = {leaf: outs.pop(leaf) for leaf in leaves.at_the_end if leaf in outs}
        if self._stack > 1:
            for a, b in leaves.pairs:
                if a in outs:
                    columns.take_stacks(a, self._look_back(index), outs.pop(a))
                if b in ahead:
                    stacks = self._look_back(last)[:, 1:]
                    columns.take_stacks(a, stacks, ahead.pop(b), (b, last))
        if outs:
            columns.take(index, outs)
        if ahead:
            columns.take(last, ahead)

    def _look_ahead(self, index: Array) -> tuple[Array, Array]:
        """For each row the n that follow it, itself first, and how many are of its episode."""
        rows = (index[:, None] + np.arange(self._n_step)) % self._ring.n_rows
        ends = self._ends[rows] | (rows == self._ring.find_row(self._ring.latest))
        ends[:, -1] = True
        return rows, ends.argmax(axis=1) + 1

    def _look_back(self, index: Array) -> Array:
        """For each row those of its stack, itself last: shape (n, k)."""
        stack = self._ring.find_ids(index)[:, None] + np.arange(1 - self._stack, 1)
        stack = np.maximum(stack, self._begins[index][:, None])
        return (stack - 1) % self._ring.n_rows


def transition_example(
    observation_space: Any, action_space: Any, extras: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return a transition of zeros, for any store's ``example``; see `ReplayBufferDataStore`."""
    observation = zeros_of(observation_space, "observations")
    return {
        "observations": observation,
        "next_observations": observation,
        "actions": zeros_of(action_space, "actions"),
        "rewards": np.float32(0),
        "masks": np.float32(0),
        "dones": np.False_,
        **(extras or {}),
    }
