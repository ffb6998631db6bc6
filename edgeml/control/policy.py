"""A policy that gives an action at each tick, and is never waited for."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from edgeml.control.asking import Answer, Asker, Source, Worker, ask, copy_observation
from edgeml.control.chunks import Chunks, Request
from edgeml.control.merging import Merge, Rule, rule_of
from edgeml.control.statistics import Statistics
from edgeml.core.errors import Closed, ConfigMismatch, DeadlineExceeded, Malformed, shown
from edgeml.core.owned import ClosedAtExit, Unpicklable, close_when_dropped
from edgeml.data.tree import copy_item

__all__ = ["ChunkedPolicy", "LeaseLike", "Step"]

_log = logging.getLogger(__name__)


class LeaseLike(Protocol):
    """Who may act: what a client's lease of an action key is to a control loop."""

    @property
    def held(self) -> bool:
        """Whether the robot is this loop's."""

    @property
    def since(self) -> int:
        """A count that rises each time that it was granted."""


@dataclass(frozen=True)
class Step:
    """What came of one step.

    Attributes:
        number: counts from 0.
        action: what `ChunkedPolicy.step` returned.
        age: seconds since the oldest observation that the action stands on; 0 for what a function
            of yours gave, and infinity where there is no action.
        observation_id: of that observation, if it has one.
        version: of the policy that made it, if that is known.
        source: ``"chunk"``, ``"hold"``, ``"taken"`` where another has the robot, or had it and that
            is latched, or ``"nothing"`` where nothing has been played yet.
    """

    number: int
    action: Any
    age: float
    observation_id: int | None
    version: int | None
    source: Literal["chunk", "hold", "taken", "nothing"]


_AHEAD = 1.0  # seconds by which an observation's time may be later than now
_AWAY = -1  # in place of a lease's count, while it isn't held
_BEFORE = Step(-1, None, math.inf, None, None, "nothing")


class ChunkedPolicy(ClosedAtExit, Unpicklable):
    """Gives one action at each tick of a control loop, of a policy that gives chunks of them::

        with ChunkedPolicy(client, rate=50, merge=Blend(10), max_age=1.0) as policy:
            for _ in Ticks(50):
                action = policy.step(robot.observe())
                if action is not None:
                    robot.send(action)

    The current chunk is played while the next one is asked for, in another thread. `step` waits for
    neither, and takes a few tenths of a millisecond, or as long as it takes to copy an observation,
    whatever the network and the server do. One request is under way at a time.

    A chunk is an array with the control steps along its first axis, or dicts of such, nested as an
    action is; or a dict that has one under the key ``actions``.

    Args:
        source: a policy: an `InferenceClient`, or anything with ``call(name, payload, timeout)``;
            or a function of an observation. It stays yours to stop.
        rate: steps per second of the loop. A policy whose contract states another is refused.
        interface: the policy's name at the server.
        merge: what a new chunk does to the one that is played. ``"append"`` plays one after the
            other. ``"aligned"`` starts a chunk at the step of its observation, so that what has
            been played meanwhile is cut off, and replaces the rest. `Blend` does so little by
            little, `Ensemble` averages all that there are, and `RealTime` is for policies that go
            on smoothly by themselves.
        refill: ask when so many steps are left: 0 for as late as can be, a chunk's length for
            always, half of it by default. It is never fewer than the worst turnaround of the last
            100 answers and one tick.
        max_age: seconds after its observation for which an action may be played; by default for
            ever.
        on_empty: what is done when nothing is left to play: ``"hold"`` gives the last action again;
            a function is called once with it, and its result given until there is more to play.
        latch: whether what ends by itself ends with `reset` alone: a hold, rather than with the
            next chunk, and a takeover, rather than when the lease is held again, as it is also
            where whoever had taken over is lost.
        sync: ask in `step`, when nothing is left, and wait: for comparison, and for policies that
            are quicker than a tick.
        lease: who may act: an object with ``held`` and ``since``, as ``client.lease(key)`` gives.
            While it isn't held nothing is asked or played; afterwards all begins anew.
        actions: the key of a result under which the chunk is, where there is one.
        timeout: seconds that a request may take; a client's own by default, and never longer than
            ``max_age`` allows.

    Raises:
        ConfigMismatch: the policy's contract states another rate, or fewer steps than ``refill``
            or blending takes.
        ValueError, TypeError: a setting means nothing.
    """

    def __init__(
        self,
        source: Source,
        *,
        rate: float,
        interface: str = "policy",
        merge: Merge = "aligned",
        refill: int | None = None,
        max_age: float | None = None,
        on_empty: Literal["hold"] | Callable[[Any], Any] = "hold",
        latch: bool = False,
        sync: bool = False,
        lease: LeaseLike | None = None,
        actions: str | None = "actions",
        timeout: float | None = None,
    ) -> None:
        for name, value in [("rate", rate), ("max_age", max_age), ("timeout", timeout)]:
            if value is not None and not _is_positive(value):
                raise ValueError(f"{name} is a positive number, not {shown(value)}")
        if refill is not None and (
            isinstance(refill, bool) or not isinstance(refill, int) or refill < 0
        ):
            raise ValueError(f"refill is a number of control steps, not {shown(refill)}")
        if lease is not None and not (hasattr(lease, "held") and hasattr(lease, "since")):
            raise TypeError(
                f"a lease has held and since, as client.lease(key) gives, not {shown(lease)}"
            )
        if on_empty != "hold" and not callable(on_empty):
            raise ValueError(f'on_empty is "hold", or a function, not {shown(on_empty)}')
        self.rate = float(rate)
        self._rule = rule_of(merge)
        contract = _contract_of(source, interface)
        if contract is not None:
            _check(contract, interface, self.rate, refill, self._rule)
        self._chunks = Chunks(
            self._rule,
            rate=rate,
            refill=refill,
            max_age=max_age,
            names=_names_of(getattr(contract, "action", None), actions),
        )
        self._what = f"the policy {interface!r}" if hasattr(source, "call") else "the policy"
        self._refill = refill or 0
        self._max_age = math.inf if max_age is None else float(max_age)
        self._on_empty = on_empty
        self._latch = latch
        self._sync = sync
        self._lease = lease
        self._timeout = timeout
        self._reset = False  # whether `reset` was called since the last step
        self._latest = _BEFORE
        self._mark: int | None = None  # of the lease: since when it is held, or that it isn't
        self._last: _Command | None = None  # what a hold repeats
        self._holding_since: float | None = None
        self._was_taken = False  # since the last `reset`, which matters where that is latched
        self._failing = False
        self._hold_was_told = False
        self._told: set[str] = set()  # of what lasts, and is not to be said with each chunk
        self._statistics = Statistics(self.rate)
        self._asker = Asker(ask(source, interface), actions, here=sync)
        self._log = Worker("edgeml control log")
        asker, log = self._asker, self._log

        def close() -> None:
            asker.close()
            log.close()

        self._close = close
        self._closing = close_when_dropped(self, close)

    # Steps ----------------------------------------------------------------------------

    def step(
        self,
        observation: Any,
        *,
        observed_at: float | None = None,
        observation_id: int | None = None,
    ) -> Any:
        """Return the action of this tick; call it once at each, always in one thread.

        The observation is copied if the policy is asked for a chunk, and may be changed afterwards;
        the action is yours.

        Args:
            observation: what the policy is given; an array, or dicts of such.
            observed_at: when it was taken, by `time.monotonic`; now by default.
            observation_id: its own, as ``ActionClient.observe`` gives.

        Returns:
            The action, or None where another has the robot, or nothing has been played yet;
            `latest` tells.

        Raises:
            Closed: the policy has been stopped.
            ValueError: ``merge`` names components that the policy's actions don't have.
        """
        now = time.monotonic()
        taken_at = now if observed_at is None else self._checked_time(observed_at, now)
        if self._asker.closed:
            raise Closed("this policy was stopped, or belongs to the process before a fork")
        if self._reset:
            self._reset = self._was_taken = False
            self._begin_anew()
        self._merge_what_came(now)
        if self._has_the_robot():
            if not self._latched and self._is_due(now):
                self._ask(observation, taken_at, observation_id, now)
                now = time.monotonic()  # as copying took its time, or the policy itself
                if self._sync:
                    self._merge_what_came(now)
            step = self._play(now)
        else:
            step = self._made(None, math.inf, "taken")
        self._latest = step
        self._statistics.count_step(step.source, step.age, self._chunks.left(now))
        return step.action

    @staticmethod
    def _checked_time(observed_at: float, now: float) -> float:
        if not observed_at <= now + _AHEAD:
            raise ValueError(
                f"observed_at is {observed_at!r}, which is to come: now is {now:.3f}, by "
                "time.monotonic()"
            )
        return min(observed_at, now)

    def _has_the_robot(self) -> bool:
        if self._lease is None:
            return True
        held = bool(self._lease.held)
        mark = self._lease.since if held else _AWAY
        if mark != self._mark:
            # Another has moved it, so neither the plan nor the last command is of use.
            self._begin_anew()
            self._was_taken |= self._mark not in (None, _AWAY)
            self._mark = mark
        return held and not (self._latch and self._was_taken)

    @property
    def _latched(self) -> bool:
        return self._latch and self._holding_since is not None

    def _begin_anew(self) -> None:
        self._chunks.clear()
        self._last = None
        self._holding_since = None

    # Asking ---------------------------------------------------------------------------

    def _is_due(self, now: float) -> bool:
        if not self._asker.idle:
            return False
        if self._sync:
            return self._rule.eager or self._chunks.left(now) <= self._refill
        return self._chunks.due(now)

    def _ask(
        self, observation: Any, observed_at: float, observation_id: int | None, now: float
    ) -> None:
        timeout = min(
            math.inf if self._timeout is None else self._timeout,
            self._max_age - (now - observed_at),  # what comes later is not played
        )
        if timeout <= 0:
            self._statistics.counts["observations_too_old"] += 1
            self._say_once(
                "%s is asked nothing: observations are %.2f s old, and max_age is %g s",
                *(self._what, now - observed_at, self._max_age),
            )
            return
        payload = observation if self._sync else copy_observation(observation)
        request = self._chunks.ask(observed_at, observation_id)
        if self._rule.tells:
            payload = _tell(payload, request)
        self._statistics.counts["requests"] += 1
        self._asker.start(request, payload, None if timeout == math.inf else timeout)

    def _merge_what_came(self, now: float) -> None:
        answer = self._asker.take()
        if answer is not None:
            self._merge(answer, now)

    def _merge(self, answer: Answer, now: float) -> None:
        margin = self._chunks.left(now) if self._latest.source == "chunk" else None
        error, outcome = answer.error, "failed"
        if answer.chunk is not None:
            try:
                outcome = self._chunks.answer(answer.request, answer.chunk, now, answer.version)
            except Malformed as failure:
                error = failure
        margin = margin if outcome == "merged" else None
        self._statistics.count_answer(outcome, answer.seconds, margin)
        if error is not None:
            self._asker.rest(answer.seconds)
        if error is not None and not self._failing:
            bound = "" if self._max_age == math.inf else f" (max_age is {self._max_age:g} s)"
            late = bound if isinstance(error, DeadlineExceeded) else ""
            self._say(
                logging.WARNING,
                "%s gives no actions: %s: %s%s",
                *(self._what, type(error).__name__, error, late),
            )
        elif error is None and self._failing:
            self._say(logging.INFO, "%s gives actions again", self._what)
        if outcome == "late":
            self._tell_of_short_chunks()
        elif outcome == "stale" and now - answer.request.observed_at > self._max_age:
            self._say_once(
                "what %s gives is too old to be played: answers take %.2f s, and max_age is %g s",
                *(self._what, answer.seconds, self._max_age),
            )
        self._failing = error is not None

    # Playing --------------------------------------------------------------------------

    def _play(self, now: float) -> Step:
        played = None if self._latched else self._chunks.play(now)
        if played is not None:
            if self._holding_since is not None:
                held = now - self._holding_since
                if self._hold_was_told:
                    self._say(logging.INFO, "%s is played again, after %.2f s", self._what, held)
                self._holding_since = None
            action, observed_at, observation_id, version = played
            self._last = _Command(copy_item(action), observed_at, observation_id, version)
            return self._made(action, now - observed_at, "chunk", observation_id, version)
        if self._last is None:
            return self._made(None, math.inf, "nothing")
        if self._holding_since is None:
            self._begin_to_hold(now)
        last = self._last
        age = 0.0 if last.observed_at is None else now - last.observed_at
        return self._made(copy_item(last.action), age, "hold", last.observation_id, last.version)

    def _begin_to_hold(self, now: float) -> None:
        if callable(self._on_empty):
            assert self._last is not None
            self._last = _Command(self._on_empty(self._last.action), None, None, None)
        self._holding_since = now
        self._statistics.counts["holds"] += 1
        self._hold_was_told = self._chunks.turnaround < self._chunks.steps
        if not self._hold_was_told:
            self._tell_of_short_chunks()  # once, rather than at each
        else:
            self._say(
                logging.WARNING,
                "nothing is left to play of %s, so the robot holds%s",
                *(self._what, " until reset()" if self._latch else ""),
            )

    def _tell_of_short_chunks(self) -> None:
        self._say_once(
            "%s gives %d steps at a time, and an answer takes %d, so the robot holds between them: "
            'it needs longer chunks, or merge="append" to play all of each',
            *(self._what, self._chunks.steps, self._chunks.turnaround),
        )

    def _made(
        self,
        action: Any,
        age: float,
        source: Literal["chunk", "hold", "taken", "nothing"],
        observation_id: int | None = None,
        version: int | None = None,
    ) -> Step:
        return Step(self._latest.number + 1, action, age, observation_id, version, source)

    def _say_once(self, text: str, *about: object) -> None:
        if text not in self._told:
            self._told.add(text)
            self._say(logging.WARNING, text, *about)

    def _say(self, level: int, text: str, *about: object) -> None:
        """Write to the log, which may take its time, in another thread."""
        self._log.do(lambda: _log.log(level, text, *about))

    # Facts ----------------------------------------------------------------------------

    @property
    def latest(self) -> Step:
        """What came of the latest step."""
        return self._latest

    def reset(self) -> None:
        """Begin anew with the next step, as for another episode: nothing is left to play or hold.

        What was asked for before is not played. A policy that remembers is told by
        `InferenceClient.reset`.
        """
        self._reset = True

    def stats(self) -> dict[str, float]:
        """Return counts since the start, and figures of the last ten thousand steps and answers.

        - ``steps``, and of these ``steps_played``, ``steps_held``, ``steps_taken`` (another had the
          robot) and ``steps_without_action`` (nothing had been played yet); ``holds``: how often it
          began to hold.
        - ``requests``, ``requests_failed``; ``chunks`` that were merged, ``chunks_late`` and
          ``chunks_stale``, which were not; ``observations_too_old`` to ask for anything.
        - ``margin_min`` and ``margin_median``: steps that were left when a chunk came.
        - ``turnaround_median`` and ``turnaround_max``: seconds from a request to its answer.
        - ``age_median`` and ``age_max``: seconds, of what was played when it was played.

        What is not known yet is NaN.
        """
        return self._statistics.figures()

    def report(self, path: str | Path | None = None) -> None:
        """Print how it went, and draw a picture of it.

        Args:
            path: of the picture; none is drawn by default, nor where matplotlib isn't installed,
                which is printed then.
        """
        print(self._statistics.describe())
        if path is None:
            return
        try:
            self._statistics.draw(Path(path))
        except ImportError as error:
            print(f"no picture: {error}")
        else:
            print(f"picture: {path}")

    def stop(self) -> None:
        """End it; a request that is under way ends by itself. Safe to call twice."""
        self._closing()
        self._close()

    def _leave(self) -> None:
        self.stop()


@dataclass(frozen=True)
class _Command:
    """What was played last, or what is given in its place."""

    action: Any
    observed_at: float | None
    observation_id: int | None
    version: int | None


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 < value < math.inf


def _tell(payload: Any, request: Request) -> dict[str, Any]:
    """A payload for real-time chunking."""
    fields = dict(payload) if isinstance(payload, Mapping) else {"observation": payload}
    fields["prev_chunk"] = request.prev_chunk
    fields["inference_delay"] = request.inference_delay
    return fields


# Contracts --------------------------------------------------------------------------------


def _contract_of(source: Source, interface: str) -> Any:
    contract = getattr(source, "contract", None)
    return contract(interface) if callable(contract) else None


def _check(contract: Any, interface: str, rate: float, refill: int | None, rule: Rule) -> None:
    """Raise a ConfigMismatch where a loop is not as the policy's contract states."""
    if contract.rate is not None and not math.isclose(contract.rate, rate):
        raise ConfigMismatch(
            f"the policy {interface!r} was made for {contract.rate:g} steps per second, and this "
            f"loop has {rate:g}: run it at the policy's rate"
        )
    if contract.horizon is None:
        return
    for what, steps in [("refill", refill), ("blending", getattr(rule, "steps", None))]:
        if steps is not None and steps > contract.horizon:
            raise ConfigMismatch(
                f"the policy {interface!r} gives {contract.horizon} steps at a time, and {what} "
                f"takes {steps}"
            )


def _names_of(features: Any, key: str | None) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Names of an action's components, by the keys that lead to them, as a contract states them."""
    if isinstance(features, Mapping) and key in features:
        features = features[key]
    found: dict[tuple[str, ...], tuple[str, ...]] = {}

    def walk(node: Any, path: tuple[str, ...]) -> None:
        if isinstance(node, Mapping):
            for name, part in node.items():
                walk(part, (*path, name))
        elif getattr(node, "names", None):
            found[path] = node.names

    walk(features, ())
    return found
