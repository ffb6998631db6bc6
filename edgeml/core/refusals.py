"""What an end refuses by itself is counted each time, and logged once for each host and reason.

What keys are refused for is told in full; of the rest one of each kind tells enough.
"""

from __future__ import annotations

import logging
from collections import Counter

__all__ = ["Refusals"]

_log = logging.getLogger(__name__)
_MOST = 1024  # that are remembered; what floods a server need not fill its log


class Refusals:
    """Counts and tells what was refused; for one thread at a time.

    Args:
        name: of who refuses, for the log.
        counts: by kind; see `Endpoint.counts`.
    """

    def __init__(self, name: object, counts: Counter[str]) -> None:
        self._name = name
        self._counts = counts
        self._told: set[tuple[str, str]] = set()

    def count(self, kind: str, number: int) -> None:
        """Count some of whom nothing is known."""
        self._counts[kind] += number

    def note(self, kind: str, address: str, host: str, why: object) -> None:
        """Count one.

        Args:
            kind: as errors are called: ``"PermissionDenied"``.
            address: of whoever was refused.
            host: that this is on; another connection from there is told no more.
            why: for people to read.
        """
        self._counts[kind] += 1
        # The text alone: with an error, whoever keeps the log's lines would keep all that had come.
        text = str(why)
        told = (host, text if kind == "PermissionDenied" else kind)
        if told in self._told or len(self._told) >= _MOST:
            return
        self._told.add(told)
        _log.warning(
            "%s refused %s: %s (%s); more like it are counted", self._name, address, text, kind
        )
