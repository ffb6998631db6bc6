"""Lets clients of GR00T's policy server in, over ZeroMQ: ``doors=["groot://0.0.0.0:5555"]``."""

from __future__ import annotations

from typing import ClassVar

from edgeml.core import (
    DEFAULT_LIMITS,
    Credentials,
    Dispatch,
    Door,
    Endpoint,
    Limits,
    Url,
    hookimpl,
)
from edgeml_groot.endpoint import GrootEndpoint
from edgeml_groot.zmtp import VERSION

__all__ = ["GrootDoor", "edgeml_door"]


class GrootDoor(Door):
    """``groot://host:port``: what a client of GR00T connects to as ``tcp://host:port``.

    A client's ``api_token`` is the token that the server asks for. GR00T's protocol has no
    encryption, so with keys it serves this machine alone.
    """

    name: ClassVar[str] = "groot"

    def report(self) -> dict[str, str]:
        """See `Door.report`."""
        return {"clients": "of N1.5, N1.6 and later", "ZMTP": "{}.{}".format(*VERSION)}

    def open(
        self,
        url: Url,
        dispatch: Dispatch,
        *,
        credentials: Credentials | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Endpoint:
        """See `Door.open`."""
        del credentials  # whose token is shown, `Dispatch.enter` finds out
        return GrootEndpoint(url, dispatch, limits)


@hookimpl
def edgeml_door() -> type[Door]:
    """Answer the plugin hook."""
    return GrootDoor
