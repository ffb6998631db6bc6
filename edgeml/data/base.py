"""The contract that every data store keeps; hold yours to it with `edgeml.testing.StoreTests`."""

from __future__ import annotations

import inspect
import itertools
import os
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeml.core.message import Allocator, pooled
from edgeml.data.adapters import adapt_class, hide_items, is_adapted
from edgeml.data.batch import Batch
from edgeml.data.forwarding import Forwarding
from edgeml.data.lanes import Lane, Lanes, Numbers
from edgeml.data.locks import make_lock
from edgeml.data.numbering import Numbering
from edgeml.data.tree import Array

if TYPE_CHECKING:
    from edgeml.data.logged import LoggedDataStore

__all__ = ["DataStoreBase", "check_random_state", "check_state"]


class DataStoreBase(ABC):
    """Keeps the newest items, numbered as they come, and hands out those past a given one.

    The first item ever inserted has id 1, and each later one the next id, whether or not it is
    still held. All methods may be called from any thread, and none ever sees half of another.
    What is inserted is copied: the caller may change its arrays afterwards.

    **Stores made for other libraries**, with four methods (`insert`, `latest_data_id`,
    ``get_latest_data(from_id)``, which returns a list, and ``__len__``), may subclass this as they
    are. They get the rest: the lock is taken around each of the four, ids are from 1 on whichever
    they have, items are copied, and there are `batch_insert`, ``limit``, `reset`, which hides what
    they hold, cuts and checkpoints. Only, a batch is inserted one by one, so that where an item is
    refused those before it stay.

    Args:
        capacity: how many items are held at most.

    Attributes:
        lock: reentrant, and held by all that inserts or reads items: take it to make several
            operations one. A process may be forked at any time: the child has the store as it was
            between two operations.
        numbering: by which its items are known to whoever receives them, together with their ids.
            It is saved in checkpoints.
        allocate: gives memory for the batches that are handed out, and may be used or not. A client
            that uploads the store's items puts its own here, from which they are sent.
    """

    forwards_rows = False
    """Whether its `insert` goes through `Forwarding.reserve_row` and `append_row` itself."""
    _forwarding: Forwarding | None = None

    knows_lanes = False
    """Whether its `batch_insert` and `interrupt` take a ``lane``; see `insert_from`."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        adapt_class(cls)
        told = cls.batch_insert, cls.interrupt
        cls.knows_lanes = all("lane" in inspect.signature(each).parameters for each in told)

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self._capacity = capacity
        self._cuts: deque[int] = deque()  # ids of items that don't follow upon the one before
        self._cuts_kept = capacity  # for how many items back
        self._lanes = Lanes(capacity)
        # Of a store that knows no lanes, whose item the newest is, and its id.
        self._newest: tuple[Lane, int, int] | None = None
        self.lock = make_lock()
        self.numbering = Numbering()
        self.allocate: Allocator = pooled
        _stores[next(_made)] = self

    @property
    def capacity(self) -> int:
        """How many items are held at most."""
        return self._capacity

    @abstractmethod
    def __len__(self) -> int:
        """How many items are held."""

    @property
    def learns(self) -> bool:
        """Whether the first item that comes, whoever sends it, says what all must be like."""
        return False

    @property
    def lanes_given_up(self) -> int:
        """How many lanes were given up as there were too many, so that their episodes are cut."""
        return self._lanes.given_up

    @abstractmethod
    def latest_data_id(self) -> int:
        """Return the id of the newest item ever inserted; 0 where there was none."""

    @abstractmethod
    def get_latest_data(self, from_id: int, *, limit: int | None = None) -> Batch:
        """Return the items with ids above ``from_id`` that are still held.

        The batch stays as it is, whatever happens to the store. Its ``first_id`` is above
        ``from_id + 1`` where items in between are gone, and its ``cuts`` and ``lanes`` are what
        `cuts_within` and `lanes_within` give.

        Args:
            from_id: the id of the last item that the caller has; 0 for all.
            limit: return at most so many, the oldest of them.
        """

    @abstractmethod
    def insert(self, item: Any) -> None:
        """Insert one item."""

    def batch_insert(self, batch: Batch | Sequence[Any]) -> None:
        """Insert items, all or (where it raises) none; their ids are the store's next ones.

        A batch's ``cuts`` go on to be told: give them to `take_cuts`. Here they are inserted one by
        one, and those before an item that is refused stay.
        """
        cuts = batch.cuts if isinstance(batch, Batch) else ()
        with self.lock:
            first = self.latest_data_id() + 1
            try:
                for item in batch:
                    self.insert(item)
            finally:
                inserted = self.latest_data_id() + 1 - first
                self.take_cuts([cut for cut in cuts if cut < inserted], first)

    def insert_from(self, source: Lane, batch: Batch) -> None:
        """Insert items of one of several sources, such as a client's id: `batch_insert` for many.

        What comes of a source follows upon what came of it before, whatever others inserted in
        between: it has a *lane* of its own, or one for each number in the batch's ``lanes``. This
        is what stores do whose `batch_insert` and `interrupt` have a parameter ``lane``, as all of
        edgeml's have. Others are interrupted wherever another source's item, or lane's, comes in
        between.
        """
        with self.lock:
            if self.knows_lanes:
                insert: Any = self.batch_insert
                insert(batch, lane=source)
                return
            if not len(batch):
                return
            lanes = np.zeros(len(batch), np.int64) if batch.lanes is None else batch.lanes
            before = self.latest_data_id()
            if self._newest != (source, int(lanes[0]), before):
                self.interrupt()
            switches = 1 + np.flatnonzero(lanes[1:] != lanes[:-1])
            if len(switches):
                batch = batch.cut(np.union1d(switches, batch.cuts).astype(int).tolist())
            try:
                self.batch_insert(batch.in_lanes(None))
            finally:
                latest = self.latest_data_id()
                if latest > before:
                    self._newest = (
                        source,
                        int(lanes[min(latest - before, len(batch)) - 1]),
                        latest,
                    )

    def interrupt_from(self, source: Lane) -> None:
        """Tell that what comes next of a source does not follow upon what came of it last."""
        with self.lock:
            if self.knows_lanes:
                interrupt: Any = self.interrupt
                interrupt(lane=source)
            elif self._newest is not None and self._newest[0] == source:
                self._newest = None  # and so it will be interrupted

    def reset(self, next_id: int | None = None) -> None:
        """Forget all items.

        Args:
            next_id: the id that the next one gets; by default the one that is next anyway. Ids
                must not begin anew where somebody reads the store, such as a `TrainerClient`: it
                would take new items for those that it has.

        Raises:
            ValueError: it is below 1.
            NotImplementedError: a store that has its own `get_latest_data` with a limit, and no
                `reset`.
        """
        if not is_adapted(type(self)):
            raise NotImplementedError(f"{type(self).__name__} has no reset()")
        with self.lock:
            hide_items(self, self.forget_cuts(next_id))

    def interrupt(self) -> None:
        """Tell that what is inserted next does not follow upon what was inserted last.

        Another environment's items come, or some in between were lost. A store that knows
        episodes lets none go on across this; all tell their readers, by `Batch.cuts`.
        """
        with self.lock:
            self.take_cuts([0], self.latest_data_id() + 1)

    def forward_to(self, log: LoggedDataStore | None) -> None:
        """Have all that is inserted go into a log as well, in the same step.

        First the log gets what the store holds and it lacks. From then on both get an item, or
        neither: where the log has no room, the insert raises what the log's does, and where this
        store refuses an item, the log doesn't have it. What the log gets is what this store would
        hand out; a queue has handed it on then. The log is this store's alone.

        Args:
            log: None for none any more.
        """
        with self.lock:
            if self._forwarding is not None:
                self._forwarding.end()
                self._forwarding = None
            if log is not None:
                log.share_lock(self.lock)
                self._forwarding = Forwarding(self, log)
                self._forwarding.begin()

    @contextmanager
    def not_forwarding(self) -> Iterator[None]:
        """Fill the store with what it once had; its log gets what that lacks at the end."""
        with self.lock:
            forwarding = self._forwarding
            if forwarding is None:
                yield
                return
            self.forward_to(None)
            try:
                yield
            finally:
                self._forwarding = forwarding
                forwarding.begin()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled or copied.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"a {type(self).__name__} can't be pickled or copied: make it in the process that uses "
            "it. edgeml.data.checkpoint saves its items to a file and loads them"
        )

    # What implementations need for that ---------------------------------------------------------

    def take_cuts(self, cuts: Sequence[int], first_id: int) -> None:
        """Remember the cuts of a batch whose first item has, or will have, the id ``first_id``."""
        for cut in cuts:
            if first_id + cut > (self._cuts[-1] if self._cuts else 1):
                self._cuts.append(first_id + cut)

    def cuts_within(self, first_id: int, n: int) -> list[int]:
        """Positions of the n items from ``first_id`` on that don't follow upon the one before."""
        while self._cuts and self._cuts[0] <= self.latest_data_id() - self._cuts_kept:
            self._cuts.popleft()
        return [cut - first_id for cut in self._cuts if first_id <= cut < first_id + n]

    def number_lanes(self, batch: Batch, lane: Lane) -> tuple[Numbers, Sequence[int]]:
        """Return the numbers of the lanes of a batch's items, and the cuts that all lanes have.

        Args:
            batch: with ``lanes`` and ``cuts`` of the store that it comes from.
            lane: which of this store's it is for, or None.
        """
        return self._lanes.number(batch, lane), batch.cuts if lane is None else ()

    def take_lanes(self, numbers: Numbers, first_id: int, n: int) -> None:
        """Remember the lanes of n items, by their numbers, from ``first_id`` on."""
        self._lanes.note(first_id, n, numbers)

    def lanes_within(self, first_id: int, n: int) -> Array | None:
        """Return the numbers of the lanes of the n items from ``first_id`` on; None for all 0."""
        return self._lanes.within(first_id, n)

    def forget_cuts(self, next_id: int | None) -> int:
        """Forget all cuts and lanes, for `reset`; returns the id of the next item."""
        if next_id is not None and next_id < 1:
            raise ValueError(f"ids are from 1 on, got {next_id}")
        self._cuts.clear()
        self._lanes.clear()
        self._newest = None
        if next_id is not None:
            if next_id <= self.latest_data_id():
                self.numbering = Numbering()  # other items will have these ids
            return next_id
        DataStoreBase.interrupt(self)  # a reader has the items before
        return self.latest_data_id() + 1

    # What a checkpoint (edgeml.data.checkpoint) needs; these will do for a store whose items are
    # all that it knows.

    def state(self) -> Any:
        """Return what the store knows beyond its items, small: plain values and arrays."""
        with self.lock:
            state: dict[str, Any] = {"interrupted": self.latest_data_id() + 1 in self._cuts}
            return {**state, "lanes": self._lanes.state()} if self._lanes.are_used else state

    def set_state(self, state: Any) -> None:
        """Take up what `state` gave, after all items were restored."""
        if "lanes" in state:
            self._lanes.set_state(state["lanes"])
        if state["interrupted"]:
            self.interrupt()

    def check_restore(self, parts: Iterable[tuple[Batch, Any]], state: Any) -> None:
        """Raise what `restore`, with these parts, and `set_state` would, and change nothing.

        Who made them is not known. A store that can tell what it takes before it takes it says so
        here, so that a checkpoint that doesn't fit leaves it as it is.

        Args:
            parts: what `dump` gave, the oldest first; they follow upon each other.
            state: what `state` gave.
        """
        del parts
        if type(self).set_state is DataStoreBase.set_state:  # else it is a state of their own
            check_state(state)

    def dump(self, from_id: int, *, limit: int | None = None) -> tuple[Batch, Any]:
        """Return items as `get_latest_data` does, and what else the store knows of each.

        The latter is a value that a codec carries, such as a dict of arrays as long as the batch,
        or None.
        """
        return self.get_latest_data(from_id, limit=limit), None

    def restore(self, batch: Batch, extra: Any) -> None:
        """Insert what `dump` gave."""
        del extra
        self.batch_insert(batch)

    def release(self, up_to_id: int) -> None:
        """Tell that the items up to this id have reached their destination for good.

        A learner that saves checkpoints has them in one. Does nothing in a store that keeps its
        items, such as a replay buffer.
        """
        del up_to_id

    def mark_applied(self, up_to_id: int) -> None:
        """Tell that the items up to this id are with a learner that saves no checkpoints.

        Nothing surer will ever be told of them, so by default they are released. A store that has
        room to spare may keep them until it needs that, for a learner that starts anew.
        """
        self.release(up_to_id)

    def branch(self) -> None:
        """Number what comes next apart from what another store of this numbering goes on with."""
        self.numbering = self.numbering.branch(self.latest_data_id())


_stores: weakref.WeakValueDictionary[int, DataStoreBase] = weakref.WeakValueDictionary()
_made = itertools.count()


def _branch_all() -> None:
    """Let a forked child's stores go another way than the parent's."""
    for store in list(_stores.values()):
        store.branch()
        store.forward_to(None)  # the log is the parent's


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_branch_all)  # after the locks', which were imported first


def check_state(state: Any) -> None:
    """Raise where a store's state is not what `DataStoreBase.state` gives, with counts besides.

    Raises:
        KeyError, TypeError: it is something else.
    """
    if type(state["interrupted"]) is not bool:
        raise TypeError("a store is interrupted or not")
    for key in ("breaks", "stale"):
        if type(state.get(key, 0)) is not int:
            raise TypeError(f"{key!r} is a count")
    if "lanes" in state:
        Lanes.check_state(state["lanes"])


def check_random_state(rng: np.random.Generator, state: Any) -> None:
    """Raise what giving a generator that state would, and change nothing."""
    try:
        type(rng.bit_generator)().state = state
    except (ArithmeticError, LookupError, ValueError) as error:
        raise TypeError(f"the state of no random generator: {error}") from None
