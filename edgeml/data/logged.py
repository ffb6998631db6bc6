"""A queue that survives the process, and the machine: items in files, in the order they came.

The control thread packs an item's bytes and copies them into memory that it shares with the system
(`segments`), and that is all: a thread waits for the disk, makes files ahead and deletes old ones.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgeml.core.errors import Malformed, NotEncodable
from edgeml.core.frames import frame
from edgeml.core.message import pooled
from edgeml.core.owned import ClosedAtExit
from edgeml.data.batch import Batch, join
from edgeml.data.bounded import BoundedQueue, OnFull
from edgeml.data.files import explain_errors
from edgeml.data.log_writer import LogWriter, Sync
from edgeml.data.numbering import Numbering
from edgeml.data.packing import Packer
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
from edgeml.data.tree import copy_item, fill

__all__ = ["LoggedDataStore"]

_log = logging.getLogger(__name__)
_USUAL = Sync()
_PART = 1 << 20  # bytes of rows in a record
_MOST_LAYOUTS = 256  # items of more are kept as values
_MOST_SOURCES = 4  # that are remembered


class _Entry(NamedTuple):
    """A record to be appended."""

    layout: Layout | None
    n: int
    payload: Any
    size: int


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

    _writer: LogWriter | None = None

    def __init__(
        self,
        directory: str | os.PathLike[str],
        capacity: int = 10_000_000,
        on_full: OnFull = "raise",
        *,
        timeout: float = 10.0,
        sync: Sync = _USUAL,
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
        writer = LogWriter(self.directory, sync)
        try:
            self._open(writer)
        except BaseException:
            writer.close()
            raise
        writer.start()
        weakref.finalize(self, writer.end).atexit = False

    # What was there ---------------------------------------------------------------------------

    def _open(self, writer: LogWriter) -> None:
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

    def _begin(self, writer: LogWriter, segments: list[Segment]) -> None:
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
        left = sys.maxsize if limit is None else limit
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

    def _check(self) -> LogWriter:
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
