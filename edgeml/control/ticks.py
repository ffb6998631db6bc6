"""A loop's rate."""

from __future__ import annotations

import time
from collections.abc import Iterator

__all__ = ["Ticks"]


class Ticks:
    """Iterates at a rate, by a schedule that does not drift::

        for tick in Ticks(50):
            robot.send(policy.step(robot.observe()))

    Each tick comes at its time after the first, however long the loop's body took. One whose time
    was over already comes at once, and counts as late; those that are over by a whole period or
    more are left out, and count as late as well, so that a loop that was held up does not rush.

    Args:
        rate: ticks per second.

    Attributes:
        rate: as given.
        late: ticks that came late, or were left out.
    """

    def __init__(self, rate: float) -> None:
        if not rate > 0:
            raise ValueError(f"rate is ticks per second, positive, not {rate!r}")
        self.rate = float(rate)
        self.late = 0

    def __iter__(self) -> Iterator[int]:
        """Count the ticks from 0 on; those that are left out are missing."""
        began = time.monotonic()
        tick = 0
        while True:
            yield tick
            tick += 1
            wait = began + tick / self.rate - time.monotonic()
            if wait > 0:
                time.sleep(wait)
                continue
            over = int(-wait * self.rate)  # whole periods
            tick += over
            self.late += over + 1
