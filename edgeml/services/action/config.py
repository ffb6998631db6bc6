"""What a device offers, as both ends are told."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeml.services.base import names

__all__ = ["CLOCK", "OBSERVATIONS", "ActionConfig"]

OBSERVATIONS = "observations"
"""The topic of what a device publishes."""

CLOCK = "clock"
"""The extension of the hello, and the interface, that tell the device's clock."""


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
        action_timeout: seconds after the last action of a key after which the device itself calls
            ``on_action_timeout``, and the age beyond which an action is not begun unless it says
            itself how long it is valid: of every key, or of those named. None for no such bound.
            The server's counts; not compared.
        on_action_timeout: the safe action: ``on_action_timeout(key)``, or with no argument. It is
            called once each time that commands stop, in a thread of its own; see
            ``docs/guides/safe-robots.md``. The server's counts; not compared.
        action_rate: actions per second of each key. A new holder's first action waits one period
            after the last one of the holder before. None for no such wait. The server's counts;
            not compared.
    """

    port_number: int
    action_keys: Sequence[str] = field(default_factory=list)
    observation_keys: Sequence[str] = field(default_factory=list)
    broadcast_port: int | None = None
    version: str = "1"
    transport: str | None = None
    action_timeout: float | Mapping[str, float] | None = None
    on_action_timeout: Callable[..., object] | None = None
    action_rate: float | None = None

    def shared(self) -> dict[str, Any]:
        """What the two sides' configurations must agree on."""
        return {
            "version": self.version,
            "action_keys": sorted(names("action_keys", self.action_keys)),
            "observation_keys": sorted(names("observation_keys", self.observation_keys)),
        }

    def timeouts(self) -> dict[str, float]:
        """The seconds of ``action_timeout`` of each key that has any.

        Raises:
            ValueError: they aren't positive, or are a key's that there isn't.
        """
        keys, given = names("action_keys", self.action_keys), self.action_timeout
        if given is None:
            return {}
        seconds = dict(given) if isinstance(given, Mapping) else dict.fromkeys(keys, given)
        if unknown := [key for key in seconds if key not in keys]:
            raise ValueError(f"action_timeout names {unknown}; the action_keys are {keys}")
        for each in seconds.values():
            if isinstance(each, bool) or not isinstance(each, (int, float)) or not each > 0:
                raise ValueError(f"action_timeout is a positive number of seconds, not {each!r}")
        return {key: float(each) for key, each in seconds.items() if each < math.inf}

    def period(self) -> float:
        """The seconds of one action at ``action_rate``; 0 where that isn't given.

        Raises:
            ValueError: it isn't positive.
        """
        rate = self.action_rate
        if rate is None:
            return 0.0
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
            raise ValueError(f"action_rate is a positive number of Hz, not {rate!r}")
        return 1 / rate
