"""How long runs take of late, and with that whether a call can have its answer in time.

The last few runs are kept, and three figures made of them: what each of them took at *least*, what
they take *usually*, and what *most* of them stay below. A call with less time left than any run has
taken can't make it. One with twice what most of them need makes it with time to spare, whatever the
machine does meanwhile. A figure in between, such as an average alone, would do for neither.
"""

from __future__ import annotations

import math

from edgeml.core.call import Call
from edgeml.core.errors import DeadlineExceeded, EdgemlError, Overloaded

__all__ = ["OVERTAKEN", "TOO_BUSY", "TOO_LATE", "TOO_SHORT", "UNREAD", "Pace", "overtaken"]

# Why calls are refused, as `Dispatcher.counts` has it.
TOO_BUSY = "refused_too_busy"
TOO_SHORT = "refused_too_short"
OVERTAKEN = "refused_overtaken"
TOO_LATE = "expired"
UNREAD = "refused_unread"

_KEPT = 16  # runs
_FEW = 3  # runs with which nothing is ruled out yet
_EVERY = 16  # runs after which the figures are made anew, though none stands out
_STALE = 20  # times a run, after which one is tried again, whatever the last ones took
_LONGEST = 60.0  # seconds, of that


class Pace:
    """What the runs of one kind take, in seconds.

    Safe to use from several threads, which may lose a run of each other's.

    Attributes:
        least: what none of the last runs was below; 0.0 as long as little is known.
        usual: their average, without the longest, since one may have compiled; 0.0 at first.
        most: what the longest of those took, so that one alone makes no difference here either.
    """

    __slots__ = ("_count", "_ended", "_runs", "least", "most", "usual")

    def __init__(self) -> None:
        self.least = self.usual = self.most = 0.0
        self._runs: list[float] = []
        self._count = 0
        self._ended = -math.inf

    def add(self, seconds: float, now: float) -> None:
        """Learn from a run that has ended now; not from the first, which may have compiled."""
        self._ended = now
        count = self._count
        self._count = count + 1
        runs = self._runs
        if len(runs) == _KEPT:
            runs[count % _KEPT] = seconds
        elif count:
            runs.append(seconds)
        if count < _KEPT or not count % _EVERY or not self.least <= seconds <= self.most:
            self._sum_up()

    def _sum_up(self) -> None:
        runs = sorted(self._runs)
        if not runs:
            return
        usual = runs[:-1] or runs
        self.usual = sum(usual) / len(usual)
        self.most = usual[-1]
        self.least = runs[0] if len(runs) >= _FEW else 0.0

    def rules_out(self, left: float, now: float) -> bool:
        """Whether a run that begins with so many seconds left can't end in time.

        When there was no run for long, nothing is: or nobody would notice that runs are quicker.
        """
        if left >= self.least:
            return left < 0
        return left < 0 or now - self._ended < min(_STALE * self.usual, _LONGEST)

    def comfort(self, call: Call) -> float:
        """Seconds with which a call is to begin where others could as well.

        Twice what runs take; of a call that had less to begin with, half of what it has to spare.
        """
        return min(2 * self.most, (call.deadline - call.arrived + self.usual) / 2)

    def is_risky(self, call: Call, left: float, ahead: float) -> bool:
        """Whether a call that would begin later would have no time to spare.

        Each of the runs before it may take long, and of many hardly all: what n of them take
        together varies by the square root of n times what one does, and hardly by over twice that.

        Args:
            call: the call.
            left: seconds that it would have then.
            ahead: seconds until then, of runs.
        """
        runs = ahead / self.usual if self.usual else 0.0
        more = min(runs, 2 * math.sqrt(runs)) * (self.most - self.usual)
        return left < max(self.comfort(call), self.most + more)

    def refusal(self, call: Call, now: float, ahead: float = 0.0) -> tuple[EdgemlError, str]:
        """Return what to tell a call that can't make it, and the reason to count it by.

        Args:
            call: that is refused.
            now: when.
            ahead: seconds until it could begin.
        """
        left = call.deadline - now
        if left < 0 or call.expired:
            return DeadlineExceeded("nobody waits for this call any more"), TOO_LATE
        took = f"{call.name!r} takes {_told(self.usual)} of late"
        given = call.deadline - call.arrived
        if given < self.least:
            return (
                DeadlineExceeded(
                    f"{took}, and the caller waits {_told(given)}: give it more time; it was not "
                    "begun"
                ),
                TOO_SHORT,
            )
        return (
            Overloaded(
                f"{took}, what comes before it {_told(ahead)}, and of the {_told(given)} that the "
                f"caller waits {_told(left)} are left: ask less often, with more time, or another "
                "server; it was not begun"
            ),
            TOO_BUSY,
        )


def overtaken(call: Call) -> Overloaded:
    """Return what to tell a call that a newer one of its client takes the place of."""
    return Overloaded(
        f"a newer call of {call.name!r} by this client is answered in place of this one, as there "
        "is no time for both; it was not begun"
    )


def _told(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
