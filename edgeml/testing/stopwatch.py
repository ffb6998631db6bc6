"""How long something takes, on a machine that has other things to do as well."""

from __future__ import annotations

import os
import threading
import time
import weakref
from contextlib import suppress

__all__ = ["Stopwatch"]

_BEAT = 0.05  # seconds
_LATE = 0.2  # seconds by which a beat that comes later shows that something is wrong


class Stopwatch:
    """Tells how long it has run, less what the machine kept this process waiting meanwhile.

    A bound on time is there for what waits in vain: for a peer, a lock, a timer. What waits for a
    processor that other programs have is no fault of what is tested, and Linux tells how long each
    thread does. The one that waited most counts, so never more than has passed; where nobody else
    wants the processors that is nothing, and elsewhere than on Linux it is not known. Nor does it
    count for how long the whole process stood still, as a machine does that is suspended.

    Args:
        others: processes that are waited for, a server's say: what they were kept waiting counts as
            well.
    """

    def __init__(self, *others: int) -> None:
        self._processes = (os.getpid(), *others)
        self._waits, self._steals = [_waits(each) for each in self._processes], _steals()
        self._stood = _pulse.watch(self)
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since it was made."""
        passed = time.monotonic() - self._began
        waited = _most(self._steals, _steals())
        for process, before in zip(self._processes, self._waits, strict=True):
            waited += _most(before, _waits(process))
        return max(0.0, passed - max(waited, _pulse.stood - self._stood))


class _Pulse:
    """Notices, while there are watches, that the process stands still: nothing in it runs then."""

    def __init__(self) -> None:
        self.begin_anew()

    def begin_anew(self) -> None:
        """Know of nothing yet: in a forked child there are neither threads nor free locks."""
        self._lock = threading.Lock()
        self._watches: weakref.WeakSet[Stopwatch] = weakref.WeakSet()
        self._beating = False
        self._last = 0.0  # beat
        self._stood = 0.0

    def watch(self, watch: Stopwatch) -> float:
        """Beat as long as this one is there; returns what `stood` is."""
        with self._lock:
            self._watches.add(watch)
            if not self._beating:
                self._beating, self._last = True, time.monotonic()
                threading.Thread(target=self._beat, name="stopwatch", daemon=True).start()
        return self._stood

    @property
    def stood(self) -> float:
        """Seconds in all."""
        if time.monotonic() - self._last > _BEAT + _LATE:
            time.sleep(2 * _BEAT)  # the next beat tells, which is due
        return self._stood

    def _beat(self) -> None:
        used = time.process_time()
        while True:
            time.sleep(_BEAT)
            now, before = time.monotonic(), used
            late, used = now - self._last - _BEAT, time.process_time()
            if late > _LATE and used - before < late / 10:  # else something kept this thread out
                self._stood += late
            self._last = now
            with self._lock:
                if not self._watches:
                    self._beating = False
                    return


_pulse = _Pulse()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pulse.begin_anew)


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
