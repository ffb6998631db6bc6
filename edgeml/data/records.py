"""Records in a file, with checksums by which any that is damaged, missing or foreign is noticed.

Each record is one value as the msgpack codec encodes it and `edgeml.core.frames` frames it::

    offset  size
    0       8       tag
    8       8       size S of the frame, little-endian like all of these; 0 in the first head
    16      44      zeros
    60      4       CRC-32 (zlib's), begun with the one of the head before, of the 60 bytes above
                    and of all that follows them up to the next head
    64      S       the frame, then zeros up to the next multiple of 64, where the next head is

The first head stands alone; its tag ends in the version of the format. The tag of the last record
says that the file is whole: it is the index of the others. Since each checksum covers all that
came before, no record can be damaged, missing, or of another file, unseen. They tell damage, not
malice; but nothing in a file is ever executed.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeml.core.codec import Codec, limited
from edgeml.core.errors import Malformed
from edgeml.core.frames import parts, unframe
from edgeml.core.limits import DEFAULT_LIMITS
from edgeml.core.message import empty, pooled
from edgeml.core.plugins import load_codec
from edgeml.data.files import explain_errors

__all__ = ["RecordReader", "RecordWriter", "make_codec"]

_HEAD = struct.Struct("<8sQ44sI")
_CHECKED = _HEAD.size - 4  # bytes of a head that its own checksum covers
_FILE, _VERSION = b"\x89edgeml", 1
_RECORD, _INDEX = b"record", b"index"
_ZEROS = bytes(_HEAD.size)

_CHUNK = 1 << 20  # bytes read at a time to check them: they are still in the cache then
_UNSYNCED = 64 << 20  # bytes; see RecordWriter
_AT_ONCE = 1024  # pieces that the system takes in one call

_sync = getattr(os, "fdatasync", os.fsync)  # macOS has the latter alone


def make_codec() -> Codec:
    """Return the codec of what lies in files: of more than a peer may send, as it is one's own."""
    # 16,384 items of 256 nodes.
    return limited(load_codec("msgpack"), replace(DEFAULT_LIMITS, nodes=1 << 22))


class RecordWriter:
    """Appends records to an empty file.

    Every 64 MB wait for the disk. So there is never more to be written back than that: no more
    time is lost, and other threads and programs don't meet a memory full of dirty pages.

    Args:
        fd: of the file, open for writing.
        path: of the file, for the texts of errors.
        kept: says there what is left all the same; see `explain_errors`.

    Attributes:
        at: how many bytes have been written, which is where the next record begins.
    """

    def __init__(self, fd: int, path: Path, kept: str) -> None:
        self.at = 0
        self._fd, self._path, self._kept = fd, path, kept
        self._crc = 0
        self._unsynced = 0
        self._codec = make_codec()
        self._write([], _FILE + bytes([_VERSION]), 0)

    def append(self, value: Any) -> int:
        """Append a record, and return where it is.

        Raises:
            NotEncodable: the codec doesn't carry the value.
            OSError: what the system says; the text names the file, and what was needed.
        """
        return self._append(value, _RECORD)

    def append_index(self, value: Any) -> int:
        """Append the last record: without it the file is not whole."""
        return self._append(value, _INDEX)

    def _append(self, value: Any, tag: bytes) -> int:
        at = self.at
        pieces = parts(self._codec.encode(value))
        size = sum(len(piece) for piece in pieces)
        self._write([*pieces, _ZEROS[: -size % _HEAD.size]], tag, size)
        return at

    def _write(self, pieces: list[bytes | memoryview], tag: bytes, size: int) -> None:
        head = _HEAD.pack(tag, size, b"", 0)[:_CHECKED]
        crc = zlib.crc32(head, self._crc)
        for piece in pieces:
            crc = zlib.crc32(piece, crc)
        self._crc = crc
        views = [
            memoryview(piece)[start : start + _UNSYNCED]
            for piece in (head + crc.to_bytes(4, "little"), *pieces)
            for start in range(0, len(piece), _UNSYNCED)
        ]
        end = self.at + sum(len(view) for view in views)
        with explain_errors(self._path, end, self._kept):
            while views:
                views = self._write_some(views)

    def _write_some(self, views: list[memoryview]) -> list[memoryview]:
        """Write the first of the views in one go, and return what is left."""
        n = 1
        size = len(views[0])
        while n < min(len(views), _AT_ONCE) and size < _UNSYNCED:
            size += len(views[n])
            n += 1
        written = os.writev(self._fd, views[:n])
        self.at += written
        self._unsynced += written
        if self._unsynced >= _UNSYNCED:
            _sync(self._fd)
            self._unsynced = 0
        n = 0
        while n < len(views) and written >= len(views[n]):
            written -= len(views[n])
            n += 1
        return [views[n][written:], *views[n + 1 :]] if written else views[n:]


class RecordReader:
    """Reads the records of a whole file, all of which is checked first.

    Args:
        fd: of the file, open for reading.
        path: of the file, for the texts of errors.
        kind: what such a file is called there, such as "checkpoint".

    Attributes:
        index: the value of the last record.

    Raises:
        Malformed: it is damaged, cut off, of another version, or no such file at all; the text
            tells which.
    """

    def __init__(self, fd: int, path: str, kind: str) -> None:
        self.path = path
        self._kind = kind
        self._fd = fd
        self._codec = make_codec()
        self._sizes: dict[int, int] = {}  # of the frames, by the offsets of their records
        self.index = self.read(self._check())

    def read(self, at: int, *, writable: bool = False) -> Any:
        """Return the value of the record at an offset; its arrays live in memory of their own.

        Args:
            at: where the record begins.
            writable: whether its arrays may be changed.

        Raises:
            Malformed: no record begins there.
        """
        if at not in self._sizes:
            raise Malformed(f"{self.path} has an index that is none: no record is at byte {at}")
        size = self._sizes[at]
        memory = memoryview(empty(pooled, size, np.uint8))  # type: ignore[arg-type]
        if self._fill(memory, at + _HEAD.size) < size:
            raise self._explain_end()
        return self._codec.decode(unframe(memory), writable=writable)

    def _check(self) -> int:
        """Check all of the file, and return where its last record is."""
        end = os.fstat(self._fd).st_size
        chunk = memoryview(bytearray(_CHUNK))
        at = crc = 0
        while True:
            head = os.pread(self._fd, _HEAD.size, at)
            if at == 0:
                self._check_first(head)
            if len(head) < _HEAD.size:
                raise self._explain_end()
            tag, size, _, expected = _HEAD.unpack(head)
            self._sizes[at] = size
            begin, at = at, at + _HEAD.size
            crc = zlib.crc32(head[:_CHECKED], crc)
            size += -size % _HEAD.size
            # A damaged size is told from a file that was cut off by what it leads to.
            stop = min(at + size, end)
            while at < stop:
                n = self._fill(chunk[: stop - at], at)
                if not n:
                    raise self._explain_end()
                crc = zlib.crc32(chunk[:n], crc)
                at += n
            if at < begin + _HEAD.size + size:
                raise self._explain_end()
            if crc != expected:
                raise Malformed(
                    f"{self.path} is damaged: bytes {begin} to {at} are not what was written; "
                    f"take an older {self._kind}"
                )
            if tag.rstrip(b"\0") == _INDEX:
                if at != end:
                    raise Malformed(f"{self.path} has {end - at} bytes after its end")
                return begin

    def _check_first(self, head: bytes) -> None:
        if not head.startswith(_FILE) and not _FILE.startswith(head):
            raise Malformed(
                f"{self.path} is no {self._kind} of edgeml: it begins with {head[:8]!r}"
            )
        if len(head) == _HEAD.size and zlib.crc32(head[:_CHECKED]) == int.from_bytes(
            head[_CHECKED:], "little"
        ):
            version = head[len(_FILE)]
            if version != _VERSION:
                raise Malformed(
                    f"{self.path} is a {self._kind} of version {version}, and this edgeml reads "
                    f"version {_VERSION}: use the edgeml that wrote it, or a newer one"
                )

    def _explain_end(self) -> Malformed:
        size = os.fstat(self._fd).st_size
        return Malformed(
            f"{self.path} is cut off, or damaged: it ends after {size} bytes, amid a record; "
            f"take an older {self._kind}"
        )

    def _fill(self, memory: memoryview, at: int) -> int:
        """Fill memory from an offset; returns how much there was."""
        done = 0
        while done < len(memory) and (n := os.preadv(self._fd, [memory[done:]], at + done)):
            done += n
        return done
