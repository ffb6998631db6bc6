"""Checkpoints: a program's values and stores in one file, whole and exact, or not replaced at all.

The file is one of `edgeml.data.records`; its index tells which records are of which store.
"""

from __future__ import annotations

import logging
import os
import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from edgeml.core.errors import ConfigMismatch, Malformed, shown
from edgeml.data.base import DataStoreBase
from edgeml.data.batch import Batch
from edgeml.data.files import KEPT, replace
from edgeml.data.locks import sort_locks
from edgeml.data.numbering import Numbering
from edgeml.data.records import RecordReader, RecordWriter

__all__ = ["Report", "load", "save"]

_PART = 4 << 20  # bytes of items read at a time: half a millisecond of copying, under the lock
_MOST = 1 << 14  # items in a part: the next ones may be larger than those before
_MOST_ID = 1 << 62  # what is counted from there on still is an int64

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
    numbering: list[tuple[int, int]] = field(default_factory=list)  # none in older files


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
        OSError: what the system says: no space, no such directory, ... The text names the file, or
            the directory that isn't there, and how many bytes were needed.
    """
    stores = stores or {}
    path = Path(path)
    with replace(path) as fd:
        writer = RecordWriter(fd, path, KEPT)
        with _lock(stores):
            begun = {
                name: (store.latest_data_id(), len(store), store.state(), store.numbering)
                for name, store in stores.items()
            }
            if callable(values):
                values = values()
        contents = _Contents(
            writer.append(values),
            {
                name: _Stored(latest, writer.append(state), [], numbering.to_list())
                for name, (latest, _, state, numbering) in begun.items()
            },
        )
        # Those with the fewest items first, as these are overwritten the soonest.
        for name in sorted(begun, key=lambda name: begun[name][1]):
            _write_items(writer, stores[name], contents.stores[name], begun[name][1])
        writer.append_index(contents)
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

    The whole file is checked before anything is touched, whoever made it: each item and state by
    the store that it is for. (So the stores' records are read twice.) The stores are made by the
    caller as the saved ones were, except that the capacity may differ: a smaller one keeps the
    newest items. They are locked meanwhile, until all of them are filled, and what they held
    before is forgotten.

    Args:
        path: of the file.
        stores: to be filled, by the names under which they were saved. Others that the file has
            are left alone.
        check: is given the values before any store is touched; what it raises ends the load.

    Returns:
        The values, with arrays that are private and can be written to.

    Raises:
        FileNotFoundError: there is none.
        Malformed: it is damaged, cut off, of a newer version, made up, or no checkpoint at all;
            the text tells which.
        ConfigMismatch: a store that the file doesn't have.
        ValueError: a store is of another kind than the saved one, or was made otherwise and can't
            take an item.

    Whatever is raised, the stores are as they were; but all of them are empty if one raises as it
    is filled that has no `DataStoreBase.check_restore` of its own.
    """
    stores = stores or {}
    with open(path, "rb", buffering=0) as file:
        reader = RecordReader(file.fileno(), os.fspath(path), "checkpoint")
        contents = _read_contents(reader)
        if missing := stores.keys() - contents.stores.keys():
            raise ConfigMismatch(
                f"{reader.path} has no store {sorted(missing)}; "
                f"it has {sorted(contents.stores) or 'none'}"
            )
        values = reader.read(contents.values, writable=True)
        if check is not None:
            check(values)
        with _lock(stores):
            for name, store in stores.items():
                with _explain(reader, name, store):
                    _check(reader, store, contents.stores[name])
            try:
                for name, store in stores.items():
                    with _explain(reader, name, store):
                        _fill(reader, store, contents.stores[name])
            except BaseException:
                for store in stores.values():
                    store.reset()
                raise
    return values


@contextmanager
def _explain(reader: RecordReader, name: str, store: DataStoreBase) -> Iterator[None]:
    """Say of what is raised which store it is about, and that it may be another kind of store."""
    try:
        yield
    except BaseException as error:
        if sys.version_info >= (3, 11):
            error.add_note(f"while loading the store {name!r} from {reader.path}")
        if isinstance(error, (ArithmeticError, AttributeError, LookupError, TypeError)):
            kind = type(store).__name__
            raise ValueError(
                f"the store {name!r} in {reader.path} is of another kind than {kind}"
            ) from error
        raise


def _read_contents(reader: RecordReader) -> _Contents:
    try:
        return msgspec.convert(reader.index, _Contents)
    except (msgspec.ValidationError, AttributeError, TypeError) as error:  # of an array, say
        raise Malformed(f"{reader.path} has an index that is none: {error}") from None


def _write_items(writer: RecordWriter, store: DataStoreBase, stored: _Stored, held: int) -> None:
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
        if batch.first_id > at + 1:  # the oldest were overwritten just now, or some were lost
            stored.parts.clear()
            at = batch.first_id - 1
            continue
        if not batch:
            raise RuntimeError(f"{store!r} holds ids {at + 1} to {latest}, but dumps none of them")
        begin = writer.at
        stored.parts.append((batch.first_id, writer.append([batch.to_payload(), extra])))
        at += len(batch)
        # Twice as many at most, as items need not be of one size.
        n = max(1, min(2 * n, _MOST, _PART * len(batch) // (writer.at - begin)))


def _check(reader: RecordReader, store: DataStoreBase, stored: _Stored) -> None:
    """Look at all that `_fill` is going to use, and touch nothing."""
    firsts = [first for first, _ in stored.parts]
    if not 0 <= stored.latest_id < _MOST_ID:
        raise Malformed(f"{reader.path} has a store whose latest id is {stored.latest_id}")
    if stored.numbering:
        try:
            Numbering.from_list(stored.numbering)
        except ValueError as error:
            raise Malformed(f"{reader.path} has a store whose numbering is none: {error}") from None
    if any(a >= b for a, b in pairwise([0, *firsts, stored.latest_id + 1])):
        raise Malformed(f"{reader.path} has a store whose parts are not in the order of their ids")
    parts = _read_parts(reader, store, stored)
    store.check_restore(parts, reader.read(stored.state, writable=True))
    deque(parts, maxlen=0)  # those that it didn't look at


def _read_parts(
    reader: RecordReader, store: DataStoreBase, stored: _Stored
) -> Iterator[tuple[Batch, Any]]:
    """The parts that a store has room for."""
    gone = stored.latest_id - store.capacity  # ids up to here would be overwritten
    firsts = [first for first, _ in stored.parts]
    oldest = bisect_right(firsts, gone + 1) - 1  # part, of those held
    # From one part before that on: a store may need what came before its oldest item.
    for index in range(max(0, oldest - 1), len(firsts)):
        part = reader.read(stored.parts[index][1])
        if not isinstance(part, list) or len(part) != 2:
            raise Malformed(f"{reader.path} has items that are none: {shown(part, 80)}")
        batch, extra = Batch.from_payload(part[0]), part[1]
        end = firsts[index + 1] if index + 1 < len(firsts) else stored.latest_id + 1
        if (batch.first_id, batch.first_id + len(batch)) != (firsts[index], end):
            raise Malformed(
                f"{reader.path} has {len(batch)} items from {batch.first_id} on where its index "
                f"has those from {firsts[index]} to {end - 1}"
            )
        yield batch, extra


def _fill(reader: RecordReader, store: DataStoreBase, stored: _Stored) -> None:
    with store.not_forwarding():
        _restore(reader, store, stored)


def _restore(reader: RecordReader, store: DataStoreBase, stored: _Stored) -> None:
    store.reset(stored.latest_id + 1)
    for batch, extra in _read_parts(reader, store, stored):
        if not len(store):
            store.reset(batch.first_id)
        store.restore(batch, extra)
    # Last, since inserting changes what a store knows.
    store.set_state(reader.read(stored.state, writable=True))
    if stored.numbering:
        # Others may load the same file, and go another way.
        store.numbering = Numbering.from_list(stored.numbering).branch(stored.latest_id)


@contextmanager
def _lock(stores: _Stores) -> Iterator[None]:
    """Hold the locks of all stores, taken in the same order by everyone."""
    with ExitStack() as stack:
        for lock in sort_locks(store.lock for store in stores.values()):
            stack.enter_context(lock)
        yield
