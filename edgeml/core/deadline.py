"""One moment by which something is to be done, shared by all of its parts.

What is told as a number of seconds counts from when it is told. So whoever is given such a number
makes a `Deadline` of it first of all, and gives each of its parts what is left by then.
"""

from __future__ import annotations

import time

__all__ = ["Deadline"]


class Deadline:
    """A moment, so many seconds from when it is made.

    Attributes:
        timeout: those seconds, for errors that tell them.
    """

    __slots__ = ("_at", "timeout")

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._at = time.monotonic() + timeout

    @property
    def began(self) -> float:
        """When it was made, by `time.monotonic`."""
        return self._at - self.timeout

    @property
    def left(self) -> float:
        """Seconds; 0.0 once it is over."""
        return max(0.0, self._at - time.monotonic())

    def __repr__(self) -> str:
        return f"Deadline({self.timeout:g}, {self.left:.3f} s left)"
