"""What a server of stores does for a learner elsewhere, which draws from them: see `sharded`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edgeml.core.dispatch import Call
from edgeml.core.errors import Malformed
from edgeml.core.message import Allocator, empty, pooled
from edgeml.data import DataStoreBase
from edgeml.data.tree import nbytes_of

__all__ = ["SAMPLE", "UPDATE_PRIORITIES", "Sampling"]

SAMPLE, UPDATE_PRIORITIES = "sample", "update_priorities"
"""The interfaces, for which a key needs the permission ``call``."""

_MOST_CHOICES = 64  # of keys, that are remembered
_MOST_BYTES = 1 << 30  # of a sample
_LARGE = 1 << 16  # bytes; smaller arrays lie in the message's header, or gain nothing

_Choice = tuple[str, frozenset[Any] | None, bool]


class Sampling:
    """Answers samples: as columns, written where they are sent from, so that nothing is copied.

    Args:
        find: gives the store of a name, or raises UnknownInterface.
        allocate: gives memory that the transport sends from, where it has such.

    Attributes:
        counts: ``items_sampled``, and ``priorities_stale`` whose items are not held any more.
    """

    def __init__(self, find: Callable[[str], DataStoreBase], allocate: Allocator) -> None:
        self.counts: Counter[str] = Counter()
        self._find = find
        self._allocate = allocate
        self._rows: dict[_Choice, Any] = {}  # a batch of one item, which tells shapes and dtypes

    def sample(self, call: Call) -> None:
        """Draw items, and tell what share of them all there is here.

        The answer is a dict of ``mass`` (see `ReplayBuffer.mass`) at the moment of the draw; the
        ``batch`` (see `ReplayBuffer.sample`), of no items where none were asked for or none are
        held, and None where it isn't known what they are like; and the store's
        ``largest_weight``, None where the batch has no weights.
        """
        match call.payload():
            case {
                "store": str(name),
                "n": int(n),
                "keys": list() | None as keys,
                "pack": bool(pack),
            }:
                call.detail = repr(name)
            case _:
                raise Malformed("sample takes a store, a number of items, keys and whether to pack")
        if n < 0:
            raise Malformed(f"a sample has a number of items from 0 up, not {n}")
        store: Any = self._find(name)
        if not hasattr(store, "sample") or not hasattr(store, "empty_batch"):
            raise Malformed(
                f"the store {name!r} is a {type(store).__name__}, from which nothing can be sampled"
            )
        options: dict[str, Any] = {"pack_obs_and_next_obs": True} if pack else {}
        # What is drawn, and the share that it is of, are of one moment.
        with store.lock:
            mass = float(getattr(store, "mass", len(store)))
            largest = getattr(store, "largest_weight", None)
            try:
                choice = name, None if keys is None else frozenset(keys), pack
                row = self._row(store, choice, options)
                if row is not None and n * nbytes_of(row) > _MOST_BYTES:
                    raise ValueError(
                        f"{n} items of {nbytes_of(row)} bytes are more than the {_MOST_BYTES} that "
                        "a sample may have: ask for fewer at a time"
                    )
                keys = None if keys is None or row is None else list(row)
                if row is None or not n or not mass:
                    batch = None if row is None else _map(lambda array: array[:0], row)
                else:
                    batch = self._draw(store, n, row, {**options, "keys": keys})
                    self.counts["items_sampled"] += n
            except (TypeError, ValueError) as error:  # of what was asked for
                raise Malformed(str(error)) from error
        call.answer({"mass": mass, "largest_weight": largest, "batch": batch})

    def update_priorities(self, call: Call) -> None:
        """Give items new priorities; those of items that are not here any more are counted."""
        match call.payload():
            case {"store": str(name), "ids": np.ndarray() as ids, "priorities": priorities}:
                call.detail = repr(name)
            case _:
                raise Malformed("update_priorities takes a store, ids and priorities")
        store: Any = self._find(name)
        if not hasattr(store, "update_priorities"):
            raise Malformed(f"the store {name!r} is a {type(store).__name__} without priorities")
        try:
            with store.lock:
                # A store that was restored may not have come as far again as it was.
                there = ids <= store.latest_data_id()
                self.counts["priorities_stale"] += len(ids) - int(np.count_nonzero(there))
                store.update_priorities(ids[there], np.asarray(priorities)[there])
        except (IndexError, TypeError, ValueError) as error:
            raise Malformed(str(error)) from error
        call.answer(None)

    def _row(self, store: Any, choice: _Choice, options: Mapping[str, Any]) -> Any:
        """A batch of one item, with anything in it, or None while nothing is known of them.

        Raises:
            ValueError: there are no such keys, or nothing to pack, or too many choices.
        """
        row = self._rows.get(choice)
        if row is None and not (getattr(store, "learns", False) and not len(store)):
            if len(self._rows) >= _MOST_CHOICES:
                raise ValueError(
                    f"{_MOST_CHOICES} different choices of keys were asked for: use one of them"
                )
            wanted = choice[1]
            keys = None if wanted is None else list(wanted)
            if keys is not None and wanted is not None:
                # In the order of the items' own, so that each choice is one to the store.
                own = [key for key in store.empty_batch(1) if key in wanted]
                keys = own + [key for key in keys if key not in own]
            row = self._rows[choice] = store.empty_batch(1, keys, **options)
        return row

    def _draw(self, store: Any, n: int, row: Any, options: Mapping[str, Any]) -> Any:
        """Draw items, to where they are sent from where that is worth it."""
        if n * nbytes_of(row) < _LARGE:
            return store.sample(n, **options)
        batch = _map(lambda array: self._empty(n, array), row)
        return store.sample(n, out=batch, **options)

    def _empty(self, n: int, row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        shape = (n, *row.shape[1:])
        if n * row.nbytes < _LARGE:
            return np.empty(shape, row.dtype)
        place = self._allocate(n * row.nbytes)
        return empty(pooled if place is None else lambda _: place, shape, row.dtype)


def _map(function: Callable[[Any], Any], batch: Any) -> Any:
    """Return a batch with something else for each array."""
    if isinstance(batch, dict):
        return {key: _map(function, child) for key, child in batch.items()}
    return function(batch)
