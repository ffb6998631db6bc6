"""Lanes: the sequences of items that several sources, each with its own episodes, put into a store.

Several actors upload to one store, or one actor has several environments. What one of them sends
follows upon what it sent before, whatever came in between from others.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from edgeml.core.errors import shown
from edgeml.data.batch import MOST_LANES, Batch
from edgeml.data.tree import Array

__all__ = ["Lane", "Lanes", "Numbers", "slot_of"]

Lane: TypeAlias = "str | int | None"
"""What an insert calls its lane: a client's id, an environment's number; None for no other's."""

Numbers: TypeAlias = "int | Array"
"""Lanes' numbers, of each item, (n,) int64, or of all."""

_MOST_NUMBER = 1 << 53


class Lanes:
    """The lanes of a store: which are open, and which the newest items are of.

    A lane is known by a *source*, which is what an insert calls it, and a *part*: the number that
    the lane had in the store that the items come from, 0 where that knew none. Here it has a
    number of its own, which is never given to another: what comes after an interruption is a
    lane anew, with another number. So numbers, and cuts, tell a reader all. 0 is the lane of what
    is inserted without one.

    `MOST_LANES` are remembered. Who opens more gives up the one used longest ago by the source
    that has the most of them, so that nobody pushes out the others'. Nothing here takes a lock.

    Attributes:
        kept: for how many items back their lanes are known.
        given_up: how many lanes were given up to make room.
    """

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self.given_up = 0
        self._open: OrderedDict[Lane, OrderedDict[int, int]] = OrderedDict()
        self._fresh = 1  # the next slot that was never used
        self._free: deque[int] = deque()  # the last numbers of slots that are free again
        self._of: Array | None = None  # of each of the newest items, once there are lanes

    @property
    def are_used(self) -> bool:
        """Whether anything was ever inserted with a lane."""
        return self._of is not None

    def find(self, source: Lane, part: int = 0) -> int:
        """Return the number of a lane, which is opened where it isn't.

        Raises:
            TypeError: a source that is no text or integer.
        """
        if source is None and not part:
            return 0
        parts = self._open.get(source)
        if parts is None:
            if not isinstance(source, (str, int, type(None))):
                raise TypeError(f"a lane is a text or an integer, got {shown(source, 40)}")
            parts = self._open[source] = OrderedDict()
        self._open.move_to_end(source)
        number = parts.get(part)
        if number is None:
            number = parts[part] = self._take_number()
        parts.move_to_end(part)
        return number

    def number(self, batch: Batch, source: Lane) -> Numbers:
        """Return the lanes' numbers of a batch's items; its cuts end lanes of its source only.

        But where no source is given: cuts are all lanes' then, and for the caller to note.
        """
        cuts = batch.cuts if source is not None else ()
        if not cuts:
            return self._number(batch.lanes, source)
        numbers = np.empty(len(batch), np.int64)
        for place, (first, end) in enumerate(pairwise((0, *cuts, len(batch)))):
            if place:
                self.close(source)
            if first < end:
                lanes = None if batch.lanes is None else batch.lanes[first:end]
                numbers[first:end] = self._number(lanes, source)
        return numbers

    def _number(self, lanes: Array | None, source: Lane) -> Numbers:
        if lanes is None:
            return self.find(source)
        parts, places = np.unique(lanes, return_inverse=True)
        numbers = [self.find(source, part) for part in parts.tolist()]
        return np.array(numbers, np.int64)[places] if len(numbers) > 1 else numbers[0]

    def numbers_of(self, source: Lane) -> list[int]:
        """Return the numbers of a source's lanes that are open."""
        return list(self._open.get(source, {}).values())

    def is_open(self, number: int) -> bool:
        """Return whether items may still come in the lane of this number."""
        return not number or any(number in parts.values() for parts in self._open.values())

    def close(self, source: Lane) -> list[int]:
        """Let what comes next of a source follow upon nothing; returns its lanes' numbers."""
        numbers = self.numbers_of(source)
        self._open.pop(source, None)
        self._free += numbers
        return numbers

    def clear(self) -> None:
        """Close all lanes, and forget those of all items."""
        while self._open:
            self.close(next(iter(self._open)))
        self._of = None if self._of is None else np.zeros_like(self._of)

    def _take_number(self) -> int:
        if self._fresh < MOST_LANES:
            self._fresh += 1
            return self._fresh - 1
        if not self._free:
            parts = max(self._open.values(), key=len)
            self._free.append(parts.popitem(last=False)[1])
            self.given_up += 1
        # The same slot, see `slot_of`.
        return self._free.popleft() + MOST_LANES

    def note(self, first_id: int, n: int, numbers: Numbers) -> None:
        """Remember the lanes of n items."""
        if self._of is None:
            if isinstance(numbers, int) and not numbers:
                return
            self._of = np.zeros(self.kept, np.int64)
        if n > self.kept:
            first_id, n = first_id + n - self.kept, self.kept
            numbers = numbers if isinstance(numbers, int) else numbers[-n:]
        start = (first_id - 1) % self.kept
        before_end = min(n, self.kept - start)
        if isinstance(numbers, int):
            self._of[start : start + before_end] = self._of[: n - before_end] = numbers
        else:
            self._of[start : start + before_end] = numbers[:before_end]
            self._of[: n - before_end] = numbers[before_end:]

    def within(self, first_id: int, n: int) -> Array | None:
        """Return the numbers of n items' lanes, (n,) int64; None where all are 0."""
        if self._of is None or not n:
            return None
        numbers = self._of[np.arange(first_id - 1, first_id - 1 + n) % self.kept]
        return numbers if numbers.any() else None

    # What checkpoints need ------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return which lanes are open, as plain values."""
        opened = [
            [source, part, number]
            for source, parts in self._open.items()
            for part, number in parts.items()
        ]
        return {"open": opened, "fresh": self._fresh, "free": [*self._free], "gone": self.given_up}

    def set_state(self, state: Any) -> None:
        """Take up what `state` gave; the items' lanes stay as they are."""
        self.check_state(state)
        self._open.clear()
        for source, part, number in state["open"]:
            self._open.setdefault(source, OrderedDict())[part] = number
        self._fresh, self._free = state["fresh"], deque(state["free"])
        self.given_up = state["gone"]

    @staticmethod
    def check_state(state: Any) -> None:
        """Raise where `set_state` is not to be given this, whoever made it.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        opened, free = state["open"], state["free"]
        known = [number for _, _, number in opened] + list(free)
        if not all(isinstance(source, (str, int, type(None))) for source, _, _ in opened):
            raise TypeError("a lane's source is a text or an integer")
        if not state["fresh"] <= MOST_LANES:
            raise ValueError(f"there are {MOST_LANES} lanes at most")
        counts = [part for _, part, _ in opened] + [state["fresh"], state["gone"], *known]
        if not all(type(count) is int and 0 <= count < _MOST_NUMBER for count in counts):
            raise TypeError("a lane has numbers")
        slots = set(map(slot_of, known))
        if len(slots) < len(known) or slots - set(range(1, state["fresh"])):
            raise ValueError("lanes share their numbers")


def slot_of(number: Any) -> Any:
    """Return a number below `MOST_LANES` that of all open lanes only this one has; or of many."""
    return number % MOST_LANES
