"""A queue that survives the process, and the machine: items in files, in the order they came.

The control thread packs an item's bytes and copies them into memory that it shares with the system
(`segments`), and that is all: a thread waits for the disk, makes files ahead and deletes old ones.
"""

from __future__ import annotations

import atexit
import errno
import itertools
import logging
import math
import os
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgeml.core.errors import Closed, DeadlineExceeded, Malformed, NotEncodable
from edgeml.core.forks import drop_descriptors, watch_forks
from edgeml.core.frames import frame
from edgeml.core.message import pooled
from edgeml.core.owned import ClosedAtExit
from edgeml.data.batch import Batch, join
from edgeml.data.bounded import BoundedQueue, OnFull
from edgeml.data.files import explain_errors, lock_directory, sync_names
from edgeml.data.numbering import Numbering
from edgeml.data.records import make_codec
from edgeml.data.segments import (
    CUT,
    LONGEST,
    RESET,
    ROWS,
    STATE,
    VALUE,
    Layout,
    Run,
    Segment,
    find_segments,
)
from edgeml.data.tree import copy_item, fill, leaves_of

__all__ = ["LoggedDataStore", "Packer", "Sync"]

_log = logging.getLogger(__name__)
_sync = getattr(os, "fdatasync", os.fsync)  # macOS has the latter alone

_SIZES = (8 << 20, 1 << 20)  # bytes of a segment; the latter where there is no room for more
_PART = 1 << 20  # bytes of rows in a record
_MOST_LAYOUTS = 256  # items of more are kept as values
_NEVER = 1 << 62  # an id that no item has
_MOST_SOURCES = 4  # that are remembered
_RETRY = 1.0  # seconds until the disk is tried again, where it failed
_LAST_SYNC = 10.0  # seconds that closing may wait for the disk
_KEPT = (
    "nothing was inserted, and all that was before is in the log: free some space, or let the "
    "learner take what is there, and insert it again"
)
_CODES = dict(zip("?bBhHiIlLqQefd", "?bBhHiIqQqQefd", strict=True))  # struct's, of numpy's dtypes


@dataclass(frozen=True, slots=True)
class Sync:
    """When a log has the disk follow, in the background: at the first of these.

    Until then what was inserted is in the system's memory: it survives the end of the process by
    whatever means, but not the loss of power.

    Args:
        seconds: so long after an item came (default 1).
        items: when so many have come; 1 is for each, where one wait for the disk is for all that
            came during the one before. None (default): whatever their number.
    """

    seconds: float = 1.0
    items: int | None = None

    def __post_init__(self) -> None:
        if not self.seconds > 0 or (self.items is not None and self.items < 1):
            raise ValueError(
                f"a log syncs after so many seconds, or items, above 0, not {self.seconds} and "
                f"{self.items}"
            )


class _Entry(NamedTuple):
    """A record to be appended."""

    layout: Layout | None
    n: int
    payload: Any
    size: int


class Packer:
    """Takes items apart that are like a first one, and gives their rows, quickly.

    Numbers become what the layout has, as a `ReplayBuffer` converts them: those of Python, and
    numpy's scalars and arrays of other floats. Where a value doesn't fit, there is no row.

    Args:
        layout: of the rows.
        item: the first one.

    Raises:
        ValueError: such items need more than that.
    """

    def __init__(self, layout: Layout, item: Any) -> None:
        self.layout = layout
        skeleton = layout.skeleton
        self._get: Callable[[Any], Sequence[Any]] | None = None
        self._length = 0
        if (
            type(item) is dict
            and type(skeleton) is dict
            and len(item) > 1
            and list(skeleton.values()) == [*range(len(item))]
        ):
            self._get, self._length = itemgetter(*skeleton), len(item)
        leaves = leaves_of(skeleton, item)
        self._types = list(map(type, leaves))
        self._arrays: list[tuple[int, np.dtype[Any], tuple[int, ...]]] = []
        self._changes: list[tuple[int, Callable[[Any], Any]]] = []
        specs = zip(leaves, layout.dtypes, layout.shapes, strict=True)
        for i, (leaf, dtype, shape) in enumerate(specs):
            kind = type(leaf)
            if kind is np.ndarray:
                self._arrays.append((i, leaf.dtype, shape))
            elif kind not in (bool, int, float) and not issubclass(kind, np.generic):
                raise ValueError(f"{kind.__name__} to {dtype}")
            if kind in (np.ndarray, bool) or kind not in (int, float):
                given = np.asarray(leaf).dtype
                if given == dtype and kind is not bool:
                    continue
            self._changes.append((i, _find_change(kind, np.asarray(leaf).dtype, dtype)))
        if self.pack(item) is None:
            raise ValueError("no buffers")

    def pack(self, item: Any) -> bytes | None:
        """Return the row of an item, or None where it isn't like the first one."""
        leaves: list[Any]
        try:
            if self._get is not None:
                if type(item) is not dict or len(item) != self._length:
                    return None
                leaves = [*self._get(item)]
            else:
                leaves = leaves_of(self.layout.skeleton, item)
            if list(map(type, leaves)) != self._types:
                return None
            for i, dtype, shape in self._arrays:
                leaf = leaves[i]
                if (leaf.dtype is not dtype and leaf.dtype != dtype) or leaf.shape != shape:
                    return None
            for i, change in self._changes:
                leaves[i] = change(leaves[i])
            return b"".join(leaves)
        except (ArithmeticError, BufferError, KeyError, TypeError, ValueError, struct.error):
            return None  # of another structure, not contiguous, beyond what fits


def _find_change(kind: type, given: np.dtype[Any], dtype: np.dtype[Any]) -> Callable[[Any], Any]:
    """What makes bytes of a leaf whose dtype isn't the layout's."""
    if kind is np.ndarray:
        if given.kind not in "fiu" or dtype.kind != "f":
            raise ValueError(f"{given} to {dtype}")
        return lambda leaf: leaf.astype(dtype)
    allowed = {"f": "fiu", "i": "iu", "u": "iu", "b": "b"}
    if dtype.char not in _CODES or given.kind not in allowed[dtype.kind]:
        raise ValueError(f"{given} to {dtype}")
    return struct.Struct("<" + _CODES[dtype.char]).pack


class LoggedDataStore(ClosedAtExit, BoundedQueue):
    """A first-in, first-out queue of any items that a codec carries, kept in files.

    What `insert` has returned from survives the process, however that ends. It survives the loss
    of power once it is on the disk, for which a thread sees soon after: see ``sync``. Made anew
    with the same directory, by this process or another, it holds what was not released, in order;
    what comes next is taken not to follow upon that. An item comes back as arrays and numpy
    scalars, dicts, tuples and lists; what isn't numbers alone, as the codec carries it.

    What is damaged in the files is left out, counted in `lost` and told in the log, and all else is
    there. Files are deleted when all their items are released. `close` it, or use ``with``; what
    is dropped is closed, too.

    Args:
        directory: of the files; it is made if need be. One store has it at a time.
        capacity: how many items are held at most (default: ten million; the disk may be full
            before that).
        on_full: what an insert does then: "raise" (default) raises Overloaded; "block" waits for
            `release`; "drop_oldest" overwrites the oldest items, and counts them in `dropped`.
        timeout: for "block", how many seconds an insert waits (default 10).
        sync: when the disk follows (default: a second later).

    Attributes:
        directory: of the files.
        lane: of the store that it follows, the newest item's: a log has no lanes itself, and is
            interrupted wherever another lane's item comes.

    Raises:
        BlockingIOError: another store has the directory, in this process or another one.
        Malformed: a file is of another version of edgeml.
        OSError: what the system says, by the inserts as well: no space, no permission, the disk
            failed, ... The text says what to do. Nothing was inserted then, and the log goes on
            when there is room again.
        NotEncodable: by the inserts, for an item that the codec doesn't carry.
        Overloaded, DeadlineExceeded, ValueError: by the inserts, as those of `QueuedDataStore`.
    """

    _writer: _Writer | None = None

    def __init__(
        self,
        directory: str | os.PathLike[str],
        capacity: int = 10_000_000,
        on_full: OnFull = "raise",
        *,
        timeout: float = 10.0,
        sync: Sync = Sync(),
    ) -> None:
        super().__init__(capacity, on_full, timeout)
        self.directory = Path(directory)
        self._named = f"the log {self.directory}"
        self._codec = make_codec()
        self._segments: deque[Segment] = deque()
        self._layouts: dict[Any, Layout] = {}  # by their keys
        self._packer: Packer | None = None
        self._gone = self._lost = 0  # an id, and items
        self._sources: list[_Source] = []  # the newest is the last; see `follow`
        self._follows = False
        self.lane = 0  # of the newest item
        self._applied = 0  # id
        self._pid = os.getpid()
        writer = _Writer(self.directory, sync)
        try:
            self._open(writer)
        except BaseException:
            writer.close()
            raise
        writer.start()
        weakref.finalize(self, writer.end).atexit = False

    # What was there ---------------------------------------------------------------------------

    def _open(self, writer: _Writer) -> None:
        segments = []
        for path in find_segments(self.directory):
            with explain_errors(path, 0, "nothing was changed"):
                segments.append(Segment(path, os.open(path, os.O_RDWR | os.O_NOFOLLOW)))
        found = _Found()
        for segment in segments:
            with explain_errors(segment.path, 0, "nothing was changed"):
                self._take_up(segment, found)
            self._segments.append(segment)
        writer.latest = found.latest or 0
        if segments:
            writer.next_number = segments[-1].number + 1
        gone = min(found.gone, writer.latest)
        self._held = sum(run.n for segment in segments for run in segment.runs)
        self._lost = sum(max(0, last - max(gone, before)) for before, last in found.holes)
        self._lost += segments[-1].cut_off if segments else 0
        if self._lost:
            text = "the log %s was damaged: at least %d items are lost, and all others are there"
            _log.warning(text, self.directory, self._lost)
        numbering = self._parse_state(found.state)
        if numbering is not None:
            # The power may have failed, and the learner have items that are not here.
            self._numbering = numbering.branch(writer.latest)
        elif writer.latest:
            text = "the log %s has lost its numbering: who has some of its items gets them again"
            _log.warning(text, self.directory)
        writer.state = self._encode_state()
        self._begin(writer, segments)
        self._writer = writer
        for segment in list(self._segments):
            if not segment.runs and segment is not writer.segment:
                self._segments.remove(segment)
                writer.doom(segment)
        if writer.latest:
            self.interrupt()
        self._forget(gone)
        if self._on_full == "drop_oldest" and self._held > self._capacity:
            self._drop(self._held - self._capacity)

    def _take_up(self, segment: Segment, found: _Found) -> None:
        """Take up what a segment has."""
        found.gone = max(found.gone, segment.find_gone())
        for record in segment.scan(self._codec):
            first, n = record.first, record.n
            if record.kind == STATE:
                n = 0
                with suppress(Malformed):
                    found.state = segment.decode(record.at, record.size, self._codec)
                if record.flags & RESET:
                    for older in self._segments:
                        older.runs.clear()
                    self._cuts.clear()
                    found.latest, found.gone = None, segment.find_gone()
                    found.holes.clear()
            elif record.kind not in (ROWS, VALUE):
                continue
            if found.latest is None:
                found.latest = max(0, first - 1)
            if first <= found.latest:
                continue
            hole = first > found.latest + 1
            if hole:
                found.holes.append((found.latest, first - 1))
            if hole or record.flags & CUT:
                self.take_cuts([0], first)
            found.latest = first + n - 1
            if record.kind == ROWS:
                if record.layout is None or n * record.layout.size != record.size:
                    found.holes.append((first - 1, first + n - 1))
                    continue
                layout = self._layouts.setdefault(record.layout.key, record.layout)
                segment.add_rows(layout, first, n, record.at)
            elif record.kind == VALUE:
                segment.add_value(first, record.at, record.size)

    def _parse_state(self, state: Any) -> Numbering | None:
        """Take up what `_encode_state` gave; returns the numbering."""
        try:
            numbering = Numbering.from_list(state["numbering"])
            sources = [
                _Source(Numbering.from_list(entries), int(shift), int(until))
                for entries, shift, until in state["sources"]
            ]
        except (KeyError, TypeError, ValueError):
            return None
        self._sources = sources
        return numbering

    def _encode_state(self) -> bytes:
        state = {
            "numbering": list(map(list, self._numbering.to_list())),
            "sources": [
                [list(map(list, each.numbering.to_list())), each.shift, each.until]
                for each in self._sources
            ],
        }
        return frame(self._codec.encode(state))

    def _begin(self, writer: _Writer, segments: list[Segment]) -> None:
        """Have a segment to append to, with the state in it, on the disk."""
        last = segments[-1] if segments else None
        if last is not None:
            with suppress(OSError):  # a new one may do
                last.map()
        if last is not None and last.has_room(2 * Segment.measure(len(writer.state))):
            writer.segment = last
            writer.append_state(0)
        else:
            self._segments.append(writer.rotate(0))
        writer.sync_now()
        if writer.failure is not None:
            raise writer.explain_failure()

    # What comes in ----------------------------------------------------------------------------

    @property
    def lost(self) -> int:
        """How many items, at least, were found damaged or missing when this was made."""
        return self._lost

    @property
    def synced_id(self) -> int:
        """The id up to which all items are on the disk."""
        assert self._writer is not None
        return self._writer.synced

    def latest_data_id(self) -> int:
        """Return the id of the newest item ever inserted; 0 where there was none."""
        return 0 if self._writer is None else self._writer.latest

    def insert(self, item: Any) -> None:
        """Insert one item; the class tells what it raises."""
        packer = self._packer
        row = None if packer is None else packer.pack(item)
        if row is None:
            entry = self._encode_item(item)
            with self.lock:
                self._append([entry], 1)
            return
        assert packer is not None
        with self.lock:
            self.reserve_row(packer.layout)
            self.append_row(row)

    def batch_insert(self, batch: Batch | Sequence[Any]) -> None:
        """Insert items in one step; the class tells what it raises."""
        with self.lock:
            self.append(self.reserve(batch))

    def _encode(self, batch: Batch) -> list[_Entry]:
        """Make records of a batch, which ends one at each cut."""
        if batch.columns is None or not batch:
            return [self._encode_item(item) for item in batch]
        try:
            layout = self._find_layout(batch)
        except ValueError:
            return [self._encode_value(item) for item in batch]
        step = max(1, _PART // layout.size)
        entries = []
        for begin, end in itertools.pairwise([0, *filter(None, batch.cuts), len(batch)]):
            for start in range(begin, end, step):
                part = batch[start : min(start + step, end)]
                rows = layout.pack(part.columns, len(part))
                entries.append(_Entry(layout, len(part), rows, rows.nbytes))
        return entries

    def _encode_item(self, item: Any) -> _Entry:
        batch = Batch.of([item])
        if batch.columns is None:
            return self._encode_value(item)
        try:
            layout = self._find_layout(batch)
        except ValueError:
            return self._encode_value(item)
        with suppress(ValueError):
            self._packer = Packer(layout, item)
        return _Entry(layout, 1, layout.pack(batch.columns, 1), layout.size)

    def _encode_value(self, item: Any) -> _Entry:
        payload = frame(self._codec.encode(copy_item(item)))
        if len(payload) >= LONGEST:
            raise NotEncodable(f"an item of {len(payload):,} bytes is too large for a log")
        return _Entry(None, 1, payload, len(payload))

    def _find_layout(self, batch: Batch) -> Layout:
        """The layout of columns; raises ValueError where they have none, or all are different."""
        layout = Layout.of_columns(batch.columns)
        if layout.key not in self._layouts and len(self._layouts) >= _MOST_LAYOUTS:
            raise ValueError("too many layouts")
        return self.keep_layout(layout)

    # In two steps, so that a store can forward what it inserts, and neither has what the other
    # refuses: all that may fail is in the first.

    def reserve(self, batch: Batch | Sequence[Any]) -> Reserved:
        """Make room for a batch, under the lock; it raises what inserting it would."""
        if not isinstance(batch, Batch):
            if isinstance(batch, (dict, str)):
                raise TypeError(f"a batch is a sequence of items, got a {type(batch).__name__}")
            batch = Batch.of(batch)
        lanes = batch.lanes
        if lanes is not None and len(batch):
            if int(lanes[0]) != self.lane:
                self.switch_lane(int(lanes[0]))
            switches = 1 + np.flatnonzero(np.diff(lanes))
            batch = batch.cut(sorted({*batch.cuts, *switches.tolist()}))
            self.lane = int(lanes[-1])
        elif self.lane:
            self.switch_lane(0)
        n = len(batch)
        if self._on_full == "drop_oldest":
            batch = batch[-self._capacity :]
        self._make_room(entries := self._encode(batch), n)
        return Reserved(entries, n, batch.cuts)

    def append(self, reserved: Reserved) -> None:
        """Insert what there is room for now; nothing else was done under the lock since."""
        self._append_all(reserved)

    def _append(self, entries: list[_Entry], n: int) -> None:
        self._make_room(entries, n)
        self._append_all(Reserved(entries, n, ()))

    def reserve_row(self, layout: Layout) -> None:
        """Make room for a row, as `reserve` does; `append_row` inserts it."""
        assert self._writer is not None
        segment = self._writer.segment
        if (
            segment.layout is not layout
            or self._held >= self._capacity
            or segment.end + layout.size + 40 > segment.room
        ):
            self._make_room([_Entry(layout, 1, b"", layout.size)], 1)
            self._writer.segment.use(layout, self._codec)

    def append_row(self, row: bytes) -> None:
        """Insert the row for which there is room now."""
        writer = self._writer
        assert writer is not None
        segment = writer.segment
        first = writer.latest + 1
        flags = CUT if self._cuts and self._cuts[-1] == first else 0
        at = segment.append(ROWS, first, 1, flags, (row,), len(row))
        assert segment.layout is not None
        segment.add_rows(segment.layout, first, 1, at)
        self._held += 1
        writer.latest = first
        if first >= writer.wake_at:
            writer.wake()

    def _append_all(self, reserved: Reserved) -> None:
        writer = self._writer
        assert writer is not None
        segment = writer.segment
        n, kept = reserved.n, sum(entry.n for entry in reserved.entries)
        if n > kept:
            self._dropped += n - kept
        first = writer.latest + 1 + n - kept
        self.take_cuts(reserved.cuts, first)
        cuts = {cut for cut in self._cuts if cut >= first}
        for layout, count, payload, size in reserved.entries:
            flags = CUT if first in cuts else 0
            if layout is None:
                at = segment.append(VALUE, first, 1, flags, (payload,), size)
                segment.add_value(first, at, size)
            else:
                segment.use(layout, self._codec)
                at = segment.append(ROWS, first, count, flags, (payload,), size)
                segment.add_rows(layout, first, count, at)
            first += count
            self._held += count
            writer.latest = first - 1
        if n > kept:
            self._forget(writer.latest - kept)
        if writer.latest >= writer.wake_at:
            writer.wake()

    def _make_room(self, entries: Sequence[_Entry], n: int) -> None:
        """Make room for records of n items, all in one segment."""
        writer = self._writer
        assert writer is not None
        writer.check()
        excess = self._held + n - self._capacity
        if excess > 0 and self._applied > self._gone:
            self._forget(self._applied)
            excess = self._held + n - self._capacity
        if excess > 0 and self._on_full != "drop_oldest":
            self._await_space(n)
            writer.check()
        need = sum(Segment.measure(entry.size) for entry in entries)
        layouts = {id(entry.layout): entry.layout for entry in entries if entry.layout is not None}
        for layout in layouts.values():
            need += 2 * Segment.measure(len(Segment.encode_layout(layout, self._codec)))
        if not writer.segment.has_room(need):
            try:
                segment = writer.rotate(need)
            except OSError:
                if self._applied <= self._gone:
                    raise
                self._forget(self._applied)
                writer.delete_doomed()
                segment = writer.rotate(need)
            if self._segments[-1] is not segment:
                self._segments.append(segment)
        if excess > 0 and self._on_full == "drop_oldest":
            self._drop(min(excess, self._held))

    def _has_room(self, n: int) -> bool:
        if not super()._has_room(n):
            self._forget(self._applied)
        return super()._has_room(n)

    # What goes out ----------------------------------------------------------------------------

    def get_latest_data(self, from_id: int, *, limit: int | None = None) -> Batch:
        """Return the items with ids above ``from_id`` that are still held; see the base class.

        Where some are lost, it returns those before, or if there are none, those after them.
        """
        with self.lock:
            self._check()
            first, parts = self._find(max(from_id, self._gone), limit)
            cuts = self.cuts_within(first, sum(run.n for _, run in parts))
        # What is written is never changed, so the rest needs no lock.
        batches = [
            self._read_rows(list(group), layout)
            if layout is not None
            else join([segment.read_values(run, self._codec) for segment, run in group], 1, pooled)
            for layout, group in itertools.groupby(parts, lambda part: part[1].layout)
        ]
        return join(batches, first, self.allocate).cut(cuts)

    def _read_rows(self, parts: Sequence[tuple[Segment, Run]], layout: Layout) -> Batch:
        """Return the items of runs of one layout."""
        leaves = layout.make_leaves(sum(run.n for _, run in parts), self.allocate)
        begin = 0
        for segment, run in parts:
            segment.read_rows(run, [leaf[begin : begin + run.n] for leaf in leaves])
            begin += run.n
        return Batch.from_columns(fill(layout.skeleton, leaves))

    def _find(self, from_id: int, limit: int | None) -> tuple[int, list[tuple[Segment, Run]]]:
        """The id of the first item above another one, and the runs that follow upon each other."""
        left = _NEVER if limit is None else limit
        parts: list[tuple[Segment, Run]] = []
        first = following = 0
        for segment in self._segments:
            runs = segment.runs
            if not runs or runs[-1].first + runs[-1].n - 1 <= from_id:
                continue
            for run in itertools.islice(runs, _bisect(runs, from_id), None):
                start = max(run.first, from_id + 1)
                if not first:
                    first = following = start
                if left <= 0 or start != following:
                    return first, parts
                part = run[start - run.first : min(run.n, start - run.first + left)]
                parts.append((segment, part))
                left -= part.n
                following += part.n
        assert self._writer is not None
        return first or max(from_id, self._writer.latest) + 1, parts

    def release(self, up_to_id: int) -> None:
        """Let go of the items up to this id, and delete the files that have no others."""
        with self.lock:
            self._check()
            self._forget(up_to_id)
            self._not_full.notify_all()

    def mark_applied(self, up_to_id: int) -> None:
        """Tell that a learner that saves no checkpoints has the items up to this id.

        They are kept for one that starts anew, until there is no room for others.
        """
        with self.lock:
            self._applied = max(self._applied, up_to_id)
            self._not_full.notify_all()

    def reset(self, next_id: int | None = None) -> None:
        """Forget all items; see the base class."""
        with self.lock:
            writer = self._check()
            next_id = self.forget_cuts(next_id)
            segment = writer.rotate(0, reset_to=next_id)
            for older in self._segments:
                if older is not segment:
                    writer.doom(older)
            self._segments = deque([segment])
            self._held, self._gone, self._applied = 0, next_id - 1, 0
            segment.note_gone(self._gone)
            self._not_full.notify_all()

    def restore(self, batch: Batch, extra: Any) -> None:
        """Insert what `dump` gave; where there is no room, the oldest items go."""
        with self.lock, self._overwriting():
            self.batch_insert(batch)

    def _drop(self, count: int) -> None:
        """Let go of the oldest items that are held, which nobody has taken."""
        self._dropped += count
        for segment in self._segments:
            for run in segment.runs:
                if count <= run.n:
                    self._forget(run.first + count - 1)
                    return
                count -= run.n

    def _forget(self, up_to: int) -> None:
        writer = self._writer
        assert writer is not None
        up_to = min(up_to, writer.latest)
        if up_to <= self._gone:
            return
        self._gone = up_to
        while self._segments:
            segment = self._segments[0]
            runs = segment.runs
            done = 0
            for run in runs:
                if run.first > up_to:
                    break
                gone = min(run.n, up_to + 1 - run.first)
                self._held -= gone
                if gone < run.n:
                    runs[done] = run[gone:]
                    break
                done += 1
            del runs[:done]
            if runs or segment is writer.segment:
                break
            writer.doom(self._segments.popleft())
        writer.segment.note_gone(up_to)

    # Following another store; see `Forwarding` --------------------------------------------------

    def share_lock(self, lock: Any) -> None:
        """Have the lock of the store whose items come here, so that one step is one for both.

        Raises:
            ValueError: it follows another store already.
        """
        if self._follows:
            raise ValueError(f"another store's items go to the log {self.directory} already")
        with self.lock:
            self._follows = True
            self.lock = lock
            self._not_full = threading.Condition(lock)

    def switch_lane(self, lane: int) -> None:
        """Note that what comes next is of another lane, and so follows upon nothing here."""
        self.interrupt()
        self.lane = lane

    def known(self, numbering: Numbering) -> int:
        """Return the id up to which items of a numbering have come here."""
        marks = (
            min(
                each.numbering.shared(numbering), (each.until or self.latest_data_id()) - each.shift
            )
            for each in self._sources
        )
        return max(0, *marks, 0)

    def follow(self, numbering: Numbering, latest: int) -> None:
        """Note that the newest item here is the one with that id of that numbering."""
        newest = self.latest_data_id()
        shift = newest - latest
        last = self._sources[-1] if self._sources else None
        if last is not None and last.shift == shift and last.numbering is numbering:
            return
        if last is not None:
            self._sources[-1] = last._replace(until=newest)
            # What the new one has in common with it is known by the new one.
            if last.shift == shift and last.numbering.shared(numbering) >= latest:
                self._sources.pop()
        self._sources = [*self._sources[1 - _MOST_SOURCES :], _Source(numbering, shift, 0)]
        self._write_state()

    def make_room(self, n: int, nbytes: int) -> None:
        """Make room for n items of so many bytes in all, under the lock."""
        self._make_room([_Entry(None, n, b"", nbytes)], n)

    def keep_layout(self, layout: Layout) -> Layout:
        """Return the one of equal layouts that is in use here."""
        return self._layouts.setdefault(layout.key, layout)

    def make_packer(self, batch: Batch, item: Any) -> Packer:
        """Return what packs items like one, of which a store made the batch of one.

        Raises:
            ValueError: there is none.
        """
        if batch.columns is None:
            raise ValueError("no columns")
        layout = self._find_layout(batch)
        packer = Packer(layout, item)
        if len(batch) != 1 or packer.pack(item) != layout.pack(batch.columns, 1).tobytes():
            raise ValueError("the store makes something else of it")
        return packer

    # Its numbering ----------------------------------------------------------------------------

    @property
    def numbering(self) -> Numbering:
        """By which its items are known to whoever receives them; it is kept in the files."""
        return self._numbering

    @numbering.setter
    def numbering(self, numbering: Numbering) -> None:
        self._numbering = numbering
        if self._writer is not None:
            self._write_state()

    def branch(self) -> None:
        """Number what comes next apart from what was; see the base class."""
        if os.getpid() == self._pid:  # the files are the parent's
            super().branch()

    def _write_state(self) -> None:
        writer = self._check()
        writer.state = self._encode_state()
        if writer.segment.has_room(2 * Segment.measure(len(writer.state))):
            writer.append_state(0)
        else:
            self._segments.append(writer.rotate(0))

    # Its end ----------------------------------------------------------------------------------

    def sync(self, timeout: float = 10.0) -> None:
        """Wait until all that has been inserted is on the disk.

        Raises:
            DeadlineExceeded: it is not, so many seconds later.
            OSError: the disk failed.
        """
        self._check().wait_synced(timeout)

    def close(self) -> None:
        """See all of it on the disk, and let go of the directory. What is held stays there."""
        assert self._writer is not None
        self._writer.close()
        if os.getpid() == self._pid:
            with self.lock:
                self._segments.clear()

    def _leave(self) -> None:
        self.close()

    def _check(self) -> _Writer:
        assert self._writer is not None
        self._writer.check_open()
        return self._writer


class _Found:
    """What is found in the files, one after the other.

    Attributes:
        latest: the newest id; None where there is none yet.
        gone: id up to which all items are gone.
        state: the newest one.
        holes: of each the id before it, and its last.
    """

    def __init__(self) -> None:
        self.latest: int | None = None
        self.gone = 0
        self.state: Any = None
        self.holes: list[tuple[int, int]] = []


class _Source(NamedTuple):
    """Where items came from: those with ids of a numbering, and here with other ids."""

    numbering: Numbering
    shift: int  # from an id there to the one here
    until: int  # the id here of the last one; 0 while more come


class Reserved(NamedTuple):
    """What there is room for."""

    entries: list[_Entry]
    n: int
    cuts: Sequence[int]


def _bisect(runs: Sequence[Run], from_id: int) -> int:
    """The position of the first run with an item above an id."""
    low, high = 0, len(runs)
    while low < high:
        middle = (low + high) // 2
        if runs[middle].first + runs[middle].n - 1 <= from_id:
            low = middle + 1
        else:
            high = middle
    return low


class _Writer:
    """The files of a log, and the thread that has the disk follow. It knows no items.

    Args:
        directory: of the files.
        sync: when the disk follows.

    Attributes:
        latest: id of the newest item.
        synced: id up to which items are on the disk.
        wake_at: id from which on `wake` must be called for an item that was appended.
        segment: that records are appended to.
        next_number: of a segment.
        state: what each segment begins with.
        failure: of the disk, until it works again: its number and text.
    """

    segment: Segment

    def __init__(self, directory: Path, sync: Sync) -> None:
        self.latest = self.synced = 0
        self.wake_at = 1
        self.next_number = 1
        self.state = b""
        self.failure: tuple[int, str] | None = None
        self._directory, self._sync = directory, sync
        self._changed = threading.Condition()
        self._due = math.inf
        self._doomed: list[Segment] = []
        self._unsynced: list[Segment] = []  # beside the one that is appended to
        self._spare: Segment | None = None
        self._wants_spare = self._ending = self._closed = self._forked = False
        self._attempts = 0  # that failed
        self._renamed = False  # whether files were deleted, which may not be on the disk
        self._thread: threading.Thread | None = None
        taken = "another store keeps its log there"
        self._held = ExitStack()
        self._lock = self._held.enter_context(lock_directory(directory, taken))

    def start(self) -> None:
        """Have the disk follow from now on."""
        self.synced = self.latest
        self.wake_at = self.latest + 1
        watch_forks(self)
        atexit.register(self.close)
        self._thread = threading.Thread(target=self._run, name="edgeml log", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise if nothing can be appended."""
        self.check_open()
        if self.failure is not None:
            raise self.explain_failure()

    def explain_failure(self) -> OSError:
        """Return the error of the disk."""
        assert self.failure is not None
        number, what = self.failure
        text = (
            f"{what}; the disk doesn't take what is in the log already, and nothing was inserted: "
            "see to the disk, and insert it again, or close this and choose another directory"
        )
        return OSError(number, text, str(self._directory))

    def check_open(self) -> None:
        """Raise if it can't be used."""
        if self._forked:
            raise Closed(f"the log {self._directory} belongs to the process before the fork")
        if self._closed or self._ending:
            raise Closed(f"the log {self._directory} has been closed")

    def rotate(self, size: int, *, reset_to: int | None = None) -> Segment:
        """Have room for so many bytes of records; returns the segment, a new one if need be."""
        segment: Segment | None = getattr(self, "segment", None)
        if segment is not None and reset_to is None and segment.room < segment.size > 0:
            segment.room = segment.size  # the second half
            with self._changed:
                self._wants_spare = True
                self._changed.notify_all()
            if segment.has_room(size):
                return segment
        size += Segment.first + 2 * Segment.measure(len(self.state))
        with self._changed:
            new, self._spare = self._spare, None
            self._wants_spare = False
        if new is not None and (
            new.size < size or (segment is not None and new.number < segment.number)
        ):
            self.doom(new)
            new = None
        if new is None:
            sizes = sorted({max(size, each) for each in (*_SIZES, size)}, reverse=True)
            new = Segment.create(self._directory, self._take_number(), sizes, _KEPT)
        if segment is not None:
            with self._changed:
                self._unsynced.append(segment)
        if size < new.size // 2:
            new.room = new.size // 2
        self.segment = new
        if reset_to is not None:
            with self._changed:
                self.latest = self.synced = reset_to - 1
                self.wake_at = reset_to
        self.append_state(RESET if reset_to is not None else 0)
        return new

    def append_state(self, flags: int) -> None:
        """Append the state; twice, as damage may hit one."""
        state = self.state
        for _ in range(2):
            self.segment.append(STATE, self.latest + 1, 0, flags, (state,), len(state))

    def doom(self, segment: Segment) -> None:
        """Have a segment deleted."""
        with self._changed:
            self._doomed.append(segment)
            if segment in self._unsynced:
                self._unsynced.remove(segment)
            self._changed.notify_all()

    def delete_doomed(self) -> None:
        """Delete what is doomed."""
        while True:
            with self._changed:
                if not self._doomed:
                    return
                path = self._doomed.pop(0).path  # nothing refers to it then, and its space is free
                self._renamed = True
            with suppress(OSError):
                os.unlink(path)

    def wake(self) -> None:
        """Notice that items have come."""
        with self._changed:
            unsynced = self.latest - self.synced
            most = self._sync.items
            if most is not None and unsynced >= most:
                self._due = 0.0
                self.wake_at = _NEVER
            else:
                if self._due == math.inf:
                    self._due = time.monotonic() + self._sync.seconds
                self.wake_at = _NEVER if most is None else self.synced + most
            self._changed.notify_all()

    def wait_synced(self, timeout: float) -> None:
        """Wait until all items there are now are on the disk."""
        target = self.latest
        deadline = time.monotonic() + timeout
        with self._changed:
            attempts = self._attempts
            while self.synced < target:
                if self.failure is not None and self._attempts > attempts:
                    raise self.explain_failure()
                left = deadline - time.monotonic()
                if left <= 0:
                    raise DeadlineExceeded(f"the disk has not followed in {timeout} s")
                self._due = 0.0
                self._changed.notify_all()
                self._changed.wait(left)

    def end(self) -> None:
        """Let the thread finish: it sees all on the disk, and lets go of the directory."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()

    def close(self) -> None:
        """End, and wait for it."""
        if self._forked:
            return
        self.end()
        if self._thread is None:
            self._let_go()
        elif self._thread is not threading.current_thread():
            self._thread.join(_LAST_SYNC)

    def abandon(self) -> None:
        """Leave it to the parent, in a forked child."""
        self._forked = True
        self._changed = threading.Condition()
        self.segment.room = 0
        segments = [self.segment, *self._unsynced, *self._doomed]
        if self._spare is not None:
            segments.append(self._spare)
        drop_descriptors([self._lock, *(segment.fd for segment in segments)])

    # In the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._ending or self._doomed or self._wants_spare):
                    left = self._due - time.monotonic()
                    if left <= 0:
                        break
                    self._changed.wait(None if left == math.inf else left)
                ending, wants_spare = self._ending, self._wants_spare
                self._wants_spare = False
                due = time.monotonic() >= self._due
            self.delete_doomed()
            if wants_spare and not ending:
                self._make_spare()
            if due or ending:
                self.sync_now()
            if ending:
                self._let_go()
                return

    def sync_now(self) -> None:
        """See all that there is on the disk."""
        with self._changed:
            self._due = math.inf
            self.wake_at = _NEVER
            target = self.latest
            segments = [*self._unsynced, self.segment]
        ends = [segment.end for segment in segments]
        try:
            if self._renamed or not all(segment.named for segment in segments):
                self._renamed = False
                sync_names(self._directory)
            for segment, end in zip(segments, ends, strict=True):
                if self.failure is not None:
                    segment.rewrite()
                _sync(segment.fd)
                segment.unsynced, segment.named = end, True
        except OSError as error:
            self._fail(error)
            return
        with self._changed:
            if self.failure is not None:
                _log.warning("the disk under the log %s works again", self._directory)
                self.failure = None
                self.segment.room = self.segment.size
            self._unsynced = [each for each in self._unsynced if each not in segments]
            self.synced = max(self.synced, min(target, self.latest))
            self.wake_at = self.synced + 1
            self._changed.notify_all()
        if self.latest > self.synced:
            self.wake()

    def _fail(self, error: OSError) -> None:
        what = error.strerror or str(error)
        if self.failure is None:
            _log.warning("the disk under the log %s fails: %s", self._directory, what)
        with self._changed:
            self.failure = (error.errno or errno.EIO, what)
            self._attempts += 1
            self.segment.room = min(self.segment.room, self.segment.end)
            self._due = time.monotonic() + _RETRY
            self._changed.notify_all()

    def _make_spare(self) -> None:
        with suppress(OSError):  # the insert that needs it says so
            spare = Segment.create(self._directory, self._take_number(), _SIZES[:1], _KEPT)
            with self._changed:
                self._spare = spare

    def _take_number(self) -> int:
        with self._changed:
            self.next_number += 1
            return self.next_number - 1

    def _let_go(self) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = True
            atexit.unregister(self.close)
            segment: Segment | None = getattr(self, "segment", None)
            if segment is not None:
                segment.unmap()
            self._unsynced.clear()
            self._doomed.clear()
            spare, self._spare = self._spare, None
        if spare is not None:
            with suppress(OSError):
                os.unlink(spare.path)
        self._held.close()
