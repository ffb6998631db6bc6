"""How long a loop has been behind with reading: nobody tells how old a request is that is read.

It's measured while somebody asks, so that it costs nothing where nobody does::

    backlog = Backlog()
    if backlog.measured and nothing_is_left():     # before each read, or wait
        backlog.clear()
    backlog.seconds                                # from any thread
"""

from __future__ import annotations

import time

__all__ = ["Backlog"]


class Backlog:
    """Since when there has always been something left to read.

    Attributes:
        measured: whether somebody has asked since nothing was left.
    """

    __slots__ = ("_since", "measured")

    def __init__(self) -> None:
        self.measured = False
        self._since = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since it was asked for first without a moment since in which nothing was left."""
        now = time.monotonic()
        if not self.measured:
            self._since = now
            self.measured = True
        return now - self._since

    def clear(self) -> None:
        """Note that nothing is left."""
        self.measured = False
