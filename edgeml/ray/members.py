"""The actors of a deployment, as the controller knows them: asked what they are at, and ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from edgeml.core.errors import text_of
from edgeml.extras import load_ray
from edgeml.ray.deployment import Failure, ReplicaStatus
from edgeml.ray.replica import Description

__all__ = ["FIRST_ANSWER", "FIRST_PAUSE", "GOING", "LONGEST_PAUSE", "Member", "ask_all"]

_log = logging.getLogger(__name__)

_ANSWER = 0.5  # seconds that a step waits for its actors' answers; late ones count next time
FIRST_ANSWER = 5.0  # as long, where it is not known at all what they are at
GOING = 60.0  # seconds after which one that leaves is ended all the same
FIRST_PAUSE = 1.0  # seconds before one that failed is started anew; doubled each time
LONGEST_PAUSE = 30.0


@dataclass(eq=False)
class Member:
    """An actor that has ``describe()``, as a `Replica` has it.

    Attributes:
        id: its name within the deployment.
        name: its name in Ray, for the log.
        actor: the actor.
        version: of the deployment that it belongs to.
        number: of a shard, its own.
        node: of a relay, Ray's id of its node.
        asked: the answer that is due.
        told: what it told last.
        lost: whether it is being started anew.
        gone: whether it will not be.
        leaving: when it began to leave; 0.0 where it doesn't.
    """

    id: str
    name: str
    actor: Any
    version: int = 0
    number: int = -1
    node: str = ""
    asked: Any = None
    told: Description | None = None
    lost: bool = False
    gone: bool = False
    leaving: float = 0.0

    @property
    def ready(self) -> bool:
        """Whether it takes calls."""
        return (
            self.told is not None
            and self.told.state == "ready"
            and not (self.lost or self.gone or self.leaving)
        )

    @property
    def failure(self) -> Failure | None:
        """Why it can't be used, where that doesn't mend itself."""
        if self.gone:
            return Failure("RuntimeError", "Ray has ended its actor")
        if self.lost or self.told is None or self.told.state != "failed":
            return None
        return self.told.failure

    @property
    def at(self) -> str:
        """What it is at, as `ReplicaStatus.state`."""
        if self.gone:
            return "failed"
        if self.leaving:
            return "leaving"
        if self.lost:
            return "lost"
        return "starting" if self.told is None else self.told.state

    def tell(self) -> ReplicaStatus:
        """Return what users are told of it."""
        told = self.told
        if told is None or self.lost:
            return ReplicaStatus(self.id, state=self.at, version=self.version)
        return ReplicaStatus(
            id=self.id,
            url=told.url,
            state=self.at,
            detail=str(told.failure) if told.failure is not None else told.detail,
            node=told.node,
            pid=told.pid,
            version=self.version,
            waiting=told.waiting,
            running=told.running,
        )

    def begin_leaving(self) -> None:
        """Note that it leaves, from now on if it didn't before."""
        if not self.leaving:
            self.leaving = time.monotonic()

    def kill(self) -> None:
        """End its process, and have Ray start none in its place."""
        ray = load_ray()
        try:
            ray.kill(self.actor, no_restart=True)
        except ray.exceptions.RayError as error:
            _log.info("%s: %s", self.name, text_of(error))


def ask_all(
    members: Iterable[Member], lock: AbstractContextManager[Any], timeout: float = _ANSWER
) -> None:
    """Ask each actor what it is at; an answer that is late is taken the next time.

    Args:
        members: are asked.
        lock: is held as they take in what they are told.
        timeout: seconds to wait for answers.
    """
    ray = load_ray()
    for member in (members := list(members)):
        if member.asked is None and not member.gone:
            member.asked = member.actor.describe.remote()
    asked = {member.asked: member for member in members if member.asked is not None}
    if not asked:
        return
    done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=timeout)
    errors = ray.exceptions
    with lock:
        for each in done:
            member = asked[each]
            member.asked = None
            try:
                member.told = ray.get(each)
                member.lost = False
                if member.told.state in ("leaving", "left"):
                    member.begin_leaving()  # as a controller before this one has told it
            except errors.ActorUnavailableError:
                if not member.lost:
                    _log.info("%s is lost, and started anew", member.name)
                member.lost = True
            except errors.ActorDiedError:
                member.gone = True
            except errors.RayError as error:
                member.lost = True
                _log.warning("%s: %s", member.name, text_of(error))
