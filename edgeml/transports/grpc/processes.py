"""Which process may use gRPC: none that was forked from one that does.

gRPC's threads are not in the child, its state is: 1 to 5 of 80 children of a client's process died
of SIGSEGV or SIGABRT when they connected, and 61 of 600 of a busy server's process.
"""

from __future__ import annotations

import os

from edgeml.core import PermissionDenied

__all__ = ["NO_FORKS", "enter_process"]

NO_FORKS = (
    'gRPC crashes in forked children: start this process with multiprocessing\'s "spawn" or '
    '"forkserver", as multiprocessing.get_context("spawn") does, or use another transport in it'
)

_user: int | None = None  # the process that uses gRPC


def enter_process() -> None:
    """Note that this process uses gRPC.

    Raises:
        PermissionDenied: the process from which it was forked does so already.
    """
    global _user
    if _user is None:
        _user = os.getpid()
    elif _user != os.getpid():
        raise PermissionDenied(NO_FORKS)
