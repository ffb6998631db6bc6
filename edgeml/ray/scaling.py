"""How many replicas there are to be: a rule without a clock, threads or Ray."""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean, median

from edgeml.ray.deployment import Autoscale

__all__ = ["Scaling"]

_SLACK = 1e-6  # of sums of fractions


class Scaling:
    """Decides by how many calls waited, and how busy the replicas were, of late.

    What waits tells that there are too few, but nothing of whether there are too many: of a
    deployment that just keeps up nothing waits. So for fewer the replicas' time decides as well:
    as busy as one fewer would be, half of what may wait would wait at most. Of calls that come at
    random, ``b ** 2 / (1 - b)`` wait for a server that is busy for the part ``b`` of its time
    (M/M/1). So a steady load doesn't have replicas come and go.

    Args:
        bounds: see `Autoscale`.
    """

    def __init__(self, bounds: Autoscale) -> None:
        self.bounds = bounds
        half = bounds.waiting / 2
        self._busiest = (math.sqrt(half * half + 4 * half) - half) / 2
        self._seen: deque[tuple[float, int, int]] = deque()

    def decide(self, wanted: int, ready: int, waiting: int, running: int, now: float) -> int:
        """Note what there is now, and return how many replicas are wanted from now on.

        Args:
            wanted: replicas until now.
            ready: those of them that answer calls.
            waiting: calls that wait, in all.
            running: replicas that are at a call.
            now: seconds on any clock.
        """
        bounds = self.bounds
        decided = bounds.within(wanted)
        if ready != wanted:  # what has been decided is not so yet
            self._seen.clear()
            return decided
        self._seen.append((now, waiting, running))
        # One that is older than anybody asks is kept, for it tells that all is known since.
        since = now - max(bounds.up_after, bounds.down_after)
        while len(self._seen) > 1 and self._seen[1][0] <= since:
            self._seen.popleft()
        if late := self._over(bounds.up_after, now):
            waited = median(each[1] for each in late)  # of which a burst is not much
            if waited > bounds.waiting * wanted:
                busy = median(each[2] for each in late)
                decided = bounds.within(max(wanted + 1, self._fewest(waited, busy)))
        if late := self._over(bounds.down_after, now):
            waited, busy = fmean(each[1] for each in late), fmean(each[2] for each in late)
            fewest = max(self._fewest(waited, busy), math.ceil(busy / self._busiest - _SLACK))
            if fewest < wanted:
                decided = bounds.within(wanted - 1)
        if decided != wanted:
            self._seen.clear()
        return decided

    def _fewest(self, waited: float, busy: float) -> int:
        """How many would each have one call under way and as many waiting as may be."""
        return math.ceil((waited + busy) / (1 + self.bounds.waiting) - _SLACK)

    def _over(self, seconds: float, now: float) -> list[tuple[float, int, int]]:
        """What was seen in the last seconds; nothing as long as that isn't known."""
        if now - self._seen[0][0] < seconds - _SLACK:
            return []
        return [each for each in self._seen if each[0] >= now - seconds - _SLACK]
