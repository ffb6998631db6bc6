"""A replica of the servers that are replaced, killed and scaled: what it begins and ends is told.

Its factory is called in an actor of Ray, whose process has nothing else of this package.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

from .history import Writer
from .witness import watch

_BEAT = 0.05  # seconds; a process of Ray's has many threads


@dataclass(frozen=True)
class Replicas:
    """Makes the servers.

    Attributes:
        directory: for what they tell.
        transport: by name.
        version: of all that are made by this.
        work: seconds that a call takes, without the interpreter's lock.
        breaks: what is broken on purpose; see `replicas_breaks`.
    """

    directory: str
    transport: str
    version: int
    work: float
    breaks: str = ""

    def __call__(self) -> Any:
        """Return a server, unstarted."""
        from edgeml import InferenceServer

        from .replicas_breaks import BREAKS

        if self.breaks in BREAKS:
            BREAKS[self.breaks]()
        pid = os.getpid()
        history = Writer(f"{self.directory}/replica.{pid}.jsonl")
        history.tell("made", version=self.version)
        watch(history, _BEAT)
        server = InferenceServer(0, transport=self.transport)

        def policy(call: str) -> dict[str, Any]:
            history.tell("begin", call=call)
            time.sleep(self.work)
            history.tell("done", call=call)
            return {"call": call, "pid": pid, "version": self.version}

        server.register_interface("policy", policy)
        return server
