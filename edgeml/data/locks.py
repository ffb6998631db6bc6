"""Locks that a forked child can go on with.

A child has only the thread that forked. A lock that another thread held at that moment would be
held for ever there, over something half changed. So all locks made here are taken before a fork,
and given back on both sides of it.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterable
from typing import Any

__all__ = ["make_lock", "sort_locks"]

_ONE = 0.05  # seconds to wait for a lock, before those taken so far are given back for a while
_ALL = 10.0  # seconds after which the fork goes ahead without those that are still held

_log = logging.getLogger(__name__)

_locks: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()

_forking = threading.RLock()  # held from before a fork until after it
_taken: list[Any] = []
_left: list[Any] = []  # held by somebody else for too long


def make_lock() -> Any:
    """Return a `threading.RLock` that is free, or its own thread's, in every forked child."""
    lock = threading.RLock()
    _locks[next(_numbers)] = lock
    return lock


def sort_locks(locks: Iterable[Any]) -> list[Any]:
    """Return locks in the order in which everybody takes them who takes several."""
    return sorted(locks, key=id)


def _take_all() -> None:
    _forking.acquire()
    deadline = time.monotonic() + _ALL
    # A copy made in one step, as others may make locks meanwhile.
    locks = sort_locks(lock for ref in _locks.valuerefs() if (lock := ref()) is not None)
    while True:
        waits = time.monotonic() < deadline
        for lock in locks:
            if lock.acquire(timeout=_ONE if waits else 0):
                _taken.append(lock)
            elif waits:
                # Whoever has it may wait for one of ours, having an order of its own. So all are
                # given back, and the next attempt begins with this one.
                _give_back()
                locks.remove(lock)
                locks.insert(0, lock)
                break
            else:
                _left.append(lock)
        else:
            break
    if _left:
        _log.warning(
            "a process was forked while %d locks of stores had been held for %g s: in the child, "
            "these stores may be half changed",
            len(_left),
            _ALL,
        )


def _give_back() -> None:
    while _taken:
        _taken.pop().release()


def _after_in_parent() -> None:
    _left.clear()
    _give_back()
    _forking.release()


def _after_in_child() -> None:
    for lock in _left:
        lock._at_fork_reinit()  # nobody is there to release it
    _after_in_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_take_all, after_in_parent=_after_in_parent, after_in_child=_after_in_child
    )
