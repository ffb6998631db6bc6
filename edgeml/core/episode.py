"""What is kept about a caller from one call to the next, and when that ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

__all__ = ["Episode", "RunInHandlers"]

_log = logging.getLogger(__name__)

RunInHandlers = Callable[[Callable[[], object]], object]
"""Runs a function in the handlers' thread, in its turn."""


class Episode:
    """A stretch of a caller's calls, in which handlers keep something about it.

    A call belongs to the episode in which it arrived. So one that begins meanwhile takes nothing
    away from it, and what is to be done at the end of an episode waits for its last call's answer.

    Attributes:
        id: what the caller names it; empty until it has named one.
        session: what handlers keep.
        calls: has as many entries as calls of this episode have no answer. Lists, since to append
            and to pop need no lock.
        ended: whether no more calls come.
    """

    __slots__ = ("__weakref__", "_ends", "_run", "calls", "ended", "id", "session")

    def __init__(self, id: str = "") -> None:
        self.id = id
        self.session: dict[Any, Any] = {}
        self.calls: list[None] = []
        self.ended = False
        self._ends: list[Callable[[], object]] = []
        self._run: RunInHandlers | None = None

    def on_end(self, function: Callable[[], object]) -> None:
        """Call ``function()`` in the handlers' thread once the last call of this has its answer."""
        self._ends.append(function)
        if self.ended:
            self.settle()

    def end(self, run: RunInHandlers) -> None:
        """Begin no more calls in this; ``run`` does what is to be done at the end."""
        self._run = run
        self.ended = True
        self.settle()

    def leave(self) -> None:
        """Take notice that a call of this has its answer."""
        self.calls.pop()
        if self.ended:
            self.settle()

    def settle(self) -> None:
        """Do what is to be done at the end, if this is it."""
        if self._run is not None and self._ends and not self.calls:
            self._run(self._run_ends)

    def _run_ends(self) -> None:
        while self._ends:
            try:
                self._ends.pop()()  # the newest first
            except IndexError:  # another worker took it
                return
            except Exception:
                _log.exception("what was to be done at the end of a session failed")
