"""What stores hand out and take in: consecutive items, as columns where they agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, overload

import numpy as np

from edgeml.core.errors import Malformed, shown
from edgeml.core.message import Allocator, empty, pooled
from edgeml.data.tree import Array, Skeleton, fill, is_plain, leaves_of, skeleton_of, transpose

__all__ = ["Batch"]

MOST_LANES = 1024  # of a store, and so of a batch

_MAYBE = {"cuts", "lanes"}  # keys of a payload that need not be there
_PYTHON_DTYPES: dict[type, type[np.generic]] = {
    bool: np.bool_,
    int: np.int64,
    float: np.float64,
}


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Batch(Sequence[Any]):
    """Consecutive items of a store, immutable; make one with `of` or `from_columns`.

    Items that agree in structure, keys, shapes and dtypes are held as *columns*: one array for
    each leaf, with a leading axis as long as the batch. An item is then put together when it is
    asked for: dicts, tuples and lists as they were (a namedtuple keeps its batch from having
    columns), each leaf as a read-only array or a numpy scalar. Other items are held as they are.

    A slice is a batch that shares the columns; since ids are consecutive, its step is 1.

    Attributes:
        first_id: the id of the first item, and of an empty batch the id that would come next.
        cuts: positions, ascending, of items that don't follow upon the one before although that
            doesn't say so itself; see `DataStoreBase.interrupt`.
        lanes: of each item a number, (n,) int64: items follow upon the one before of the same
            number. None where all are of one lane. See `DataStoreBase.insert_from`.
    """

    first_id: int
    _items: list[Any] | None
    _skeleton: Skeleton
    _leaves: list[Array]
    cuts: tuple[int, ...] = ()
    lanes: Array | None = None

    @classmethod
    def of(cls, items: Sequence[Any], first_id: int = 1, *, allocate: Allocator = pooled) -> Batch:
        """Make a batch, with columns if the items agree in structure, keys, shapes and dtypes.

        Leaves of columns are booleans, numbers and numeric arrays, anything with ``__array__``
        among them; Python's bool, int and float count as bool, int64 and float64. Columns are
        copies, in memory from ``allocate``; items that don't make columns are held by reference.
        """
        if isinstance(items, Batch):
            columns = items._items, items._skeleton, items._leaves
            return cls(first_id, *columns, items.cuts, items.lanes)
        items = list(items)
        if items:
            try:
                skeleton = skeleton_of(items[0])
                leaves = _columnise(skeleton, items, allocate)
            except ValueError:  # a key, a depth or shapes that columns can't have
                leaves = None
            if leaves is not None:
                return cls(first_id, None, skeleton, leaves)
        return cls(first_id, items, None, [])

    @classmethod
    def from_columns(cls, columns: Any, first_id: int = 1) -> Batch:
        """Make a batch of columns, an item's structure with an array for each leaf.

        The arrays are not copied: don't change them while the batch is in use.

        Raises:
            ValueError: not arrays of numbers, of different lengths, or nothing in them.
        """
        skeleton = skeleton_of(columns)
        leaves = leaves_of(skeleton, columns)
        for leaf in leaves:
            if not isinstance(leaf, np.ndarray) or not leaf.ndim or not is_plain(leaf.dtype):
                raise ValueError("a column is a numeric array with a leading axis")
        if len({len(leaf) for leaf in leaves}) != 1:
            raise ValueError(f"columns of one length, got {[len(leaf) for leaf in leaves]}")
        # Without a byte in it, a few bytes of message could claim any number of items.
        if len(leaves[0]) and not any(leaf.nbytes for leaf in leaves):
            raise ValueError("columns without data")
        return cls(first_id, None, skeleton, [_read_only(leaf) for leaf in leaves])

    def cut(self, positions: Sequence[int]) -> Batch:
        """Return the same batch with these `cuts`."""
        columns = self._items, self._skeleton, self._leaves
        return Batch(self.first_id, *columns, tuple(positions), self.lanes)

    def in_lanes(self, lanes: Array | None) -> Batch:
        """Return the same batch with these `lanes`, which are not copied."""
        if lanes is self.lanes:
            return self
        lanes = None if lanes is None else _read_only(lanes)
        return Batch(self.first_id, self._items, self._skeleton, self._leaves, self.cuts, lanes)

    @property
    def columns(self) -> Any:
        """An item's structure with an array of shape (n, ...) for each leaf, or None."""
        return None if self._items is not None else fill(self._skeleton, self._leaves)

    @property
    def nbytes(self) -> int:
        """Bytes of the columns; 0 where items are held as they are."""
        return sum(leaf.nbytes for leaf in self._leaves)

    def __len__(self) -> int:
        return len(self._leaves[0] if self._items is None else self._items)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Batch: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError("a batch's ids are consecutive: its slices have step 1")
            items = None if self._items is None else self._items[index]
            leaves = [leaf[index] for leaf in self._leaves]
            cuts = tuple(cut - start for cut in self.cuts if start <= cut < stop)
            lanes = None if self.lanes is None else self.lanes[index]
            return Batch(self.first_id + start, items, self._skeleton, leaves, cuts, lanes)
        if self._items is not None:
            return self._items[index]
        return fill(self._skeleton, [leaf[index] for leaf in self._leaves])

    def __iter__(self) -> Iterator[Any]:
        if self._items is not None:
            return iter(self._items)
        return (fill(self._skeleton, row) for row in zip(*self._leaves, strict=True))

    def __repr__(self) -> str:
        held = "items" if self._items is not None else "columns"
        return f"Batch({len(self)} {held} from id {self.first_id})"

    def to_payload(self) -> dict[str, Any]:
        """Return a dict that any codec carries; it shares the batch's arrays or items."""
        payload: dict[str, Any] = {"first_id": self.first_id}
        if self._items is not None:
            payload["items"] = self._items
        else:
            payload["columns"] = self.columns
        if self.cuts:
            payload["cuts"] = list(self.cuts)
        if self.lanes is not None:
            payload["lanes"] = self.lanes
        return payload

    @classmethod
    def from_payload(cls, payload: Any) -> Batch:
        """Make a batch of what `to_payload` gave and a codec carried, without copying.

        Raises:
            Malformed: nothing that `to_payload` could have made.
        """
        if not isinstance(payload, dict) or len(payload) != 2 + len(_MAYBE & payload.keys()):
            raise Malformed("a batch is a dict: first_id, either columns or items, cuts and lanes")
        first_id = payload.get("first_id")
        if type(first_id) is not int or first_id < 1:
            raise Malformed(f"a batch's first_id is an int from 1, got {shown(first_id, 40)}")
        if "columns" in payload:
            try:
                batch = cls.from_columns(payload["columns"], first_id)
            except ValueError as error:
                raise Malformed(f"a batch's columns: {error}") from None
        else:
            items = payload.get("items")
            if not isinstance(items, list):
                raise Malformed("a batch has a list of items, or columns")
            batch = cls(first_id, items, None, [])
        if "lanes" in payload:
            batch = batch.in_lanes(_check_lanes(payload["lanes"], len(batch)))
        if "cuts" not in payload:
            return batch
        cuts = payload["cuts"]
        if not isinstance(cuts, list) or not all(type(cut) is int for cut in cuts):
            raise Malformed("a batch's cuts are a list of positions")
        if any(a >= b for a, b in pairwise([-1, *cuts, len(batch)])):
            raise Malformed("a batch's cuts are ascending, and positions of its items")
        return batch.cut(cuts)


def _check_lanes(lanes: Any, n: int) -> Array:
    if not isinstance(lanes, np.ndarray) or lanes.dtype != np.int64 or lanes.shape != (n,):
        raise Malformed(f"a batch's lanes are an array of {n} int64, not {shown(lanes, 40)}")
    if n and (lanes.min() < 0 or lanes.max() >= 1 << 53 or len(np.unique(lanes)) > MOST_LANES):
        raise Malformed(f"a batch is of up to {MOST_LANES} lanes, numbered from 0 on")
    return lanes


def join(parts: Sequence[Batch], first_id: int, allocate: Allocator) -> Batch:
    """Return one batch of all items, with columns if all parts have the same."""
    if len(parts) == 1:
        return Batch.of(parts[0], first_id)
    if parts and all(part._items is None for part in parts):
        skeleton = parts[0]._skeleton
        try:
            rows = [leaves_of(skeleton, part.columns) for part in parts]
        except ValueError:
            rows = []
        pieces = list(zip(*rows, strict=True))
        if pieces and all(map(_agree, pieces)):
            leaves = [_read_only(concatenate(piece, allocate)) for piece in pieces]
            return Batch(first_id, None, skeleton, leaves)
    return Batch(first_id, [item for part in parts for item in part], None, [])


def _agree(pieces: Sequence[Any]) -> bool:
    """Whether what several batches have in one place makes one column."""
    # Where one has a column, another may have a dict of some.
    if not all(isinstance(piece, np.ndarray) for piece in pieces):
        return False
    return len({(piece.dtype, piece.shape[1:]) for piece in pieces}) == 1


def concatenate(pieces: Sequence[Array], allocate: Allocator) -> Array:
    """Arrays of one dtype one after the other, in memory from ``allocate``."""
    first = pieces[0]
    out = empty(allocate, (sum(map(len, pieces)), *first.shape[1:]), first.dtype)
    return np.concatenate(pieces, out=out)


def _columnise(skeleton: Skeleton, items: list[Any], allocate: Allocator) -> list[Array] | None:
    values = transpose(skeleton, items)
    if values is None:
        return None
    leaves = []
    for each in values:
        column = _column(each, allocate)
        if column is None:
            return None
        leaves.append(_read_only(column))
    return leaves if any(leaf.nbytes for leaf in leaves) else None


def _column(values: list[Any], allocate: Allocator) -> Array | None:
    """Return the values as one array, or None where types, dtypes or shapes differ."""
    kinds = set(map(type, values))
    if len(kinds) != 1:
        return None
    kind = kinds.pop()
    try:
        if kind in _PYTHON_DTYPES:
            return np.array(values, _PYTHON_DTYPES[kind])
        if issubclass(kind, np.generic):
            return np.array(values, values[0].dtype) if is_plain(values[0].dtype) else None
        if kind is not np.ndarray:
            arrays = list(map(np.asarray, values)) if hasattr(kind, "__array__") else None
            return None if arrays is None else _column(arrays, allocate)
        first = values[0]
        if not is_plain(first.dtype):
            return None
        if not first.ndim:
            return _column([value[()] for value in values], allocate)
        # numpy compares everything but the leading axis, and "equiv" lets nothing but the byte
        # order change; `out` keeps it in C order. (np.array takes 1.2 times as long, np.stack 3.)
        if set(map(len, values)) != {len(first)}:
            return None
        shape = (len(values) * len(first), *first.shape[1:])
        out = empty(allocate, shape, first.dtype.newbyteorder("="))
        np.concatenate(values, out=out, casting="equiv")
        return out.reshape(len(values), *first.shape)
    except (TypeError, ValueError, OverflowError):
        return None


def _read_only(array: Array) -> Array:
    view: Array = array.view()
    view.flags.writeable = False
    return view
