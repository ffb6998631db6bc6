"""Where the leaves of items lie: small ones side by side in rows, large ones in their own arrays.

A batch drawn at random touches other memory with each item, and that is most of its cost. So the
small leaves of an item are fields of one row, and one copy of the row brings them all. A large
observation is most often there twice, as what an action led to and as what the next one started
from; and where it is a stack of the newest frames, each of these is in as many stacks as one has
frames. Each is kept once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from edgeml.core.message import Allocator, empty, private, together
from edgeml.data.batch import concatenate
from edgeml.data.memory import zeros
from edgeml.data.schema import Schema
from edgeml.data.tree import Array

__all__ = ["Columns", "Order", "as_slice", "equal_bytes", "is_stack"]

_PARALLEL = 1 << 22  # bytes; from here on two threads take half to three quarters of one's time
_PACKED = 1024  # bytes; larger leaves gain nothing from lying in a row with others


class Order(NamedTuple):
    """Which of n items that are written together may follow upon which.

    Attributes:
        follows: positions of those that may follow upon another of them.
        leaders: of each of these the position of that one.
        begins: positions of those that may follow upon one that is there already, (k,).
        before: of each of these the row of that one, which is not written over, (k,).
    """

    follows: slice | Array
    leaders: slice | Array
    begins: Array
    before: Array


class Columns:
    """A ring of rows, each with the leaves of one item.

    Rows are written in order, so that the one written over is always the oldest. Nothing here
    takes a lock.

    Args:
        schema: of the items; everything that is written must have been made to fit it.
        n: how many rows.
        pairs: numbers of leaves of the same shape and dtype, each an observation and the next
            one. Where they are large, and a row's observation equals the next observation of the
            row that it is said to follow, byte by byte, it is kept once. Where they are stacks of
            large frames, and the next one begins, byte by byte, with what the observation ends
            with, all but a frame, these frames are kept once, too.
    """

    def __init__(self, schema: Schema, n: int, pairs: Iterable[tuple[int, int]] = ()) -> None:
        self._n = n
        self._shapes, self._dtypes = schema.shapes, schema.dtypes
        sizes = [
            dtype.itemsize * math.prod(shape)
            for dtype, shape in zip(schema.dtypes, schema.shapes, strict=True)
        ]
        specs = list(zip(map(str, range(len(sizes))), schema.dtypes, schema.shapes, strict=True))
        packed = [spec for spec, size in zip(specs, sizes, strict=True) if 0 < size <= _PACKED]
        self._rows = zeros((n,), np.dtype(packed, align=True))
        self._raw = self._rows.view(f"V{self._rows.itemsize}") if packed else self._rows
        self._scratch = np.empty(0, self._raw.dtype)
        self._scratch_fields: list[tuple[int, Array]] = []
        self._fields: dict[int, tuple[np.dtype[Any], int]] = {}  # as bytes, and their offset
        for name, _, _ in packed:
            assert self._rows.dtype.fields is not None
            size, offset = sizes[int(name)], self._rows.dtype.fields[name][1]
            self._fields[int(name)] = (np.dtype(f"V{size}"), offset)
        self._no_buffers = {leaf for leaf in self._fields if not _is_buffer(schema.dtypes[leaf])}
        self._large = [leaf for leaf in range(len(sizes)) if leaf not in self._fields]
        large = [(a, b) for a, b in pairs if sizes[a] > _PACKED]
        depths = {a: _count_frames(schema.shapes[a], sizes[a]) for a, _ in large}
        self._groups: list[_Frames] = []
        for depth in sorted(set(depths.values())):
            alike = [(a, b) for a, b in large if depths[a] == depth]
            kind = _Frames if depth == 1 else _Stacks
            self._groups.append(kind(n, alike, schema, depth))
        # The leaves that are kept in frames, and where.
        self._frames = {leaf: group for group in self._groups for leaf in group.slots}
        # Every other leaf's column.
        self._columns: dict[int, Array] = {
            leaf: self._rows[str(leaf)]
            if leaf in self._fields
            else zeros((n, *schema.shapes[leaf]), schema.dtypes[leaf])
            for leaf in range(len(sizes))
            if leaf not in self._frames
        }

    @property
    def nbytes(self) -> int:
        """Bytes of memory that all rows written so far need, large pages aside."""
        own = sum(c.nbytes for leaf, c in self._columns.items() if leaf not in self._fields)
        return self._rows.nbytes + own + sum(group.nbytes for group in self._groups)

    def clear(self) -> None:
        """Forget what is kept."""
        for group in self._groups:
            group.clear()

    def keeps_once(self, leaf: int) -> bool:
        """Whether a leaf is one of those observations that are kept once."""
        return leaf in self._frames

    def write(self, row: int, leaves: Sequence[Any], before: int = -1) -> bool:
        """Write one item.

        Args:
            row: where to.
            leaves: of the item.
            before: the row of the one that it may follow, another than ``row``; -1 for none.

        Returns:
            Whether all observations that may be kept once are what that one led to; True where
            there are none, too.
        """
        for leaf, column in self._columns.items():
            column[row] = leaves[leaf]
        same = True
        for group in self._groups:
            same = group.write_one(row, leaves, before) and same
        return same

    def write_many(
        self, row: int, leaves: Sequence[Array], n: int, order: Order | None = None
    ) -> Array | None:
        """Write n items, at most as many as there are rows, from ``row`` on and round the end.

        Args:
            row: where the first goes.
            leaves: of all.
            n: how many.
            order: which may follow upon which; needed where there is what is kept once.

        Returns:
            As `write`, of each, shape (n,); None for True.
        """
        before_end = min(n, self._n - row)
        for leaf, column in self._columns.items():
            values = leaves[leaf]
            column[row : row + before_end] = values[:before_end]
            if before_end < n:
                column[: n - before_end] = values[before_end:]
        if not self._groups:
            return None
        assert order is not None
        rows = np.arange(row, row + n) % self._n
        same = np.ones(n, np.bool_)
        for group in self._groups:
            same &= group.write(rows, leaves, order)
        return same

    def grab(self, row: int, n: int, allocate: Allocator) -> list[Array]:
        """Copy n items from ``row`` on, in few steps; `split` makes arrays of their leaves.

        Each step may let go of the GIL, and wait 5 ms for it beside a thread that computes in
        Python: so the fewer are taken under a lock, the better.
        """
        wrapped = max(0, row + n - self._n)
        grabbed = [
            concatenate((column[row : row + n], column[:wrapped]), allocate)
            for leaf, column in self._columns.items()
            if leaf not in self._fields
        ]
        for group in self._groups:
            grabbed += group.read(np.arange(row, row + n) % self._n, allocate)
        grabbed.append(concatenate((self._raw[row : row + n], self._raw[:wrapped]), private))
        return grabbed

    def split(self, grabbed: Sequence[Array], allocate: Allocator) -> list[Array]:
        """All leaves of the items that `grab` copied; this needs no lock."""
        *whole, raw = grabbed
        others = [leaf for leaf in self._columns if leaf not in self._fields]
        leaves = dict(zip([*others, *self._frames], whole, strict=True))
        for leaf, field in self._view_fields(raw) if self._fields else ():
            out = leaves[leaf] = empty(
                allocate, (len(raw), *self._shapes[leaf]), self._dtypes[leaf]
            )
            target: Array = np.ndarray(raw.shape, field.dtype, out.reshape(-1).view(np.uint8))
            target[...] = field
        return [leaves[leaf] for leaf in range(len(leaves))]

    def take(self, index: Array, outs: Mapping[int, Array]) -> None:
        """Copy leaves of the rows in ``index`` into contiguous arrays of the same length."""
        shape = index.shape
        if not self._fields.keys().isdisjoint(outs):
            for leaf, field in self._take_rows(index):
                out = outs.get(leaf)
                if out is None:
                    continue
                if leaf in self._no_buffers:
                    out = out.reshape(-1).view(np.uint8)
                # As bytes, which is twice as fast as an array of a few numbers for each row.
                target: Array = np.ndarray(shape, field.dtype, out)
                target[...] = field
        if self._large:
            _gather([self._locate(leaf, index, outs[leaf]) for leaf in self._large if leaf in outs])

    def look(self, leaf: int, index: Array) -> Array:
        """One leaf of the rows in ``index``, which may have any shape; not one kept once."""
        found: Array = self._columns[leaf][index]
        return found

    def take_stacks(
        self, leaf: int, index: Array, out: Array, following: tuple[int, Array] | None = None
    ) -> None:
        """Copy stacks of a leaf into ``out``, of shape (n, k, ...).

        Args:
            leaf: its number.
            index: of the rows, shape (n, k); where something follows, (n, k - 1).
            out: contiguous.
            following: for the last place of each stack, the number of the paired leaf, and the
                rows to take that from, shape (n,).
        """
        group = self._frames.get(leaf)
        if group is not None:
            slots = group.slots[leaf][index]
            if following is not None:
                last = group.slots[following[0]][following[1]]
                slots = np.concatenate([slots, last[:, None]], axis=1)
            _gather([group.locate(leaf, slots, out)])
        elif following is None:
            out[...] = self._columns[leaf][index]
        else:
            out[:, :-1] = self._columns[leaf][index]
            out[:, -1] = self._columns[following[0]][following[1]]

    def take_packed(self, pair: tuple[int, int], index: Array, last: Array, out: Array) -> Array:
        """Copy stacks of an observation with the newest frame of the next one behind it.

        Args:
            pair: numbers of the two leaves, of shape (T, ...).
            index: rows to take the observation from, shape (n,).
            last: rows to take the next one from, shape (n,).
            out: contiguous, shape (n, T + 1, ...).

        Returns:
            Of each whether the next one is told by that, shape (n,): it begins, byte by byte,
            with all but the first frame of the observation.
        """
        a, b = pair
        group = self._frames.get(a)
        if group is not None and group.depth == out.shape[1] - 1:
            slots = group.slots[a][index], group.slots[b][last]
            now, following = (each.reshape(len(index), group.depth) for each in slots)
            # What is equal has been found so when it was written, and is in one place.
            told: Array = (now[:, 1:] == following[:, :-1]).all(axis=1)
            _gather([group.locate(a, np.concatenate([now, following[:, -1:]], axis=1), out)])
            return told
        both = [np.empty((len(index), *self._shapes[leaf]), self._dtypes[leaf]) for leaf in pair]
        self.take(index, {a: both[0]})
        self.take(last, {b: both[1]})
        out[:, :-1], out[:, -1] = both[0], both[1][:, -1]
        return equal_bytes(both[0][:, 1:], both[1][:, :-1])

    def _locate(self, leaf: int, index: Array, out: Array) -> tuple[Array, Array, Array]:
        """The array that a large leaf is in, where there the rows in ``index`` have it, and out."""
        group = self._frames.get(leaf)
        if group is not None:
            return group.locate(leaf, group.slots[leaf][index], out)
        return self._columns[leaf], index, out

    def _take_rows(self, index: Array) -> list[tuple[int, Array]]:
        """The fields of the rows in ``index``, as bytes, until it is called again."""
        if self._scratch.shape != index.shape:
            # Kept, since at some hundred KB fresh memory costs more than what is done with it.
            self._scratch = np.empty(index.shape, self._raw.dtype)
            self._scratch_fields = self._view_fields(self._scratch)
        self._raw.take(index, mode="clip", out=self._scratch)
        return self._scratch_fields

    def _view_fields(self, rows: Array) -> list[tuple[int, Array]]:
        raw = rows.view(np.uint8)
        return [
            (leaf, np.ndarray(rows.shape, dtype, raw, offset, rows.strides))
            for leaf, (dtype, offset) in self._fields.items()
        ]


class _Frames:
    """Large observations, each kept once for the row that it came from and the one it led to.

    Args:
        n: how many rows.
        pairs: numbers of the leaves, each an observation and the next one.
        schema: of the items.
        depth: how many frames an observation has, for which it has as many slots.
    """

    def __init__(
        self, n: int, pairs: Sequence[tuple[int, int]], schema: Schema, depth: int = 1
    ) -> None:
        self.depth = depth
        self._pairs = pairs
        self.slots: dict[int, Array] = {}  # of each leaf, where in its array a row's frames are
        self.arrays: dict[int, Array] = {}
        # Twice the rows are needed only if nothing is shared: memory that is never written to
        # costs nothing.
        self._of, self._next = np.full((2, n) if depth == 1 else (2, n, depth), -1)
        self._lent = np.zeros(n, np.bool_)  # of each row whether its next is a later one's own
        self._free = np.empty(2 * n * depth, np.int64)
        self._top = self._free_count = 0  # slots that were ever used; those of them free again
        for a, b in pairs:
            shape = schema.shapes[a] if depth == 1 else schema.shapes[a][1:]
            self.arrays[a] = self.arrays[b] = zeros((len(self._free), *shape), schema.dtypes[a])
            self.slots |= {a: self._of, b: self._next}

    @property
    def nbytes(self) -> int:
        """Bytes of the frames that there ever were at once."""
        return sum(self.arrays[a][: self._top].nbytes for a, _ in self._pairs)

    def clear(self) -> None:
        """Forget all frames."""
        self._of[:] = self._next[:] = -1
        self._lent[:] = False
        self._top = self._free_count = 0

    def locate(self, leaf: int, slots: Array, out: Array) -> tuple[Array, Array, Array]:
        """What `_gather` needs to copy the frames in these slots, in their order."""
        array = self.arrays[leaf]
        return array, slots.ravel(), out.reshape(slots.size, *array.shape[1:])

    def read(self, rows: Array, allocate: Allocator) -> list[Array]:
        """The observations of rows, of each leaf."""
        read = []
        for leaf, all_slots in self.slots.items():
            array, slots = self.arrays[leaf], all_slots[rows]
            out = empty(allocate, (*slots.shape, *array.shape[1:]), array.dtype)
            _gather([self.locate(leaf, slots, out)])
            read.append(out)
        return read

    def write(self, rows: Array, leaves: Sequence[Array], order: Order) -> Array:
        """Write items; see `Columns.write_many`."""
        led_here = self._next[order.before]
        self._release(rows)
        shared = np.zeros(len(rows), np.bool_)
        shared[order.follows] = shared[order.begins] = True
        for a, b in self._pairs:
            shared[order.follows] &= equal_bytes(leaves[b][order.leaders], leaves[a][order.follows])
            if len(order.begins):
                shared[order.begins] &= equal_bytes(
                    self.arrays[a][led_here], leaves[a][order.begins]
                )
        self._put(rows, leaves, order, led_here, np.flatnonzero(~shared))
        self._lent[rows] = False
        self._lent[rows[order.leaders][shared[order.follows]]] = True
        self._lent[order.before[shared[order.begins]]] = True
        return shared

    def _put(
        self, rows: Array, leaves: Sequence[Array], order: Order, led_here: Array, own: Array
    ) -> None:
        """Give items their slots, and write what is not there yet: all is new of ``own`` ones."""
        n = len(rows)
        slots = self._take_slots(n + len(own))
        following, first = slots[:n], slots[n:]
        of = np.empty(n, np.int64)
        of[order.follows] = following[order.leaders]
        of[order.begins] = led_here
        of[own] = first
        self._of[rows], self._next[rows] = of, following
        for a, b in self._pairs:
            array = self.arrays[a]
            array[following] = leaves[b]
            if len(own):
                array[first] = leaves[a][own]

    def write_one(self, row: int, leaves: Sequence[Any], before: int) -> bool:
        """Write one item; see `Columns.write`. `write` takes three times as long for it."""
        shared = before >= 0
        led_here = self._next[before] if shared else -1
        for a, _ in self._pairs if shared else ():
            shared = shared and _is_equal(self.arrays[a][led_here], leaves[a])
        for slot in (self._of[row], -1 if self._lent[row] else self._next[row]):
            if slot >= 0:
                self._free[self._free_count] = slot
                self._free_count += 1
        of = led_here if shared else self._take_slot()
        self._of[row], self._next[row] = of, self._take_slot()
        self._lent[row] = False
        if shared:
            self._lent[before] = True
        for a, b in self._pairs:
            if not shared:
                self.arrays[a][of] = leaves[a]
            self.arrays[b][self._next[row]] = leaves[b]
        return shared

    def _take_slot(self) -> int:
        if self._free_count:
            self._free_count -= 1
            return int(self._free[self._free_count])
        self._top += 1
        return self._top - 1

    def _release(self, rows: Array) -> None:
        """Free what only these rows need; they are the oldest, so none before them is left."""
        of, following = self._of[rows], self._next[rows]
        self._free_slots(of[of >= 0], following[(following >= 0) & ~self._lent[rows]])

    def _free_slots(self, *slots: Array) -> None:
        gone = np.concatenate(slots)
        self._free[self._free_count : self._free_count + len(gone)] = gone
        self._free_count += len(gone)

    def _take_slots(self, n: int) -> Array:
        reused = min(n, self._free_count)
        self._free_count -= reused
        fresh = np.arange(self._top, self._top + n - reused)
        self._top += len(fresh)
        return np.concatenate([self._free[self._free_count : self._free_count + reused], fresh])


class _Stacks(_Frames):
    """The same where each is a stack of frames: these are kept once for all stacks they are in.

    So it is where a next observation *overlaps* its row's own one: it begins with what that one
    ends with, all but a frame.
    """

    def __init__(
        self, n: int, pairs: Sequence[tuple[int, int]], schema: Schema, depth: int
    ) -> None:
        super().__init__(n, pairs, schema, depth)
        self._overlaps = np.zeros(n, np.bool_)  # of each row

    def _put(
        self, rows: Array, leaves: Sequence[Array], order: Order, led_here: Array, own: Array
    ) -> None:
        n, depth = len(rows), self.depth
        overlaps = np.ones(n, np.bool_)
        for a, b in self._pairs:
            overlaps &= _are_overlapping(leaves[a], leaves[b])
        whole = np.flatnonzero(~overlaps)
        counts = np.where(overlaps, 1, depth)
        # In the order of time, since what is side by side is written and read as one.
        ends = np.cumsum(counts)
        slots = self._take_slots(int(ends[-1]) + len(own) * depth)
        first = slots[ends[-1] :].reshape(-1, depth)
        of, following = np.empty((2, n, depth), np.int64)
        following[:, -1] = slots[ends - 1]
        following[whole] = slots[(ends[whole] - depth)[:, None] + np.arange(depth)]
        # Frames move on by one place from stack to stack: so each place follows from the next.
        for place in reversed(range(depth)):
            if place < depth - 1:
                following[overlaps, place] = of[overlaps, place + 1]
            of[order.follows, place] = following[order.leaders, place]
            of[order.begins, place] = led_here[:, place]
            of[own, place] = first[:, place]
        self._of[rows], self._next[rows], self._overlaps[rows] = of, following, overlaps
        for a, b in self._pairs:
            array = self.arrays[a]
            array[following[:, -1]] = leaves[b][:, -1]
            if len(whole):
                array[following[whole, :-1]] = leaves[b][whole, :-1]
            if len(own):
                array[first] = leaves[a][own]

    def write_one(self, row: int, leaves: Sequence[Any], before: int) -> bool:
        """Write one item; see `Columns.write`."""
        depth, shared, overlaps = self.depth, before >= 0, True
        of: list[int] = self._next[before].tolist() if shared else []
        for a, b in self._pairs:
            shared = shared and _is_equal(self.arrays[a][_as_range(of)], leaves[a])
            overlaps = (
                overlaps
                and leaves[a][1, 0].tobytes() == leaves[b][0, 0].tobytes()  # tells most others
                and _is_equal(leaves[a][1:], leaves[b][:-1])
            )
        if (gone := self._of[row].tolist())[0] >= 0:
            if self._overlaps[row]:
                del gone[1:]
            if not self._lent[row]:
                gone += self._next[row].tolist()
            # Backwards, so that they are taken again in their order.
            self._free[self._free_count : self._free_count + len(gone)] = gone[::-1]
            self._free_count += len(gone)
        if not shared:
            of = [self._take_slot() for _ in range(depth)]
        fresh = [self._take_slot() for _ in range(1 if overlaps else depth)]
        self._of[row], self._next[row] = of, of[len(fresh) :] + fresh
        self._lent[row], self._overlaps[row] = False, overlaps
        if shared:
            self._lent[before] = True
        for a, b in self._pairs:
            if not shared:
                self.arrays[a][_as_range(of)] = leaves[a]
            self.arrays[b][_as_range(fresh)] = leaves[b][-len(fresh) :]
        return shared

    def _release(self, rows: Array) -> None:
        rows = rows[self._of[rows, 0] >= 0]
        of, overlaps = self._of[rows], self._overlaps[rows]
        # The first frame of a stack is in none after it.
        later = of[~overlaps, 1:], self._next[rows[~self._lent[rows]]]
        self._free_slots(of[:, 0], *(slots.ravel() for slots in later))


def _gather(jobs: Sequence[tuple[Array, Array, Array]]) -> None:
    """Copy items of arrays, each of them by an index, into contiguous arrays."""
    large = sum(out.nbytes for _, _, out in jobs) >= _PARALLEL and os.cpu_count() != 1
    if large:
        halves = [slice(len(index) // 2) for _, index, _ in jobs]
        jobs = [
            (array, index[part], out[part])
            for (array, index, out), half in zip(jobs, halves, strict=True)
            for part in (half, slice(half.stop, None))
        ]
    pieces = iter(jobs)

    def work() -> None:
        for array, index, out in pieces:  # whoever is free takes the next
            # mode="raise" would copy twice, and the indices are in range.
            array.take(index, axis=0, mode="clip", out=out)

    if large:
        together(work)
    else:
        work()


def _is_buffer(dtype: np.dtype[Any]) -> bool:
    """Whether arrays of it can be used as memory; those of ml_dtypes can't."""
    try:
        memoryview(np.empty(1, dtype))  # type: ignore[arg-type]
    except ValueError:
        return False
    return True


def as_slice(index: Array) -> slice | Array:
    """Return an index as a slice, which copies nothing, where it is one."""
    n = len(index)
    if not n or index[-1] - index[0] != n - 1 or (index[1:] - index[:-1] != 1).any():
        return index
    return slice(int(index[0]), int(index[-1]) + 1)


def is_stack(shape: tuple[int, ...]) -> bool:
    """Return whether a part of an observation has frames along its first axis: (T, H, W, C)."""
    return len(shape) >= 4


def _count_frames(shape: tuple[int, ...], size: int) -> int:
    """How many frames an observation has if it may be a stack of large ones, else 1."""
    return shape[0] if is_stack(shape) and size > shape[0] * _PACKED else 1


def _is_equal(left: Array, right: Any) -> bool:
    """Whether two items have the same bytes."""
    return bool(equal_bytes(left[None], np.asarray(right)[None])[0])


def _as_range(index: list[int]) -> slice | list[int]:
    """An index as a slice, which copies nothing, where it is one."""
    first, n = index[0], len(index)
    return slice(first, first + n) if index == list(range(first, first + n)) else index


def _are_overlapping(now: Array, following: Array) -> Array:
    """Of stacks, (n, T, ...), whether one begins with what the other ends with, all but a frame."""
    now, following = now[:, 1:], following[:, :-1]
    same = equal_bytes(now[:, 0, 0], following[:, 0, 0])  # this tells most of those that don't
    maybe = as_slice(np.flatnonzero(same))
    same[maybe] = equal_bytes(now[maybe], following[maybe])
    return same


def equal_bytes(left: Array, right: Array) -> Array:
    """Return for each item of two columns whether they have the same bytes."""
    n = len(left)
    if not n:
        return np.zeros(0, np.bool_)
    left, right = _as_bytes(left), _as_bytes(right)
    if not left.shape[1] % 8:
        left, right = left.view(np.uint64), right.view(np.uint64)
    same: Array = (left == right).all(axis=1)
    return same


def _as_bytes(column: Array) -> Array:
    """A column as bytes, (n, bytes); a view of it where each item lies in one piece."""
    flat = column.reshape(len(column), -1)
    if flat.strides[1] != flat.itemsize:
        flat = np.ascontiguousarray(flat)
    return flat.view(np.uint8)
