"""Checkpoints: a program's values and stores in one file, whole and exact, or not replaced at all.

The file is a sequence of records, each one value as the msgpack codec encodes it and
`edgeml.core.frames` frames it::

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

import errno
import fcntl
import logging
import os
import struct
import sys
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np

from edgeml.core.codec import Codec
from edgeml.core.errors import ConfigMismatch, Malformed
from edgeml.core.frames import parts, unframe
from edgeml.core.message import empty, pooled
from edgeml.core.plugins import load_codec
from edgeml.data.base import DataStoreBase
from edgeml.data.batch import Batch
from edgeml.data.files import rename

__all__ = ["Report", "load", "save"]

_HEAD = struct.Struct("<8sQ44sI")
_CHECKED = _HEAD.size - 4  # bytes of a head that its own checksum covers
_FILE, _VERSION = b"\x89edgeml", 1
_RECORD, _INDEX = b"record", b"index"
_ZEROS = bytes(_HEAD.size)

_PART = 4 << 20  # bytes of items read at a time: half a millisecond of copying, under the lock
_MOST = 1 << 14  # items in a part: the next ones may be larger than those before
_CHUNK = 1 << 20  # bytes read at a time to check them: they are still in the cache then
_UNSYNCED = 64 << 20  # bytes; see _Writer
_AT_ONCE = 1024  # pieces that the system takes in one call

_sync = getattr(os, "fdatasync", os.fsync)  # macOS has the latter alone

_log = logging.getLogger(__name__)

_Stores: TypeAlias = Mapping[str, DataStoreBase]


@dataclass(frozen=True, slots=True)
class Report:
    """What `save` has written.

    Attributes:
        nbytes: size of the file.
        items: how many items it holds of each store.
        missed: how many more each store held when the save began, which were overwritten or
            released before they were read.
    """

    nbytes: int
    items: dict[str, int]
    missed: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Stored:
    """A store in the file; records are named by their offset."""

    latest_id: int
    state: int
    parts: list[tuple[int, int]]  # first id and record; ids are consecutive up to the latest


@dataclass(frozen=True, slots=True)
class _Contents:
    values: int
    stores: dict[str, _Stored]


def save(
    path: str | os.PathLike[str],
    values: Any | Callable[[], Any] = None,
    stores: _Stores | None = None,
) -> Report:
    """Save values and stores to a file, which replaces the one before once it is whole on disk.

    Whatever happens (a full disk, an exception, a kill, the power), there is the old file or the
    new one. Until then the new one is ``.NAME.tmp`` beside it; what a killed process leaves of
    that, the next save to the same path takes over.

    Inserts and samples go on meanwhile. The file tells of the moment at which it was begun: of
    each store the items up to the newest at that moment, consecutive, and the state then. Items
    that are overwritten before they are read are missing, and the items before them too, as ids
    in a store are consecutive; the report counts them. No lock is held for longer than it takes
    to copy 4 MB, or one item that is larger. A store must not be reset meanwhile.

    Args:
        path: of the file; its directory must exist.
        values: what a codec carries, such as weights, optimizer state and counters in a dict; or
            a function that returns that, called at the very moment at which the stores are
            looked at, while all of them are locked: so let it be short. What it returns must not
            change until the save is over.
        stores: to be saved, by name.

    Raises:
        NotEncodable: a value or an item that the codec doesn't carry.
        BlockingIOError: another save to the same path is under way.
        OSError: what the system says: no space, no such directory, ...
    """
    stores = stores or {}
    path = Path(path)
    with _replacing(path) as fd:
        writer = _Writer(fd)
        with _locked(stores):
            begun = {
                name: (store.latest_data_id(), len(store), store.state())
                for name, store in stores.items()
            }
            if callable(values):
                values = values()
        contents = _Contents(
            writer.record(values),
            {
                name: _Stored(latest, writer.record(state), [])
                for name, (latest, _, state) in begun.items()
            },
        )
        # Those with the fewest items first, as these are overwritten the soonest.
        for name in sorted(begun, key=lambda name: begun[name][1]):
            _write_items(writer, stores[name], contents.stores[name], begun[name][1])
        writer.record(contents, _INDEX)
    items = {
        name: stored.latest_id + 1 - stored.parts[0][0] if stored.parts else 0
        for name, stored in contents.stores.items()
    }
    missed = {name: begun[name][1] - n for name, n in items.items()}
    for name, n in missed.items():
        if n:
            text = "%d items of the store %r were overwritten before they could be saved to %s"
            _log.warning(text, n, name, path)
    return Report(writer.at, items, missed)


def load(
    path: str | os.PathLike[str],
    stores: _Stores | None = None,
    check: Callable[[Any], Any] | None = None,
) -> Any:
    """Fill stores from a file that `save` made, and return its values.

    The whole file is checked before anything is touched. The stores are made by the caller as
    the saved ones were, except that the capacity may differ: a smaller one keeps the newest
    items. They are locked until all of them are filled, and what they held before is forgotten.

    Args:
        path: of the file.
        stores: to be filled, by the names under which they were saved. Others that the file has
            are left alone.

        check: is given the values before any store is touched; what it raises ends the load.

    Returns:
        The values, with arrays that are private and can be written to.

    Raises:
        FileNotFoundError: there is none.
        Malformed: it is damaged, cut off, of a newer version, or no checkpoint at all; the text
            tells which.
        ConfigMismatch: a store that the file doesn't have.
        ValueError: a store is of another kind than the saved one, or was made otherwise and can't
            take an item. All of the stores are empty then.
    """
    stores = stores or {}
    with open(path, "rb", buffering=0) as file:
        reader = _Reader(file.fileno(), os.fspath(path))
        contents = reader.contents
        if missing := stores.keys() - contents.stores.keys():
            raise ConfigMismatch(
                f"{reader.path} has no store {sorted(missing)}; "
                f"it has {sorted(contents.stores) or 'none'}"
            )
        values = reader.value(contents.values, writable=True)
        if check is not None:
            check(values)
        with _locked(stores):
            name = ""
            try:
                for name, store in stores.items():
                    _fill(reader, store, contents.stores[name])
            except BaseException as error:
                for store in stores.values():
                    store.reset()
                if sys.version_info >= (3, 11):
                    error.add_note(f"while loading the store {name!r} from {reader.path}")
                if isinstance(error, (KeyError, TypeError)):
                    kind = type(stores[name]).__name__
                    raise ValueError(
                        f"the store {name!r} in {reader.path} is of another kind than {kind}"
                    ) from error
                raise
    return values


def _write_items(writer: _Writer, store: DataStoreBase, stored: _Stored, held: int) -> None:
    """Write what the store held when the save began; notes down the parts that count."""
    latest = stored.latest_id
    at = latest - held  # up to here all is written, or gone
    n = 1
    while at < latest:
        with store.lock:
            now = store.latest_data_id()
            oldest = now + 1 - len(store)
        if oldest > at + 1 or now < latest:  # with a gap, what comes before is of no use
            stored.parts.clear()
            at = oldest - 1
            if not at < latest <= now:
                return
        # Not under the lock: the store takes it for as long as it must.
        batch, extra = store.dump(at, limit=min(n, latest - at))
        if batch.first_id > at + 1:
            continue  # the oldest were overwritten just now
        if not batch:
            raise RuntimeError(f"{store!r} holds ids {at + 1} to {latest}, but dumps none of them")
        begin = writer.at
        stored.parts.append((batch.first_id, writer.record([batch.to_payload(), extra])))
        at += len(batch)
        # Twice as many at most, as items need not be of one size.
        n = max(1, min(2 * n, _MOST, _PART * len(batch) // (writer.at - begin)))


def _fill(reader: _Reader, store: DataStoreBase, stored: _Stored) -> None:
    gone = stored.latest_id - store.capacity  # ids up to here would be overwritten
    oldest = bisect_right([first for first, _ in stored.parts], gone + 1) - 1  # part, of those held
    store.reset(stored.latest_id + 1)
    # From one part before that on: a store may need what came before its oldest item.
    for _, record in stored.parts[max(0, oldest - 1) :]:
        payload, extra = reader.value(record)
        batch = Batch.from_payload(payload)
        if not len(store):
            store.reset(batch.first_id)
        store.restore(batch, extra)
    # Last, since inserting changes what a store knows.
    store.set_state(reader.value(stored.state, writable=True))


@contextmanager
def _locked(stores: _Stores) -> Iterator[None]:
    """Hold the locks of all stores, taken in the same order by everyone."""
    with ExitStack() as stack:
        for lock in sorted((store.lock for store in stores.values()), key=id):
            stack.enter_context(lock)
        yield


# The file -----------------------------------------------------------------------------------


@contextmanager
def _replacing(path: Path) -> Iterator[int]:
    """Open a new file that replaces the one at ``path`` unless the block raises."""
    temporary = path.with_name(f".{path.name}.tmp")
    fd = _open_alone(temporary)
    try:
        try:
            yield fd
            os.fsync(fd)
            rename(temporary, path)
        except BaseException:
            if _is_at(fd, temporary):
                os.unlink(temporary)
            raise
    finally:
        # Closing would do, unless a process that was forked meanwhile has the file open too.
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _open_alone(temporary: Path) -> int:
    """Open a file, empty, that nobody else writes to; one that a killed process left will do."""
    while True:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                why = "another save to the same path is under way"
                raise BlockingIOError(errno.EAGAIN, why, str(temporary)) from None
            except OSError:  # a file system without locks
                pass
            if _is_at(fd, temporary):
                os.ftruncate(fd, 0)
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # it was renamed by one who had it locked, while we waited


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


class _Writer:
    """Appends records to a file.

    Every 64 MB wait for the disk. So there is never more to be written back than that: no more
    time is lost, and other threads and programs don't meet a memory full of dirty pages.
    """

    def __init__(self, fd: int) -> None:
        self.at = 0
        self._fd = fd
        self._crc = 0
        self._unsynced = 0
        self._codec: Codec = load_codec("msgpack")
        self._write([], _FILE + bytes([_VERSION]), 0)

    def record(self, value: Any, tag: bytes = _RECORD) -> int:
        """Write a record, and return where it is."""
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


class _Reader:
    """Reads records of a file, which is checked as a whole first.

    Raises:
        Malformed: see `load`.
    """

    def __init__(self, fd: int, path: str) -> None:
        self.path = path
        self._fd = fd
        self._codec: Codec = load_codec("msgpack")
        self._sizes: dict[int, int] = {}  # of the frames, by the offsets of their records
        index = self.value(self._check())
        try:
            self.contents = msgspec.convert(index, _Contents)
        except msgspec.ValidationError as error:
            raise Malformed(f"{path} has an index that is none: {error}") from None

    def value(self, at: int, *, writable: bool = False) -> Any:
        """Decode the record at an offset; its arrays live in memory of their own."""
        if at not in self._sizes:
            raise Malformed(f"{self.path} has an index that is none: no record is at byte {at}")
        size = self._sizes[at]
        memory = memoryview(empty(pooled, size, np.uint8))  # type: ignore[arg-type]
        if self._read(at + _HEAD.size, memory) < size:
            raise self._torn()
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
                raise self._torn()
            tag, size, _, expected = _HEAD.unpack(head)
            self._sizes[at] = size
            begin, at = at, at + _HEAD.size
            crc = zlib.crc32(head[:_CHECKED], crc)
            size += -size % _HEAD.size
            # A damaged size is told from a file that was cut off by what it leads to.
            stop = min(at + size, end)
            while at < stop:
                n = self._read(at, chunk[: stop - at])
                if not n:
                    raise self._torn()
                crc = zlib.crc32(chunk[:n], crc)
                at += n
            if at < begin + _HEAD.size + size:
                raise self._torn()
            if crc != expected:
                raise Malformed(
                    f"{self.path} is damaged: bytes {begin} to {at} are not what was written; "
                    "take an older checkpoint"
                )
            if tag.rstrip(b"\0") == _INDEX:
                if at != end:
                    raise Malformed(f"{self.path} has {end - at} bytes after its end")
                return begin

    def _check_first(self, head: bytes) -> None:
        if not head.startswith(_FILE) and not _FILE.startswith(head):
            raise Malformed(f"{self.path} is no checkpoint of edgeml: it begins with {head[:8]!r}")
        if len(head) == _HEAD.size and zlib.crc32(head[:_CHECKED]) == int.from_bytes(
            head[_CHECKED:], "little"
        ):
            version = head[len(_FILE)]
            if version != _VERSION:
                raise Malformed(
                    f"{self.path} is a checkpoint of version {version}, and this edgeml reads "
                    f"version {_VERSION}: use the edgeml that wrote it, or a newer one"
                )

    def _torn(self) -> Malformed:
        size = os.fstat(self._fd).st_size
        return Malformed(
            f"{self.path} is cut off, or damaged: it ends after {size} bytes, amid a record; "
            "take an older checkpoint"
        )

    def _read(self, at: int, memory: memoryview) -> int:
        """Fill memory from an offset; returns how much there was."""
        done = 0
        while done < len(memory) and (n := os.preadv(self._fd, [memory[done:]], at + done)):
            done += n
        return done
