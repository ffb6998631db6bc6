"""Replay buffers: items as preallocated numpy columns, sampled uniformly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgeml.core.message import empty, private
from edgeml.data.base import DataStoreBase
from edgeml.data.batch import Batch
from edgeml.data.columns import Columns
from edgeml.data.prefetch import Prefetch
from edgeml.data.schema import Schema
from edgeml.data.tree import Array, describe, fill, is_plain, leaves_of, paths_of

__all__ = ["ReplayBuffer", "ReplayBufferDataStore", "transition_example"]

_DRAWS = 8  # rounds in which items of too old a policy are drawn anew, before the others are listed
_VERSION = "policy_version"
_POOLED = 1 << 16  # bytes; below this malloc is fast enough


class ReplayBuffer(DataStoreBase):
    """A ring of the newest items, held as numpy columns, from which batches are sampled.

    An item is a dict, or a tuple such as `env.step` gives, nested as deep as you like, with
    arrays and numbers for leaves. ``example``, else the first item, gives the schema (keys,
    shapes and dtypes), and memory for all items is set aside then. A leaf of another dtype is
    converted where that keeps what it means: between floats, from integers to floats, between
    integers where the value fits, from booleans to numbers. So give the first item's reward as
    a float, or all later ones are integers. Other items are refused.

    Dicts with the keys ``observations``, ``next_observations``, ``rewards``, ``masks`` and
    ``dones``, as `ReplayBufferDataStore` describes them, are *transitions*, inserted in the order
    in which they happened. ``n_step`` and ``frame_stack`` need those. An episode goes on until
    ``dones`` is true, or `interrupt` was called; where several environments fill one buffer, call
    `interrupt` between their items (a `TrainerServer` does), or give each its own store, in
    which its episodes stay whole. Of large
    observations (above 1 KiB) each is kept once: what one transition led to, and what the
    next one started from.

    Args:
        capacity: how many items are held at most.
        example: an item that gives the schema; it is not inserted.
        seed: of the generator that `sample` uses unless it is given one.
        n_step: samples look so many transitions ahead within their episode (default 1). With more
            than 1, ``rewards``, which must be floats, are the discounted sums of up to n rewards;
            ``next_observations``, ``masks`` and ``dones`` are those of the last of these
            transitions; and there is one more key, ``discounts`` (float32), by which the value of
            ``next_observations`` is to be multiplied: ``discount ** m * masks`` of the m
            transitions that there were. An episode that was truncated keeps its value, and so
            does one that has got no further yet.
            (Sutton & Barto 2018, 7.1; Mnih et al. 2016.)
        discount: of future rewards, for ``n_step`` (default 0.99).
        frame_stack: samples have so many frames of each observation, the oldest first, as one
            more axis after the batch's (default 1: no such axis). Each frame is kept once. At the
            start of an episode its first frame is repeated. (Mnih et al. 2015.)

    Raises:
        ValueError: by the inserts, for an item that doesn't fit. The text gives the path to the
            part and both shapes or structures, and the store is as it was.
    """

    def __init__(
        self,
        capacity: int,
        *,
        example: Any = None,
        seed: int | None = None,
        n_step: int = 1,
        discount: float = 0.99,
        frame_stack: int = 1,
    ) -> None:
        super().__init__(capacity)
        if n_step < 1 or frame_stack < 1:
            raise ValueError(f"n_step and frame_stack are at least 1, got {n_step}, {frame_stack}")
        if not 0 <= discount <= 1:
            raise ValueError(f"discount is from 0 to 1, got {discount}")
        self._rng = np.random.default_rng(seed)
        self._n_step, self._discount, self._stack = n_step, discount, frame_stack
        # Rows are kept for the frames of the oldest item's stack, too.
        self._n_rows = self._cuts_kept = capacity + frame_stack - 1
        self._latest = 0  # ids: of the newest item,
        self._before = 0  # of the one before the first that counts as held,
        self._kept_from = 1  # and of the first whose row was written
        self._schema: Schema | None = None
        self._transition: _Transition | None = None
        self._added: list[tuple[str, int, np.dtype[Any]]] = []
        self._plans: dict[Any, _Plan] = {}  # by the keys that are wanted
        self._columns: Columns
        # Of each row: whether its episode goes no further, and the id of that episode's first item.
        self._ends, self._begins = np.zeros(self._n_rows, np.bool_), np.empty(0, np.int64)
        if frame_stack > 1:
            self._begins = np.zeros(self._n_rows, np.int64)
        if example is not None:
            self._allocate(Schema(example))

    def __len__(self) -> int:
        with self.lock:
            return self._held()

    @property
    def nbytes(self) -> int:
        """Bytes of memory for the items, of which what was never written to is not in use yet."""
        return 0 if self._schema is None else self._columns.nbytes

    def latest_data_id(self) -> int:
        """Return the id of the newest item ever inserted; 0 where there was none."""
        with self.lock:  # `restore` goes back for a moment
            return self._latest

    def insert(self, item: Any) -> None:
        """Insert a copy of one item; the class tells what it raises."""
        with self.lock:
            schema = self._schema
            if schema is None:
                schema = Schema(item)
                leaves = schema.fit(item)
                self._allocate(schema)
            else:
                leaves = schema.fit(item)
            row = self._latest % self._n_rows
            self._columns.write(row, leaves)
            if self._transition is not None:
                self._mark(row, leaves[self._transition.dones])
            self._latest += 1

    def batch_insert(self, batch: Batch | Sequence[Any]) -> None:
        """Insert copies of items in one step; the class tells what it raises."""
        batch = batch if isinstance(batch, Batch) else Batch.of(batch)
        if not batch:
            return
        with self.lock:
            schema = self._schema or Schema(batch[0])
            columns = schema.fit_batch(batch)
            if self._schema is None:
                self._allocate(schema)
            kept = min(len(batch), self._n_rows)
            if kept < len(batch):
                columns = [column[-kept:] for column in columns]
            first = self._latest + len(batch) - kept + 1
            row = (first - 1) % self._n_rows
            self._columns.write_many(row, columns, kept)
            cuts = [cut - len(batch) + kept for cut in batch.cuts if cut >= len(batch) - kept]
            if self._transition is not None:
                dones = np.asarray(columns[self._transition.dones], np.bool_)
                self._mark_many(first, dones, cuts)
            self._latest += len(batch)
            self.take_cuts(cuts, first)

    def get_latest_data(self, from_id: int, *, limit: int | None = None) -> Batch:
        """Return the items with ids above ``from_id`` that are still held; see the base class."""
        with self.lock:
            first, n = self._range(from_id, limit)
            grabbed, cuts = self._grab(first, n), self.cuts_within(first, n)
        return self._split(grabbed, first).cut(cuts)

    def reset(self, next_id: int | None = None) -> None:
        """Forget all items; see the base class."""
        with self.lock:
            next_id = self.forget_cuts(next_id)
            self._latest = self._before = next_id - 1
            self._kept_from = next_id
            if self._schema is not None:
                self._columns.clear()

    def interrupt(self) -> None:
        """End the episode under way: what is inserted next does not follow upon it."""
        with self.lock:
            super().interrupt()
            if self._latest >= self._kept_from:
                self._ends[(self._latest - 1) % self._n_rows] = True

    def sample(
        self,
        batch_size: int,
        rng: np.random.Generator | None = None,
        *,
        keys: Iterable[Any] | None = None,
        out: dict[Any, Any] | None = None,
        max_policy_lag: int | None = None,
        policy_version: int | None = None,
    ) -> dict[Any, Any]:
        """Draw items uniformly, with replacement.

        Args:
            batch_size: how many.
            rng: the generator to use (default: the store's own, see ``seed``).
            keys: an item's outermost keys that are wanted (default: all), such as
                ``("observations",)``; of tuples and lists, the positions.
            out: a batch of the same keys and size to write to, which is returned then. Its arrays
                are contiguous; `empty_batch` makes one. Don't give one that went to
                `jax.device_put`: on a CPU that takes the memory as it is (`on_device` copies).
            max_policy_lag: only items whose ``policy_version`` (a number in each item: of the
                weights that it was made with) is behind by no more than this.
            policy_version: behind which (default: that of the newest item).

        Returns:
            The structure of an item as nested dicts, tuples and lists among it keyed by position
            (0, 1, ...), with a contiguous array of shape (batch_size, ...) for each leaf. The
            arrays are private copies.

        Raises:
            ValueError: batch_size is below 1; the store is empty, or has nothing that new; an
                unknown key; ``out`` doesn't fit.
        """
        with self.lock:
            plan = self._plan(keys)
            outs = plan.arrays(batch_size, out)
            least = self._least_version(max_policy_lag, policy_version)
            self._fill(outs, self._draw(batch_size, self._rng if rng is None else rng, least))
            return plan.filled(outs) if out is None else out

    def empty_batch(self, batch_size: int, keys: Iterable[Any] | None = None) -> dict[Any, Any]:
        """Return a batch as `sample` gives it, with anything in it, for its ``out``.

        Raises:
            ValueError: as `sample`.
        """
        with self.lock:
            plan = self._plan(keys)
            return plan.filled(plan.arrays(batch_size))

    def prefetch(
        self, batch_size: int, *, device: Any = None, depth: int = 2, **options: Any
    ) -> Prefetch[dict[Any, Any]]:
        """Return an endless iterator of samples that are drawn ahead, in a thread of its own.

        Args:
            batch_size: how many items each has.
            device: a JAX device, or sharding, to put them on; None for numpy arrays.
            depth: how many are kept ready.
            options: ``keys``, ``rng`` and the like, for `sample`; no ``out``, as each batch has
                its own memory.
        """
        if options.get("out") is not None:
            raise ValueError("batches drawn ahead have memory of their own: give no out")
        if options.get("keys") is not None:
            options["keys"] = tuple(options["keys"])  # an iterator would do for one batch only
        return Prefetch(lambda: self.sample(batch_size, **options), device=device, depth=depth)

    # What checkpoints need ------------------------------------------------------------------

    def state(self) -> Any:
        """Return what the store knows beyond its items."""
        return {**super().state(), "rng": self._rng.bit_generator.state}

    def set_state(self, state: Any) -> None:
        """Take up what `state` gave."""
        super().set_state(state)
        self._rng.bit_generator.state = state["rng"]

    def dump(self, from_id: int, *, limit: int | None = None) -> tuple[Batch, Any]:
        """Return items as `get_latest_data` does, with the frames before the oldest one."""
        with self.lock:
            first, n = self._range(from_id, limit)
            extra: dict[str, Any] | None = None
            older = first - max(self._kept_from, self._latest + 1 - self._n_rows)
            if n and first == self._latest + 1 - len(self) and older > 0:
                # Rows that are kept for the frames of the oldest items.
                before = self._split(self._grab(first - older, older), first - older)
                cuts = self.cuts_within(first - older, older)
                extra = {"older": before.cut(cuts).to_payload()}
            grabbed, cuts = self._grab(first, n), self.cuts_within(first, n)
        return self._split(grabbed, first).cut(cuts), extra

    def restore(self, batch: Batch, extra: Any) -> None:
        """Insert what `dump` gave."""
        with self.lock:
            if extra is not None and "older" in extra and not len(self):
                older = Batch.from_payload(extra["older"])
                self.reset(self._latest + 1 - len(older))
                self.batch_insert(older)
                self._before = self._latest
            self.batch_insert(batch)

    # Within --------------------------------------------------------------------------------

    def _allocate(self, schema: Schema) -> None:
        transition = _Transition.of(schema)
        if transition is None and (self._n_step > 1 or self._stack > 1):
            raise ValueError(
                "n_step and frame_stack need items with observations, next_observations (alike), "
                "rewards, masks and dones"
            )
        if transition and self._n_step > 1 and schema.dtypes[transition.rewards].kind in "biu":
            raise ValueError("discounted sums are no whole numbers: give rewards as floats")
        self._added = [
            (key, len(schema.shapes) + i, dtype) for i, (key, dtype) in enumerate(self._adds())
        ]
        for key, _, _ in self._added:
            if key in schema.keyed:
                raise ValueError(f"{key!r} is what samples have besides: rename the items' own")
        pairs = transition.pairs if transition is not None else []
        self._columns = Columns(schema, self._n_rows, pairs)
        self._transition = transition
        self._schema = schema

    def _adds(self) -> list[tuple[str, np.dtype[Any]]]:
        """What a sample has besides the keys of an item, one number for each."""
        return [("discounts", np.dtype(np.float32))] if self._n_step > 1 else []

    def _added_leaf(self, key: str) -> int:
        return next((number for added, number, _ in self._added if added == key), -1)

    def _held(self) -> int:
        return min(self._latest - self._before, self._capacity)

    def _rows_of(self, first_id: int, n: int) -> Array:
        return np.arange(first_id - 1, first_id - 1 + n) % self._n_rows

    def _ids_of(self, rows: Array) -> Array:
        newest = (self._latest - 1) % self._n_rows
        return self._latest - (newest - rows) % self._n_rows

    def _range(self, from_id: int, limit: int | None) -> tuple[int, int]:
        """The first id, and the number, of the items past ``from_id`` that are held."""
        first = max(from_id + 1, self._latest - len(self) + 1)
        n = max(0, self._latest + 1 - first)
        return first, n if limit is None else max(0, min(n, limit))

    def _grab(self, first_id: int, n: int) -> list[Array]:
        if not n:
            return []
        return self._columns.grab((first_id - 1) % self._n_rows, n, self.allocate)

    def _split(self, grabbed: list[Array], first_id: int) -> Batch:
        """Make a batch of what was grabbed, which needs no lock."""
        if not grabbed:
            return Batch.of([], first_id)
        assert self._schema is not None
        leaves = self._columns.split(grabbed, self.allocate)
        return Batch.from_columns(fill(self._schema.skeleton, leaves), first_id)

    def _mark(self, row: int, done: Any) -> None:
        """Note the episode of the item that gets the next id."""
        if self._stack > 1:
            goes_on = self._goes_on(self._latest + 1)
            self._begins[row] = self._begins[row - 1] if goes_on else self._latest + 1
        self._ends[row] = done

    def _mark_many(self, first_id: int, dones: Array, cuts: Sequence[int]) -> None:
        rows = self._rows_of(first_id, len(dones))
        if 0 in cuts and first_id == self._latest + 1:
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

    def _goes_on(self, item_id: int) -> bool:
        """Whether an item belongs to the episode of the one before, which must be the newest."""
        newest = self._latest
        if item_id != newest + 1 or newest < self._kept_from:
            return False
        return not self._ends[(newest - 1) % self._n_rows]

    def _plan(self, keys: Iterable[Any] | None) -> _Plan:
        if isinstance(keys, str):
            raise ValueError(f"keys are a list of keys, got {keys!r}")
        keys = None if keys is None else tuple(keys)
        try:
            return self._plans[keys]
        except KeyError:
            pass
        schema = self._schema
        if schema is None:
            raise ValueError("can't sample from an empty replay buffer")
        specs = list(zip(schema.shapes, schema.dtypes, strict=True))
        if self._stack > 1:
            assert self._transition is not None
            for leaf in {leaf for pair in self._transition.pairs for leaf in pair}:
                shape, dtype = specs[leaf]
                specs[leaf] = ((self._stack, *shape), dtype)
        skeleton = dict(schema.keyed)
        for key, number, dtype in self._added:
            skeleton[key] = number
            specs.append(((), dtype))
        if keys is not None:
            if unknown := [key for key in keys if key not in skeleton]:
                raise ValueError(f"no such keys: {unknown}; there are {list(skeleton)}")
            skeleton = {key: skeleton[key] for key in keys}
        wanted = {leaf: (*specs[leaf], _nbytes(*specs[leaf])) for leaf in _leaves(skeleton)}
        made = _Plan(skeleton, wanted)
        self._plans[keys] = made
        return made

    def _least_version(self, lag: int | None, version: int | None) -> int | None:
        """The oldest version of the weights that will do, or None for any."""
        if lag is None:
            return None
        leaf = self._version_leaf()
        if version is None:
            version = int(self._columns.look(leaf, np.array((self._latest - 1) % self._n_rows)))
        return version - lag

    def _version_leaf(self) -> int:
        assert self._schema is not None
        leaf = self._schema.keyed.get(_VERSION)
        if type(leaf) is not int or self._schema.shapes[leaf] != ():
            raise ValueError(f"max_policy_lag needs items with a number at {_VERSION!r}")
        return leaf

    def _draw(self, n: int, rng: np.random.Generator, least: int | None) -> Array:
        """Rows of n items, of policies from the version ``least`` on."""
        if not self._held():
            raise ValueError("can't sample from an empty replay buffer")
        index = self._draw_rows(n, rng)
        if least is None:
            return index
        leaf = self._version_leaf()
        old = np.flatnonzero(self._columns.look(leaf, index) < least)
        for _ in range(_DRAWS):
            if not len(old):
                return index
            index[old] = self._draw_rows(len(old), rng)
            old = old[self._columns.look(leaf, index[old]) < least]
        rows = self._rows_of(self._latest + 1 - len(self), len(self))
        rows = rows[self._columns.look(leaf, rows) >= least]
        if not len(rows):
            raise ValueError(f"no item is of a policy from version {least} on")
        index[old] = self._choose(rows, len(old), rng)
        return index

    def _draw_rows(self, n: int, rng: np.random.Generator) -> Array:
        held = self._held()
        # Twice as fast as rng.integers, and as even: it is off by less than 2**-53 of the length.
        index = rng.random(n)
        index *= held
        rows = index.astype(np.int64)
        if held < self._n_rows:  # or all rows are held, whichever the oldest is
            rows += (self._latest - held) % self._n_rows
            rows[rows >= self._n_rows] -= self._n_rows
        return rows

    def _choose(self, rows: Array, n: int, rng: np.random.Generator) -> Array:
        """Draw among these rows only, as `_draw_rows` does among all."""
        return rng.choice(rows, n)

    def _fill(self, outs: dict[int, Array], index: Array) -> None:
        """Write the leaves of these rows into a batch."""
        if self._n_step == 1 and self._stack == 1:
            self._columns.take(index, outs)
        else:
            self._fill_transitions(dict(outs), index)

    def _fill_transitions(self, outs: dict[int, Array], index: Array) -> None:
        transition = self._transition
        assert transition is not None
        rows, taken = self._ahead(index)
        last = rows[np.arange(len(index)), taken - 1]
        if transition.rewards in outs:
            within = np.arange(self._n_step) < taken[:, None]
            rewards = self._columns.look(transition.rewards, rows).astype(np.float64)
            powers = self._discount ** np.arange(self._n_step)
            outs.pop(transition.rewards)[:] = np.where(within, rewards * powers, 0).sum(axis=1)
        if (leaf := self._added_leaf("discounts")) in outs:
            masks = self._columns.look(transition.masks, last)
            outs.pop(leaf)[:] = self._discount**taken * masks
        ahead = {leaf: outs.pop(leaf) for leaf in transition.at_the_end if leaf in outs}
        if self._stack > 1:
            for a, b in transition.pairs:
                if a in outs:
                    self._columns.take_stacks(a, self._before_it(index), outs.pop(a))
                if b in ahead:
                    stacks = self._before_it(last)[:, 1:]
                    self._columns.take_stacks(a, stacks, ahead.pop(b), (b, last))
        if outs:
            self._columns.take(index, outs)
        if ahead:
            self._columns.take(last, ahead)

    def _ahead(self, index: Array) -> tuple[Array, Array]:
        """For each row the n that follow it, itself first, and how many are of its episode."""
        rows = (index[:, None] + np.arange(self._n_step)) % self._n_rows
        ends = self._ends[rows] | (rows == (self._latest - 1) % self._n_rows)
        ends[:, -1] = True
        return rows, ends.argmax(axis=1) + 1

    def _before_it(self, index: Array) -> Array:
        """For each row those of its stack, itself last: shape (n, k)."""
        stack = self._ids_of(index)[:, None] + np.arange(1 - self._stack, 1)
        stack = np.maximum(stack, self._begins[index][:, None])
        return (stack - 1) % self._n_rows


@dataclass(frozen=True)
class _Plan:
    """What is wanted of a sample.

    Attributes:
        skeleton: its structure, with the numbers of the leaves.
        specs: of an item's part of each leaf the shape, the dtype and how many bytes it has.
        sized: the same for the last batch size, the shapes those of the batch.
    """

    skeleton: Any
    specs: dict[int, tuple[tuple[int, ...], np.dtype[Any], int]]
    sized: dict[int, list[tuple[int, tuple[int, ...], np.dtype[Any], bool]]] = field(
        default_factory=dict
    )

    def arrays(self, n: int, out: Any = None) -> dict[int, Array]:
        """Arrays to write n items to, those of ``out`` once they have been found to fit."""
        if n < 1:
            raise ValueError(f"batch_size must be at least 1, got {n}")
        if out is None:
            if n not in self.sized:
                self.sized.clear()
                self.sized[n] = [
                    (leaf, (n, *shape), dtype, n * size < _POOLED)
                    for leaf, (shape, dtype, size) in self.specs.items()
                ]
            return {
                leaf: np.empty(shape, dtype) if small else empty(private, shape, dtype)
                for leaf, shape, dtype, small in self.sized[n]
            }
        outs = dict(zip(self.specs, leaves_of(self.skeleton, out), strict=True))
        for leaf, array in outs.items():
            shape, dtype = (n, *self.specs[leaf][0]), self.specs[leaf][1]
            if not (
                isinstance(array, np.ndarray)
                and (array.shape, array.dtype) == (shape, dtype)
                and array.flags.c_contiguous
                and array.flags.writeable
            ):
                raise ValueError(
                    f"out has {describe(array)} for a contiguous, writable array of {shape} {dtype}"
                )
        return outs

    def filled(self, arrays: dict[int, Array]) -> dict[Any, Any]:
        batch: dict[Any, Any] = fill(self.skeleton, arrays)
        return batch


@dataclass(frozen=True)
class _Transition:
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
    def of(cls, schema: Schema) -> _Transition | None:
        """Find them, or return None: these items are something else."""
        keyed = schema.keyed
        scalars = [keyed.get(name) for name in ("rewards", "masks", "dones")]
        if not all(type(leaf) is int and schema.shapes[leaf] == () for leaf in scalars):
            return None
        if "observations" not in keyed or "next_observations" not in keyed:
            return None
        now, following = keyed["observations"], keyed["next_observations"]
        # By their paths, since dicts may have the same keys in another order.
        numbers = dict(zip(paths_of(following), _leaves(following), strict=True))
        paths = paths_of(now)
        if numbers.keys() != set(paths):
            return None
        pairs = [(a, numbers[path]) for a, path in zip(_leaves(now), paths, strict=True)]
        for a, b in pairs:
            if (schema.shapes[a], schema.dtypes[a]) != (schema.shapes[b], schema.dtypes[b]):
                return None
        return cls(pairs, *scalars)


def _leaves(skeleton: Any) -> list[int]:
    """The numbers in a part of a skeleton."""
    return leaves_of(skeleton, skeleton)


def _nbytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    return math.prod(shape) * dtype.itemsize


class ReplayBufferDataStore(ReplayBuffer):
    """The transitions of off-policy learning, with a schema from gymnasium spaces.

    An item is a dict of

    ==================  ======================  =================================================
    observations        like observation_space
    next_observations   like observation_space
    actions             like action_space
    rewards             () float32
    masks               () float32              0 where the episode terminated, else 1: what the
                                                value of the next observation is multiplied by
    dones               () bool                 the episode ended, terminated or truncated
    ==================  ======================  =================================================

    An episode that was truncated (by a time limit) did not terminate: its last item has mask 1
    and done True. In other words ``masks = 1.0 - terminated; dones = terminated or truncated``.

    Args:
        observation_space: Box, Discrete, MultiDiscrete, MultiBinary, and Dict or Tuple of them.
        action_space: the same.
        capacity: how many transitions are held at most.
        extras: further parts of an item, each with an example: ``{"policy_version": 0}``.
        seed, n_step, discount, frame_stack: as for `ReplayBuffer`.

    Raises:
        TypeError: a space whose samples have no fixed shape and dtype.
    """

    def __init__(
        self,
        observation_space: Any,
        action_space: Any,
        capacity: int,
        *,
        extras: Mapping[str, Any] | None = None,
        seed: int | None = None,
        n_step: int = 1,
        discount: float = 0.99,
        frame_stack: int = 1,
    ) -> None:
        super().__init__(
            capacity,
            example=transition_example(observation_space, action_space, extras),
            seed=seed,
            n_step=n_step,
            discount=discount,
            frame_stack=frame_stack,
        )


def transition_example(
    observation_space: Any, action_space: Any, extras: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return a transition of zeros, for any store's ``example``; see `ReplayBufferDataStore`."""
    observation = _zeros(observation_space)
    return {
        "observations": observation,
        "next_observations": observation,
        "actions": _zeros(action_space),
        "rewards": np.float32(0),
        "masks": np.float32(0),
        "dones": np.False_,
        **(extras or {}),
    }


def _zeros(space: Any) -> Any:
    """Return a sample of zeros of a space that looks like one of gymnasium's."""
    parts = getattr(space, "spaces", None)
    if isinstance(parts, Mapping):
        return {key: _zeros(part) for key, part in parts.items()}
    if isinstance(parts, Sequence):
        return tuple(_zeros(part) for part in parts)
    shape, dtype = getattr(space, "shape", None), getattr(space, "dtype", None)
    if shape is None or dtype is None or not is_plain(np.dtype(dtype)):
        raise TypeError(f"{space!r} has no fixed shape and numeric dtype to store")
    return np.zeros(shape, dtype)
