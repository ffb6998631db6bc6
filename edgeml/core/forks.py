"""Forked children: what was open in the parent is told, for its threads are not in the child.

Locks may be held there for ever by threads that are gone, and sockets are the parent's: to use or
to close them as usual would take part in its conversations.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

from edgeml.core.errors import Closed

__all__ = ["explain_fork", "leave_to_parent", "watch_forks"]


class _Watching(Protocol):
    def abandon(self) -> None: ...


_watching: weakref.WeakSet[_Watching] = weakref.WeakSet()
_left: list[object] = []


def watch_forks(end: _Watching) -> None:
    """Have ``end.abandon()`` called in every forked child, as long as ``end`` lives.

    It makes its locks anew, and has every use raise `explain_fork`'s error. Its threads are not
    there; descriptors of its own may be closed, which does nothing to the parent's.
    """
    _watching.add(end)


def leave_to_parent(*things: object) -> None:
    """Never free things in this child: what frees them would act upon what the parent uses."""
    _left.extend(things)


def explain_fork(url: object) -> Closed:
    """Return the error of a connection that was made before the fork."""
    return Closed(f"the connection to {url} belongs to the process before the fork")


def _abandon_all() -> None:
    for end in list(_watching):
        end.abandon()


os.register_at_fork(after_in_child=_abandon_all)
