"""Ask a server that refuses most calls no more than it can use: the client's half of overload.

Even a refusal takes the server's time. Where clients ask without waiting, more comes than it can
read, all of it is over before it's looked at, and nobody has an answer. So a client that is refused
sends twice as many calls as are answered, and some more, and says no to the others itself, which
costs nobody anything. The server still has more to choose from than it can do; and where it can do
more, it's soon asked for that.

Nothing here reads a clock.
"""

from __future__ import annotations

import math

from edgeml.core.errors import DeadlineExceeded, EdgemlError, Overloaded, text_of

__all__ = ["Throttle"]

_TIMES = 2.0  # as many as are answered may be sent, ...
_MORE = 10.0  # ... and so many a second, or nobody would notice that there are answers again
_MEMORY = 1.0  # seconds over which both are counted, fading; without refusals all is forgotten
_FADES = 0.9  # the part of it that how long a refused call waits still counts after the next


class Throttle:
    """Which of an interface's calls are worth sending, by what came of those before them.

    Only where calls are refused is anything held back, and only what waits no longer than they do.
    Safe to use from several threads, which may lose a call of each other's.
    """

    __slots__ = ("_answered", "_asked", "_due", "_longest", "_noted", "_refused", "_why")

    def __init__(self) -> None:
        self._refused = -math.inf  # when one was last
        self._longest = 0.0  # seconds that those had
        self._why: EdgemlError = Overloaded("")  # what the last was told
        self._noted = 0.0  # when these were right, both of the last seconds:
        self._asked = self._answered = 0.0
        self._due = 0.0  # of a call; sent with the next that makes it whole

    def _fade(self, now: float) -> None:
        left = math.exp(min(0.0, self._noted - now) / _MEMORY)
        self._asked *= left
        self._answered *= left
        self._noted = now

    def note_answered(self, now: float) -> None:
        """Note that a call had its answer in time."""
        self._fade(now)
        self._answered += 1

    def note_refused(self, timeout: float, now: float, why: EdgemlError) -> None:
        """Note that a call which had so many seconds was refused, or had no answer in time."""
        if now - self._refused > _MEMORY:
            self._longest = self._asked = self._answered = self._due = 0.0
        self._refused = now
        self._longest = max(_FADES * self._longest, timeout)
        self._why = why

    def refusal(self, timeout: float, now: float) -> EdgemlError | None:
        """Return why a call with so many seconds is not worth sending; None if it is to be sent."""
        if now - self._refused > _MEMORY or timeout > self._longest:
            return None
        self._fade(now)
        self._asked += 1
        # Evenly, rather than the first that come: the newest are of most use.
        self._due += min(1.0, (_MORE * _MEMORY + _TIMES * self._answered) / self._asked)
        if self._due >= 1:
            self._due -= 1
            return None
        kind = DeadlineExceeded if isinstance(self._why, DeadlineExceeded) else Overloaded
        return kind(
            "not sent, as the server can't answer most calls like it in time; what it last said of "
            f"one: {text_of(self._why)}"
        )
