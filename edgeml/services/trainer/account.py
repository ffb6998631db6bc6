"""What became of the items of one store, so that it adds up at any moment."""

from __future__ import annotations

import re
import threading
from collections import Counter
from typing import Any, NamedTuple

__all__ = ["ClientAccount", "ServerAccount"]

_MOST_RUNS = 4096  # that are kept apart, for a learner that goes back
_KINDS = 100  # of reasons that are told apart

DROPPED, LOST = "dropped", "lost"


class _Run(NamedTuple):
    """Consecutive items of a client's store that the learner doesn't get."""

    first: int
    n: int
    why: str  # DROPPED, LOST, or why they were refused
    refused: bool

    def above(self, number: int) -> int:
        """How many of them have ids above a number."""
        return min(self.n, max(0, self.first + self.n - 1 - number))


class ClientAccount:
    """The client's end. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mark = 0
        self._durable = 0
        self._sent = 0
        self._repeated = 0
        self._furthest = 0  # id that was sent
        self._best = 0  # the highest mark there was
        self._runs: list[_Run] = []  # in order
        self._folded: Counter[tuple[str, bool]] = Counter()  # of the oldest runs
        self._fold_end = 0  # the newest id of these
        self._newest = 0  # id that there was
        self._past: Counter[tuple[str, bool]] = Counter()  # of numberings before this one
        self._past_durable = 0

    def send(self, first: int, n: int) -> None:
        """Note that items are sent, maybe not for the first time."""
        with self._lock:
            self._sent += n
            self._repeated += min(n, max(0, self._furthest + 1 - first))
            self._furthest = max(self._furthest, first + n - 1)

    def mark(self, number: int, durable: int) -> None:
        """Note how far the learner has come; it may have gone back."""
        with self._lock:
            if number < self._mark:
                # Whether it refuses these again will be seen.
                self._runs = [run for run in self._runs if not run.refused or run.first <= number]
            self._mark, self._durable = number, durable
            self._best = max(self._best, number)

    def miss(self, first: int, n: int) -> int:
        """Note that items are not in the client's store any more, though the learner lacks them.

        They are lost if a learner had them that forgot them, else dropped. Returns how many are
        new here.
        """
        fresh = 0
        with self._lock:
            for start, end in self._unknown(first, first + n):
                forgotten = min(end, max(start, self._best + 1))
                if forgotten > start:
                    self._add(_Run(start, forgotten - start, LOST, False))
                if end > forgotten:
                    self._add(_Run(forgotten, end - forgotten, DROPPED, False))
                fresh += end - start
        return fresh

    def refuse(self, first: int, n: int, why: str) -> int:
        """Note that items can't be sent, or that the learner refused them; how many are new."""
        why = re.sub(r"\d+", "#", why)
        fresh = 0
        with self._lock:
            kinds = {run.why for run in self._runs if run.refused} if self._runs else set()
            if why not in kinds and len(kinds) >= _KINDS:
                why = "another reason"
            for start, end in self._unknown(first, first + n):
                self._add(_Run(start, end - start, why, True))
                fresh += end - start
        return fresh

    def _unknown(self, start: int, end: int) -> list[tuple[int, int]]:
        """Which ids of a range are in no run yet, as ranges."""
        parts = []
        start = max(start, self._fold_end + 1)
        for run in self._runs:
            if run.first >= end:
                break
            if run.first + run.n > start:
                if run.first > start:
                    parts.append((start, run.first))
                start = run.first + run.n
        if start < end:
            parts.append((start, end))
        return parts

    def _add(self, run: _Run) -> None:
        runs = self._runs
        at = len(runs)
        while at and runs[at - 1].first > run.first:
            at -= 1
        before = runs[at - 1] if at else None
        if before is not None and before[2:] == run[2:] and before.first + before.n == run.first:
            runs[at - 1] = before._replace(n=before.n + run.n)
        else:
            runs.insert(at, run)
        if len(runs) > _MOST_RUNS:
            oldest = runs.pop(0)
            self._folded[oldest.why, oldest.refused] += oldest.n
            self._fold_end = oldest.first + oldest.n - 1

    def begin_anew(self) -> None:
        """Note that the store's ids have begun anew; what was not sent of before is gone."""
        with self._lock:
            counts = self._count(self._newest)
            counts[DROPPED, False] += counts.pop(("waiting", False))
            self._past.update(counts)
            self._past_durable += min(self._count_durable(), counts["applied", False])
            self._mark = self._durable = self._furthest = self._best = self._newest = 0
            self._runs, self._folded, self._fold_end = [], Counter(), 0

    def _count(self, newest: int) -> Counter[tuple[str, bool]]:
        """How many items there are of each kind, of which each item is of one."""
        counts = Counter(self._folded)
        above = 0
        for run in self._runs:
            counts[run.why, run.refused] += run.n
            above += run.above(self._mark)
        if self._mark < self._fold_end:
            above += sum(self._folded.values())
        counts["waiting", False] = max(0, newest - self._mark - above)
        counts["applied", False] = max(0, newest - sum(counts.values()))
        return counts

    def durable(self) -> int:
        """How many items are in a checkpoint of the learner's."""
        with self._lock:
            return self._count_durable() + self._past_durable

    def _count_durable(self) -> int:
        gone = sum(run.n - run.above(self._durable) for run in self._runs)
        return max(0, self._durable - gone - sum(self._folded.values()))

    def count(self, latest_id: int) -> dict[str, Any]:
        """Tell what became of the items up to the store's newest.

        Returns:
            ``accepted`` by the store, which is ``applied`` (the learner has them), ``refused``
            (a dict: reasons and counts), ``dropped`` (overwritten before they were sent), ``lost``
            (a learner had them and forgot them, or the disk did, and the store has them no more)
            and ``waiting``. Of those applied, how many are ``durable``, in a checkpoint; and how
            many were ``sent``, of which ``repeated`` not for the first time.
        """
        with self._lock:
            self._newest = max(self._newest, latest_id, self._mark)
            counts = self._count(self._newest)
            durable = min(self._count_durable(), counts["applied", False]) + self._past_durable
            counts.update(self._past)
            told = {
                "accepted": sum(counts.values()),
                "sent": self._sent,
                "repeated": self._repeated,
                "applied": counts["applied", False],
                "durable": durable,
                "refused": {why: n for (why, refused), n in counts.items() if refused},
                "dropped": counts[DROPPED, False],
                "lost": counts[LOST, False],
                "waiting": counts["waiting", False],
            }
        return told


class ServerAccount:
    """The learner's end. One thread at a time changes it; any may `count`.

    Attributes:
        applied: items that are in the store.
        repeated: items that came again.
        dropped: items that clients had overwritten, or lost, before they were sent.
        durable: items of those applied that are in a checkpoint.
    """

    def __init__(self) -> None:
        self.applied = self.repeated = self.dropped = self.durable = 0
        self._refused: Counter[str] = Counter()

    def refuse(self, why: str) -> None:
        """Note that the store refused an item."""
        why = re.sub(r"\d+", "#", why)
        if why not in self._refused and len(self._refused) >= _KINDS:
            why = "another reason"
        self._refused[why] += 1

    def count(self) -> dict[str, Any]:
        """Tell what became of what came: ``accepted`` is applied, refused and repeated."""
        refused = dict(self._refused)
        return {
            "accepted": self.applied + sum(refused.values()) + self.repeated,
            "applied": self.applied,
            "durable": self.durable,
            "refused": refused,
            "repeated": self.repeated,
            "dropped": self.dropped,
        }
