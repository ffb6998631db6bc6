"""What a deployment is to the controller, and what it tells of itself; knows nothing of Ray."""

from __future__ import annotations

import re
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from edgeml.core.errors import text_of
from edgeml.core.resolver import Place

__all__ = [
    "Ask",
    "Autoscale",
    "Deployment",
    "Failure",
    "Host",
    "ReplicaStatus",
    "Spec",
    "State",
    "Status",
    "check_name",
]

State = Literal["starting", "ready", "replacing", "failed", "ending"]

# What a URL's host may be: urlsplit makes small letters of large ones.
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,99}")


def check_name(name: object) -> str:
    """Return a deployment's name, if it can be one.

    Raises:
        ValueError: it can't.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"a deployment can't be called {name!r}: small letters, digits, '-', '_' and '.', at "
            "most 100 of them, since it becomes part of a URL"
        )
    return name


@dataclass(frozen=True)
class Autoscale:
    """How many replicas there are, by how many calls wait.

    A replica that keeps up has one call under way and few that wait. More are started once for
    ``up_after`` seconds more than ``waiting`` calls have waited for each, but for moments; one is
    ended once for ``down_after`` seconds one fewer would have kept up, with room to spare.

    Args:
        least: replicas that there always are, at least 1.
        most: replicas that there are at most.
        waiting: calls that may wait for each.
        up_after: seconds.
        down_after: seconds.
    """

    least: int = 1
    most: int = 4
    waiting: float = 2.0
    up_after: float = 2.0
    down_after: float = 30.0

    def __post_init__(self) -> None:
        """Check the bounds."""
        if not 1 <= self.least <= self.most:
            raise ValueError(f"least {self.least} and most {self.most}: 1 <= least <= most")
        if not self.waiting > 0:
            raise ValueError(f"waiting must be positive, not {self.waiting}")
        if not (self.up_after > 0 and self.down_after > 0):
            raise ValueError("up_after and down_after are positive numbers of seconds")

    def within(self, n: int) -> int:
        """Return the number nearest to this that there may be."""
        return min(max(n, self.least), self.most)


@dataclass(frozen=True)
class Failure:
    """What a deployed function raised, or what else went wrong.

    Attributes:
        type_name: of the exception; empty where it just took too long.
        text: for people to read.
        traceback: the far side's.
    """

    type_name: str
    text: str
    traceback: str = ""

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Keep an error that is being handled: Ray takes what a constructor raises to be final."""
        return cls(type(error).__qualname__, text_of(error), traceback.format_exc())

    def __str__(self) -> str:
        return f"{self.type_name}: {self.text}" if self.type_name else self.text


@dataclass(frozen=True)
class ReplicaStatus:
    """One server of a deployment.

    Attributes:
        id: its name within the deployment.
        url: where it is reached, the ways separated by commas; "" as long as it isn't.
        state: "starting" until its process has called the factory, "loading", "ready", "leaving"
            once it takes no more calls, "lost" while it is started anew, "failed".
        detail: more of that, for people to read.
        node: the address of its machine.
        pid: its process there; 0 as long as there is none.
        version: of the deployment that it belongs to.
        waiting: calls that wait there.
        running: threads that are at a call, or at a batch of them.
    """

    id: str
    url: str = ""
    state: str = "starting"
    detail: str = ""
    node: str = ""
    pid: int = 0
    version: int = 0
    waiting: int = 0
    running: int = 0


@dataclass(frozen=True)
class Status:
    """What a deployment is at.

    Attributes:
        name: as it was deployed.
        kind: "servers" for equal ones, "trainer" for a learner in shards.
        state: "starting", "ready", "replacing" while a new version takes the place of another,
            "failed" where none of its replicas could be started, "ending" once it is deleted.
        wanted: replicas that there are to be.
        ready: replicas that take calls.
        version: counts from 1, one more each time that the name is deployed. While it is replaced,
            and where that failed, the old one's.
        replicas: each of them.
        autoscale: the bounds, if it scales by itself.
        failure: why the newest version could not be started; None if it could.
        note: what was given with it.
        names: the address of the name service, HOST:PORT.
    """

    name: str
    kind: str
    state: State
    wanted: int
    ready: int
    version: int
    replicas: Sequence[ReplicaStatus] = ()
    autoscale: Autoscale | None = None
    failure: Failure | None = None
    note: str = ""
    names: str = ""

    @property
    def url(self) -> str:
        """What clients give as ``url=``, wherever they are."""
        return f"ray://{self.names}/{self.name}"


@dataclass(frozen=True)
class Ask:
    """Who asks where the servers are.

    Attributes:
        service: the kind of server that is wanted.
        client_id: the client's identity.
        node: the id of Ray's node on which it runs; "" outside of Ray.
        host: the address of its machine, as the name service sees it.
        path: what follows the name in the URL: ``"2"`` of ``ray://learner/2``.
    """

    service: str
    client_id: str
    node: str = ""
    host: str = ""
    path: str = ""


@dataclass(frozen=True)
class Host:
    """What a deployment may ask of the controller. Safe to use from any thread.

    Attributes:
        keep: keeps a spec that has changed, so that a controller which is started anew has it.
        changed: says that `Deployment.places` may answer otherwise than before.
    """

    keep: Callable[[Spec], None]
    changed: Callable[[], None]


@dataclass(frozen=True)
class Spec(ABC):
    """What a deployment is made of: pickled, and kept for as long as it exists.

    Attributes:
        kind: see `Status`.
        name: of the deployment.
        note: an opaque text, which its status gives back.
        version: see `Status`; the controller counts.
    """

    kind: ClassVar[str]
    name: str
    note: str = ""
    version: int = 0

    @abstractmethod
    def open(self, host: Host) -> Deployment:
        """Make the deployment, in the controller; or again, in one that was started anew.

        Whatever actors of it there are go on, so look for them: clients are told its `places` as
        soon as this returns.
        """


class Deployment(ABC):
    """What the controller keeps under a name. Its methods are called from several threads."""

    @abstractmethod
    def step(self) -> None:
        """Bring what is nearer to what the spec wants; called a few times a second.

        In a thread of this deployment's own, so it may block for some seconds.
        """

    @abstractmethod
    def replace(self, spec: Spec) -> None:
        """Take a new spec, of a later version; quick, as all but `step` and `end`."""

    @abstractmethod
    def scale(self, n: int) -> None:
        """Want so many servers from now on.

        Raises:
            ValueError: it can't have so many.
        """

    @abstractmethod
    def places(self, ask: Ask) -> Sequence[Place]:
        """Return the servers that a client is told of."""

    @abstractmethod
    def status(self) -> Status:
        """Return what it is at."""

    @abstractmethod
    def end(self) -> None:
        """End all that it has, within a minute or so; the last thing that is called."""
