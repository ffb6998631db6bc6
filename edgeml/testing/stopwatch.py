"""How long something takes, on a machine that has other things to do as well."""

from __future__ import annotations

import os
import time
from contextlib import suppress

__all__ = ["Stopwatch"]


class Stopwatch:
    """Tells how long it has run, less what the machine kept this process waiting meanwhile.

    A bound on time is there for what waits in vain: for a peer, a lock, a timer. What waits for a
    processor that other programs have is no fault of what is tested, and Linux tells how long each
    thread does. The one that waited most counts, so never more than has passed; where nobody else
    wants the processors that is nothing, and elsewhere than on Linux it is not known.

    Args:
        others: processes that are waited for, a server's say: what they were kept waiting counts as
            well.
    """

    def __init__(self, *others: int) -> None:
        self._processes = (os.getpid(), *others)
        self._waits, self._steals = [_waits(each) for each in self._processes], _steals()
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since it was made."""
        passed = time.monotonic() - self._began
        for process, before in zip(self._processes, self._waits, strict=True):
            passed -= _most(before, _waits(process))
        return max(0.0, passed - _most(self._steals, _steals()))


def _most(before: dict[str, float], now: dict[str, float]) -> float:
    return max((now[each] - before.get(each, 0.0) for each in now), default=0.0)


def _waits(process: int) -> dict[str, float]:
    """Seconds that each thread of a process has waited for a processor."""
    waits = {}
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{process}/task"):
            with suppress(OSError), open(f"/proc/{process}/task/{thread}/schedstat") as file:
                waits[thread] = int(file.read().split()[1]) / 1e9
    return waits


def _steals() -> dict[str, float]:
    """Seconds for which each processor of a virtual machine was given to other machines."""
    steals = {}
    with suppress(OSError), open("/proc/stat") as file:
        for line in file:
            if not line.startswith("cpu"):
                break
            name, *ticks = line.split()
            steals[name] = int(ticks[7]) / os.sysconf("SC_CLK_TCK")
    steals.pop("cpu", None)  # all together
    return steals
