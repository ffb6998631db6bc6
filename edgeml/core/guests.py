"""What a server keeps of its clients, and how those are let in who come by a door."""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from edgeml.core.dispatch import Call, Caller, require_plain
from edgeml.core.door import Dispatch, Guest
from edgeml.core.errors import Closed, DeadlineExceeded, EdgemlError, Malformed, shown
from edgeml.core.security import ClientKey
from edgeml.core.state import ServerState
from edgeml.core.transport import Endpoint, Peer

__all__ = ["Entrance", "Host", "Known", "Passage"]

_log = logging.getLogger(__name__)

_CALM = 0.9  # the part of a lag that still counts after the next sign of life


class Known(Caller):
    """A client as a server keeps it, from the moment it is let in.

    Attributes:
        proved: the key that it has shown.
        key: by which it is found again; nobody else knows it.
        seen: when it was last heard from.
        quiet: seconds since then, without those in which this process did not run.
        silence: seconds of quiet after which it is taken to be gone.
        lag: seconds by which it was later of late than one that has time; twice that is added.
        gone: whether it is; its next request shows that it is not.
        forget: seconds of quiet after which nothing is kept of it.
        left: whether it is no longer kept.
    """

    def __init__(
        self, client_id: str, label: str, peer: Peer, proved: ClientKey | None, forget: float
    ) -> None:
        super().__init__(client_id, label, peer)
        if proved is not None:
            self.identity, self.role = proved.name, proved.role
            self.proof = (proved.curve, proved.certificate, proved.token)
        self.proved = proved
        self.key = secrets.token_bytes(16)
        self.seen = time.monotonic()
        self.quiet = 0.0
        self.silence = self.forget = forget
        self.lag = 0.0
        self.gone = False
        self.left = False

    @property
    def patience(self) -> float:
        """Seconds of quiet after which it is taken to be gone, as slow as it is."""
        return min(self.silence + 2 * self.lag, self.forget)

    def note_lag(self, usual: float) -> None:
        """Take notice that it is heard from; its quiet should have been so long at most."""
        self.lag = max(self.quiet - usual, _CALM * self.lag, 0.0)


class Host(Protocol):
    """What an entrance asks of its server."""

    @property
    def state(self) -> ServerState:
        """What the server is at."""

    def admit(
        self, peer: Peer, token: str | None, make: Callable[[ClientKey | None], Known]
    ) -> Known:
        """Take a client in; raises as `Dispatch.enter` does."""

    def dismiss(self, known: Known) -> None:
        """Forget a client."""

    def begin_episode(self, caller: Caller, name: str) -> None:
        """Forget what is kept about a caller."""

    def submit(self, call: Call) -> None:
        """Have a call answered, if the server is ready; never raises."""


@dataclass(frozen=True)
class Passage:
    """What is done with a door's payloads and results on their way to a function and back.

    Args:
        names: of the top-level keys of a payload: theirs, and ours in their place; of a result that
            is a dict, ours and theirs.
        before: makes the function's payload of theirs.
        after: makes their result of the function's.

    Raises:
        ValueError: two names mean the same.
        TypeError: these are no names, or no functions.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    before: Callable[[Any], Any] | None = None
    after: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.names, Mapping) or not all(
            isinstance(name, str) for pair in self.names.items() for name in pair
        ):
            raise TypeError(
                f"names is a dict of texts, theirs and ours, not {shown(self.names, 200)}"
            )
        for name, function in (("before", self.before), ("after", self.after)):
            if function is not None:
                require_plain(name, function)
        ours = list(self.names.values())
        if len(set(ours)) < len(ours):
            raise ValueError(f"names {shown(dict(self.names), 200)} give two keys the same name")

    def bring(self, payload: Any) -> Any:
        """Return what the function gets."""
        if self.names and isinstance(payload, dict):
            payload = _rename(payload, self.names)
        return payload if self.before is None else self.before(payload)

    def take_back(self, result: Any) -> Any:
        """Return what the client gets."""
        if self.after is not None:
            result = self.after(result)
        if self.names and isinstance(result, dict):
            result = _rename(result, self._theirs)
        return result

    def tell(self, contract: dict[str, Any]) -> dict[str, Any]:
        """Return a contract's plain form with the names that the client knows."""
        told = dict(contract)
        for side in ("observation", "action"):
            features = told.get(side)
            if isinstance(features, dict) and all(isinstance(v, dict) for v in features.values()):
                told[side] = _rename(features, self._theirs)
        return told

    @cached_property  # each result needs it
    def _theirs(self) -> dict[str, str]:
        return {ours: theirs for theirs, ours in self.names.items()}


def _rename(given: dict[Any, Any], names: Mapping[str, str]) -> dict[Any, Any]:
    renamed = {names.get(key, key): value for key, value in given.items()}
    if len(renamed) < len(given):
        raise Malformed(
            f"two of the keys {shown(sorted(map(str, given)), 200)} have the same name here"
        )
    return renamed


class _DoorCall(Call):
    """A call that a door made. Its guest is answered in time, whatever its handler does."""

    __slots__ = ("_answer", "_entrance", "_fail", "_payload", "_untold", "guest")

    def __init__(
        self,
        guest: _Guest,
        entrance: Entrance,
        payload: Callable[[], Any],
        answer: Callable[[Any], object],
        fail: Callable[[EdgemlError], object],
        nbytes: int,
        timeout: float,
    ) -> None:
        super().__init__(entrance.interface, guest, 0.0, nbytes, entrance.endpoint)
        self.deadline = self.arrived + timeout
        self.episode = guest.join_episode()
        self.guest = guest
        self._entrance = entrance
        self._payload: Callable[[], Any] | None = payload
        self._answer = answer
        self._fail = fail
        self._untold = [True]  # until the guest has an answer; to pop from it happens once

    def payload(self) -> Any:
        assert self._payload is not None
        return self._entrance.passage.bring(self._payload())

    def drop_payload(self) -> None:
        self._payload = None

    @property
    def expired(self) -> bool:
        return not self._untold or self.guest.left or time.monotonic() > self.deadline

    def _send(self, value: Any) -> None:
        if self._claim():
            try:
                self._answer(self._entrance.passage.take_back(value))
            except BaseException:
                self._untold.append(True)
                raise
        self._settled()

    def _send_error(self, error: EdgemlError) -> None:
        self.tell(error)
        self._settled()

    def _claim(self) -> bool:
        try:
            self._untold.pop()
        except IndexError:
            return False
        return True

    def tell(self, error: EdgemlError) -> None:
        """Give the guest an error, unless it has an answer; the handler may go on."""
        if not self._claim():
            return
        self._entrance.under_way.discard(self)
        try:
            self._fail(error)
        except Exception:  # a door may be anybody's
            _log.exception("%s: an error did not reach its guest", self._entrance)

    def _settled(self) -> None:
        self._entrance.under_way.discard(self)
        self._payload = None
        self.episode.leave()


class _Guest(Known, Guest):
    """See `Guest`."""

    def __init__(
        self, entrance: Entrance, label: str, peer: Peer, proved: ClientKey | None, forget: float
    ) -> None:
        client_id = f"{entrance.scheme}-{secrets.token_hex(8)}"
        super().__init__(client_id, label, peer, proved, forget)
        if proved is not None:
            self.peer = replace(peer, identity=proved.name)
        self._entrance = entrance

    def call(
        self,
        payload: Callable[[], Any],
        answer: Callable[[Any], object],
        fail: Callable[[EdgemlError], object],
        *,
        nbytes: int = 0,
        timeout: float | None = None,
    ) -> None:
        entrance = self._entrance
        if self.left and not self.revoked:  # of that the dispatcher tells
            fail(Closed("the client has left, or was silent for too long: it has to come anew"))
            return
        wait = entrance.timeout if timeout is None else timeout
        call = _DoorCall(self, entrance, payload, answer, fail, nbytes, wait)
        self.seen = call.arrived
        entrance.counts[f"calls_by_{entrance.scheme}"] += 1
        entrance.under_way.add(call)
        entrance.host.submit(call)

    def begin_episode(self, name: str = "") -> None:
        self._entrance.host.begin_episode(self, name)

    def leave(self) -> None:
        self._entrance.host.dismiss(self)


class Entrance(Dispatch):
    """Where a door leads in.

    Args:
        host: the server.
        scheme: of the door's URL.
        interface: see `Dispatch`; "" until it is known, which is before the door is opened.
        passage: what is done with payloads and results.
        metadata: see `Dispatch`.
        timeout: see `Dispatch`.
        describe: tells the contract of an interface.

    Attributes:
        endpoint: of the door, once it is open.
        under_way: calls whose guests have no answer.
        counts: by kind.
    """

    def __init__(
        self,
        host: Host,
        scheme: str,
        interface: str,
        passage: Passage,
        metadata: Mapping[str, Any],
        timeout: float,
        describe: Callable[[str], dict[str, Any] | None],
    ) -> None:
        if not isinstance(metadata, Mapping):
            raise TypeError(
                f"metadata is a dict of what clients are told, not {shown(metadata, 200)}"
            )
        if not timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, not {timeout!r}")
        self.host = host
        self.scheme = scheme
        self.interface = interface
        self.passage = passage
        self.metadata = metadata
        self.timeout = timeout
        self.endpoint: Endpoint | None = None
        self.under_way: set[_DoorCall] = set()
        self.counts: dict[str, int] = {f"calls_by_{scheme}": 0}
        self._describe = describe

    def __str__(self) -> str:
        return self.scheme if self.endpoint is None else str(self.endpoint.url)

    @property
    def state(self) -> ServerState:
        """See `Dispatch.state`."""
        return self.host.state

    def contract(self) -> dict[str, Any] | None:
        """See `Dispatch.contract`."""
        contract = self._describe(self.interface)
        return None if contract is None else self.passage.tell(contract)

    def enter(
        self, peer: Peer, *, label: str = "", token: str | None = None, forget: float | None = None
    ) -> Guest:
        """See `Dispatch.enter`."""
        # Ids are compared with those of all other connections of the server.
        placed = replace(peer, id=f"{self.scheme} {id(self)} {peer.id}")
        after = math.inf if forget is None else forget
        made = self.host.admit(
            placed, token, lambda proved: _Guest(self, label[:200], placed, proved, after)
        )
        assert isinstance(made, _Guest)
        return made

    def look(self) -> None:
        """Tell those who have waited for long enough; called again and again."""
        now = time.monotonic()
        for call in list(self.under_way):
            if now > call.deadline:
                seconds = call.deadline - call.arrived
                call.tell(DeadlineExceeded(f"no answer within {seconds:.3g} s"))

    def close(self) -> None:
        """Tell all who still wait that the server stops, and stop listening."""
        for call in list(self.under_way):
            call.tell(Closed("the server has been stopped"))
        if self.endpoint is not None:
            self.endpoint.close()
