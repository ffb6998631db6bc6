"""An actor's half of the rule by which every item arrives once; see the package."""

from __future__ import annotations

import logging
import math
import re
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, NamedTuple

from edgeml.core.client import Client
from edgeml.core.errors import DeadlineExceeded, EdgemlError, Malformed, NotEncodable, shown
from edgeml.core.message import pooled
from edgeml.data import Batch, DataStoreBase
from edgeml.services.trainer.ledger import Run
from edgeml.services.trainer.refusals import Refusals

__all__ = ["OnRefused", "Uploader"]

OnRefused = Literal["skip", "raise"]

_log = logging.getLogger(__name__)

_LARGE_COLUMN = 1 << 20  # bytes
_CHUNK_BYTES = 4 << 20  # larger messages of images are slower, not faster
_WINDOW = 4  # chunks under way: one is collected, sent or inserted while others are
_MOST_ITEMS = 4096  # in a chunk
_FIRST_ITEMS = 32  # in the first chunk, since the size of the items isn't known yet
_MOST_SETBACKS = 8  # times that a server may ask for items again in an update that gets no further
_LONGEST_REASON = 300  # characters, of why an item was refused


class _Chunk(NamedTuple):
    """Consecutive items in one message: the id sent before them, the first one's, how many."""

    after: int
    first: int
    n: int

    @property
    def last(self) -> int:
        return self.first + self.n - 1


class _Unfit(Exception):
    """A chunk that can't be carried because of what is in it, with the reason."""

    def __init__(self, chunk: _Chunk, error: EdgemlError) -> None:
        super().__init__(chunk, error)
        self.chunk = chunk
        self.error = error


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
        refusals: of items that can't be sent, or that the learner's store refused.
    """

    def __init__(self, name: str, store: DataStoreBase, client: Client, incarnation: int) -> None:
        self.sent = 0
        self.lost = 0
        self.refusals = Refusals()
        self._name = name
        self._store = store
        self._client = client
        self._incarnation = incarnation
        self._unsure: deque[_Chunk] = deque()  # under way, or whose answer was lost
        self._furthest = 0  # the newest id that was ever sent
        self._arrived = 0  # items
        self._unfit: deque[int] = deque()  # ids above `sent` of items that can't be sent
        self._passed = 0  # up to this id, what is above `sent` can't be
        self._refused_here = self._refused_there = 0  # the newest ids that were counted
        self._good_length = _FIRST_ITEMS  # of a chunk
        self._epoch = client.epoch
        self._timeout: float | None = None  # these are the update's
        self._deadline = math.inf
        self._window = _WINDOW
        self._on_refused: OnRefused = "skip"
        self._allocate = self._allocate_batch  # one object, to be known by
        store.allocate = self._allocate

    @property
    def unsent(self) -> int:
        """How many items the server isn't known to have, and may yet get."""
        return self._store.latest_data_id() - max(self.sent, self._passed)

    def close(self) -> None:
        """Let go of the store."""
        if self._store.allocate is self._allocate:
            self._store.allocate = pooled

    def update(
        self,
        timeout: float | None,
        on_refused: OnRefused = "skip",
        deadline: float = math.inf,
        one_by_one: bool = False,
    ) -> int:
        """Send what is new; returns how much of it the server has now.

        Args:
            timeout: seconds for each message; the client's own by default.
            on_refused: see `TrainerClient.update`.
            deadline: when to give up, by `time.monotonic`.
            one_by_one: whether only one chunk is under way at a time, which needs no thread.

        Raises:
            DeadlineExceeded: the deadline has come.
            EdgemlError: see `TrainerClient.update`.
        """
        self._timeout, self._deadline = timeout, deadline
        self._window = 1 if one_by_one else _WINDOW
        self._on_refused = on_refused
        before = self._arrived
        newest = self._store.latest_data_id()  # what comes in meanwhile goes with the next update
        epoch = self._client.epoch
        if self._unsure or epoch != self._epoch:
            # A server that was started anew may have its stores from a checkpoint, and lack what
            # came after that; this store may hold it yet.
            self._ask_how_far()
            self._epoch = epoch
        most = _MOST_ITEMS
        while True:
            try:
                self._send(newest, most)
                break
            except _Unfit as unfit:
                chunk, error = unfit.chunk, unfit.error
            if self._unsure:
                self._ask_how_far()  # which fails, too, where it isn't the items' fault
            if chunk.n > 1:
                most = chunk.n // 2
            elif chunk.after <= self.sent:  # else something before it was lost under way
                why = re.sub(
                    r"^value\['batch'\](\['items'\]\[0\]|\['columns'\])", "item", str(error)
                )
                if self._on_refused == "raise":
                    raise type(error)(
                        f"store {self._name!r}, item {chunk.first}: {why}; "
                        "its release(id) gives up the items up to that id"
                    )
                self._refuse(chunk.first, why)
        if self._passed > self.sent:
            self._store.release(self._passed)
        return self._arrived - before

    def _send(self, newest: int, most: int) -> None:
        """Send what is new, up to an id; at first no more than ``most`` items at a time."""
        under_way: deque[tuple[Callable[[], Any], _Chunk]] = deque()
        after, cursor = self.sent, max(self.sent, self._passed)
        unfit: _Unfit | None = None
        furthest, setbacks = self.sent, 0
        try:
            while True:
                while unfit is None and cursor < newest and len(under_way) < self._window:
                    batch = self._next_batch(cursor, most)
                    if not len(batch):
                        newest = cursor
                        break
                    chunk = _Chunk(after, batch.first_id, len(batch))
                    alone = self._window == 1 or (chunk.last >= newest and not under_way)
                    try:
                        answer = self._upload(chunk, batch, alone, self._on_refused == "skip")
                    except (NotEncodable, Malformed) as error:
                        unfit = _Unfit(chunk, error)  # raised once those before it are there
                    else:
                        under_way.append((answer, chunk))
                        after = cursor = chunk.last
                        most *= 2
                if not under_way:
                    break
                answer, chunk = under_way.popleft()
                try:
                    answered = answer()
                except Malformed as error:
                    raise _Unfit(chunk, error) from None
                self._acknowledge(answered)
                if self.sent < chunk.last:  # a gap, and so are those that follow
                    _wait_for(under_way)
                    self._ask_how_far()
                    after = cursor = self.sent
                    unfit = None
                    setbacks = 0 if self.sent > furthest else setbacks + 1
                    if setbacks > _MOST_SETBACKS:
                        raise Malformed(
                            f"the server asks for the items of {self._name!r} from {self.sent + 1} "
                            f"on again and again, and was sent them {setbacks} times"
                        )
                furthest = max(furthest, self.sent)
        except BaseException:
            _wait_for(under_way)
            raise
        if unfit is not None:
            raise unfit
        self._passed = cursor

    def _next_batch(self, after: int, most: int) -> Batch:
        chunk = self._good_length
        # A little more in one piece, rather than a little piece at the end.
        limit = 2 * chunk if self._store.latest_data_id() - after <= 2 * chunk else chunk
        batch = self._store.get_latest_data(after, limit=min(limit, most))
        if len(batch):
            self._good_length = fitting = _fitting(batch)
            if self._window == 1:  # it is to go in one piece over gRPC, where more need a thread
                batch = batch[: max(1, fitting // 2)]
            elif len(batch) > 2 * fitting:
                batch = batch[:fitting]
        return batch

    def _allocate_batch(self, nbytes: int) -> memoryview | None:
        """Where the transport sends from, for what is large; else memory that was used before."""
        place = self._client.allocate(nbytes) if nbytes >= _LARGE_COLUMN else None
        return place if place is not None else pooled(nbytes)

    def _upload(
        self, chunk: _Chunk, batch: Batch, alone: bool, skip_refused: bool
    ) -> Callable[[], Any]:
        """Send a batch; returns what gives the server's answer."""
        upload = {
            "store": self._name,
            "incarnation": self._incarnation,
            "acknowledged": self.sent,
            "after": chunk.after,
            "batch": batch.to_payload(),
            "skip_refused": skip_refused,
        }
        timeout = self._limit()
        self._unsure.append(chunk)
        self._furthest = max(self._furthest, chunk.last)
        try:
            if not alone:
                return self._client.call_async("update", upload, timeout).result
            answer = self._client.call("update", upload, timeout)  # spares two thread hops
        except NotEncodable:
            self._unsure.pop()  # nothing of it was sent
            raise
        return lambda: answer

    def _limit(self) -> float | None:
        """Seconds that the next message may take; raises DeadlineExceeded when there are none."""
        if self._deadline == math.inf:
            return self._timeout
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("there was no time for more")
        return left if self._timeout is None else min(left, self._timeout)

    def _ask_how_far(self) -> None:
        """Learn the server's mark rather than send again what is there."""
        nothing = Batch.of([], self.sent + 1)
        chunk = _Chunk(self.sent, nothing.first_id, 0)
        answer = self._upload(chunk, nothing, True, True)()
        self._unsure.pop()
        before = self.sent
        self._acknowledge(answer)
        self._unsure.clear()  # what isn't there by now will be sent anew
        if self.sent < before:
            self._passed = 0

    def _acknowledge(self, answer: Any) -> None:
        """The server has all items up to its mark, but for those overwritten or refused."""
        mark, refused = _parse(answer, self._furthest)
        n_refused = 0
        for first, n, why in refused:
            start = max(first, self._refused_there + 1)
            if (fresh := first + n - start) > 0:
                self.refusals.add(self._name, start, fresh, why)
                self._refused_there = first + n - 1
                n_refused += fresh
        while self._unsure and self._unsure[0].first <= mark:
            chunk = self._unsure.popleft()
            self._arrived += min(chunk.n, mark + 1 - chunk.first)
            lost = chunk.first - chunk.after - 1
            while self._unfit and self._unfit[0] < chunk.first:
                lost -= self._unfit.popleft() > chunk.after
            if lost:
                self.lost += lost
                _log.warning(
                    "%d items of %r were overwritten before they were sent", lost, self._name
                )
        self._arrived -= n_refused
        self.sent = mark
        self._store.release(mark)

    def _refuse(self, item_id: int, why: str) -> None:
        """Go past an item that can't be sent."""
        self._passed = item_id
        if not self._unfit or self._unfit[-1] < item_id:
            self._unfit.append(item_id)
        if item_id > self._refused_here:
            self._refused_here = item_id
            self.refusals.add(self._name, item_id, 1, why)


def _parse(answer: Any, newest: int) -> tuple[int, list[Run]]:
    """The mark in an answer, and the runs of items that the learner's store refused.

    Args:
        answer: whatever a server gave.
        newest: the number of the newest item that it was sent.

    Raises:
        Malformed: it can't be an answer to an upload.
    """
    match answer:
        case {"mark": mark, "refused": list(runs)}:
            pass
        case mark:
            runs = []
    if type(mark) is not int or not 0 <= mark <= newest:
        raise Malformed(
            f"an answer to an upload has a mark of 0 to {newest}, which was sent, "
            f"not {shown(answer)}"
        )
    refused: list[Run] = []
    following = 1
    for run in runs:
        match run:
            case [first, n, str(why)] if type(first) is type(n) is int:
                if following <= first <= first + n - 1 <= mark:
                    following = first + n
                    refused.append((first, n, why[:_LONGEST_REASON]))
                    continue
        raise Malformed(
            "an answer to an upload has runs of items up to its mark, in order, each a number, a "
            f"count and a text, not {shown(run)}"
        )
    return mark, refused


def _wait_for(under_way: deque[tuple[Callable[[], Any], _Chunk]]) -> None:
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
