"""Ways to break the library, in clients or in replicas, by which the checker is tested."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any


def _send_again() -> None:
    """What may have been carried out is sent once more."""
    from edgeml import InferenceClient, Unreachable

    call = InferenceClient.call

    def again(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(self, *args, **kwargs)
        except Unreachable:
            return call(self, *args, **kwargs)

    InferenceClient.call = again  # type: ignore[method-assign]


def _drop_calls() -> None:
    """A server that drains answers nothing more."""
    from edgeml.core.server import Server

    Server.drain = lambda self, timeout: self.stop() or False  # type: ignore[method-assign]


def _swap_answers() -> None:
    """Now and then a client gets what another call was answered."""
    from edgeml import InferenceClient

    call, turns, kept = InferenceClient.call, itertools.count(1), list[Any]()

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept.append(call(self, *args, **kwargs))
        return kept.pop(0) if next(turns) % 50 or len(kept) > 1 else kept[0]

    InferenceClient.call = other  # type: ignore[method-assign]


def _wait_on() -> None:
    """A call has all the time in the world."""
    from edgeml import InferenceClient

    call = InferenceClient.call

    def patient(self: Any, name: str, payload: Any, timeout: float | None = None) -> Any:
        del timeout
        return call(self, name, payload, 60.0)

    InferenceClient.call = patient  # type: ignore[method-assign]


BREAKS: dict[str, Callable[[], None]] = {
    "what may have been carried out is sent again": _send_again,
    "calls are dropped by a server that drains": _drop_calls,
    "answers are swapped": _swap_answers,
    "calls wait on": _wait_on,
}
