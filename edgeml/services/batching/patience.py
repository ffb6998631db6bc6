"""When it pays to wait for clients that were just answered, learned from what has been seen.

Clients in a closed loop come back soon after their answer. Those of one batch come back just too
late for the next, so there are two groups that take turns; where a batch costs the same at any
size, that halves the rate. But where it costs more for each row, the way there and back of one
group is hidden behind the batch of the other. So what a batch of each size costs is measured, and
how soon each client comes back. Of n calls, those that wait and those that are about to come back:

- all in one batch take ``cost(n) + pace``, the slowest one's time from answer to next call,
- two groups of a and n - a take ``cost(a) + cost(n - a)``.

The next batch waits for the others where the first is less. A lone client waits for nobody by this,
and neither does one beside clients that come now and then.
"""

from __future__ import annotations

import time
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable

from edgeml.core.dispatch import Caller

__all__ = ["Costs", "Patience"]

_OLD = 256  # batches after which a cost that was not seen again is forgotten
_AWAY = 1.0  # seconds after an answer from which on a client is not expected to come back soon


class Costs:
    """Seconds that a batch takes, by its size."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, int]] = {}  # seconds, and when
        self._met: set[int] = set()
        self._sizes: list[int] = []
        self._count = 0

    def add(self, size: int, seconds: float) -> None:
        """Learn from a batch; not from the first of a size, which may have been compiled."""
        self._count += 1
        if size not in self._met:
            self._met.add(size)
            return
        before = self._seen.get(size)
        if before is not None:
            # Quickly down, and slowly up, as a busy machine makes some batches look long.
            seconds = before[0] + (seconds - before[0]) * (0.5 if seconds < before[0] else 0.1)
        self._seen[size] = seconds, self._count
        old = [s for s, (_, when) in self._seen.items() if when < self._count - _OLD]
        for forgotten in old:
            del self._seen[forgotten]
        if before is None or old:
            self._sizes = sorted(self._seen)

    def of(self, size: int) -> float:
        """Return what a batch of this size will take.

        Between two sizes in proportion; beyond those known the same as the nearest, so that a
        size which may be better is tried. 0.0 where nothing is known.
        """
        if size <= 0 or not self._sizes:
            return 0.0
        seen = self._seen.get(size)
        if seen is not None:
            return seen[0]
        at = bisect_left(self._sizes, size)
        if at == 0 or at == len(self._sizes):
            return self._seen[self._sizes[max(0, at - 1)]][0]
        low, high = self._sizes[at - 1 : at + 1]
        first, second = self._seen[low][0], self._seen[high][0]
        return first + (second - first) * (size - low) / (high - low)


class Patience:
    """Says how many more calls the next batch should wait for, and until when.

    Not thread-safe: its owner has a lock.

    Args:
        cost: what a batch of so many calls takes, in seconds.
    """

    def __init__(self, cost: Callable[[int], float]) -> None:
        self._cost = cost
        self._paces: weakref.WeakKeyDictionary[Caller, float] = weakref.WeakKeyDictionary()
        self._away: dict[Caller, float] = {}  # when they were answered, with no call since
        self.wanted = 0
        """Calls that are to be waiting before the next batch begins."""
        self.until = 0.0
        """When to wait no longer, on the clock `time.monotonic`."""

    def arrive(self, caller: Caller, now: float) -> None:
        """Learn that a client calls."""
        answered = self._away.pop(caller, None)
        if answered is not None:
            pace = now - answered
            before = self._paces.get(caller)
            self._paces[caller] = pace if before is None else (before + pace) / 2

    def expects_more(self, now: float) -> bool:
        """Whether some client may call while a batch runs."""
        return any(now - answered < _AWAY for answered in self._away.values())

    def decide(self, answered: Iterable[Caller], waiting: int, most: int) -> None:
        """Set `wanted` and `until` at the end of a batch.

        Args:
            answered: whose calls were in it, and who have none waiting.
            waiting: calls that wait now.
            most: calls in a batch.
        """
        now = time.monotonic()
        if len(self._away) > 4 * most:  # who has left would stay for ever
            self._away = {c: when for c, when in self._away.items() if now - when < _AWAY}
        paces = []
        for caller in answered:
            self._away[caller] = now
            pace = self._paces.get(caller)
            if pace is not None and pace < _AWAY:
                paces.append(pace)
        self.wanted, self.until = 0, now
        if not paces or waiting >= most:
            return
        cost = self._cost
        # Whoever comes later than two batches from now is no part of this.
        late = 2 * cost(min(most, waiting + len(paces)))
        paces = sorted(pace for pace in paces if pace < late)[: most - waiting]
        together = waiting + len(paces)
        if not paces or together < 2:
            return
        all_at_once = cost(together) + paces[-1]
        first, in_turns = min(
            ((a, cost(a) + cost(together - a)) for a in range(1, together)),
            # Of those that cost the same, groups that are most alike.
            key=lambda split: (split[1], abs(2 * split[0] - together)),
        )
        if all_at_once < in_turns:
            self.wanted = together
            # Somebody may be late, which is still worth some of what there is to win.
            gain = min(in_turns - all_at_once, cost(together))
            self.until = now + paces[-1] + gain / 2
        elif not waiting:
            self.wanted = first
            self.until = now + paces[first - 1]
