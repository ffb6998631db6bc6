"""What the servers, and what the clients, have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from agentlace.internal.values import unpack
from edgeml import EdgemlError, NotEncodable
from edgeml.services.base import ServiceServer

__all__ = ["ServerBase", "answer_or_none"]

_log = logging.getLogger("agentlace")


class ServerBase:
    """Starts and stops the server of edgeml's that does the work."""

    _server: ServiceServer

    def start(self, threaded: bool = False) -> None:
        """Serve until `stop` or Ctrl-C; in the background with ``threaded``."""
        self._server.start(threaded)

    def stop(self) -> None:
        """Stop serving."""
        self._server.stop()

    @property
    def port(self) -> int:
        """Where it listens since the start, also where the configuration's port is 0, for any."""
        return self._server.port

    @property
    def url(self) -> str:
        """Where clients reach it, and by which transport."""
        return self._server.url

    def stats(self) -> dict[str, int]:
        """Counts since the start; see `edgeml.TrainerServer.stats` and the like."""
        return self._server.stats()


def answer_or_none(ask: Callable[[], Any]) -> Any:
    """Return what a server answers; None where it doesn't, or with an error, which is logged.

    Raises:
        NotEncodable: what it was to be asked can't be sent.
    """
    try:
        return unpack(ask())
    except NotEncodable:
        raise
    except (EdgemlError, ValueError) as error:
        _log.warning("no answer: %s", error)
        return None
