"""What a device offers, as both ends are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeml.services.base import names

__all__ = ["OBSERVATIONS", "ActionConfig"]

OBSERVATIONS = "observations"
"""The topic of what a device publishes."""


@dataclass
class ActionConfig:
    """What a device offers; both sides have one, and what they must share is compared.

    Attributes:
        port_number: where the server listens; 0 lets the system pick. Not compared.
        action_keys: the names of the actions that it takes.
        observation_keys: the names of the observations that it offers.
        broadcast_port: a second port that answers just as well; None for none. Where it is taken,
            the server warns and does without. Not compared.
        version: of the two programs' agreement.
        transport: a transport's name, or a URL; None for ``$EDGEML_TRANSPORT``, which defaults to
            ``"zmq"``. Not compared.
    """

    port_number: int
    action_keys: Sequence[str] = field(default_factory=list)
    observation_keys: Sequence[str] = field(default_factory=list)
    broadcast_port: int | None = None
    version: str = "1"
    transport: str | None = None

    def shared(self) -> dict[str, Any]:
        """What the two sides' configurations must agree on."""
        return {
            "version": self.version,
            "action_keys": sorted(names("action_keys", self.action_keys)),
            "observation_keys": sorted(names("observation_keys", self.observation_keys)),
        }
