"""Who of several drivers wanted a robot and was able to have it, and from when on it was due to it.

A driver is *ready* in spans of time: from when it asked for the lease, or a while after whatever
kept it from its work had ended, until it gives up or is kept again. Whose the lease is isn't known
here, and need not be: a driver that acted, or might have, and was then lost, had it until `ttl`
after that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .history import Event

_RECOVERY = 2.0  # seconds that a driver may take over finding its way back
_SAME = 0.02  # seconds between two who want it at once

Process = tuple[str, int]
"""Its name, and which of its lives."""


@dataclass
class Driver:
    """What became of one, over all its lives.

    Attributes:
        ready: spans of time.
        losses: moments at which it was lost, or gave up, and from when on its lease is over then;
            None where nobody can say, as its connection was cut and it may have come back.
        lame: spans in which it found its way back.
        lives: of its processes.
    """

    ready: list[tuple[float, float]] = field(default_factory=list)
    losses: list[tuple[float, float | None]] = field(default_factory=list)
    lame: list[tuple[float, float]] = field(default_factory=list)
    lives: set[int] = field(default_factory=set)


class Hands:
    """All drivers that have leases of one key.

    Attributes:
        key: of the robot's.
        priorities: of the drivers, by name; none where there are no leases.
    """

    def __init__(self, events: list[Event]) -> None:
        plan = next(event for event in events if event["e"] == "plan")
        styles = plan["styles"].items()
        self.priorities: dict[str, int] = {
            name: style["priority"] for name, style in styles if style["priority"] is not None
        }
        self.key: str = plan["styles"]["policy"]["keys"][0]
        self._ttl: float = plan["ttl"]
        # Who thinks has nothing to play at first, and may have the lease meanwhile.
        self._thinks = {name for name, style in styles if style["merge"]}
        self._drivers = {name: self._follow(name, events) for name in self.priorities}

    def lives(self, name: str) -> set[int]:
        return self._drivers[name].lives

    def _follow(self, name: str, events: Iterable[Event]) -> Driver:
        driver = Driver()
        wants = alive = False
        kept = set[str]()  # by what it is kept from its work
        since: float | None = None

        def close(t: float) -> None:
            nonlocal since
            if since is not None and since < t:
                driver.ready.append((since, t))
            since = None

        def lose(t: float, why: str, over: float | None) -> None:
            close(t)
            driver.losses.append((t, over))
            kept.add(why)

        def recover(t: float, *why: str) -> None:
            nonlocal since
            if not kept & set(why):
                return
            kept.difference_update(why)
            if not kept:
                driver.lame.append((t, t + _RECOVERY))
                if wants and alive:
                    since = t + _RECOVERY

        for event in events:
            e, t = event["e"], event["t"]
            if event["who"] == name:
                driver.lives.add(event["life"])
                if e == "connected":
                    alive = True
                    kept.discard("dead")
                elif e == "wants":
                    wants = True
                    if since is None and not kept:
                        lame = driver.lame[-1][1] if driver.lame else t
                        since = max(t, lame)
                elif e in ("gives", "no lease", "leaving"):
                    wants = wants and e == "no lease"
                    close(t)
                    driver.losses.append((t, t + self._ttl))
                elif e == "given" and driver.losses:
                    driver.losses[-1] = driver.losses[-1][0], t
            elif event.get("of") == name and event["who"] == "harness":
                if e == "kill":
                    wants = alive = False
                    kept.clear()
                    lose(t, "dead", t + self._ttl)
                elif e == "stands":
                    lose(t, "frozen", t + self._ttl)
                elif e == "freeze":
                    close(t)
                elif e == "thaw":
                    recover(t, "frozen")
                elif e == "proxy" and event["do"] == "set":
                    close(event["since"])
                    lose(t, "weather", t + self._ttl)
                elif e == "proxy" and event["do"] == "calm":
                    recover(t, "weather")
                elif e == "proxy" and event["do"] in ("cut", "reset", "half-open"):
                    close(event["since"])
                    lose(t, "cut", None)
                    recover(t, "cut")
            elif event.get("of") == "device" and event["who"] == "harness":
                if e in ("kill", "freeze"):
                    lose(t, "device", None)
                elif e in ("clock", "thaw"):  # it serves, or goes on
                    recover(t, "device")
            elif event["who"] == "device" and e == "stopping":
                lose(t, "device", None)
        if since is not None:
            driver.ready.append((since, float("inf")))
        return driver

    def due(
        self, name: str, before: Process, t: float, after: Process, then: float
    ) -> Iterator[tuple[float, float]]:
        """Yield since when a driver was ready, and from when on it could have had the robot.

        Args:
            name: of the driver.
            before: who acted until `t`.
            t: seconds.
            after: who acted next, at `then`.
            then: seconds.
        """
        driver = self._drivers[name]
        spans = [(begin, end) for begin, end in driver.ready if begin < then <= end]
        if not spans or after[0] == before[0] == name or name in self._thinks:
            return
        since = spans[0][0]
        priority = self.priorities[name]
        # No other of less priority acts beside it, however steadily.
        if after[0] != name and self.priorities.get(after[0], 0) < priority:
            yield since, since
        ends = [since, t]
        for other, its in self._drivers.items():
            if other == name or self.priorities[other] < priority:
                continue
            if other in self._thinks or any(begin < then and end > t for begin, end in its.lame):
                return  # it may have had it meanwhile, and not known what to do
            lost = [over for moment, over in its.losses if t <= moment < then]
            if other == before[0] and not lost:
                return  # it had it, and may have it still
            for over in lost:
                if over is None:
                    return
                ends.append(over)
        due = max(ends)
        if after[0] != name and any(
            begin <= due + _SAME and then <= end for begin, end in self._drivers[after[0]].ready
        ):
            return  # it was that one's turn, and is looked at as such
        yield since, due
