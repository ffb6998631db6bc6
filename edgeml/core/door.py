"""The third kind of plugin: a door, by which other people's clients come in.

A door listens in a protocol of its own and makes *calls by value* of what it hears: a payload to be
had, whose it is, and what to do with the answer. It sees no envelope and runs no handler: all it
knows of the server that it leads to is `Dispatch`. So one function, registered once, answers native
clients and those of every door, in the same batches.

Publish a class through the entry-point group ``edgeml.doors`` whose module answers the hook
``edgeml_door``, and hold it to `edgeml.testing.DoorTests` by subclassing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from edgeml.core.errors import EdgemlError
from edgeml.core.limits import DEFAULT_LIMITS, Limits
from edgeml.core.security import Credentials
from edgeml.core.state import ServerState
from edgeml.core.transport import Endpoint, Peer
from edgeml.core.url import Url

__all__ = ["Dispatch", "Door", "Guest"]


class Guest(ABC):
    """A client that has come in by a door, until it leaves. Safe to use from any thread.

    Attributes:
        peer: who it is; with the name of its key as ``identity``, where the server asks for keys.
        left: whether it has left: by itself, as its time was over, or as its key was revoked.
    """

    peer: Peer
    left: bool

    @abstractmethod
    def call(
        self,
        payload: Callable[[], Any],
        answer: Callable[[Any], object],
        fail: Callable[[EdgemlError], object],
        *,
        nbytes: int = 0,
        timeout: float | None = None,
    ) -> None:
        """Have the door's function called; returns at once, and never raises.

        Exactly one of ``answer`` and ``fail`` is called, once, at any time, from any thread, also
        from within this: in time whatever the function does, and also where the guest has left.

        Args:
            payload: gives what the client sent, decoded now, in the thread that handles the call or
                puts it into a batch; arrays may be read-only views of what was received. It raises
                Malformed for what can't be decoded, and is called once at most.
            answer: takes the result, which may be changed once this has returned: encode it first.
                What it raises is given to ``fail``, as an error of the function.
            fail: takes the error.
            nbytes: what the payload takes up while the call waits.
            timeout: seconds after which ``fail`` is given DeadlineExceeded, within half a second;
                `Dispatch.timeout` by default.
        """

    @abstractmethod
    def begin_episode(self, name: str = "") -> None:
        """Forget what functions keep about this guest; calls made before find it as it was."""

    @abstractmethod
    def leave(self) -> None:
        """Forget the guest, and what waits of it; idempotent. Its connection is over."""


class Dispatch(ABC):
    """What a door may ask of the server that it leads to. Safe to use from any thread.

    Attributes:
        interface: the name of the function that the door's protocol means.
        metadata: what whoever opened the door wants clients to be told, where the protocol has a
            place for it; plain values.
        timeout: seconds that a call may take where the protocol says nothing.
    """

    interface: str
    metadata: Mapping[str, Any]
    timeout: float

    @property
    @abstractmethod
    def state(self) -> ServerState:
        """What the server is at; calls are refused with NotReady unless it is "ready"."""

    @abstractmethod
    def contract(self) -> dict[str, Any] | None:
        """Return what the function takes and gives, as `PolicyContract.to_plain` does.

        Its keys are those that clients know, where the door was opened with ``names``. None if it
        isn't stated, or there is no such function yet.
        """

    @abstractmethod
    def enter(
        self, peer: Peer, *, label: str = "", token: str | None = None, forget: float | None = None
    ) -> Guest:
        """Let a client in; one connection may be several, as where a protocol has session ids.

        Args:
            peer: who has come: ``id`` names the connection, ``host`` its machine.
            label: what the client calls itself, for people to read; at most 200 characters.
            token: what it shows where the server asks for keys: the token of its key.
            forget: seconds without a call after which it is taken to have left; by default it stays
                until `Guest.leave`, as a door sees when a connection ends.

        Raises:
            PermissionDenied: the server asks for keys, and this is none of them.
            Overloaded: there are too many clients, in all or of this connection or machine.
            NotReady: the server is draining.
            Closed: the server has been stopped.
        """


class Door(ABC):
    """One protocol of other people's clients, by URL scheme. Its instances hold no state."""

    name: ClassVar[str]
    """The URL scheme; the same as the entry point's name."""

    def report(self) -> dict[str, str]:
        """What it is made of and what limits it on this machine; see `Transport.report`."""
        return {}

    @abstractmethod
    def open(
        self,
        url: Url,
        dispatch: Dispatch,
        *,
        credentials: Credentials | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Endpoint:
        """Listen at ``url``, and make calls of what clients send.

        The endpoint's `Endpoint.carry` saves a call two thread hops, and need not be there. Its
        ``close`` ends all connections; until it returns, answers that were given are sent to those
        who read them. It says whether it is ``local``, and whether ``secured``: nobody else can
        read what passes, so that a token may be shown on it. A server with keys opens no door that
        is neither.

        Args:
            url: where; port 0 lets the system pick one.
            dispatch: where calls go.
            credentials: those of the server, if it asks for keys. A door can use their
                certificate; whose a token is, `Dispatch.enter` finds out.
            limits: what one peer, and all together, may make the door hold.

        Raises:
            OSError: the address is taken, or isn't this machine's.
            ValueError: the credentials can't be used here.
        """
