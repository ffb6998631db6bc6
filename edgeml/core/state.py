"""What a server is at: starting, loading, ready, draining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

__all__ = ["ServerState", "State", "state_of"]

State = Literal["starting", "loading", "ready", "draining", "stopped"]


@dataclass(frozen=True)
class ServerState:
    """What a server is at.

    Attributes:
        state: "starting" until it listens, "loading" until it can answer calls, "ready",
            "draining" once it answers what it has and takes nothing new, and "stopped".
        progress: of loading, 0 to 1; 1 once it is ready.
        detail: what it is at, for people to read.
    """

    state: State
    progress: float = 1.0
    detail: str = ""

    def __str__(self) -> str:
        far = f", {self.progress:.0%} done" if self.state == "loading" else ""
        return f"{self.state}{far}" + (f": {self.detail}" if self.detail else "")


def state_of(name: str) -> State:
    """Check a state's name, which came from a server; one that isn't known is as good as ready."""
    return cast("State", name) if name in get_args(State) else "ready"
