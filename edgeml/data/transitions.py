"""Transitions: sums of rewards over n steps and stacks of frames, beside the ring they lie in."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeml.data.batch import MOST_LANES
from edgeml.data.columns import Columns, Order, as_slice, equal_bytes, is_stack
from edgeml.data.lanes import Numbers, slot_of
from edgeml.data.ring import Ring
from edgeml.data.schema import Schema
from edgeml.data.spaces import zeros_of
from edgeml.data.tree import Array, leaves_of, paths_of

__all__ = ["LANE", "Transitions", "count_spare_rows", "transition_example"]

LANE = "lane"
"""The key of an item that says which of several environments it is of."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Leaves:
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
    def find(cls, schema: Schema) -> _Leaves | None:
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
    """The transitions in a ring: which follows upon which, and what n steps and frames make of it.

    An item follows upon the one before in its lane unless that ended its episode, `interrupt` was
    called, or its observation is, in any byte, another than that one led to. Items that follow
    upon each other are a *run*. A lane here is one of the store's, by its number, and within that
    one of those that items tell themselves. Nothing here takes a lock.

    Args:
        ring: where the items lie, with `count_spare_rows` more than items that are held.
        schema: of the items.
        n_step, discount, frame_stack, lanes: as for `ReplayBuffer`.

    Attributes:
        columns: the rows of the ring.
        breaks: how many items began a run only because their observation was another.
        added: what a sample has besides the keys of an item: the dtypes of one number each.
        is_plain: a sample has what an item has, and no more.

    Raises:
        ValueError: n_step, frame_stack or lanes, with items that lack what these need.
    """

    def __init__(
        self,
        ring: Ring,
        schema: Schema,
        n_step: int,
        discount: float,
        frame_stack: int,
        lanes: int,
    ) -> None:
        leaves = _Leaves.find(schema)
        self._schema = schema
        self.is_plain = n_step == frame_stack == 1
        if leaves is None and not (self.is_plain and lanes == 1):
            raise ValueError(
                "n_step, frame_stack and lanes need items with observations, next_observations "
                "(alike), rewards, masks and dones"
            )
        self.added: dict[str, np.dtype[Any]] = {}
        if n_step > 1:
            self.added["discounts"] = np.dtype(np.float32)
            if leaves and schema.dtypes[leaves.rewards].kind in "biu":
                raise ValueError("discounted sums are no whole numbers: give rewards as floats")
        self.breaks = 0
        self.columns = Columns(schema, ring.n_rows, leaves.pairs if leaves else ())
        self._ring, self._leaves = ring, leaves
        self._lane_leaf = None if lanes == 1 else _find_lane(schema)
        self._n_step, self._discount, self._stack = n_step, discount, frame_stack
        self._keys = lanes
        self._several = (
            lanes > 1
        )  # lanes, so that items may be far from those that they follow upon
        # Of each slot the number of the store's lane that was written there last.
        self._numbers = np.zeros(MOST_LANES, np.int64)
        # Of each lane the id of the newest item, and whether another may follow upon it.
        self._last = np.zeros(MOST_LANES * lanes, np.int64)
        self._open = np.zeros(MOST_LANES * lanes, np.bool_)
        # Of each row the rows of the items before and after it in its run; itself where none is.
        self._before = np.arange(ring.n_rows if frame_stack > 1 else 0)
        self._after = np.arange(0 if self.is_plain else ring.n_rows)
        pairs = [] if leaves is None else leaves.pairs
        # Where observations are kept once, that tells whether they are equal.
        self._compared = [pair for pair in pairs if not self.columns.keeps_once(pair[0])]
        self._follows = len(self._compared) < len(pairs) or not self.is_plain
        self._warned = False

    def shape_of(self, leaf: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that an item's part of a leaf has in a sample."""
        if self._stack > 1 and self._leaves and any(leaf in pair for pair in self._leaves.pairs):
            return (self._stack, *shape)
        return shape

    def find_packed(self) -> list[tuple[int, int]]:
        """Return the pairs of leaves, an observation and the next one, that can be packed.

        Raises:
            ValueError: there are none; or n_step is such that they don't overlap.
        """
        shapes, packed = self._schema.shapes, []
        for pair in self._leaves.pairs if self._leaves else ():
            shape = self.shape_of(pair[0], shapes[pair[0]])
            if is_stack(shape):
                packed.append(pair)
                if self._n_step > 1 and shape[0] > 1:
                    raise ValueError(
                        "pack_obs_and_next_obs needs stacks that are one frame apart, and those "
                        f"of n_step={self._n_step} are further: leave it out"
                    )
        if not packed:
            raise ValueError(
                "pack_obs_and_next_obs needs transitions with stacks of frames, (T, H, W, C), "
                "among observations and next_observations; make the store with frame_stack=, or "
                "leave it out"
            )
        return packed

    # What comes in --------------------------------------------------------------------------

    def check(self, leaves: Sequence[Any]) -> None:
        """Raise what writing several items, with a leading axis, would, and write nothing."""
        if self._lane_leaf is not None:
            self._check_lanes(leaves[self._lane_leaf])

    def write(self, leaves: Sequence[Any], number: int = 0) -> None:
        """Write the item that gets the next id.

        Args:
            leaves: of the item.
            number: of the store's lane that it is of.

        Raises:
            ValueError: the lane that it tells is none of those that there are; nothing is written.
        """
        ring = self._ring
        item_id = ring.latest + 1
        row = ring.latest % ring.n_rows
        if not self._follows:
            self.columns.write(row, leaves)
            return
        lane = 0 if self._lane_leaf is None else self._check_lanes(leaves[self._lane_leaf])
        if number:
            lane += self._enter(number)
        last = int(self._last[lane])
        before = (last - 1) % ring.n_rows if 0 < last > item_id - ring.n_rows else -1
        same = self.columns.write(row, leaves, before)
        self._last[lane] = item_id
        if self.is_plain:
            return
        follows = before >= 0 and bool(self._open[lane])
        if follows:
            for a, b in self._compared:
                kept = self.columns.look(b, np.array(before))
                same = same and kept.tobytes() == np.asarray(leaves[a]).tobytes()
            follows = same
            if not follows:
                self._count_breaks(1)
        self._link(row, before if follows else row)
        assert self._leaves is not None
        self._open[lane] = not leaves[self._leaves.dones]

    def write_many(
        self,
        first_id: int,
        leaves: Sequence[Array],
        n: int,
        cuts: Sequence[int] = (),
        numbers: Numbers = 0,
    ) -> None:
        """Write n items, at most as many as there are rows.

        Args:
            first_id: of the first; those between the newest and this one are not kept.
            leaves: of all, with a leading axis.
            n: how many.
            cuts: positions of items that follow upon none of those before.
            numbers: of the store's lanes that they are of.

        Raises:
            ValueError: a lane is none of those that there are; nothing is written.
        """
        ring = self._ring
        row = ring.find_row(first_id)
        if not self._follows:
            self.columns.write_many(row, leaves, n)
            return
        lanes, order, ends, opened = self._order(first_id, leaves, n, numbers)
        shared = self.columns.write_many(row, leaves, n, order)
        self._last[lanes[ends]] = first_id + ends
        if self.is_plain:
            return
        assert self._leaves is not None
        dones = np.asarray(leaves[self._leaves.dones], np.bool_)
        follows = np.zeros(n, np.bool_)
        follows[order.follows] = ~dones[order.leaders]
        follows[order.begins] = opened
        opens = ~dones[ends]
        if cuts:
            pieces = np.zeros(n, np.int64)  # how many cuts there are up to each item
            pieces[list(cuts)] = 1
            pieces = np.cumsum(pieces)
            follows[order.follows] &= pieces[order.follows] == pieces[order.leaders]
            follows[order.begins] &= pieces[order.begins] == 0
            opens &= pieces[ends] == pieces[-1]
            self._open[:] = False
        self._open[lanes[ends]] = opens
        same = np.ones(n, np.bool_) if shared is None else shared
        for a, b in self._compared:
            same[order.follows] &= equal_bytes(leaves[b][order.leaders], leaves[a][order.follows])
            if len(order.begins):
                led_here = self.columns.look(b, order.before)
                same[order.begins] &= equal_bytes(led_here, leaves[a][order.begins])
        if broken := int(np.count_nonzero(follows & ~same)):
            self._count_breaks(broken)
            follows &= same
        rows = ring.find_rows(first_id, n)
        before = rows.copy()
        before[order.follows] = rows[order.leaders]
        before[order.begins] = order.before
        self._link(rows, np.where(follows, before, rows))

    def _order(
        self, first_id: int, leaves: Sequence[Array], n: int, numbers: Numbers
    ) -> tuple[Array, Order, Array, Array]:
        """Find which of n items may follow upon which.

        Returns:
            Their lanes; the order; the last one of each lane; and of those that may follow upon
            one that is there already, whether that one's lane is open.
        """
        n_rows = self._ring.n_rows
        follows: slice | Array
        leaders: slice | Array
        if self._lane_leaf is None and isinstance(numbers, int):
            lanes = np.full(n, self._enter(numbers) if numbers else 0)
            follows, leaders = slice(1, n), slice(0, n - 1)
            firsts, ends = np.array([0]), np.array([n - 1])
            last = self._last[lanes[firsts]]
        else:
            told = np.zeros(n, np.int64)
            if self._lane_leaf is not None:
                told = np.asarray(leaves[self._lane_leaf], np.int64)
                self._check_lanes(told)
            if isinstance(numbers, int):
                self._enter(numbers)
                numbers = np.full(n, numbers)
            slots = slot_of(numbers)
            lanes, marks = slots * self._keys + told, numbers * self._keys + told
            places = np.argsort(marks, kind="stable")
            again = marks[places[1:]] == marks[places[:-1]]
            follows, leaders = as_slice(places[1:][again]), as_slice(places[:-1][again])
            firsts, ends = places[np.append(True, ~again)], places[np.append(~again, True)]
            last = self._last[lanes[firsts]]
            last[self._numbers[slots[firsts]] != numbers[firsts]] = 0
        kept = (last > 0) & (last > first_id + n - 1 - n_rows)
        order = Order(follows, leaders, firsts[kept], (last[kept] - 1) % n_rows)
        opened = self._open[lanes[order.begins]]
        if not isinstance(numbers, int):
            for number in np.unique(numbers[firsts]).tolist():
                self._enter(number)
            ends = ends[self._numbers[slots[ends]] == numbers[ends]]  # or it has been given up
        return lanes, order, ends, opened

    def _enter(self, number: int) -> int:
        """Return the first of the lanes in the slot of one of the store's lanes, which is empty.

        Or has this lane's already. What another left there is over.
        """
        slot = int(slot_of(number))
        first = slot * self._keys
        self._several = self._several or number != 0
        if self._numbers[slot] != number:
            self._numbers[slot] = number
            self._last[first : first + self._keys] = 0
            self._open[first : first + self._keys] = False
        return first

    def interrupt(self) -> None:
        """Let what comes next begin a run, in all lanes."""
        self._open[:] = False

    def reset(self) -> None:
        """Forget all items, as the ring just has."""
        self._last[:] = 0
        self._open[:] = False
        self._after[:] = np.arange(len(self._after))
        self.columns.clear()

    def _link(self, rows: Any, before: Any) -> None:
        """Note which rows those just written follow upon: themselves where upon none."""
        if self._stack > 1:
            if self._several:
                # What followed upon an item that was written over begins its run. In a single lane
                # that is the next row, which no stack of an item that is held needs any more.
                after = self._after[rows]
                self._before[after] = after
            self._before[rows] = before
        if self._n_step > 1 or self._several:
            self._after[rows] = rows
            self._after[before] = rows  # where that is a row itself, it stays so

    def _check_lanes(self, lanes: Any) -> int:
        """Return the first of some lanes, once all are found to be there."""
        lanes = np.asarray(lanes)
        if lanes.min() < 0 or lanes.max() >= self._keys:
            raise ValueError(
                f"item[{LANE!r}]: expected 0 to {self._keys - 1}, got {lanes.min()} to "
                f"{lanes.max()}: make the store with as many lanes as there are environments"
            )
        return int(lanes.flat[0])

    def _count_breaks(self, n: int) -> None:
        self.breaks += n
        if n and not self._warned:
            self._warned = True
            _log.warning(
                "an item does not begin with the observation that the one before it led to, so "
                "n_step and frame_stack don't reach from one to the other (`breaks` counts such). "
                "Where several environments fill one store, insert each one's items with a lane= "
                "of its own, or make the store with lanes= and give each item the key, as "
                "VectorTransitions does"
            )

    # What goes out --------------------------------------------------------------------------

    def take(
        self,
        index: Array,
        outs: Mapping[int, Array],
        added: int,
        packed: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Write the transitions that begin in these rows into a batch.

        Args:
            index: (n,) rows.
            outs: arrays by the numbers of their leaves.
            added: the leaf of ``discounts``.
            packed: those of `find_packed` whose first one has the frames of both.

        Raises:
            ValueError: an item's next observation is not its own one frame on.
        """
        leaves, columns = self._leaves, self.columns
        if self.is_plain and not packed:
            columns.take(index, outs)
            return
        assert leaves is not None
        outs = dict(outs)
        rows, taken = self._look_ahead(index)
        last = rows[-1]
        for pair in packed:
            self._take_packed(pair, index, last, outs.pop(pair[0]))
        if self.is_plain:
            columns.take(index, outs)
            return
        if leaves.rewards in outs:
            within = np.arange(self._n_step)[:, None] < taken
            rewards = columns.look(leaves.rewards, rows).astype(np.float64)
            powers = (self._discount ** np.arange(self._n_step))[:, None]
            outs.pop(leaves.rewards)[:] = np.where(within, rewards * powers, 0).sum(axis=0)
        if added in outs:
            outs.pop(added)[:] = self._discount**taken * columns.look(leaves.masks, last)
        ahead = {leaf: outs.pop(leaf) for leaf in leaves.at_the_end if leaf in outs}
        if self._stack > 1:
            stacks, following = self._look_back(index), self._look_back(last)[:, 1:]
            for a, b in leaves.pairs:
                if a in outs:
                    columns.take_stacks(a, stacks, outs.pop(a))
                if b in ahead:
                    columns.take_stacks(a, following, ahead.pop(b), (b, last))
        if outs:
            columns.take(index, outs)
        if ahead:
            columns.take(last, ahead)

    def _take_packed(self, pair: tuple[int, int], index: Array, last: Array, out: Array) -> None:
        a, b = pair
        if self._stack > 1:
            self.columns.take_stacks(a, self._look_back(index), out, (b, last))
            return
        told = self.columns.take_packed(pair, index, last, out)
        if not told.all():
            first = int(self._ring.find_ids(index)[np.argmin(told)])
            raise ValueError(
                f"{self._schema.paths[b]} of the item {first} does not begin with the frames that "
                f"{self._schema.paths[a]} ends with, so one array can't tell both: leave out "
                "pack_obs_and_next_obs, or see to it that all items are made of one stack of "
                "frames that moves on (next_observations are what the action led to, before a "
                "reset)"
            )

    def _look_ahead(self, index: Array) -> tuple[Array, Array]:
        """The n rows of each run from these on, (n, B), the last repeated; and how many it has."""
        rows = np.empty((self._n_step, len(index)), np.int64)
        rows[0] = index
        for k in range(1, self._n_step):
            self._after.take(rows[k - 1], mode="clip", out=rows[k])
        return rows, 1 + np.count_nonzero(rows[1:] != rows[:-1], axis=0)

    def _look_back(self, index: Array) -> Array:
        """For each row those of its stack, itself last, the first of its run repeated: (B, k)."""
        rows = np.empty((self._stack, len(index)), np.int64)
        rows[-1] = index
        for k in range(self._stack - 1, 0, -1):
            self._before.take(rows[k], mode="clip", out=rows[k - 1])
        return np.ascontiguousarray(rows.T)


def count_spare_rows(frame_stack: int, lanes: int) -> int:
    """Return how many rows a ring has beyond the items held: for the frames of the oldest ones."""
    # By so many ids is an item past the one that it follows upon: a lane that is reset gives no
    # item in that step. Of one that is further, the oldest frames are gone before it is.
    return (frame_stack - 1) * (1 if lanes == 1 else 2 * lanes)


def _find_lane(schema: Schema) -> int:
    leaf = schema.keyed.get(LANE)
    if type(leaf) is not int or schema.shapes[leaf] != () or schema.dtypes[leaf].kind not in "iu":
        raise ValueError(f"lanes need items with an integer at {LANE!r}: which environment's it is")
    return leaf


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
