"""A store's items go into a log as well, in the same step: both have an item, or neither has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeml.data.batch import Batch
from edgeml.data.segments import Layout
from edgeml.data.tree import nbytes_of

if TYPE_CHECKING:
    from edgeml.data.base import DataStoreBase
    from edgeml.data.logged import LoggedDataStore
    from edgeml.data.packing import Packer
    from edgeml.data.schema import Schema

__all__ = ["Forwarding"]

_CATCH_UP = 1024  # items at a time
_SPARE = 1 << 14  # bytes of room beyond what an item seems to need
_METHODS = ("insert", "batch_insert", "interrupt", "reset", "end_trajectory")


class Forwarding:
    """Puts itself before a store's own methods, on that one object, from `begin` until `end`.

    What goes on is what the store made of an item: what it would hand out. Where it hands out the
    bytes that it was given, as found with the first item, these are taken, which is much faster. A
    `ReplayBuffer` gives the leaves that it has found to fit.
    """

    def __init__(self, store: DataStoreBase, log: LoggedDataStore) -> None:
        self._store, self._log = store, log
        self._own: dict[str, Callable[..., Any]] = {
            name: getattr(store, name)
            for name in _METHODS
            if hasattr(store, name) and not (name == "insert" and store.forwards_rows)
        }
        self._own_insert = store.insert
        # A class of somebody else's may change what it is given.
        self._fast = type(store).insert.__module__.startswith("edgeml.data.")
        self._packer: Packer | None = None
        self._schema: Schema | None = None
        self._layout: Layout
        self._inside = self._followed = False
        # A queue's items have been handed on once they are in the log.
        self._hands_on = not type(store).release.__qualname__.startswith("DataStoreBase.")
        self._count: Callable[[], None] | None = getattr(store, "hand_on", None)

    def begin(self) -> None:
        """Forward what the log lacks, and what comes."""
        with self._store.lock:
            self.catch_up()
            for name in self._own:
                setattr(self._store, name, getattr(self, name))

    def end(self) -> None:
        """Leave the store as it was."""
        with self._store.lock:
            for name in self._own:
                vars(self._store).pop(name, None)

    def catch_up(self) -> None:
        """Forward what the store holds and the log lacks."""
        store, log = self._store, self._log
        at = log.known(store.numbering)
        log.interrupt()
        while len(batch := store.get_latest_data(at, limit=_CATCH_UP)):
            if batch.first_id > at + 1:
                log.interrupt()
            log.follow(store.numbering, batch.first_id - 1)
            log.append(log.reserve(batch))
            at = batch.first_id + len(batch) - 1
        if at != store.latest_data_id():
            log.interrupt()
        self._done()

    # By the store itself ---------------------------------------------------------------------

    def reserve_row(self, schema: Schema, leaves: Sequence[Any], lane: int = 0) -> bytes | None:
        """Make room for an item, given by leaves that fit a schema; returns what to append."""
        if self._inside:
            return None
        if lane != self._log.lane:
            self._log.switch_lane(lane)
        if schema is not self._schema:
            layout = Layout(schema.skeleton, schema.dtypes, schema.shapes)
            self._schema, self._layout = schema, self._log.keep_layout(layout)
        if not self._followed:
            self._followed = True
            self._log.follow(self._store.numbering, self._store.latest_data_id())
        try:
            row = b"".join(leaves)
        except (BufferError, TypeError, ValueError):  # not contiguous, of ml_dtypes, ...
            row = b"".join([np.asarray(leaf).tobytes() for leaf in leaves])
        self._log.reserve_row(self._layout)
        return row

    def append_row(self, row: bytes | None) -> None:
        """Append it, once the store has it."""
        if row is not None:
            self._log.append_row(row)

    # In place of the store's own ------------------------------------------------------------

    def insert(self, item: Any, *arguments: Any, **options: Any) -> Any:
        """Insert an item."""
        packer = self._packer
        row = None if packer is None or arguments or options else packer.pack(item)
        with self._store.lock:
            if row is None or self._inside:
                return self._insert(item, arguments, options)
            assert packer is not None
            self._log.reserve_row(packer.layout)
            if self._log.lane:
                self._log.switch_lane(0)
            if self._count is not None:
                self._count()
            else:
                self._own_insert(item)
            self._log.append_row(row)
            if self._hands_on and self._count is None:
                self._store.release(self._store.latest_data_id())
        return None

    def _insert(self, item: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if self._inside:
            return self._own_insert(item, *arguments, **options)
        before = self._store.latest_data_id()
        result = self._go_through(self._own_insert, 1, item, arguments, options)
        if self._fast and not arguments and not options:
            with suppress(ValueError, TypeError, LookupError):
                self._packer = self._log.make_packer(self._store.get_latest_data(before), item)
        self._done()
        return result

    def batch_insert(self, batch: Any, *arguments: Any, **options: Any) -> Any:
        """Insert items."""
        with self._store.lock:
            if self._inside:
                return self._own["batch_insert"](batch, *arguments, **options)
            if not isinstance(batch, (Batch, dict, str)):
                batch = list(batch)
            result = self._go_through(
                self._own["batch_insert"], len(batch), batch, arguments, options
            )
            self._done()
            return result

    def _go_through(
        self,
        method: Callable[..., Any],
        n: int,
        what: Any,
        arguments: tuple[Any, ...],
        options: dict[str, Any],
    ) -> Any:
        """Have room in the log, insert into the store, and append what that has then."""
        store, log = self._store, self._log
        log.make_room(n, 2 * nbytes_of(what) + n * 256 + _SPARE)
        before = store.latest_data_id()
        self._inside = True
        try:
            return method(what, *arguments, **options)
        finally:
            self._inside = False
            if store.latest_data_id() > before:
                batch = store.get_latest_data(before)
                if batch.first_id > before + 1:
                    log.interrupt()
                log.append(log.reserve(batch))

    def interrupt(self, *arguments: Any, **options: Any) -> Any:
        """Interrupt both."""
        with self._store.lock:
            result = self._own["interrupt"](*arguments, **options)
            self._log.interrupt()
            return result

    def end_trajectory(self, *arguments: Any, **options: Any) -> Any:
        """End the trajectory, which the log can't tell by the item that is in it already."""
        with self._store.lock:
            result = self._own["end_trajectory"](*arguments, **options)
            self._log.interrupt()
            return result

    def reset(self, next_id: int | None = None) -> Any:
        """Reset the store; the log keeps what is to be sent yet."""
        with self._store.lock:
            result = self._own["reset"](next_id)
            self._log.interrupt()
            self._done()
            return result

    def _done(self) -> None:
        store = self._store
        latest = store.latest_data_id()
        self._followed = latest > 0
        if latest:  # an empty one may be loaded from a checkpoint yet
            self._log.follow(store.numbering, latest)
            store.release(latest)  # a queue's items have been handed on
