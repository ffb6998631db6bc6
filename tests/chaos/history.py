"""What a process did, and when: a file that it appends to, and which outlives `kill -9`.

An event is a line of JSON with the key ``e`` (what), ``t`` (by `time.monotonic`, which is one clock
for all processes of a machine) and whatever else it tells. What is about to be done is an event of
its own, before the one of its outcome: of what a killed process began nobody knows the outcome.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class Writer:
    """Appends events to a file; what `tell` returned from is in the page cache, past any kill.

    Args:
        path: of the file.
        ahead: seconds by which this process's clock is before the harness's, by which is told.
    """

    def __init__(self, path: str | os.PathLike[str], ahead: float = 0.0) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._ahead = ahead

    def now(self) -> float:
        """The harness's time."""
        return time.monotonic() - self._ahead

    def tell(self, e: str, **more: Any) -> None:
        line = json.dumps({"e": e, "t": self.now(), **more}) + "\n"
        os.write(self._fd, line.encode())


def read(directory: Path) -> list[Event]:
    """All events of a run, in the order of time; each with ``who`` and ``life``, by its file."""
    events = []
    for path in directory.glob("*.jsonl"):
        who, _, life = path.stem.rpartition(".")
        for line in path.read_bytes().split(b"\n")[:-1]:  # a torn last line tells nothing
            event = json.loads(line)
            event["who"], event["life"] = who, int(life)
            events.append(event)
    events.sort(key=lambda event: event["t"])
    return events
