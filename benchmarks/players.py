"""Ways to play chunks that come late: edgeml's, and those of LeRobot's documentation.

The latter are written anew, in their best light, from https://huggingface.co/docs/lerobot, pages
``async`` (asynchronous inference: `Async`), ``remote_inference`` (`Remote`) and ``rtc`` (`Rtc`), as
of 2026. Where a page leaves something open, it was decided in their favour: nothing here stops for
good when it runs out of actions, as remote inference does, and no observation is left out for being
like the last one, as by asynchronous inference.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from arm import GRIPPERS, HORIZON, JOINTS, RATE, STEP
from common import Array
from edgeml.control import Blend, Ensemble, RealTime
from edgeml.control.chunks import Chunks

DEADLINE = 0.5  # s after which whoever has one request under way asks anew
_HANDS = list(GRIPPERS)


@dataclass
class Request:
    """What is sent to the policy, and what its sender keeps beside it.

    Attributes:
        tick: at which it was sent.
        extra: what the observation has besides; see `arm.Policy.plan`.
        note: its sender's own.
    """

    tick: int
    extra: dict[str, Any]
    note: Any = None


Step = tuple[Array, int]
"""A command, and the tick of the oldest observation that it rests on."""


class Player(Protocol):
    """Plays chunks: at each tick it is given the answers that have come, may ask, and plays."""

    deadline: float
    """Seconds after which it takes no answer any more."""

    def ask(self, tick: int) -> Request | None:
        """What to send with this tick's observation, if anything."""

    def answer(self, request: Request, chunk: Array, tick: int) -> None:
        """Take an answer that came before this tick is played."""

    def give_up(self) -> None:
        """Wait no longer for the request that is under way."""

    def play(self, tick: int) -> Step | None:
        """The command of this tick; None: there is nothing to play."""


class Edgeml:
    """The plan of `edgeml.control.ChunkedPolicy`, with its one request under way."""

    deadline = DEADLINE

    def __init__(self, merge: Any, refill: float) -> None:
        self._chunks = Chunks(merge, rate=RATE, refill=round(refill * RATE))
        self._pending = False

    def ask(self, tick: int) -> Request | None:
        if self._pending or not self._chunks.due(tick * STEP):
            return None
        self._pending = True
        made = self._chunks.ask(tick * STEP)
        tell = {"prev_chunk": made.prev_chunk, "inference_delay": made.inference_delay}
        return Request(tick, tell, made)

    def answer(self, request: Request, chunk: Array, tick: int) -> None:
        self._pending = False
        self._chunks.answer(request.note, chunk, tick * STEP)

    def give_up(self) -> None:
        self._pending = False

    def play(self, tick: int) -> Step | None:
        played = self._chunks.play(tick * STEP)
        return None if played is None else (played.action, round(played.observed_at * RATE))


class _Lerobot:
    """One request under way; the next when as much is left as the worst of a hundred took."""

    deadline = DEADLINE

    def __init__(self, refill: float) -> None:
        self._refill = refill
        self._took: deque[int] = deque(maxlen=100)  # ticks; the first request's are left out
        self._cold = True
        self._pending = False
        self._queue: deque[Step] = deque()
        self._played = 0

    def _due(self, left: int) -> bool:
        floor = max(self._took, default=0) + 1
        return not self._pending and left <= max(self._refill * RATE, floor)

    def answer(self, request: Request, chunk: Array, tick: int) -> None:
        self._pending = False
        if not self._cold:
            self._took.append(tick - request.tick)
        self._cold = False
        self._take(request, deque((command, request.tick) for command in chunk))

    def _take(self, request: Request, new: deque[Step]) -> None:
        raise NotImplementedError

    def _trim(self, request: Request, new: deque[Step]) -> None:
        """Take off what was played since the request."""
        for _ in range(min(self._played - request.note, len(new))):
            new.popleft()

    def give_up(self) -> None:
        self._pending = False

    def play(self, tick: int) -> Step | None:
        if not self._queue:
            return None
        self._played += 1
        return self._queue.popleft()


class Remote(_Lerobot):
    """Remote inference, aligned: what is left is replaced, or blended over the first few steps."""

    def __init__(self, refill: float, blend_steps: int = 0, blend_weight: float = 0.5) -> None:
        super().__init__(refill)
        self._steps, self._weight = blend_steps, blend_weight

    def ask(self, tick: int) -> Request | None:
        if not self._due(len(self._queue)):
            return None
        self._pending = True
        return Request(tick, {}, self._played)

    def _take(self, request: Request, new: deque[Step]) -> None:
        self._trim(request, new)
        for k in range(min(self._steps, len(self._queue), len(new))):
            (old, was), (command, _) = self._queue[k], new[k]
            mixed = (1 - self._weight) * old + self._weight * command
            mixed[_HANDS] = command[_HANDS]
            new[k] = (mixed, min(was, request.tick))
        if new:
            self._queue = new


class Append(_Lerobot):
    """Remote inference, append: one chunk, and one that waits behind it."""

    def __init__(self, refill: float) -> None:
        super().__init__(refill)
        self._next: deque[Step] = deque()

    def ask(self, tick: int) -> Request | None:
        if self._next or not self._due(len(self._queue)):
            return None
        self._pending = True
        return Request(tick, {})

    def _take(self, request: Request, new: deque[Step]) -> None:
        self._next = new

    def play(self, tick: int) -> Step | None:
        if not self._queue:
            self._queue, self._next = self._next, deque()
        return super().play(tick)


class Rtc(_Lerobot):
    """Real-time chunking: what is left of the plan, and the delay, go with the request.

    It asks at a fixed number of steps that are left.
    """

    def __init__(self, queue_threshold: int) -> None:
        super().__init__(0)
        self._threshold = queue_threshold

    def ask(self, tick: int) -> Request | None:
        if self._pending or len(self._queue) > self._threshold:
            return None
        self._pending = True
        left = np.array([command for command, _ in self._queue]) if self._queue else None
        delay = max(self._took, default=0)
        return Request(tick, {"prev_chunk": left, "inference_delay": delay}, self._played)

    def _take(self, request: Request, new: deque[Step]) -> None:
        self._trim(request, new)
        if new:
            self._queue = new


class Async:
    """Asynchronous inference: observations are sent at each tick while the queue is low.

    The server takes the newest one. Answers are aligned by the steps of the episode, and where the
    queue has a step already an aggregate function makes one of the two.
    """

    deadline = math.inf

    def __init__(self, chunk_size_threshold: float, new: float) -> None:
        self._g, self._new = chunk_size_threshold, new
        self._queue: dict[int, Step] = {}
        self._played = 0

    def ask(self, tick: int) -> Request | None:
        if len(self._queue) / HORIZON > self._g:
            return None
        return Request(tick, {}, self._played)

    def answer(self, request: Request, chunk: Array, tick: int) -> None:
        queue: dict[int, Step] = {}
        for step, command in enumerate(chunk, request.note):
            if step < self._played:
                continue
            queue[step] = (command, request.tick)
            if step in self._queue and self._new < 1:
                old, was = self._queue[step]
                mixed = (1 - self._new) * old + self._new * command
                queue[step] = (mixed, min(was, request.tick))
        if queue:
            self._queue = queue

    def give_up(self) -> None:
        pass

    def play(self, tick: int) -> Step | None:
        step = self._queue.pop(self._played, None)
        self._played += step is not None
        return step


class Sequential(_Lerobot):
    """Asks when there is nothing left, and waits."""

    def __init__(self) -> None:
        super().__init__(0)

    def ask(self, tick: int) -> Request | None:
        if self._pending or self._queue:
            return None
        self._pending = True
        return Request(tick, {})

    def _take(self, request: Request, new: deque[Step]) -> None:
        self._queue = new


class Fresh:
    """A plan at each tick, of which the first step is played: what no delay would give."""

    deadline = math.inf

    def __init__(self) -> None:
        self._step: Step | None = None

    def ask(self, tick: int) -> Request | None:
        return Request(tick, {})

    def answer(self, request: Request, chunk: Array, tick: int) -> None:
        self._step = (chunk[0], request.tick)

    def give_up(self) -> None:
        pass

    def play(self, tick: int) -> Step | None:
        return self._step


def _aggregate(new: float) -> Ensemble:
    """The ensemble that an aggregate function comes to: each older chunk counts by 1 - new less."""
    return Ensemble(math.log(1 - new), only=JOINTS)


MERGES: dict[str, Any] = {
    "append": "append",
    "aligned": "aligned",
    "Blend(5)": Blend(5, only=JOINTS),
    "Ensemble(log 0.3)": _aggregate(0.7),
    "Ensemble(log 0.5)": _aggregate(0.5),
    "Ensemble(log 0.7)": _aggregate(0.3),
    "Ensemble(0.01)": Ensemble(0.01, only=JOINTS),
    "RealTime()": RealTime(),
}
"""edgeml's merging choices, by name."""


class Kind(NamedTuple):
    """Two of a kind.

    Attributes:
        theirs: gives LeRobot's, for a refill in seconds; None where it has none.
        ours: the name of edgeml's merging choice; None where it has none.
        refill: gives edgeml's refill.
    """

    theirs: Callable[[float], Player] | None
    ours: str | None
    refill: Callable[[float], float] = lambda refill: refill


_CHUNK = HORIZON * STEP
_RTC = 30  # actions that are left when it asks, by LeRobot's documentation

KINDS = {
    "sequential": Kind(lambda refill: Sequential(), None),
    "append": Kind(Append, "append"),
    "aligned": Kind(Remote, "aligned"),
    "blended": Kind(lambda refill: Remote(refill, blend_steps=5), "Blend(5)"),
    "latest_only": Kind(
        lambda refill: Async(refill / _CHUNK, 1.0), "aligned", lambda refill: refill + 0.2
    ),
    "weighted_average": Kind(lambda refill: Async(refill / _CHUNK, 0.7), "Ensemble(log 0.3)"),
    "average": Kind(lambda refill: Async(refill / _CHUNK, 0.5), "Ensemble(log 0.5)"),
    "conservative": Kind(lambda refill: Async(refill / _CHUNK, 0.3), "Ensemble(log 0.7)"),
    "ensembling of ACT": Kind(None, "Ensemble(0.01)"),
    "real-time chunking": Kind(lambda refill: Rtc(_RTC), "RealTime()", lambda refill: _RTC * STEP),
}
"""By name."""
