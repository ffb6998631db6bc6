"""What `control.py` plays with: arms that follow commands, a moving target, a policy, a link.

All of it is a function of a seed and of the time in control steps (*ticks*) alone, so that two ways
to play chunks that ask at different times meet the same world: the target's path, the pushes that
the arm gets, what the policy would answer to an observation of that tick, and how long an answer
takes that is asked for at that tick.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from common import Array

RATE = 50.0  # Hz, of control
STEP = 1 / RATE
HORIZON = 50  # steps of a chunk
DIMS = 14  # of a command: two arms of six joints and a gripper each
GRIPPERS = (6, 13)
JOINTS = [i for i in range(DIMS) if i not in GRIPPERS]

_TARGET_HZ, _TARGET_DAMPING, _TARGET_SIZE = 0.3, 0.05, 0.3  # a swing that is driven by noise; rad
_ARM_HZ = 3.0  # the servo's bandwidth, critically damped
_LEAD = 2 / (2 * math.pi * _ARM_HZ)  # s that such a servo lags behind a steady motion
_GAIN, _DECAY = 0.5, 0.12  # how much of the gap is made up for beyond that, and for how long (s)
_SIDE = 0.35  # rad that the arm passes by on either side
_CERTAIN = 2.5  # how much the side it is on decides which side is planned
_WHIM = 0.3  # s that what else decides it lasts
_OFFSET, _SLOPE = 0.012, 0.03  # a plan's error: rad at its beginning, and what comes to it per s
_PUSHES, _PUSH = 0.5, 25.0  # of the arm: how many a second, and how hard, rad/s2
_GUIDED = 25  # steps of the plan before that a new one is guided by, the most
_GRIPPER = 0.4  # how often a second it opens or closes


def _steps(motion: Array, seconds: float) -> Array:
    """What a linear motion x' = Mx does in so many seconds: the matrix exponential."""
    parts = 1 << 14
    return np.linalg.matrix_power(np.eye(len(motion)) + motion * (seconds / parts), parts)


def _swing(hz: float, damping: float) -> Array:
    w = 2 * math.pi * hz
    return np.array([[0.0, 1.0], [-w * w, -2 * damping * w]])


class World:
    """What happens whatever the arm does, for so many ticks."""

    def __init__(self, seed: int, ticks: int) -> None:
        rng = np.random.default_rng([seed, 1])
        joints = len(JOINTS)
        self.ticks = ticks
        moves = _steps(_swing(_TARGET_HZ, _TARGET_DAMPING), STEP)
        w = 2 * math.pi * _TARGET_HZ
        kick = _TARGET_SIZE * math.sqrt(4 * _TARGET_DAMPING * w**3 * STEP)
        state = rng.normal(0, _TARGET_SIZE, (2, joints)) * [[1.0], [w]]
        self.target = np.empty((ticks, 2, joints))  # where it is, and how fast
        for tick in range(ticks):
            self.target[tick] = state
            state = moves @ state
            state[1] += kick * rng.normal(size=joints)
        self.pushes = np.zeros((ticks, joints))
        for hit in np.flatnonzero(rng.random(ticks) < _PUSHES * STEP):
            self.pushes[hit : hit + 5] += _PUSH * rng.normal(size=joints)
        # One after the other for each gripper, open or closed.
        self.grips = (rng.random((ticks, 2)) < _GRIPPER * STEP).cumsum(axis=0) % 2
        side = rng.normal(size=joints)
        self.side = side / np.linalg.norm(side)
        self.offsets = _OFFSET * rng.normal(size=(ticks, joints))
        self.slopes = _SLOPE * rng.normal(size=(ticks, joints))
        keep = math.exp(-STEP / _WHIM)
        whim = rng.normal()
        self.whims = np.empty(ticks)  # uniform in 0..1 each, and alike for a while
        for tick in range(ticks):
            self.whims[tick] = 0.5 * (1 + math.erf(whim / math.sqrt(2)))
            whim = keep * whim + math.sqrt(1 - keep * keep) * rng.normal()

    def observe(self, tick: int, arm: Arm) -> dict[str, Any]:
        """What the robot's cameras and sensors tell at a tick."""
        return {
            "tick": tick,
            "joints": arm.state.copy(),
            "target": self.target[tick],
            "grips": self.grips[tick],
        }

    def off(self, tick: int, arm: Arm) -> float:
        """How far the arm is from the nearer of the two ways past the target; rad, squared."""
        gap = arm.state[0] - self.target[tick, 0]
        way = np.array([gap - _SIDE * self.side, gap + _SIDE * self.side])
        return float(np.min(np.mean(way**2, axis=1)))


class Policy:
    """Plans a chunk from an observation: knows all that can be known of the target's motion.

    There are two ways past the target, one on either side, and neither is in the middle. Which one
    it plans depends mostly on the side that the arm is on, and on a whim; so successive chunks may
    disagree by the whole width, and the mean of two that do is worse than either. Beyond that each
    plan has an error of its own, that grows with how far it looks ahead.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        swing = _swing(_TARGET_HZ, _TARGET_DAMPING)
        self._ahead = np.stack([_steps(swing, k * STEP + _LEAD)[0] for k in range(HORIZON)])
        self._decay = _GAIN * np.exp(-np.arange(HORIZON) * STEP / _DECAY)[:, None]
        self._times = np.arange(HORIZON)[:, None] * STEP

    def plan(self, observation: dict[str, Any]) -> Array:
        """Return a chunk, HORIZON x DIMS, whose first step is for the observation's own tick.

        Args:
            observation: see `World.observe`. Where it has a ``prev_chunk``, what is left to play of
                the plan before, the new one continues that, as by real-time chunking (Black et al.
                2025): it keeps its side, its first ``inference_delay`` steps, and less and less of
                those that follow.
        """
        world, tick = self._world, int(observation["tick"])
        prev = observation.get("prev_chunk")
        joints, target = observation["joints"], observation["target"]
        path = self._ahead @ target
        if prev is None or not len(prev):
            at = (joints[0] - target[0]) @ world.side / _SIDE
            sign = 1.0 if world.whims[tick] < 1 / (1 + math.exp(-_CERTAIN * at)) else -1.0
        else:
            sign = 1.0 if np.mean((prev[:, JOINTS] - path[: len(prev)]) @ world.side) > 0 else -1.0
        aim = sign * _SIDE * world.side
        path = path + aim + self._decay * (target[0] + aim - joints[0])
        path += world.offsets[tick] + self._times * world.slopes[tick]
        chunk = np.empty((HORIZON, DIMS))
        chunk[:, JOINTS] = path
        chunk[:, GRIPPERS] = observation["grips"]
        if prev is not None and len(prev):
            _continue(chunk, prev, observation["inference_delay"])
        return chunk


def _continue(chunk: Array, prev: Array, delay: int) -> None:
    """Let a chunk go on from another one, with the weights of Black et al. (2025), equation 5.

    Theirs guide a denoising; here the two are averaged by them, but for the grippers.
    """
    overlap = min(max(_GUIDED, delay), len(prev))
    prev, delay = prev[:overlap], min(delay, overlap)
    c = (overlap - np.arange(overlap)) / (overlap - delay + 1)
    weights = np.where(np.arange(overlap) < delay, 1.0, c * np.expm1(c) / math.expm1(1))[:, None]
    kept = chunk[:overlap, GRIPPERS].copy()
    chunk[:overlap] = weights * prev + (1 - weights) * chunk[:overlap]
    chunk[delay:overlap, GRIPPERS] = kept[delay:]


class Arm:
    """Twelve joints, each of which follows its command like a critically damped servo."""

    _w = 2 * math.pi * _ARM_HZ
    # Of where it is, how fast it is, and the command and the push, which stay for a tick.
    _motion = _steps(
        np.array([[0, 1, 0, 0], [-_w * _w, -2 * _w, _w * _w, 1], [0] * 4, [0] * 4]), STEP
    )[:2]

    def __init__(self, world: World) -> None:
        self._world = world
        self.state = np.stack([world.target[0, 0] + _SIDE * world.side, world.target[0, 1]])

    def follow(self, tick: int, command: Array) -> None:
        """Go on by one tick."""
        inputs = [self.state, command[None, JOINTS], self._world.pushes[tick][None]]
        self.state = self._motion @ np.concatenate(inputs)


class Weather(NamedTuple):
    """What the way to the policy is like.

    Attributes:
        think: s that the policy takes, from and to.
        link: s that either way takes, from and to.
        stalls: how many a second there are of the time in which nothing passes.
        stall: s that one takes, from and to; what it held up comes at its end, as over TCP.
        lost: how many of the answers never come.
    """

    think: tuple[float, float] = (0.1, 0.1)
    link: tuple[float, float] = (0.01, 0.05)
    stalls: float = 0.0
    stall: tuple[float, float] = (0.1, 0.5)
    lost: float = 0.0


CALM = Weather((0.0, 0.0), (0.0, 0.0))
"""No delay at all."""

WEATHERS = {
    "steady": Weather(link=(0.03, 0.03)),
    "jitter": Weather(),
    "spikes": Weather(stalls=0.2),
    "lost": Weather(lost=0.02),
    "bad": Weather((0.1, 0.25), (0.01, 0.1), stalls=0.2, lost=0.02),
}
"""By name; "jitter" is 100 ms of inference, and 30 ms +- 20 of link either way."""


class Trace:
    """How long things take, by the tick at which they are asked for."""

    def __init__(self, weather: Weather, seed: int, ticks: int) -> None:
        rng = np.random.default_rng([seed, 2])
        self.up, self.down = rng.uniform(*weather.link, (2, ticks))
        self.think = rng.uniform(*weather.think, ticks)
        self.lost = rng.random(ticks) < weather.lost
        starts = np.flatnonzero(rng.random(ticks) < weather.stalls * STEP) * STEP
        ends = starts + rng.uniform(*weather.stall, len(starts))
        self._stalls = [*zip(starts.tolist(), ends.tolist(), strict=True)]

    def passes(self, at: float) -> float:
        """When what is due at that time really comes through."""
        for start, end in self._stalls:
            if start <= at < end:
                at = end
        return at


class Server:
    """A policy behind a link: one plan at a time; of what waits meanwhile only the newest is taken.

    What goes one way comes in the order in which it was sent. Time is a number, in s.

    Attributes:
        plans: that it has made.
    """

    def __init__(self, trace: Trace, plan: Callable[[Any], Array]) -> None:
        self._trace, self._plan = trace, plan
        self._events: list[tuple[float, int, str, int, Any]] = []
        self._count = 0
        self.plans = 0
        self._busy = False
        self._waiting: tuple[int, Any] | None = None
        self._last = {"arrive": 0.0, "answer": 0.0}
        self._answers: list[tuple[Any, Array]] = []

    def ask(self, tick: int, request: Any) -> None:
        """Send a request, at a tick."""
        self._pass("arrive", tick * STEP + self._trace.up[tick], tick, request)

    def answers(self, now: float) -> list[tuple[Any, Array]]:
        """What has come by now: requests, and their chunks."""
        while self._events and self._events[0][0] <= now + 1e-9:
            at, _, what, tick, request = heapq.heappop(self._events)
            if what == "arrive":
                if self._waiting is None or self._waiting[0] < tick:
                    self._waiting = (tick, request)
            elif what == "done":
                self._busy = False
                if not self._trace.lost[tick]:
                    self._pass("answer", at + self._trace.down[tick], tick, request)
            else:
                self._answers.append(request)
            if self._waiting is not None and not self._busy:
                tick, request = self._waiting
                self._waiting, self._busy = None, True
                self.plans += 1
                self._add(
                    at + self._trace.think[tick], "done", tick, (request, self._plan(request))
                )
        came, self._answers = self._answers, []
        return came

    def _pass(self, what: str, at: float, tick: int, request: Any) -> None:
        at = self._last[what] = max(self._last[what], self._trace.passes(at))
        self._add(at, what, tick, request)

    def _add(self, at: float, what: str, tick: int, request: Any) -> None:
        self._count += 1
        heapq.heappush(self._events, (at, self._count, what, tick, request))
