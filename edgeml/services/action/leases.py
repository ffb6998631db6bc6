"""Who may act on a key, and who waits for it: the rule, without a clock, a lock or a network.

Whoever wants the key has a *claim*. The claim of the highest priority is the one that counts, and
among equal ones the oldest; a claim ends when it is given back, or when there was no sign of its
writer for its *ttl*. That is all there is to say of who is next, so a human who comes with a higher
priority takes the key, and the policy, whose claim is still there, has it back when he has left.

Between two writers there is a gap: the next one is *granted* the key when no action of another is
running, and one *period* after the last one of another began. Whoever held it has lost it before.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from edgeml.core.errors import NotHolder, Overloaded

__all__ = ["LONGEST_TTL", "Leases", "Writer"]

LONGEST_TTL = 3600.0
"""Seconds that a lease may last without a sign of its holder."""


_MOST_CLAIMS = 64


class Writer(NamedTuple):
    """Who acts.

    Attributes:
        client_id: of its client.
        token: a number that only this client and the device know; 0 for one without a claim.
    """

    client_id: str
    token: int = 0


@dataclass
class _Claim:
    """That a writer wants the key.

    Attributes:
        name: of the writer, for people.
        priority: the higher one has the key.
        ttl: seconds without a sign of the writer after which this ends.
        order: counts claims as they come.
        seen: when there was the last sign.
    """

    name: str
    priority: int
    ttl: float
    order: int
    seen: float

    @property
    def ends(self) -> float:
        """When it does, without another sign."""
        return self.seen + self.ttl


class Leases:
    """Decides who may act on a key.

    Times are seconds of any one clock that never goes back; each method is told what it says.

    Args:
        key: the action's name, for the text of errors.
        period: seconds between the last action of a writer and the first of the next.
        first: the number of the first grant. One that no earlier server used, since a client may
            have been told such a number before a restart.

    Attributes:
        holder: who has been granted the key; None for nobody.
        grant: the number of the newest grant.
        counts: ``leases_granted``, ``leases_taken`` by a higher priority, ``leases_expired``, and
            ``actions_not_holder``, refused as another's turn it was.
    """

    def __init__(self, key: str, period: float = 0.0, first: int = 1) -> None:
        self.holder: Writer | None = None
        self.grant = first - 1
        self.counts: Counter[str] = Counter(
            leases_granted=0, leases_taken=0, leases_expired=0, actions_not_holder=0
        )
        self._key = key
        self._period = period
        self._claims: dict[Writer, _Claim] = {}
        self._orders = 0
        self._heir: Writer | None = None  # whose claim counts
        self._soonest = math.inf  # no claim ends before
        self._running: dict[Writer, int] = {}  # how many actions of each
        self._last: tuple[Writer, float] | None = None  # whose action began last, and when

    # Claims -------------------------------------------------------------------------------

    def claim(self, writer: Writer, name: str, priority: int, ttl: float, now: float) -> None:
        """Take notice that a writer wants the key, or still does, which is a sign of it.

        A claim keeps the priority that it came with. Where there are too many, one of a higher
        priority takes the place of the last.

        Raises:
            Overloaded: too many wait.
        """
        self.settle(now)
        claims = self._claims
        self._soonest = min(self._soonest, now + ttl)
        if writer in claims:
            claims[writer].ttl, claims[writer].seen = ttl, now
            return
        if len(claims) >= _MOST_CLAIMS:
            last = max(claims, key=self._rank)
            if claims[last].priority >= priority:
                raise Overloaded(f"{_MOST_CLAIMS} clients wait for the lease of {self._key!r}")
            del claims[last]
        self._orders += 1
        claims[writer] = _Claim(name, priority, ttl, self._orders, now)
        self._choose()
        self.settle(now)

    def give_back(self, writer: Writer, now: float) -> None:
        """End a claim, if there is one."""
        self.settle(now)
        self._claims.pop(writer, None)
        self._choose()
        self.settle(now)

    def settle(self, now: float) -> None:
        """Do what is due: end the claims of the silent, and let the next one have the key."""
        if now >= self._soonest:
            self._end_silent(now)
        if not self.pending:
            return
        if self.holder is not None:
            self.counts["leases_taken"] += self.holder in self._claims
            self.holder = None
        heir = self._heir
        if heir is not None and now >= self._free_at(heir):
            self.holder = heir
            self.grant += 1
            self.counts["leases_granted"] += 1

    def _end_silent(self, now: float) -> None:
        claims = self._claims
        for writer in [writer for writer, claim in claims.items() if now >= claim.ends]:
            del claims[writer]
            self.counts["leases_expired"] += writer == self.holder
        self._soonest = min((claim.ends for claim in claims.values()), default=math.inf)
        self._choose()

    def _choose(self) -> None:
        """Find whose claim counts."""
        self._heir = min(self._claims, key=self._rank, default=None)

    def _rank(self, writer: Writer) -> tuple[int, int]:
        """By which claims are sorted."""
        claim = self._claims[writer]
        return -claim.priority, claim.order

    @property
    def pending(self) -> bool:
        """Whether it is another's turn than that of who has the key."""
        return self.holder != self._heir

    @property
    def due(self) -> float:
        """When `settle` has something to do, unless something else happens before; inf for never.

        It may be sooner than that.
        """
        if self._heir is not None and self.pending:
            return min(self._soonest, self._free_at(self._heir))
        return self._soonest

    def __str__(self) -> str:
        if self.holder is None:
            return f"nobody has the lease of {self._key!r}"
        return f"{self._claims[self.holder].name} has the lease of {self._key!r}"

    def grant_of(self, writer: Writer) -> int:
        """Return the number of the grant by which a writer has the key; 0 where it hasn't."""
        return self.grant if writer == self.holder else 0

    def tell(self, writer: Writer) -> str:
        """Return who stands in a writer's way, for people; empty for nobody."""
        heir = self._heir
        if heir is not None and heir != writer:
            claim = self._claims[heir]
            return f"{claim.name} has the lease of {self._key!r}, with priority {claim.priority}"
        if any(not _may_mix(other, writer) for other in self._running):
            return f"an action {self._key!r} of another client is still running"
        return ""

    # Actions ------------------------------------------------------------------------------

    def begin(self, writer: Writer, now: float) -> None:
        """Begin an action, which is a sign of the writer as well.

        Raises:
            NotHolder: it is another's turn.
        """
        self.settle(now)
        if writer.token:
            if writer != self.holder:
                who = self.tell(writer) or f"this client has lost the lease of {self._key!r}"
                raise self._refusal(who)
            self._claims[writer].seen = now
        elif self._claims or now < self._free_at(writer):
            who = self.tell(writer) or f"{self._key!r} has just been another client's"
            raise self._refusal(f"{who}: ask for it with client.lease()")
        self._running[writer] = self._running.get(writer, 0) + 1
        self._last = writer, now

    def _refusal(self, why: str) -> NotHolder:
        self.counts["actions_not_holder"] += 1
        return NotHolder(f"{why}; the action was not taken")

    def end(self, writer: Writer, now: float) -> None:
        """End an action that has begun."""
        self._running[writer] -= 1
        if not self._running[writer]:
            del self._running[writer]
        if self.pending:
            self.settle(now)

    def _free_at(self, writer: Writer) -> float:
        """From when on the actions of others leave room for one of this writer."""
        for other in self._running:
            if not _may_mix(other, writer):
                return math.inf
        if self._last is None or _may_mix(self._last[0], writer):
            return -math.inf
        return self._last[1] + self._period


def _may_mix(one: Writer, other: Writer) -> bool:
    """Whether actions of the two may follow upon each other at once, and run at a time.

    Those who have no claims do as they like among each other.
    """
    return one == other or not (one.token or other.token)
