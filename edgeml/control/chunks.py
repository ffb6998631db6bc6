"""What is played, step by step, while chunks of actions come in late.

A pure class: no threads, no network, and its clock is a number that it is given. So a simulation
can play it in virtual time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from edgeml.control.merging import (
    Chunk,
    Merge,
    Names,
    Planned,
    Where,
    components_of,
    mix,
    rule_of,
)
from edgeml.core.errors import Malformed

__all__ = ["Chunks", "Outcome", "Played", "Request"]

_TURNAROUNDS = 100  # of which the worst says how early to ask
_DELAYS = 10  # of which the worst is what real-time chunking counts on

Outcome = Literal["merged", "late", "stale"]


@dataclass(frozen=True, eq=False)
class Request:
    """What is asked for at one tick.

    Attributes:
        number: counts from 1.
        tick: at which it was asked for.
        position: the step that was next then, for which a chunk's first action is meant.
        observed_at: seconds of the robot's clock.
        observation_id: of the observation, if it has one.
        prev_chunk: for `RealTime`: what was left of the newest chunk, or None.
        inference_delay: for `RealTime`: how many steps of it will have been played by the answer.
    """

    number: int
    tick: int
    position: int
    observed_at: float
    observation_id: int | None = None
    prev_chunk: Any = None
    inference_delay: int = 0


class Played(NamedTuple):
    """One action.

    Attributes:
        action: built as a chunk, without the axis of the steps; the caller's own.
        observed_at: of the oldest observation that it stands on.
        observation_id: of that one, if it has one.
        version: of the newest policy that it stands on, if that is known.
    """

    action: Any
    observed_at: float
    observation_id: int | None
    version: int | None


class Chunks:
    """A plan of actions, of which one is played at each tick::

        if chunks.due(now): request = chunks.ask(observed_at)
        chunks.answer(request, chunk, now)   # some ticks later
        played = chunks.play(now)            # once at each tick

    A chunk is meant for the steps from the one on that was next when its observation was taken.
    Steps are counted as they are played: while there is nothing to play, the robot doesn't move on,
    and what comes then begins with its first action.

    Args:
        merge: ``"append"``, ``"aligned"``, `Blend`, `Ensemble` or `RealTime`.
        rate: ticks per second.
        refill: ask when only so many steps are left; None for half a chunk. It is never fewer than
            the worst turnaround of the last 100 answers and one tick.
        max_age: seconds since its observation after which nothing is played.
        names: of the components along the last axis of an action's parts, by the keys that lead
            there, for `Blend` and `Ensemble`.
    """

    def __init__(
        self,
        merge: Merge = "aligned",
        *,
        rate: float,
        refill: int | None = None,
        max_age: float | None = None,
        names: Names | None = None,
    ) -> None:
        self._rule = rule_of(merge)
        self._period = 1.0 / rate
        self._refill = refill
        self._max_age = math.inf if max_age is None else max_age
        self._names: Mapping[tuple[str, ...], Any] = names or {}
        self._plan: list[Planned] = []
        self._shape: Chunk | None = None  # the first, which all others are like
        self._where: list[Where] = []
        self._tick = 0
        self._position = 0  # of the step that is next
        self._asked = 0
        self._newest = 0  # request whose answer was merged, or that was made before `clear`
        self._turnarounds: deque[int] = deque(maxlen=_TURNAROUNDS)
        self._delays: deque[int] = deque(maxlen=_DELAYS)
        self._answers = 0
        self._unanswered_since: int | None = None  # tick

    @property
    def tick(self) -> int:
        """How many ticks there have been."""
        return self._tick

    @property
    def turnaround(self) -> int:
        """The most ticks that one of the last 100 answers took; 0 before the first.

        Where requests were lost before it, it took as long as since the first of these, but for
        ``"append"``, which plays the later what it asks for early. The very first counts until
        there is another, since policies take their time to warm up.
        """
        return max(self._turnarounds, default=0)

    @property
    def steps(self) -> int:
        """How many steps the newest chunk has; 0 before the first."""
        return 0 if self._shape is None else self._shape.steps

    def left(self, now: float) -> int:
        """Return how many steps there are to play, the next one included, if no more comes."""
        if self._rule.aligned:
            return max((self._left_of(each, self._position, now) for each in self._plan), default=0)
        count = 0
        for each in self._plan:
            count += self._left_of(
                each, max(self._position, each.start), now + count * self._period
            )
        return count

    def _left_of(self, each: Planned, position: int, now: float) -> int:
        steps = each.end - position
        if self._max_age < math.inf:
            time = self._max_age - (now - each.observed_at)
            # The next one is played now, not a period later.
            steps = min(steps, math.floor(time / self._period + 1e-9) + 1 if time >= 0 else 0)
        return max(0, steps)

    def due(self, now: float) -> bool:
        """Whether it is time to ask, if no request is under way."""
        if self._rule.eager or not self._plan:
            return True
        refill = self._refill
        if refill is None:
            refill = self._plan[-1].chunk.steps // 2
        return self.left(now) <= max(refill, self.turnaround + 1)

    def ask(self, observed_at: float, observation_id: int | None = None) -> Request:
        """Return a request, for the observation of this tick; call it before `play`.

        Args:
            observed_at: when the observation was taken.
            observation_id: its own, if it has one.
        """
        self._asked += 1
        if self._unanswered_since is None:
            self._unanswered_since = self._tick
        rest, delay = None, 0
        if self._rule.tells and self._plan and self._plan[-1].end > self._position:
            last = self._plan[-1]
            rest = last.chunk.rest(self._position - last.anchor)
            delay = min(max(self._delays, default=0), last.end - self._position)
        return Request(
            *(self._asked, self._tick, self._position, observed_at, observation_id, rest, delay)
        )

    def answer(
        self, request: Request, chunk: Any, now: float, version: int | None = None
    ) -> Outcome:
        """Merge what came of a request into the plan.

        Args:
            request: as `ask` made it.
            chunk: an array with the steps along its first axis, dicts of such, or a `Chunk`.
            now: the time.
            version: of the policy, if that is known.

        Returns:
            ``"merged"``; ``"late"`` where all of its steps are over, and ``"stale"`` where it is
            older than what is played, too old by ``max_age``, or was asked for before `clear`.
            These two change nothing.

        Raises:
            Malformed: it is no chunk, or not like the one before.
            ValueError: the rule names components that it doesn't have.
        """
        if not isinstance(chunk, Chunk):
            chunk = Chunk(chunk)
        if request.number <= self._newest:
            return "stale"
        if self._shape is None:
            self._where = components_of(self._rule.averaged(), chunk, self._names)
        elif not chunk.is_like(self._shape):
            raise Malformed(
                f"a chunk's actions have {chunk.describe()}; those before had "
                f"{self._shape.describe()}"
            )
        self._shape = chunk
        self._note_turnaround(request)
        self._prune(now)
        if self._rule.aligned:
            anchor, start = request.position, self._position
        else:
            anchor = start = max(self._position, self._plan[-1].end if self._plan else 0)
        new = Planned(
            *(chunk, request.number, request.observed_at, request.observation_id, version),
            *(anchor, start, anchor + chunk.steps),
        )
        if new.end <= self._position:
            return "late"
        if now - request.observed_at > self._max_age:
            return "stale"
        self._newest = request.number
        self._plan = self._rule.place(self._plan, new)
        return "merged"

    def _note_turnaround(self, request: Request) -> None:
        self._answers += 1
        if self._answers == 2:
            self._turnarounds.clear()
            self._delays.clear()
        since, self._unanswered_since = self._unanswered_since, None
        if since is None or not self._rule.aligned:  # what is appended early is played late
            since = request.tick
        self._turnarounds.append(self._tick - since)
        self._delays.append(self._tick - request.tick)

    def play(self, now: float) -> Played | None:
        """Return the next action, or None where there is none, and go on to the next tick."""
        self._tick += 1
        self._prune(now)
        plan = self._plan
        if not plan:
            return None
        # What was to be played before it may have grown too old.
        position = self._position = max(self._position, plan[0].start)
        there = [each for each in plan if each.start <= position]
        weights = self._rule.weigh(there, position)
        counted = [(each, weight) for each, weight in zip(there, weights, strict=True) if weight]
        there = [each for each, _ in counted]
        action = mix(there, [weight for _, weight in counted], position, self._where)
        self._position += 1
        oldest = min(there, key=lambda each: each.observed_at)
        return Played(action, oldest.observed_at, oldest.observation_id, there[-1].version)

    def clear(self) -> None:
        """Forget the plan; whatever was asked for before is stale."""
        self._plan = []
        self._shape = None
        self._newest = self._asked
        self._unanswered_since = None

    def _prune(self, now: float) -> None:
        """Let go of what is over, or too old."""
        self._plan = [
            each
            for each in self._plan
            if each.end > self._position and now - each.observed_at <= self._max_age
        ]
