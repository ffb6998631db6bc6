"""How long a machine keeps a program's threads waiting, measured in the program itself.

A thread sleeps for 10 ms again and again. How much later it wakes up is how late a plain timer is
here, for whatever reason: other programs, other threads that have the interpreter, a SIGSTOP. And
Linux tells how long each of the other threads has waited for a processor meanwhile. The larger one
is told; by so much may anything be late in that time.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress

from .history import Writer

_BEAT = 0.01  # seconds
_LITTLE = 0.001  # seconds that aren't worth a word


def watch(history: Writer, beat: float = _BEAT) -> None:
    """Tell of it for as long as the process lives; `beat` are seconds between two looks."""
    threading.Thread(target=_watch, args=(history, beat), name="witness", daemon=True).start()


def _watch(history: Writer, beat: float) -> None:
    files: dict[str, int] = {}
    waits, now = _waits(files), history.now()
    while True:
        time.sleep(beat)
        began, now = now, history.now()
        late = now - began - beat
        before, waits = waits, _waits(files)
        most = max((waits[each] - before.get(each, waits[each]) for each in waits), default=0.0)
        if (seconds := max(late, most)) > _LITTLE:
            # A thread's waiting is known when it has ended, of which some was in earlier beats.
            since = min(began, now - seconds)
            history.tell("waited", since=since, seconds=seconds)


def _waits(files: dict[str, int]) -> dict[str, float]:
    """Seconds that each thread has waited for a processor; `files` are those that tell it."""
    with suppress(OSError):
        threads = os.listdir("/proc/self/task")
        for gone in files.keys() - threads:
            os.close(files.pop(gone))
        for new in set(threads) - files.keys():
            with suppress(OSError):
                files[new] = os.open(f"/proc/self/task/{new}/schedstat", os.O_RDONLY)
    waits = {}
    for thread, fd in files.items():
        with suppress(OSError, IndexError):
            waits[thread] = int(os.pread(fd, 100, 0).split()[1]) / 1e9
    return waits
