"""The transport half of the seam. One pattern only: a request, whose one reply may come at any
time, from any thread, in any order. Calls, streams, heartbeats and batching are built on it once,
in `edgeml.core.dispatch`, `edgeml.core.session` and `edgeml.core.streams`.

A transport is a plugin: publish a class through the entry-point group ``edgeml.transports`` whose
module answers the hook ``edgeml_transport``, and hold it to `edgeml.testing.TransportTests` by
subclassing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

from edgeml.core.deadline import Deadline
from edgeml.core.errors import DeadlineExceeded
from edgeml.core.limits import DEFAULT_LIMITS, Limits
from edgeml.core.message import Message
from edgeml.core.owned import ClosedAtExit, Unpicklable
from edgeml.core.security import Credentials
from edgeml.core.url import Url

__all__ = ["Endpoint", "OnRequest", "Peer", "Reply", "Requester", "Transport"]


@dataclass(frozen=True, slots=True)
class Peer:
    """Who sent a request, as far as the transport knows.

    Attributes:
        id: the same for all requests over one connection of the transport.
        address: for people to read.
        host: the same for all connections from one machine, or one user of this machine; empty
            where that isn't known.
        identity: the name of the key that it has proved to have (`edgeml.core.security.ClientKey`);
            None where the transport asks for no proof.
    """

    id: str
    address: str
    host: str = ""
    identity: str | None = None


class Reply(Protocol):
    """The right to answer one request: call it once, at any time, from any thread.

    It returns at once and never raises for a peer that has gone or reads too slowly: such a reply
    is dropped and counted (`Endpoint.dropped`), and the peer told if that can be. When it returns,
    the buffers may be changed.
    """

    @property
    def peer(self) -> Peer:
        """Who asks."""

    @property
    def expired(self) -> bool:
        """True once the transport knows that nobody waits for this reply any more."""

    def __call__(self, message: Message) -> None:
        """Answer.

        Raises:
            NotEncodable: this is more than the transport carries; an answer is still due.
        """


OnRequest = Callable[[Message, Reply], None]


class Endpoint(ClosedAtExit, Unpicklable, ABC):
    """One open end; a context manager that closes itself."""

    url: Url
    """Where peers reach it, the real port filled in."""

    dropped: int = 0
    """Messages that could not be delivered because the peer had gone or would not read."""

    local: bool = False
    """Whether only processes of this machine can be on the other side: by loopback, a Unix socket,
    or within the process."""

    secured: bool = False
    """Whether nobody else can read or change what passes, and each side has proved to the other who
    it is: by the credentials given, or as the system itself vouches for it."""

    @property
    def behind(self) -> float:
        """Seconds for which there was always something left to read here, as far as is known.

        Counted from when this is asked for first (`edgeml.core.backlog`). Who asks wants to know
        how long what is read now may have lain unread. 0.0 where that isn't known, as here.
        """
        return 0.0

    def heard_from(self, peer: Peer) -> float:
        """When something last came from a peer, a part of a message say, by `time.monotonic`.

        0 where that isn't known, as here. A message that takes long over a slow network is a sign
        of life then, and the heartbeats that wait behind it are not missed.
        """
        del peer
        return 0.0

    @cached_property
    def counts(self) -> Counter[str]:
        """What this end refused or cut off by itself, by kind: ``"PermissionDenied"``, say."""
        return Counter()

    @property
    def copied(self) -> int:
        """Messages that came as private copies, since too many views of others are held."""
        return 0

    @abstractmethod
    def close(self) -> None:
        """Free everything, join every thread, and wake blocked callers with `Closed`.

        Idempotent, quick, and allowed from any thread. Replies already given are sent if the
        peer takes them within a fraction of a second.
        """

    def carry(self, stay: Callable[[], bool]) -> bool:
        """Run this endpoint's loop in the calling thread, in place of the endpoint's own.

        A server's handlers run between two calls of this, so that a request and its reply need no
        thread hop, and all handlers run in one thread. A round receives what has come and calls
        ``on_request``. When this returns, the loop waits for the next call, from the same thread or
        another, or for `relieve`.

        Args:
            stay: asked before each round; where it is false, this makes one round, which waits
                for nothing, or none if another thread has the loop.

        Returns:
            False if this endpoint has ended, or has no loop that could be carried, as here.
        """
        del stay
        return False

    def wake(self) -> None:
        """Have a thread that waits in `carry` ask ``stay`` again; from any thread."""

    def relieve(self) -> None:
        """Carry on in the endpoint's own thread, as whoever carried the loop is busy elsewhere.

        Harmless where that isn't so. The next `carry` takes the loop back.
        """

    def allocate(self, nbytes: int) -> memoryview | None:
        """Memory of so many bytes that this endpoint sends without a copy; None if it has none.

        It may be filled until it has been sent, and only be read from then on: a receiver may be
        looking at it.
        """
        del nbytes
        return None

    def reply_many(self, replies: Iterable[Reply], message: Message) -> None:
        """Answer several requests of this endpoint with one message (a broadcast).

        Raises what a `Reply` does, before any is given.
        """
        for reply in replies:
            reply(message)

    def _leave(self) -> None:
        self.close()


class Requester(Endpoint):
    """A client's end: one connection. Once it is lost it stays lost, and core opens another.

    Usable from several threads at once. What one thread sends, by `request` and by `call`, is given
    to ``on_request`` in the order in which it was sent; what was given up, since it was cancelled
    or its time was over, comes at any time or not at all. What a thread leaves behind when it ends
    (a socket of its own, say) is freed within a second.

    A future's callbacks may use it as well, `call` included.
    """

    tells_loss: ClassVar[bool] = False
    """Whether `lost` becomes true as soon as the connection breaks, though nothing is asked. Core
    keeps a request under way where it doesn't."""

    @property
    def heard(self) -> float:
        """When something last came from the other side, or was taken by it, as `heard_from`."""
        return 0.0

    @property
    def lost(self) -> bool:
        """True once nothing more will be sent on it; a transport that can't tell says False."""
        return False

    @abstractmethod
    def request(self, message: Message) -> Future[Message]:
        """Send, and return at once; the buffers may be changed as soon as this has returned.

        The future gives the reply, or raises `Unreachable` when the connection is lost, `Closed`
        when this end is closed, and `Overloaded` where the other end tells that it had to drop the
        reply. It has no deadline of its own; cancel it to forget it.

        Raises:
            Overloaded: too many requests are waiting already.
            Unreachable: the connection has been lost.
            Closed: this end has been closed.
        """

    def call(self, message: Message, timeout: float) -> Message:
        """Send and wait for the reply: the hot path, so a transport may do better than this.

        When it returns, *or raises*, the buffers may be changed.

        Args:
            message: the request.
            timeout: seconds that all of it may take: to connect where that is still to be done, to
                send and to wait, whatever signals come meanwhile.

        Raises:
            DeadlineExceeded: no reply within ``timeout``.
            Unreachable, Closed, Overloaded: as for `request`.
        """
        deadline = Deadline(timeout)
        return self.wait_for(self.request(message), deadline)

    def wait_for(self, future: Future[Message], deadline: Deadline) -> Message:
        """Return a request's reply, or forget it and raise DeadlineExceeded at the deadline."""
        try:
            return future.result(deadline.left)
        except FutureTimeout:
            future.cancel()
            raise self._explain_silence(deadline) from None

    def _explain_silence(self, deadline: Deadline) -> DeadlineExceeded:
        return DeadlineExceeded(f"{self.url} gave no reply within {deadline.timeout:g} s")


class Transport(ABC):
    """One way of moving messages, chosen by name or by URL scheme. Its instances hold no state."""

    name: ClassVar[str]
    """The URL scheme; the same as the entry point's name."""

    def report(self) -> dict[str, str]:
        """What it is made of and what limits it on this machine, for people to read, by name.

        ``edgeml doctor`` shows it; for example ``{"libzmq": "4.3.5"}``.
        """
        return {}

    @abstractmethod
    def serve(
        self,
        url: Url,
        on_request: OnRequest,
        *,
        credentials: Credentials | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Endpoint:
        """Listen at ``url`` and give every request to ``on_request``, from the endpoint's own
        thread or the one that carries its loop.

        Args:
            url: where to listen; port 0 lets the system pick one.
            on_request: is given the message and the right to reply, one request at a time. It
                returns quickly. An exception from it is logged, and the endpoint lives.
            credentials: a server's keys. A transport that secures its channel by them says so
                (`Endpoint.secured`); one that can't leaves them alone, and is then used with keys
                only where the endpoint is `Endpoint.local`.
            limits: what peers may make this end keep or do.

        Raises:
            OSError: the address is taken, or isn't this machine's.
            ValueError: the credentials lack what this transport needs, or the URL says more than it
                understands.
        """

    @abstractmethod
    def connect(
        self, url: Url, timeout: float, *, credentials: Credentials | None = None
    ) -> Requester:
        """Open a connection to the endpoint at ``url``.

        Args:
            url: where it is.
            timeout: seconds that all of it may take: to look up the host, whose name server may not
                answer, to try its addresses, and to shake hands.
            credentials: a client's keys; see `serve`.

        Raises:
            ValueError: the credentials lack what this transport needs, or the URL says more than it
                understands.
            PermissionDenied: one side doesn't accept the other's keys, or has none; within two
                seconds.
            Unreachable: nobody listens there, or nobody answered within ``timeout`` seconds. A
                transport that can't tell may leave this to the first request.
        """
