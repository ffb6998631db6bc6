"""What strangers can have a server log: so many lines a second, each of them short, and no more."""

from __future__ import annotations

import logging
import threading
import time

from edgeml.core.errors import printable

__all__ = ["Lines"]

_EACH_SECOND = 50
_LONGEST = 500  # characters
_MOST_SAID = 1024  # texts that are remembered


class Lines:
    """Writes to a log for others, who could fill it. Safe to use from any thread.

    What is left out is counted, and told with the next line that there is room for.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._second = 0.0  # when the last one began, ...
        self._written = 0  # ... and how many lines there were in it
        self._left_out = 0
        self._said: set[str] = set()

    def write(self, level: int, text: str) -> None:
        """Write a line, cut to 500 characters that can be printed."""
        if not self._log.isEnabledFor(level):
            return
        with self._lock:
            now = time.monotonic()
            if now - self._second >= 1.0:
                self._second, self._written = now, 0
            if self._written >= _EACH_SECOND:
                self._left_out += 1
                return
            self._written += 1
            left_out, self._left_out = self._left_out, 0
        if left_out:
            self._log.warning("%d lines were left out, as there were too many", left_out)
        self._log.log(level, "%s", printable(text, _LONGEST))

    def write_once(self, level: int, text: str) -> None:
        """Write a line, unless it was written before."""
        text = text[:_LONGEST]
        with self._lock:
            if text in self._said:
                return
            if len(self._said) >= _MOST_SAID:
                self._said.clear()
            self._said.add(text)
        self.write(level, text)
