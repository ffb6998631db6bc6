"""Publications that only those get who were there.

edgeml gives a new subscriber what was published last; agentlace gives it nothing until the next
publication. So each says which of its server's it is, and a subscriber asks first how many there
have been.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from typing import Any

from agentlace.internal.values import pack, unpack

__all__ = ["COUNT", "Counted", "news_for"]

COUNT = "/agentlace/published"
"""What a subscriber asks for; users' names don't begin with a slash."""

_KEYS = {"server", "number", "value"}


class Counted:
    """A server's publications, counted from 1."""

    def __init__(self) -> None:
        self._server = secrets.token_hex(8)  # of this start of it
        self._number = 0
        self._lock = threading.Lock()

    def publish(self, publish: Callable[[Any], Any], value: Any) -> None:
        """Publish a value with its number."""
        with self._lock:
            publish({**self.count(1), "value": pack(value)})
            self._number += 1

    def count(self, more: int = 0) -> dict[str, Any]:
        """Return the answer to `COUNT`."""
        return {"server": self._server, "number": self._number + more}


def news_for(callback: Callable[[Any], Any], known: Any) -> Callable[[Any], None]:
    """Return what calls back with the values that were published after ``known`` was counted.

    Args:
        callback: a user's.
        known: what `Counted.count` gave; anything else for no publication.
    """
    known = known if isinstance(known, dict) else {}
    server, number = known.get("server"), known.get("number", 0)

    def receive(published: Any) -> None:
        if isinstance(published, dict) and published.keys() == _KEYS:
            if published["server"] == server and published["number"] <= number:
                return
            published = published["value"]  # else it is from a server of edgeml's own
        callback(unpack(published))

    return receive
