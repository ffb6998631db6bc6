"""An actor's half of the rule by which every item arrives once; see the package."""

from __future__ import annotations

import logging
import re
from collections import deque
from concurrent.futures import Future
from typing import Any, Literal, NamedTuple

from edgeml.core.client import Client
from edgeml.core.deadline import Deadline
from edgeml.core.errors import DeadlineExceeded, EdgemlError, Malformed, NotEncodable, shown
from edgeml.core.message import pooled
from edgeml.data import Batch, DataStoreBase
from edgeml.data.tree import nbytes_of
from edgeml.services.trainer.account import ClientAccount
from edgeml.services.trainer.ledger import Run
from edgeml.services.trainer.refusals import Refusals

__all__ = ["Delivered", "OnRefused", "Uploader"]

OnRefused = Literal["skip", "raise"]

_log = logging.getLogger(__name__)

_LARGE_COLUMN = 1 << 20  # bytes
_CHUNK_BYTES = 4 << 20  # larger messages of images are slower, not faster
_WINDOW = 4  # chunks under way: one is collected, sent or inserted while others are
_MOST_ITEMS = 4096  # in a chunk
_FIRST_ITEMS = 32  # in the first chunk, since the size of the items isn't known yet
_MOST_SETBACKS = 8  # times that a server may ask for items again in an update that gets no further
_LONGEST_REASON = 300  # characters, of why an item was refused


class Delivered(NamedTuple):
    """What an update has brought about.

    Attributes:
        applied: how many items the learner's store has more.
        durable: how many more are in a checkpoint of the learner's, where it saves any.
    """

    applied: int
    durable: int


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
        sent: the id up to which the learner is known to have the items.
        account: what became of them.
    """

    def __init__(self, name: str, store: DataStoreBase, client: Client, incarnation: int) -> None:
        self.name = name
        self.sent = 0
        self.account = ClientAccount()
        self._refusals = Refusals()
        self._store = store
        self._client = client
        self._incarnation = incarnation
        self._numbering = store.numbering
        self._unsure: deque[_Chunk] = deque()  # under way, or whose answer was lost
        self._arrived = 0  # items
        self._passed = 0  # up to this id, what is above `sent` can't be sent
        self._durable: int | None = None  # as the learner has told
        self._good_length = _FIRST_ITEMS  # of a chunk
        self._connected = -1  # the client's epoch, of the learner that told its mark last
        self._epoch: int | None = None  # the ledger's
        self._timeout: float | None = None  # these are the update's
        self._deadline: Deadline | None = None
        self._window = _WINDOW
        self._on_refused: OnRefused = "skip"
        self._allocate = self._allocate_batch  # one object, to be known by
        store.allocate = self._allocate

    @property
    def unsent(self) -> int:
        """How many items the learner isn't known to have, and may yet get."""
        return self._store.latest_data_id() - max(self.sent, self._passed)

    def count(self) -> dict[str, Any]:
        """Tell what became of the store's items."""
        return self.account.count(self._store.latest_data_id())

    def close(self) -> None:
        """Let go of the store."""
        if self._store.allocate is self._allocate:
            self._store.allocate = pooled

    def update(
        self,
        timeout: float | None,
        on_refused: OnRefused = "skip",
        deadline: Deadline | None = None,
        one_by_one: bool = False,
    ) -> Delivered:
        """Send what is new; returns how much more of it the learner has, and has saved.

        Args:
            timeout: seconds for each message; the client's own by default.
            on_refused: see `TrainerClient.update`.
            deadline: when to give up; None for never, as long as answers come.
            one_by_one: whether only one chunk is under way at a time, which needs no thread.

        Raises:
            DeadlineExceeded: the deadline has come.
            EdgemlError: see `TrainerClient.update`.
        """
        self._timeout, self._deadline = timeout, deadline
        self._window = 1 if one_by_one else _WINDOW
        self._on_refused = on_refused
        if self._store.numbering.id != self._numbering.id:
            self._begin_anew()
        arrived, durable = self._arrived, self.account.durable()
        newest = self._store.latest_data_id()  # what comes in meanwhile goes with the next update
        if newest:
            connected = self._client.epoch
            waits = self._durable is not None and self._durable < self.sent
            if (
                self._unsure
                or connected != self._connected
                or (waits and newest <= max(self.sent, self._passed))
            ):
                # A learner that was started anew may lack what this store holds yet; one that
                # goes on may have more of it than this client knows, or have saved it meanwhile.
                self._ask_how_far()
                self._connected = connected
            self._send_all(newest)
        return Delivered(self._arrived - arrived, max(0, self.account.durable() - durable))

    def _begin_anew(self) -> None:
        """Start from the first item of a store whose ids have begun anew."""
        self._numbering = self._store.numbering
        self.account.begin_anew()
        self._unsure.clear()
        self.sent = self._passed = 0
        self._connected, self._durable = -1, None

    def _send_all(self, newest: int) -> None:
        """Send what is new, up to an id, but for items that can't be sent."""
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
                        f"store {self.name!r}, item {chunk.first}: {why}; "
                        "its release(id) gives up the items up to that id"
                    )
                self._passed = chunk.first
                self._miss(chunk.after, chunk.first)
                self._refuse(chunk.first, 1, why)
        if self._passed > self.sent and (self._durable is None or self._durable >= self.sent):
            self._store.release(self._passed)

    def _send(self, newest: int, most: int) -> None:
        """Send what is new, up to an id; at first no more than ``most`` items at a time."""
        under_way: deque[tuple[Future[Any], _Chunk]] = deque()
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
                    answered = answer.result()
                except Malformed as error:
                    raise _Unfit(chunk, error) from None
                self._acknowledge(answered)
                if self.sent < chunk.last:  # a gap, and so are those that follow
                    while under_way:
                        under_way.popleft()[0].cancel()
                    self._ask_how_far()
                    after = cursor = self.sent
                    unfit = None
                    setbacks = 0 if self.sent > furthest else setbacks + 1
                    if setbacks > _MOST_SETBACKS:
                        raise Malformed(
                            f"the server asks for the items of {self.name!r} from {self.sent + 1} "
                            f"on again and again, and was sent them {setbacks} times"
                        )
                furthest = max(furthest, self.sent)
        except BaseException:
            for upload, _ in under_way:  # if they arrive all the same, the next update is told
                upload.cancel()
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

    def _upload(self, chunk: _Chunk, batch: Batch, alone: bool, skip_refused: bool) -> Future[Any]:
        """Send a batch; returns the future of the learner's answer."""
        upload = {
            "store": self.name,
            "incarnation": self._incarnation,
            "numbering": self._numbering.to_list(),
            "epoch": self._epoch,
            "acknowledged": self.sent,
            "after": chunk.after,
            "batch": batch.to_payload(),
            "skip_refused": skip_refused,
        }
        timeout = self._limit()
        self._unsure.append(chunk)
        try:
            if alone:  # a blocking call spares two thread hops
                answer: Future[Any] = Future()
                answer.set_result(self._client.call("update", upload, timeout))
            else:
                answer = self._client.call_async("update", upload, timeout)
        except NotEncodable:
            self._unsure.pop()  # nothing of it was sent
            raise
        finally:
            if self._unsure and self._unsure[-1] is chunk:
                self.account.send(chunk.first, chunk.n)
        return answer

    def _limit(self) -> float | None:
        """Seconds that the next message may take; raises DeadlineExceeded when there are none."""
        if self._deadline is None:
            return self._timeout
        left = self._deadline.left
        if not left:
            raise DeadlineExceeded("there was no time for more")
        return left if self._timeout is None else min(left, self._timeout)

    def _ask_how_far(self) -> None:
        """Learn the server's mark rather than send again what is there."""
        nothing = Batch.of([], self.sent + 1)
        chunk = _Chunk(self.sent, nothing.first_id, 0)
        answer = self._upload(chunk, nothing, True, True).result()
        self._unsure.pop()
        self._acknowledge(answer)
        self._unsure.clear()  # what isn't there by now will be sent anew

    def _acknowledge(self, answer: Any) -> None:
        """The server has all items up to its mark, but for those overwritten or refused."""
        told = _parse(answer, self._store.latest_data_id())
        before, mark = self.sent, told.mark
        self._epoch, self._durable = told.epoch, told.durable
        # What is below was sent by an earlier client, so no update of this one counts it.
        own = self._unsure[0].first if self._unsure else mark + 1
        while self._unsure and self._unsure[0].first <= mark:
            chunk = self._unsure.popleft()
            self._arrived += min(chunk.n, mark + 1 - chunk.first)
            self._miss(chunk.after, chunk.first)
        self.sent = mark
        self.account.mark(mark, told.durable or 0)
        for first, n, why in told.refused:
            below = min(n, max(0, own - first))
            self._refuse(first, below, why)
            self._arrived -= self._refuse(first + below, n - below, why)
        if mark < before:
            _log.warning(
                "the learner has the items of %r up to %d only, where it had %d: what is still "
                "held of them is sent again",
                self.name,
                mark,
                before,
            )
            self._passed = 0
        if told.durable is None:
            self._store.mark_applied(mark)
        else:
            self._store.release(told.durable)

    def _miss(self, after: int, first: int) -> None:
        """Note that what lies between two items is in the store no more."""
        missed = self.account.miss(after + 1, first - 1 - after) if first - 1 > after else 0
        if missed:
            _log.warning(
                "%d items of %r are held no more, and the learner lacks them", missed, self.name
            )

    def _refuse(self, first: int, n: int, why: str) -> int:
        """Note that items can't be sent, or the learner refuses them; how many are new."""
        fresh = self.account.refuse(first, n, why) if n else 0
        if fresh:
            self._refusals.add(self.name, first + n - fresh, fresh, why)
        return fresh


class _Told(NamedTuple):
    """An answer to an upload."""

    mark: int
    durable: int | None
    epoch: int
    refused: list[Run]


def _parse(answer: Any, newest: int) -> _Told:
    """What an answer says: the mark, and the runs of items that the learner's store refused.

    Args:
        answer: whatever a server gave.
        newest: the id of the newest item that there is.

    Raises:
        Malformed: it can't be an answer to an upload.
    """
    match answer:
        case {
            "mark": int(mark),
            "durable": int() | None as durable,
            "epoch": int(epoch),
            "refused": list(runs),
        } if (
            0 <= (durable or 0) <= mark <= newest
            and 0 <= epoch < 1 << 63
            and not any(isinstance(value, bool) for value in (mark, durable, epoch))
        ):
            pass
        case _:
            raise Malformed(
                f"an answer to an upload has a mark of 0 to {newest}, the newest item, up to where "
                f"that is durable, an epoch, and what was refused, not {shown(answer)}"
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
    return _Told(mark, durable, epoch, refused)


def _fitting(batch: Batch) -> int:
    """How many items like these make a message of a good size."""
    size = batch.nbytes or sum(map(nbytes_of, batch))
    return max(1, min(_MOST_ITEMS, _CHUNK_BYTES * len(batch) // max(1, size)))
