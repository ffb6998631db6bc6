"""An actor's half of the rule by which every item arrives once; see the package."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from edgeml.core.client import Client
from edgeml.core.errors import NotEncodable
from edgeml.core.message import pooled
from edgeml.data import Batch, DataStoreBase

__all__ = ["Uploader"]

_log = logging.getLogger(__name__)

_LARGE_COLUMN = 1 << 20  # bytes
_CHUNK_BYTES = 4 << 20  # larger messages of images are slower, not faster
_WINDOW = 4  # chunks under way: one is collected, sent or inserted while others are
_MOST_ITEMS = 4096  # in a chunk
_FIRST_ITEMS = 32  # in the first chunk, since the size of the items isn't known yet


class Uploader:
    """Sends the items of one store. Its methods are called by one thread at a time.

    Args:
        name: the learner's name for the store.
        store: whose items are sent.
        client: by which they are sent.
        incarnation: of the client.

    Attributes:
        sent: the id up to which the server is known to have the items.
        lost: how many items the store had overwritten before they could be sent.
    """

    def __init__(self, name: str, store: DataStoreBase, client: Client, incarnation: int) -> None:
        self.sent = 0
        self.lost = 0
        self._name = name
        self._store = store
        self._client = client
        self._incarnation = incarnation
        # Uploads under way, or whose answer was lost: the item that each follows, and its first.
        self._unsure: deque[tuple[int, int]] = deque()
        self._chunk = _FIRST_ITEMS  # items that make a good message
        self._epoch = client.epoch
        self._allocate = self._allocate_batch  # one object, to be known by
        store.allocate = self._allocate

    @property
    def unsent(self) -> int:
        """How many items the server isn't known to have."""
        return self._store.latest_data_id() - self.sent

    def close(self) -> None:
        """Let go of the store."""
        if self._store.allocate is self._allocate:
            self._store.allocate = pooled

    def update(self, timeout: float | None) -> int:
        """See `TrainerClient.update`."""
        before, lost_before = self.sent, self.lost
        newest = self._store.latest_data_id()  # what comes in meanwhile goes with the next update
        under_way: deque[tuple[Callable[[], int], int]] = deque()  # with the last item of each
        epoch = self._client.epoch
        if self._unsure or epoch != self._epoch:
            # A server that was started anew may have its stores from a checkpoint, and lack what
            # came after that; this store may hold it yet.
            self._ask_how_far(timeout)
            self._epoch = epoch
        cursor = self.sent
        try:
            while True:
                while cursor < newest and len(under_way) < _WINDOW:
                    batch = self._next_batch(cursor)
                    if not len(batch):
                        newest = cursor
                        break
                    last = batch.first_id + len(batch) - 1
                    alone = last >= newest and not under_way
                    under_way.append((self._upload(batch, cursor, timeout, alone), last))
                    cursor = last
                if not under_way:
                    break
                answer, last = under_way.popleft()
                mark = answer()
                if mark < last:  # refused, and with it those that follow
                    _wait_for(under_way)
                    self._ask_how_far(timeout)
                    cursor = self.sent
                else:
                    self._acknowledge(mark)
        except BaseException:
            _wait_for(under_way)
            raise
        return max(0, self.sent - before - (self.lost - lost_before))

    def _next_batch(self, after: int) -> Batch:
        chunk = self._chunk
        # A little more in one piece, rather than a little piece at the end.
        limit = 2 * chunk if self._store.latest_data_id() - after <= 2 * chunk else chunk
        batch = self._store.get_latest_data(after, limit=limit)
        if len(batch):
            self._chunk = fitting = _fitting(batch)
            if len(batch) > 2 * fitting:
                batch = batch[:fitting]
        return batch

    def _allocate_batch(self, nbytes: int) -> memoryview | None:
        """Where the transport sends from, for what is large; else memory that was used before."""
        place = self._client.allocate(nbytes) if nbytes >= _LARGE_COLUMN else None
        return place if place is not None else pooled(nbytes)

    def _upload(
        self, batch: Batch, after: int, timeout: float | None, alone: bool
    ) -> Callable[[], int]:
        """Send a batch that follows the item ``after``; returns what gives the server's mark."""
        upload = {
            "store": self._name,
            "incarnation": self._incarnation,
            "acknowledged": self.sent,
            "after": after,
            "batch": batch.to_payload(),
        }
        self._unsure.append((after, batch.first_id))
        try:
            if not alone:
                future: Future[int] = self._client.call_async("update", upload, timeout)
                return future.result
            mark: int = self._client.call("update", upload, timeout)  # spares two thread hops
        except NotEncodable as error:
            self._unsure.pop()  # nothing of it was sent
            raise NotEncodable(
                f"store {self._name!r}, in the {len(batch)} items from id {batch.first_id} on: "
                f"{error}; its release(id) gives up the items up to that id"
            ) from None
        return lambda: mark

    def _ask_how_far(self, timeout: float | None) -> None:
        """Learn the server's mark rather than send again what is there."""
        mark = self._upload(Batch.of([], self.sent + 1), self.sent, timeout, True)()
        self._unsure.pop()
        self._acknowledge(mark)
        self._unsure.clear()  # what isn't there by now will be sent anew

    def _acknowledge(self, mark: int) -> None:
        """The server has all items up to ``mark``, but for those that were overwritten here."""
        unsure = self._unsure
        while unsure and unsure[0][1] <= mark:
            after, first = unsure.popleft()
            if lost := first - after - 1:
                self.lost += lost
                _log.warning(
                    "%d items of %r were overwritten before they were sent", lost, self._name
                )
        self.sent = mark
        self._store.release(mark)


def _wait_for(under_way: deque[tuple[Callable[[], int], int]]) -> None:
    """Wait for uploads whose answers do not matter any more."""
    while under_way:
        with suppress(Exception):
            under_way.popleft()[0]()


def _fitting(batch: Batch) -> int:
    """How many items like these make a message of a good size."""
    size = batch.nbytes or sum(map(_nbytes, batch))
    return max(1, min(_MOST_ITEMS, _CHUNK_BYTES * len(batch) // max(1, size)))


def _nbytes(value: Any) -> int:
    """Roughly what a value takes in a message."""
    if isinstance(value, dict):
        return sum(map(_nbytes, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return sum(map(_nbytes, value))
    if isinstance(value, (str, bytes, bytearray)):
        return len(value)
    size = getattr(value, "nbytes", None)
    return size if isinstance(size, int) else 8
