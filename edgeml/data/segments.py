"""Segments: the files of a log, appended to through shared memory, and read whatever befell them.

A file is called ``NUMBER-SALT.log``, in decimal and in hexadecimal. It has its full size from the
beginning, so that a full disk is an error then and not in the midst of an item. What is written to
it is in the system's memory at once, without a system call, and survives the process::

    offset  size
    0       8       tag, which ends in the version of the format
    8       8       id up to which all items are gone, little-endian like all of these
    16      4       CRC-32 of these 8 bytes
    64              records, each at a multiple of 8; zeros after the last

and a record is::

    offset  size
    0       4       CRC-32 of what follows the mark
    4       4       mark; these 8 bytes are written last
    8       4       size S of the payload
    12      8       id of the first item, or of the next one
    20      4       number of items
    24      1       kind
    25      1       flags
    26      2       number of the layout, in the order of the layouts in this file
    28      S       payload

Each CRC begins with the salt, so that a record that was copied into another's payload is none. A
*layout* says what rows are like: how an item is built, and the dtype and the shape of each leaf.
*Rows* are the leaves of items one after the other, as bytes; a *value* is any other item, and the
*state* what the log knows besides, each as the msgpack codec encodes it and `edgeml.core.frames`
frames it. What is damaged is left out, and what follows is found by its mark. Nothing is executed.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import secrets
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgeml.core.codec import Codec
from edgeml.core.errors import Malformed
from edgeml.core.frames import frame, unframe
from edgeml.core.message import Allocator, empty, pooled
from edgeml.data.batch import Batch
from edgeml.data.files import explain_errors
from edgeml.data.tree import Array, Skeleton, fill, is_plain, leaves_of, skeleton_of

__all__ = [
    "CUT",
    "LAYOUT",
    "LONGEST",
    "RESET",
    "ROWS",
    "STATE",
    "VALUE",
    "Layout",
    "Run",
    "Segment",
    "find_segments",
]

LAYOUT, ROWS, VALUE, STATE = range(1, 5)
"""Kinds of records."""
CUT, RESET = 1, 2
"""Flags: the first item doesn't follow upon the one before; all older segments are void."""
LONGEST = 1 << 31
"""Bytes of a payload."""

_TAG = b"\x89edglog\1"
_FIRST = 64  # offset of the first record
_GONE = struct.Struct("<QI")
_GONE_AT = 8
_SEAL = struct.Struct("<I4s")
_HEAD = struct.Struct("<IQIBBH")
_MARK = b"\x9b\xe3\x1fr"
_BEFORE = _SEAL.size + _HEAD.size  # bytes of a record before its payload
_MOST_LAYOUTS = 1 << 16
_MOST_ID = 1 << 62
_NAME = re.compile(r"(\d{1,19})-([0-9a-f]{8})\.log")
_SEARCHED = 8  # times the size of a file that are looked at where it is damaged
_WINDOW = 1 << 16  # bytes searched at a time
_SCATTERED = 4096  # bytes; rows from here on are read piece by piece, and so copied once less
_AT_ONCE = 1000  # pieces that the system takes in one call


class Layout:
    """What rows are like.

    Args:
        skeleton: of an item.
        dtypes: of its leaves.
        shapes: of its leaves.

    Attributes:
        size: bytes of a row.
        key: equal for equal layouts.

    Raises:
        ValueError: there is nothing in a row.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        dtypes: Sequence[np.dtype[Any]],
        shapes: Sequence[tuple[int, ...]],
    ) -> None:
        self.skeleton = skeleton
        self.dtypes, self.shapes = tuple(dtypes), tuple(shapes)
        if not all(map(is_plain, dtypes)):
            raise ValueError("rows are of numbers")
        sizes = [d.itemsize * math.prod(s) for d, s in zip(dtypes, shapes, strict=True)]
        self.size = sum(sizes)
        if not 0 < self.size < LONGEST:
            raise ValueError(f"a row of {self.size} bytes")
        self.key = repr(skeleton), self.dtypes, self.shapes
        self._fields = [(s, sum(sizes[:i])) for i, s in enumerate(sizes)]

    @classmethod
    def of_columns(cls, columns: Any) -> Layout:
        """Return the layout of items of which these are columns."""
        skeleton = skeleton_of(columns)
        leaves = leaves_of(skeleton, columns)
        return cls(skeleton, [leaf.dtype for leaf in leaves], [leaf.shape[1:] for leaf in leaves])

    def to_columns(self) -> Any:
        """Return columns of no item, by which `of_columns` knows it."""
        specs = zip(self.dtypes, self.shapes, strict=True)
        return fill(self.skeleton, [np.empty((0, *shape), dtype) for dtype, shape in specs])

    def pack(self, columns: Any, n: int) -> Array:
        """Return n rows, as bytes, of columns of this layout."""
        rows: Array = np.empty(n * self.size, np.uint8)
        for leaf, target in zip(leaves_of(self.skeleton, columns), self._view(rows), strict=True):
            if target is not None:
                source = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
                target[...] = np.ndarray(n, target.dtype, source)
        return rows

    def unpack(self, memory: Array, stride: int, leaves: Sequence[Array]) -> None:
        """Copy rows that begin so many bytes apart in some memory into columns."""
        n = len(leaves[0])
        for leaf, source in zip(leaves, self._view(memory, n, stride), strict=True):
            if source is not None:
                target: Array = np.ndarray(n, source.dtype, leaf.reshape(-1).view(np.uint8))
                target[...] = source

    def make_leaves(self, n: int, allocate: Allocator) -> list[Array]:
        """Return columns of n rows, one for each leaf, with anything in them."""
        specs = zip(self.dtypes, self.shapes, strict=True)
        return [empty(allocate, (n, *shape), dtype) for dtype, shape in specs]

    def _view(self, memory: Array, n: int | None = None, stride: int = 0) -> list[Array | None]:
        """The leaves of rows in some memory, as bytes; None where these are none."""
        stride = stride or self.size
        n = len(memory) // stride if n is None else n
        return [
            np.ndarray(n, f"V{size}", memory, offset, (stride,)) if size else None
            for size, offset in self._fields
        ]


class Run:
    """Consecutive items of one kind in a segment.

    Attributes:
        first: id of the first.
        n: how many.
        layout: of rows; None for values.
        at: offset of the first row.
        stride: bytes from one row to the next.
        places: offset and size of each value.
    """

    __slots__ = ("at", "first", "layout", "n", "places", "stride")

    def __init__(
        self, first: int, n: int, layout: Layout | None = None, at: int = 0, stride: int = 0
    ) -> None:
        self.first, self.n, self.layout, self.at, self.stride = first, n, layout, at, stride
        self.places: list[tuple[int, int]] = []

    def __getitem__(self, part: slice) -> Run:
        """A part of it, which stays as it is."""
        start, stop, _ = part.indices(self.n)
        run = Run(
            self.first + start,
            stop - start,
            self.layout,
            self.at + start * self.stride,
            self.stride,
        )
        run.places = self.places[start:stop]
        return run


class Record(NamedTuple):
    """A record as it was found."""

    kind: int
    flags: int
    layout: Layout | None  # of rows; None where it is missing
    first: int
    n: int
    at: int  # of the payload
    size: int


class Segment:
    """A file of records.

    Args:
        path: of the file.
        fd: of it, open for reading and writing; it is closed with this object.

    Attributes:
        number: by which segments are ordered.
        end: where the next record begins.
        room: up to where records may be written.
        runs: of items, in order.
        layout: of rows that can be appended.
        torn: whether something that is no record comes after the last one.
        cut_off: how many records that may have been.
    """

    first = _FIRST
    """Offset of the first record."""

    def __init__(self, path: Path, fd: int) -> None:
        found = _NAME.fullmatch(path.name)
        assert found is not None
        self.path, self.fd = path, fd
        self.number, self._salt = int(found[1]), int(found[2], 16)
        self.size = os.fstat(fd).st_size
        self.end = self.room = _FIRST
        self.unsynced = 0  # offset; from here on it may not be on the disk
        self.named = True  # whether its name is on the disk
        self.runs: list[Run] = []
        self.torn = False
        self.cut_off = 0
        self.layout: Layout | None = None
        self._layouts: dict[Any, int] = {}
        self._number = 0
        self._memory: mmap.mmap | None = None

    def __del__(self) -> None:
        if self.fd >= 0:
            with suppress(OSError):
                os.close(self.fd)

    @classmethod
    def create(cls, directory: Path, number: int, sizes: Sequence[int], kept: str) -> Segment:
        """Make a new one, of the first of these sizes for which there is room.

        Args:
            directory: where.
            number: above that of all others.
            sizes: in bytes.
            kept: says what is there if it fails; see `explain_errors`.

        Raises:
            OSError: there is none for the last of them, or what else the system says.
        """
        path = directory / f"{number:016d}-{secrets.randbits(32):08x}.log"
        with explain_errors(path, sizes[-1], kept):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
            try:
                for size in sizes:
                    try:
                        _allocate(fd, size)
                        break
                    except OSError:
                        os.ftruncate(fd, 0)
                        if size == sizes[-1]:
                            raise
                segment = cls(path, fd)
                segment.named = False
                segment.map()
                return segment
            except BaseException:
                os.close(fd)
                os.unlink(path)
                raise

    def map(self) -> None:
        """Have it ready to be appended to, after its last record.

        Raises:
            OSError: there is no room for all of it.
        """
        if self.size <= _FIRST:
            return
        _allocate(self.fd, self.size)  # what was copied, say, may have holes
        self._memory = mmap.mmap(self.fd, self.size)
        self._memory[: len(_TAG)] = _TAG
        if self.torn:
            self._memory[self.end :] = bytes(self.size - self.end)
        self.room = self.size

    def unmap(self) -> None:
        """Have it not be appended to any more."""
        self.room = 0
        self._memory = None

    @staticmethod
    def measure(size: int) -> int:
        """Return the bytes of a record with a payload of so many."""
        return (_BEFORE + size + 7) & -8

    def use(self, layout: Layout, codec: Codec) -> None:
        """Let rows be of this layout from now on; there must be room."""
        number = self._layouts.get(layout.key)
        if number is None:
            number = self._number = self._layouts[layout.key] = len(self._layouts)
            payload = self.encode_layout(layout, codec)
            for _ in range(2):  # as damage may hit one, and all rows need it
                self.append(LAYOUT, 0, 0, 0, [payload], len(payload))
        self.layout, self._number = layout, number

    @staticmethod
    def encode_layout(layout: Layout, codec: Codec) -> bytes:
        """Return the payload by which a layout is told."""
        return frame(codec.encode(layout.to_columns()))

    def has_room(self, size: int) -> bool:
        """Whether so many bytes of records can be appended, in any layout."""
        return self.end + size <= self.room and len(self._layouts) < _MOST_LAYOUTS

    def append(
        self, kind: int, first: int, n: int, flags: int, pieces: Sequence[Any], size: int
    ) -> int:
        """Append a record for which there is room, and return where its payload is.

        Args:
            kind: of it.
            first: id of its first item.
            n: how many items it has.
            flags: of it.
            pieces: of its payload, each a contiguous buffer.
            size: of all pieces.
        """
        memory = self._memory
        assert memory is not None
        at = self.end
        head = _HEAD.pack(size, first, n, kind, flags, self._number)
        data = b"".join((head, *pieces))
        memory[at + 8 : at + 28 + size] = data
        _SEAL.pack_into(memory, at, zlib.crc32(data, self._salt), _MARK)
        self.end = (at + 35 + size) & -8
        return at + 28

    def note_gone(self, up_to: int) -> None:
        """Note that all items up to this id are gone."""
        memory = self._memory
        assert memory is not None
        data = up_to.to_bytes(8, "little")
        _GONE.pack_into(memory, _GONE_AT, up_to, zlib.crc32(data, self._salt))

    def add_rows(self, layout: Layout, first: int, n: int, at: int) -> None:
        """Count rows that were appended among the runs."""
        runs = self.runs
        if runs and n == 1:
            run = runs[-1]
            count = run.n
            if run.layout is layout and run.first + count == first:
                if count == 1:
                    run.stride = at - run.at
                if run.at + count * run.stride == at:
                    run.n = count + 1
                    return
        runs.append(Run(first, n, layout, at, layout.size))

    def add_value(self, first: int, at: int, size: int) -> None:
        """Count a value that was appended among the runs."""
        run = self.runs[-1] if self.runs else None
        if run is None or run.layout is not None or run.first + run.n != first or run.n >= 256:
            run = Run(first, 0)
            self.runs.append(run)
        run.n += 1
        run.places.append((at, size))

    def rewrite(self) -> None:
        """Have what may not be on the disk written again, after that failed."""
        memory = self._memory
        assert memory is not None
        memory[:_FIRST] = memory[:_FIRST]
        memory[self.unsynced : self.end] = memory[self.unsynced : self.end]

    # What is there ----------------------------------------------------------------------------

    def read_values(self, run: Run, codec: Codec) -> Batch:
        """Return the items of a run of values.

        Raises:
            Malformed: they aren't what was written.
        """
        items = [self.decode(at, size, codec) for at, size in run.places]
        return Batch(run.first, items, None, [])

    def read_rows(self, run: Run, leaves: Sequence[Array]) -> None:
        """Read a run of rows into columns as long as it is.

        Raises:
            Malformed: it was cut off meanwhile.
        """
        assert run.layout is not None
        if run.layout.size >= _SCATTERED:
            self._scatter(run, leaves)
            return
        nbytes = (run.n - 1) * run.stride + run.layout.size
        memory: Array = empty(pooled, nbytes, np.uint8)
        if self._fill(memoryview(memory), run.at) < nbytes:  # type: ignore[arg-type]
            raise Malformed(f"{self.path} was cut off while it was in use")
        run.layout.unpack(memory, run.stride, leaves)

    def _scatter(self, run: Run, leaves: Sequence[Array]) -> None:
        """Read rows that are large right into columns."""
        assert run.layout is not None
        between = memoryview(bytearray(run.stride - run.layout.size))
        places = [
            (memoryview(leaf.reshape(-1).view(np.uint8)), leaf.nbytes // run.n)  # type: ignore[arg-type]
            for leaf in leaves
            if leaf.nbytes
        ]
        step = max(1, _AT_ONCE // (len(places) + 1))
        for begin in range(0, run.n, step):
            pieces: list[memoryview] = []
            for i in range(begin, min(begin + step, run.n)):
                pieces += [view[i * size : (i + 1) * size] for view, size in places]
                pieces.append(between)
            at = run.at + begin * run.stride
            pieces.pop()
            while pieces:
                done = os.preadv(self.fd, pieces, at)
                if not done:
                    raise Malformed(f"{self.path} was cut off while it was in use")
                at += done
                while pieces and done >= len(pieces[0]):
                    done -= len(pieces.pop(0))
                if done:
                    pieces[0] = pieces[0][done:]

    def decode(self, at: int, size: int, codec: Codec) -> Any:
        """Return what a payload is the encoding of."""
        memory = memoryview(empty(pooled, size, np.uint8))  # type: ignore[arg-type]
        if self._fill(memory, at) < size:
            raise Malformed(f"{self.path} was cut off while it was in use")
        return codec.decode(unframe(memory))

    def scan(self, codec: Codec) -> Iterator[Record]:
        """Give all records that are whole, but layouts, which it takes up itself.

        Raises:
            Malformed: it is of another version.
        """
        content: Array = np.empty(self.size, np.uint8)
        size = self._fill(memoryview(content), 0)  # type: ignore[arg-type]
        content = content[:size]
        view = memoryview(content)  # type: ignore[arg-type]
        layouts: dict[int, Layout | None] = {}
        at, budget = _FIRST, _SEARCHED * size
        while at + _BEFORE <= size:
            found = self._check(view, at)
            if found is None:
                at, budget = self._search(content, view, at + 8, budget)
                continue
            kind, flags, number, first, n, length = found
            payload, at = at + _BEFORE, at + self.measure(length)
            self.end = at
            if kind != LAYOUT:
                yield Record(kind, flags, layouts.get(number), first, n, payload, length)
                continue
            try:
                columns = codec.decode(unframe(bytes(view[payload : payload + length])))
                layouts[number] = layout = Layout.of_columns(columns)
            except (AttributeError, IndexError, Malformed, TypeError, ValueError):
                continue
            self._layouts[layout.key] = number
        rest = content[min(self.end, size) :]
        self.torn = bool(rest.any())
        # Where the process was killed amid a record, that has no seal, and nobody counts on it.
        words = rest[: len(rest) & -8].view("<u4")[1::2]
        marks = int(np.count_nonzero(words == int.from_bytes(_MARK, "little")))
        self.cut_off = max(marks, int(rest[: _SEAL.size].any()))
        tag = bytes(view[: len(_TAG)])
        if self.end == _FIRST and tag[:-1] == _TAG[:-1] and tag[-1] not in (0, _TAG[-1]):
            raise Malformed(
                f"{self.path} is of version {tag[-1]}, and this edgeml reads version {_TAG[-1]}: "
                "use the edgeml that wrote it, or a newer one"
            )
        if sorted(self._layouts.values()) != list(range(len(self._layouts))):
            # One is missing, and its number must not be given again.
            self.size = self.end

    def find_gone(self) -> int:
        """Return the id up to which it says that all items are gone; 0 where it doesn't."""
        data = os.pread(self.fd, _GONE.size, _GONE_AT)
        if len(data) < _GONE.size:
            return 0
        gone, crc = _GONE.unpack(data)
        return int(gone) if crc == zlib.crc32(data[:8], self._salt) and gone < _MOST_ID else 0

    def _check(self, view: memoryview, at: int) -> tuple[int, int, int, int, int, int] | None:
        """Kind, flags, layout, first id, count and size of the record at an offset, if any."""
        expected, mark = _SEAL.unpack_from(view, at)
        size, first, n, kind, flags, layout = _HEAD.unpack_from(view, at + _SEAL.size)
        end = at + _BEFORE + size
        if mark != _MARK or end > len(view) or first + n >= _MOST_ID:
            return None
        if zlib.crc32(view[at + _SEAL.size : end], self._salt) != expected:
            return None
        return kind, flags, layout, first, n, size

    def _search(self, content: Array, view: memoryview, at: int, budget: int) -> tuple[int, int]:
        """Where the next record begins, or the end; and how much more may be looked at."""
        words = content[: len(content) & -8].view("<u4")[1::2]  # where marks may be
        mark = int.from_bytes(_MARK, "little")
        for begin in range(at // 8, len(words), _WINDOW // 8):
            for place in begin + np.flatnonzero(words[begin : begin + _WINDOW // 8] == mark):
                found = int(place) * 8
                if found + _BEFORE > len(view) or budget <= 0:
                    break
                size = _HEAD.unpack_from(view, found + _SEAL.size)[0]
                budget -= _BEFORE + min(len(view) - found, size)
                if self._check(view, found) is not None:
                    return found, budget
        return len(view), budget

    def _fill(self, memory: memoryview, at: int) -> int:
        """Fill memory from an offset; returns how much there was."""
        done = 0
        while done < len(memory) and (n := os.preadv(self.fd, [memory[done:]], at + done)):
            done += n
        return done


def find_segments(directory: Path) -> list[Path]:
    """Return the paths of the segments in a directory, the oldest first."""
    found = [
        (int(match[1]), path)
        for path in directory.iterdir()
        if (match := _NAME.fullmatch(path.name)) is not None
    ]
    return [path for _, path in sorted(found)]


def _allocate(fd: int, size: int) -> None:
    """See that a file has so many bytes, and room for them on the disk."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
        return
    have = os.fstat(fd).st_size  # macOS
    while have < size:
        have += os.pwrite(fd, bytes(min(1 << 20, size - have)), have)
