"""Replay buffers: items as preallocated numpy columns, sampled uniformly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgeml.data.base import DataStoreBase
from edgeml.data.batch import Batch, concatenate
from edgeml.data.memory import zeros
from edgeml.data.schema import Schema
from edgeml.data.tree import Array, fill, is_plain

__all__ = ["ReplayBuffer", "ReplayBufferDataStore"]

_PACKED = 1024  # bytes; larger leaves gain nothing from lying in a row with others


class ReplayBuffer(DataStoreBase):
    """A ring of the newest items, held as numpy columns, from which batches are sampled.

    An item is a dict, or a tuple such as `env.step` gives, nested as deep as you like, with
    arrays and numbers for leaves. ``example``, else the first item, gives the schema (keys,
    shapes and dtypes), and memory for all items is set aside then. A leaf of another dtype is
    converted where that keeps what it means: between floats, from integers to floats, between
    integers where the value fits, from booleans to numbers. So give the first item's reward as
    a float, or all later ones are integers. Other items are refused.

    Args:
        capacity: how many items are held at most.
        example: an item that gives the schema; it is not inserted.
        seed: of the generator that `sample` uses unless it is given one.

    Raises:
        ValueError: by the inserts, for an item that doesn't fit. The text gives the path to the
            part and both shapes or structures, and the store is as it was.
    """

    def __init__(self, capacity: int, *, example: Any = None, seed: int | None = None) -> None:
        super().__init__(capacity)
        self._rng = np.random.default_rng(seed)
        self._latest = self._before = 0  # ids: of the newest item, and the one before the first
        self._schema: Schema | None = None
        # Small leaves are fields of one array, so that one copy of a row samples them all.
        self._rows = self._scratch = np.empty(0, np.dtype([]))
        self._columns: dict[str, Array] = {}  # every leaf's column, by its number
        if example is not None:
            self._allocate(Schema(example))

    def __len__(self) -> int:
        return min(self._latest - self._before, self._capacity)

    def latest_data_id(self) -> int:
        """Return the id of the newest item ever inserted; 0 where there was none."""
        return self._latest

    def insert(self, item: Any) -> None:
        """Insert a copy of one item; the class tells what it raises."""
        with self.lock:
            schema = self._schema or Schema(item)
            row = schema.fit(item)
            if self._schema is None:
                self._allocate(schema)
            slot = self._latest % self._capacity
            for column, value in zip(self._columns.values(), row, strict=True):
                column[slot] = value
            self._latest += 1

    def reset(self, next_id: int = 1) -> None:
        """Forget all items; the next one that is inserted gets the id ``next_id``."""
        with self.lock:
            self._latest = self._before = next_id - 1

    def batch_insert(self, batch: Batch | Sequence[Any]) -> None:
        """Insert copies of items in one step; the class tells what it raises."""
        batch = batch if isinstance(batch, Batch) else Batch.of(batch)
        if not batch:
            return
        with self.lock:
            schema = self._schema or Schema(batch[0])
            if batch.columns is not None:
                columns = schema.fit(batch.columns, len(batch))
            else:
                rows = [schema.fit(item) for item in batch]
                columns = [np.stack(column) for column in zip(*rows, strict=True)]
            if self._schema is None:
                self._allocate(schema)
            kept = min(len(batch), self._capacity)
            self._latest += len(batch)
            start = (self._latest - kept) % self._capacity
            before_end = min(kept, self._capacity - start)
            for column, values in zip(self._columns.values(), columns, strict=True):
                values = values[-kept:]
                column[start : start + before_end] = values[:before_end]
                column[: kept - before_end] = values[before_end:]

    def get_latest_data(self, from_id: int, *, limit: int | None = None) -> Batch:
        """Return the items with ids above ``from_id`` that are still held; see the base class."""
        with self.lock:
            first = max(from_id + 1, self._latest - len(self) + 1)
            n = self._latest + 1 - first
            if limit is not None:
                n = min(n, limit)
            if n <= 0 or self._schema is None:
                return Batch.of([], first)
            start = (first - 1) % self._capacity
            wrapped = max(0, start + n - self._capacity)
            leaves = [
                concatenate((column[start : start + n], column[:wrapped]), self.room)
                for column in self._columns.values()
            ]
            return Batch.from_columns(fill(self._schema.skeleton, leaves), first)

    def sample(self, batch_size: int, rng: np.random.Generator | None = None) -> dict[Any, Any]:
        """Draw items uniformly, with replacement.

        Args:
            batch_size: how many.
            rng: the generator to use (default: the store's own, see ``seed``).

        Returns:
            The structure of an item as nested dicts, tuples and lists among it keyed by position
            (0, 1, ...), with a contiguous array of shape (batch_size, ...) for each leaf. The
            arrays are private copies.

        Raises:
            ValueError: batch_size is below 1, or the store is empty.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        with self.lock:
            schema = self._schema
            if schema is None or not len(self):
                raise ValueError("can't sample from an empty replay buffer")
            index = (rng or self._rng).integers(len(self), size=batch_size)
            index += self._latest - len(self)
            index %= self._capacity
            # Kept, since at some hundred KB fresh memory costs more than what is done with it.
            if len(self._scratch) < batch_size:
                self._scratch = np.empty(batch_size, self._rows.dtype)
            rows = self._scratch[:batch_size]
            # mode="raise" would copy twice, and the indices are in range.
            self._rows.take(index, mode="clip", out=rows)
            leaves = [
                rows[name].copy()
                if name in (rows.dtype.names or ())
                else column.take(index, axis=0, mode="clip")
                for name, column in self._columns.items()
            ]
        sampled: dict[Any, Any] = fill(schema.keyed, leaves)
        return sampled

    def _allocate(self, schema: Schema) -> None:
        specs = [
            (str(i), dtype, shape)
            for i, (dtype, shape) in enumerate(zip(schema.dtypes, schema.shapes, strict=True))
        ]
        packed = [spec for spec in specs if spec[1].itemsize * math.prod(spec[2]) <= _PACKED]
        self._rows = zeros((self._capacity,), np.dtype(packed, align=True))
        self._columns = {
            name: self._rows[name]
            if (name, dtype, shape) in packed
            else zeros((self._capacity, *shape), dtype)
            for name, dtype, shape in specs
        }
        self._schema = schema


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
        seed: of the generator that `sample` uses unless it is given one.

    Raises:
        TypeError: a space whose samples have no fixed shape and dtype.
    """

    def __init__(
        self, observation_space: Any, action_space: Any, capacity: int, *, seed: int | None = None
    ) -> None:
        observation = _zeros(observation_space)
        example = {
            "observations": observation,
            "next_observations": observation,
            "actions": _zeros(action_space),
            "rewards": np.float32(0),
            "masks": np.float32(0),
            "dones": np.False_,
        }
        super().__init__(capacity, example=example, seed=seed)


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
