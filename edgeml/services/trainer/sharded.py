"""A learner's stores in several servers, its shards, and batches that are drawn from all of them.

A batch is what one store with all items would give: each item of each shard comes with the same
probability (or, of prioritized stores, in proportion to its priority). How many come from each
shard is settled by *systematic sampling* (Madow & Madow 1944): n points, one apart, from a random
offset below one, over a line on which each shard has a stretch of its share times n. So each shard
gives its exact share, rounded up or down, and rounded at random such that in the mean it is exact.

The shares change while the learner samples. So each answer tells the shard's own at the moment of
the draw; the counts are worked out again from these, with the same offset, and what is too much of
one shard is left away, what is missing is asked for. Mostly nothing is.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from edgeml.core.deadline import Deadline
from edgeml.core.errors import (
    Closed,
    DeadlineExceeded,
    EdgemlError,
    Malformed,
    Overloaded,
    RemoteError,
    Unreachable,
    shown,
)
from edgeml.core.message import empty, private
from edgeml.core.owned import ClosedAtExit, Unpicklable
from edgeml.data.plans import check_size
from edgeml.data.prefetch import Prefetch
from edgeml.data.tree import Array, describe
from edgeml.services.base import ClientSettings, ServiceClient
from edgeml.services.trainer.config import TrainerConfig
from edgeml.services.trainer.sampling import SAMPLE, UPDATE_PRIORITIES

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ShardedLearner", "divide", "shard_of"]

_log = logging.getLogger(__name__)

_AWAY = (Unreachable, DeadlineExceeded, Overloaded, Closed)  # what it raises that gives nothing
_PAUSE = 0.25  # seconds between two looks whether a shard is back
_ROUND = 4 << 20  # bytes of batches that are drawn at a time; more of them gain nothing
_MARGIN = 1.0  # seconds that a future may be late, which has a deadline of its own
_SHARD_BIT = 48  # of the ids in batches: an item's own below, its shard's number from here on


def shard_of(client_id: str, shards: int) -> int:
    """Return the number, from 0, of the shard that a client's items belong to.

    It is the one for which a hash of the client's id and its own number is highest (rendezvous
    hashing, Thaler & Ravishankar 1998): the same one for ever, and in every process.
    """

    def weigh(number: int) -> bytes:
        return hashlib.blake2b(f"{number}/{client_id}".encode(), digest_size=8).digest()

    return max(range(shards), key=weigh)


def divide(n: int, masses: Array, offset: float) -> Array:
    """Return how many of n items each shard is to give, (shards,) int64, by systematic sampling.

    Args:
        n: how many.
        masses: of the shards, (shards,) float64, from 0 up; where all are 0, so is what they give.
        offset: from 0 up and below 1, drawn anew for each batch.
    """
    ends = np.cumsum(masses)
    if not len(ends) or not ends[-1]:
        return np.zeros(len(ends), np.int64)
    below = np.ceil(ends / ends[-1] * n - offset).astype(np.int64)
    below[ends == ends[-1]] = n  # whatever rounding made of it
    return np.diff(below, prepend=0)


class _Told(NamedTuple):
    """What a shard answers."""

    mass: float
    largest_weight: float | None
    batch: Any  # None, where it doesn't know what its items are like
    n: int  # items in it


_Choice = tuple[tuple[Any, ...] | None, bool]
"""The keys that are wanted, and whether stacks are packed."""


class _Shard(ServiceClient):
    """The learner's end of one shard.

    Attributes:
        number: its own, from 0.
        where: its URL, as it was given.
        mass: what its items' probabilities are shares of; 0 while it is away.
        largest_weight: see `PrioritizedReplayBuffer.largest_weight`; None without weights.
        why: it is away; None while it is there.
        counts: of items ``drawn`` for batches, and of batches ``missed``.
    """

    def __init__(
        self,
        number: int,
        where: str,
        store: str,
        config: TrainerConfig,
        **settings: Any,
    ) -> None:
        self.number = number
        self.where = where
        self.mass = 0.0
        self.largest_weight: float | None = None
        self.why: EdgemlError | None = None
        self.counts = {"drawn": 0, "missed": 0}
        self._store = store
        self._probe: Future[Any] | None = None
        self._next_probe = 0.0
        with self.naming():
            super().__init__("trainer", config, label="learner", url=where, **settings)

    def ask(self, n: int, choice: _Choice, timeout: float, alone: bool = False) -> Future[Any]:
        """Ask for n items; returns a future for `take`.

        Args:
            n: may be 0.
            choice: of what.
            timeout: seconds.
            alone: whether to wait for the answer right here, which spares two thread hops.
        """
        keys, pack = choice
        payload = {"store": self._store, "n": n, "keys": keys and list(keys), "pack": pack}
        if alone:
            return self._settled(lambda: self._client.call(SAMPLE, payload, timeout))
        return self._sent(SAMPLE, payload, timeout)

    def prioritise(self, ids: Array, priorities: Array, timeout: float) -> Future[Any]:
        """Send priorities of items; returns a future."""
        payload = {"store": self._store, "ids": ids, "priorities": priorities}
        return self._sent(UPDATE_PRIORITIES, payload, timeout)

    def _sent(self, name: str, payload: Any, timeout: float) -> Future[Any]:
        try:
            return self._client.call_async(name, payload, timeout)
        except EdgemlError as error:
            return self._settled(error)

    def _settled(self, outcome: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            if isinstance(outcome, EdgemlError):
                raise outcome
            done.set_result(outcome())
        except EdgemlError as error:
            done.set_exception(error)
        return done

    def take(self, answer: Future[Any], deadline: Deadline) -> _Told:
        """Wait for an answer, and note what it says of the shard.

        Raises:
            EdgemlError: whatever came in its place.
        """
        with self.naming():
            try:
                told = _parse(answer.result(deadline.left + _MARGIN))
            except FutureTimeout:
                if answer.done():  # from 3.11 on DeadlineExceeded is one as well
                    raise
                answer.cancel()
                raise DeadlineExceeded(f"no answer within {deadline.timeout:g} s") from None
        self.mass, self.largest_weight = told.mass, told.largest_weight
        return told

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Tell in errors which shard they are of; what it was asked for wrongly is a ValueError."""
        who = f"shard {self.number} at {self.where}"
        try:
            yield
        except Malformed as error:
            raise ValueError(f"{who}: {error}") from error
        except RemoteError as error:
            text = f"{who}: {error.message}"
            raise RemoteError(error.type_name, text, error.traceback) from error
        except EdgemlError as error:
            raise type(error)(f"{who}: {error}") from error

    def mark(self, part: _Told, batch: dict[Any, Any], to: slice, highest: float) -> None:
        """Make ids and weights those of an item of all shards, in a part of a batch.

        Args:
            part: that they came with.
            batch: that they are in.
            to: where.
            highest: the largest weight that an item of any shard has.
        """
        if part.largest_weight is None:
            return
        if "ids" in batch:
            batch["ids"][to] |= self.number << _SHARD_BIT
        if "weights" in batch and highest:
            batch["weights"][to] *= min(1.0, part.largest_weight / highest)

    def leave(self, error: EdgemlError) -> None:
        """Note that it is away, and why."""
        self.mass, self.why = 0.0, error
        self._next_probe = time.monotonic() + _PAUSE

    def look(self, timeout: float) -> bool:
        """Look whether it is back, without waiting; returns whether it is."""
        if self._probe is None and time.monotonic() >= self._next_probe:
            self._probe = self.ask(0, (None, False), timeout)
        if self._probe is None or not self._probe.done():
            return False
        probe, self._probe = self._probe, None
        try:
            self.take(probe, Deadline(0.0))
        except EdgemlError as error:
            self.leave(error)
            return False
        self.why = None
        return True

    @property
    def probe(self) -> Future[Any] | None:
        """What `look` waits for."""
        return self._probe


class ShardedLearner(ClosedAtExit, Unpicklable):
    """Draws batches from the stores of several servers as from one, all of them at once.

    ::

        shards = ["zmq://10.0.0.1:5555", "zmq://10.0.0.2:5555"]
        with ShardedLearner("robot", shards, config) as learner:
            batch = learner.sample(256)

    Each server is a `TrainerServer` with a store of that name, a `ReplayBuffer` or one like it, for
    which `TrainerServer.serve_samples` was called. Each item of all shards comes with the same
    probability, or that of its priority: each shard gives its exact share of a batch, rounded at
    random, as of the moment of the draw, whatever actors insert meanwhile. A `Mixture` takes this
    for a source.

    **While a shard is away** (killed, loading, or without an answer in time) batches are drawn from
    the others, so that learning goes on; the log says when one goes and when it is back, and
    `stats` counts the batches that each has missed. Where all are away, `sample` waits for one
    within its time, and then raises.

    Args:
        name: of the store.
        urls: of each shard the URL, or several separated by commas. The order counts for the
            ``ids`` of prioritized stores only.
        config: the shards' `TrainerConfig`.
        timeout: seconds that connecting, or a batch, may take.
        wait_for_server: wait until each shard answers and is ready, for 600 s or the number of
            seconds given.
        seed: of how shares are rounded; the shards' stores draw by their own.
        settings: ``client_id``, ``codec``, ``images``, ``credentials`` and the like, of all
            connections: see `ServiceClient`.

    Raises:
        ValueError: there are no URLs, or they are no addresses.
        Unreachable: a shard doesn't answer; the text says which.
        ConfigMismatch: a shard is configured differently.
    """

    def __init__(
        self,
        name: str,
        urls: Sequence[str],
        config: TrainerConfig,
        *,
        timeout: float = 10.0,
        wait_for_server: bool | float = False,
        seed: int | None = None,
        **settings: Unpack[ClientSettings],
    ) -> None:
        if isinstance(urls, str) or not urls:
            raise ValueError(f"urls is a list of each shard's URL, not {urls!r}")
        self._timeout = timeout
        self._rng = np.random.default_rng(seed)
        self._lock = threading.Lock()
        self._rows: dict[_Choice, Any] = {}  # batches of no items, which tell shapes and dtypes
        self._batches = self._priorities_lost = 0
        self._stopped = False
        self._shards: list[_Shard] = []
        options: dict[str, Any] = {**settings, "wait_for_server": wait_for_server}
        try:
            for url in urls:
                number = len(self._shards)
                self._shards.append(_Shard(number, url, name, config, timeout=timeout, **options))
        except BaseException:
            self.stop()
            raise

    def sample(
        self,
        batch_size: int,
        *,
        keys: Iterable[Any] | None = None,
        out: dict[Any, Any] | None = None,
        pack_obs_and_next_obs: bool = False,
    ) -> dict[Any, Any]:
        """Draw items of all shards with replacement; see `ReplayBuffer.sample`.

        Those of the first shard come first: where a batch is cut into several, shuffle it. Its
        arrays are private copies.

        Raises:
            TypeError: batch_size is no integer.
            ValueError: it is below 1; all shards are empty, or don't agree on what items are like;
                an unknown key; ``out`` doesn't fit; the store can't be sampled, or not packed.
            Unreachable: all shards are away; the text says why each is.
            UnknownInterface: a shard has no such store, or doesn't serve samples.
            PermissionDenied, RemoteError, ConfigMismatch: as a shard says, with which one.
            Closed: this has been stopped.
        """
        choice = _check_choice(keys, pack_obs_and_next_obs)
        return self._sample(check_size(batch_size), choice, [out])[0]

    def empty_batch(
        self,
        batch_size: int,
        keys: Iterable[Any] | None = None,
        *,
        pack_obs_and_next_obs: bool = False,
    ) -> dict[Any, Any]:
        """Return a batch as `sample` gives it, with anything in it, for its ``out``.

        Raises:
            As `sample`.
        """
        choice = _check_choice(keys, pack_obs_and_next_obs)
        with self._lock:
            if choice not in self._rows:
                self._ask(np.zeros(len(self._shards), np.int64), choice, Deadline(self._timeout))
            if choice not in self._rows:
                raise ValueError("can't sample from shards that are all empty")
            batch: dict[Any, Any] = _make(self._rows[choice], check_size(batch_size))
            return batch

    def prefetch(
        self,
        batch_size: int,
        *,
        device: Any = None,
        depth: int = 2,
        keys: Any = None,
        pack_obs_and_next_obs: bool = False,
    ) -> Prefetch[dict[Any, Any]]:
        """Return an endless iterator of samples drawn ahead; see `ReplayBuffer.prefetch`.

        Small ones are drawn ``depth`` at a time, as a question to each shard costs more than a few
        items more; so up to twice ``depth`` are ready.
        """
        choice = _check_choice(keys, pack_obs_and_next_obs)
        batch_size, ready = check_size(batch_size), list[dict[Any, Any]]()

        def sample() -> dict[Any, Any]:
            if not ready:
                rows = self._rows.get(choice)
                size = _ROUND if rows is None else batch_size * _nbytes_of_item(rows)
                together = max(1, min(depth, _ROUND // max(1, size)))
                ready.extend(self._sample(batch_size, choice, [None] * together))
            return ready.pop()

        return Prefetch(sample, device=device, depth=depth)

    def update_priorities(self, ids: ArrayLike, priorities: ArrayLike) -> None:
        """Give items of prioritized stores new priorities, each in its shard.

        Those for a shard that is away are counted in `stats`, and lost; those of items that it
        holds no more are counted there.

        Args:
            ids: shape (n,), as a sample has them.
            priorities: shape (n,), from 0 up.

        Raises:
            ValueError: see `PrioritizedReplayBuffer.update_priorities`; other shards may have
                theirs.
            PermissionDenied, RemoteError: as a shard says, with which one.
            Closed: this has been stopped.
        """
        ids, priorities = np.asarray(ids), np.asarray(priorities, np.float64)
        if ids.ndim != 1 or ids.shape != priorities.shape:
            raise ValueError(
                f"ids and priorities of one length, got {ids.shape}, {priorities.shape}"
            )
        if ids.dtype.kind not in "iu":
            raise ValueError(f"ids are whole numbers, got {ids.dtype}")
        ids = ids.astype(np.int64, copy=False)
        numbers = ids >> _SHARD_BIT
        if len(ids) and not 0 <= numbers.min() <= numbers.max() < len(self._shards):
            raise ValueError("these ids are of no shard: take those of a sample")
        deadline = Deadline(self._timeout)
        sent = []
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            own = ids[mine] & (1 << _SHARD_BIT) - 1
            answer = self._shards[number].prioritise(own, priorities[mine], deadline.left)
            sent.append((number, len(own), answer))
        for number, n, answer in sent:
            try:
                with self._shards[number].naming():
                    answer.result(deadline.left + _MARGIN)
            except (*_AWAY, FutureTimeout):
                self._check_open()
                self._priorities_lost += n

    def stats(self) -> dict[str, Any]:
        """Counts since the start: ``batches``, ``priorities_lost`` as their shard was away, and
        ``shards``: of each, in order, its ``url``, whether it is ``there`` or else ``why`` it
        isn't, how many items were ``drawn`` from it for batches, and how many batches have
        ``missed`` it because it was away.
        """
        shards = [
            {
                "url": shard.where,
                "there": shard.why is None,
                "why": "" if shard.why is None else str(shard.why),
                **shard.counts,
            }
            for shard in self._shards
        ]
        lost = self._priorities_lost
        return {"batches": self._batches, "priorities_lost": lost, "shards": shards}

    def stop(self) -> None:
        """Close all connections; idempotent."""
        self._stopped = True
        for shard in self._shards:
            shard.stop()

    def _leave(self) -> None:
        self.stop()

    # Within --------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._stopped:
            raise Closed("this learner has been stopped")

    def _sample(
        self, n: int, choice: _Choice, outs: Sequence[dict[Any, Any] | None]
    ) -> list[dict[Any, Any]]:
        """Draw several batches of n items, into those that are given; each has its exact shares."""
        with self._lock:
            drawn, want = self._draw(n * len(outs), choice)
            rows = self._rows[choice]
            batches = [_make(rows, n) if out is None else out for out in outs]
            highest = max((s.largest_weight or 0.0 for s in self._shards if s.mass), default=0.0)
            at = 0
            for shard, parts, wanted in zip(self._shards, drawn, want, strict=True):
                end = at + wanted
                for part in parts:
                    taken = min(part.n, end - at)
                    # Of all items that are drawn, each batch gets one in turn.
                    for number, batch in enumerate(batches):
                        skip = (number - at) % len(batches)
                        source = slice(skip, taken, len(batches))
                        first = (at + skip) // len(batches)
                        to = slice(first, first + len(range(taken)[source]))
                        if to.start < to.stop:
                            _copy(part.batch, batch, source, to, n, f"shard {shard.number}: batch")
                            shard.mark(part, batch, to, highest)
                    at += taken
                shard.counts["drawn"] += wanted
                shard.counts["missed"] += len(outs) if shard.why is not None else 0
            self._batches += len(outs)
        return batches

    def _draw(self, n: int, choice: _Choice) -> tuple[list[list[_Told]], list[int]]:
        """Draw from all shards; returns what each gave, and how many items of that are wanted."""
        deadline = Deadline(self._timeout)
        offset = float(self._rng.random())
        drawn: list[list[_Told]] = [[] for _ in self._shards]
        held = np.zeros(len(self._shards), np.int64)
        asked = False
        while True:
            self._find_there(deadline)
            want = divide(n, self._masses(), offset)
            missing = np.maximum(want - held, 0)
            if asked and not missing.any():
                if not want.any():
                    raise ValueError("can't sample from shards that are all empty")
                return drawn, want.tolist()
            for number, told in self._ask(missing, choice, deadline, some=asked):
                drawn[number].append(told)
                held[number] += told.n
            asked = True

    def _masses(self) -> Array:
        return np.array([shard.mass for shard in self._shards], np.float64)

    def _ask(
        self, wanted: Array, choice: _Choice, deadline: Deadline, some: bool = False
    ) -> list[tuple[int, _Told]]:
        """Ask the shards that are there, or ``some``: those of which any items are wanted."""
        there = [
            (number, shard)
            for number, shard in enumerate(self._shards)
            if shard.why is None and (wanted[number] or not some)
        ]
        if not deadline.left:
            raise DeadlineExceeded(f"no batch within {deadline.timeout:g} s")
        answers = [
            shard.ask(int(wanted[number]), choice, deadline.left, alone=shard is there[-1][1])
            for number, shard in there
        ]
        told = []
        for (number, shard), answer in zip(there, answers, strict=True):
            try:
                each = shard.take(answer, deadline)
            except _AWAY as error:
                self._check_open()
                shard.leave(error)
                _log.warning("%s: batches are drawn without it until it is back", error)
                continue
            told.append((number, each))
            if each.batch is not None and choice not in self._rows:
                self._rows[choice] = _first_rows(each.batch)
        return told

    def _find_there(self, deadline: Deadline) -> None:
        """Look which shards are back, and wait for one where none is there."""
        while True:
            self._check_open()
            for number, shard in enumerate(self._shards):
                if shard.why is not None and shard.look(self._timeout):
                    missed = shard.counts["missed"]
                    _log.warning(
                        "shard %d at %s is back; %d batches have been drawn without it",
                        *(number, shard.where, missed),
                    )
            if any(shard.why is None for shard in self._shards):
                return
            if not deadline.left:
                each = "; ".join(f"{shard.why}" for shard in self._shards)
                raise Unreachable(f"no shard answers within {deadline.timeout:g} s: {each}")
            probes = [shard.probe for shard in self._shards if shard.probe is not None]
            pause = min(deadline.left, _PAUSE)
            if probes:
                wait_for(probes, pause, FIRST_COMPLETED)
            else:
                time.sleep(pause)


def _check_choice(keys: Iterable[Any] | None, pack: bool) -> _Choice:
    if isinstance(keys, str):
        raise ValueError(f"keys are a list of keys, got {keys!r}")
    return None if keys is None else tuple(keys), bool(pack)


def _parse(answer: Any) -> _Told:
    """Read an answer, whoever gave it."""
    match answer:
        case {
            "mass": float(mass),
            "largest_weight": float() | None as largest,
            "batch": dict() | None as batch,
        } if 0 <= mass < np.inf and (largest is None or 0 <= largest < np.inf):
            lengths = {len(array) for array in _leaves(batch)} if batch else {0}
            if len(lengths) == 1:
                return _Told(mass, largest, batch, lengths.pop())
    raise Malformed(f"an answer to a sample has a mass and a batch, not {shown(answer)}")


def _leaves(batch: Any) -> Iterable[Array]:
    if isinstance(batch, dict):
        for child in batch.values():
            yield from _leaves(child)
    elif isinstance(batch, np.ndarray) and batch.ndim:
        yield batch
    else:
        raise Malformed(f"a batch has arrays, not {shown(batch)}")


def _first_rows(batch: Any) -> Any:
    """Return what tells a batch's shapes and dtypes, and keeps nothing of it."""
    if isinstance(batch, dict):
        return {key: _first_rows(child) for key, child in batch.items()}
    return np.empty((0, *batch.shape[1:]), batch.dtype)


def _nbytes_of_item(rows: Any) -> int:
    if isinstance(rows, dict):
        return sum(map(_nbytes_of_item, rows.values()))
    return int(rows.dtype.itemsize * math.prod(rows.shape[1:]))


def _make(rows: Any, n: int) -> Any:
    if isinstance(rows, dict):
        return {key: _make(child, n) for key, child in rows.items()}
    return empty(private, (n, *rows.shape[1:]), rows.dtype)


def _copy(part: Any, batch: Any, source: slice, to: slice, n: int, path: str) -> None:
    """Copy items of what a shard gave to where they go in a batch of n.

    Raises:
        ValueError: they don't fit.
    """
    if isinstance(batch, dict):
        if not isinstance(part, dict) or part.keys() != batch.keys():
            raise ValueError(f"{path}: expected {describe(batch)}, got {describe(part)}")
        for key, child in batch.items():
            _copy(part[key], child, source, to, n, f"{path}[{key!r}]")
        return
    if not isinstance(batch, np.ndarray) or len(batch) != n:
        raise ValueError(f"{path}: out has {describe(batch)} for {n} items")
    if not isinstance(part, np.ndarray) or (part.shape[1:], part.dtype) != (
        batch.shape[1:],
        batch.dtype,
    ):
        raise ValueError(f"{path}: expected items like {describe(batch)}, got {describe(part)}")
    batch[to] = part[source]
