"""What a learner and its actors must agree on, and where they meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeml.services.base import names

__all__ = ["NETWORK", "TrainerConfig"]

NETWORK = "network"
"""The topic on which weights are published."""


@dataclass
class TrainerConfig:
    """What a learner serves; both sides have one, and what they must share is compared.

    Attributes:
        port_number: where the server listens; 0 lets the system pick. Not compared.
        broadcast_port: a second port that answers just as well; None for none. Where it is taken,
            the server warns and does without. Not compared.
        request_types: the names that `TrainerClient.request` may be given.
        rate_limit: calls per second and client; those beyond wait their turn within their
            deadline. None for any number. Not compared.
        version: of the two programs' agreement.
        transport: a transport's name, or a URL; None for ``$EDGEML_TRANSPORT``, which defaults to
            ``"zmq"``. Not compared.
    """

    port_number: int = 5555
    broadcast_port: int | None = 5556
    request_types: Sequence[str] = field(default_factory=list)
    rate_limit: float | None = None
    version: str = "1"
    transport: str | None = None

    def shared(self) -> dict[str, Any]:
        """What the two sides' configurations must agree on."""
        return {
            "version": self.version,
            "request_types": sorted(names("request_types", self.request_types)),
        }
