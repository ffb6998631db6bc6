"""Calls by value: who calls what, until when, with what payload, and the right to answer once."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from edgeml.core.episode import Episode
from edgeml.core.errors import EdgemlError, PermissionDenied, printable
from edgeml.core.security import ALL, Role
from edgeml.core.transport import Endpoint, Peer

__all__ = ["NOBODY", "Call", "Caller", "LocalCall"]


@dataclass(eq=False)
class Caller:
    """Who calls.

    Attributes:
        client_id: the identity that the client gave; random unless its user chose one.
        label: what the client calls itself, for people to read.
        peer: who the transport says it is.
        identity: the name of its key; None where the server asks for none.
        role: what that key may do.
        revoked: whether its key has been revoked since.
        episode: what handlers keep about it.
    """

    client_id: str
    label: str
    peer: Peer
    turn: float = 0.0  # when the next call may start, under a rate limit
    episode: Episode = field(default_factory=Episode)
    identity: str | None = None
    role: Role = ALL
    revoked: bool = False

    @property
    def group(self) -> str:
        """What it shares with others: its key, or else its machine, or else its connection."""
        return self.identity or self.peer.host or self.peer.id

    def join_episode(self) -> Episode:
        """Return the episode to which a call that comes now belongs, until it leaves it."""
        episode = self.episode
        episode.calls.append(None)  # before the look, so that its end either waits for this or was
        if episode.ended:
            episode.leave()
            episode = self.episode
            episode.calls.append(None)
        return episode

    def require(self, permission: str, name: str) -> None:
        """Raise PermissionDenied unless its key may do this.

        Args:
            permission: one of `edgeml.core.security.PERMISSIONS`.
            name: of what it is to be done with.
        """
        if self.role.allowed is not None and not self.role.allows(permission, name):
            raise PermissionDenied(
                f"the key of {self.identity!r} has the role {str(self.role)!r}, which lacks "
                f"{permission}:{printable(name)}"
            )

    def __str__(self) -> str:
        key = "" if self.identity is None else f" with the key of {self.identity}"
        return f"{printable(self.label or self.client_id)}{key} at {self.peer.address}"


NOBODY = Caller("", "", Peer("", ""))
"""Who calls where no client does."""


class Call(ABC):
    """One call of an interface, and the right to answer it: once, at any time, from any thread.

    Args:
        name: of the interface.
        caller: who calls.
        deadline: until when the caller waits, on the clock `time.monotonic`.
        nbytes: what the payload takes up while the call waits.
        source: the endpoint that brought it, which the handlers' thread may carry; None for none.

    Attributes:
        detail: what of the interface is meant, as a handler may say for the log: an action's key.
        episode: of the caller, when it came.
        arrived: when it came, on the clock `time.monotonic`.
        began: when its handler began.
        cost: seconds that it was expected to take, when it began to wait; unset before.
        ended: when there was a result, if that was before it was answered; else 0.
        batch_size: calls that are answered together with this.
        version: of what answers it; 0 for none.
    """

    __slots__ = (
        "_open",
        "arrived",
        "batch_size",
        "began",
        "caller",
        "cost",
        "deadline",
        "detail",
        "ended",
        "episode",
        "name",
        "nbytes",
        "source",
        "version",
    )

    cost: float

    def __init__(
        self,
        name: str,
        caller: Caller,
        deadline: float,
        nbytes: int = 0,
        source: Endpoint | None = None,
    ) -> None:
        self.name = name
        self.caller = caller
        self.deadline = deadline
        self.nbytes = nbytes
        self.source = source
        self.detail = ""
        self.episode = caller.episode
        self.arrived = self.began = time.monotonic()
        self.ended = 0.0
        self.batch_size = 1
        self.version = 0
        self._open = [True]  # until it is answered; to pop from it happens once

    @abstractmethod
    def payload(self) -> Any:
        """Return what the caller sent, decoded now: call this in the thread that handles it.

        Raises:
            Malformed: it can't be decoded.
        """

    def drop_payload(self) -> None:  # noqa: B027 - most have nothing to let go of
        """Let go of the payload, which has been copied: it may lie in memory that others need."""

    @property
    def expired(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return time.monotonic() > self.deadline

    @property
    def answered(self) -> bool:
        """Whether it has had its answer."""
        return not self._open

    def answer(self, value: Any) -> None:
        """Give the caller this result; the value may be changed when this returns.

        Raises:
            NotEncodable: the value can't be carried; an answer is still due.
            RuntimeError: there was an answer before.
        """
        self._settle(value, self._send)

    def fail(self, error: EdgemlError) -> None:
        """Give the caller this error in place of a result.

        Raises:
            RuntimeError: there was an answer before.
        """
        self._settle(error, self._send_error)

    def _settle(self, what: Any, send: Callable[[Any], None]) -> None:
        try:
            self._open.pop()
        except IndexError:
            raise RuntimeError(f"a call of {self.name!r} is answered twice") from None
        try:
            send(what)
        except BaseException:
            self._open.append(True)
            raise

    @abstractmethod
    def _send(self, value: Any) -> None:
        """Encode a result and give it to the caller."""

    @abstractmethod
    def _send_error(self, error: EdgemlError) -> None:
        """Give an error to the caller."""


class LocalCall(Call):
    """A call from this very process: the payload and the result are passed as they are.

    Args:
        name: of the interface.
        payload: any value.
        timeout: seconds until nobody waits any more.
        caller: who calls; somebody in this process by default.

    Attributes:
        future: gives the result, or raises what the handler's end does.
    """

    __slots__ = ("_payload", "future")

    def __init__(
        self, name: str, payload: Any, timeout: float = 10.0, caller: Caller | None = None
    ) -> None:
        who = caller or Caller("local", "local", Peer("local", "this process"))
        super().__init__(name, who, time.monotonic() + timeout)
        self.future: Future[Any] = Future()
        self._payload = payload

    def payload(self) -> Any:
        """See `Call.payload`."""
        return self._payload

    @property
    def expired(self) -> bool:
        """See `Call.expired`."""
        return self.future.done() or super().expired

    def _send(self, value: Any) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(value)

    def _send_error(self, error: EdgemlError) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)
