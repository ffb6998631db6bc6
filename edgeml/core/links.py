"""A whole transport from what carries pieces of bytes in asyncio: say how to listen, how to dial,
and how to send and receive a piece, and the rest of `Transport` is here.

A piece is a request's number, 8 bytes, little-endian, and then the message's frame
(`edgeml.core.frames`); the reply to it carries the same number.
"""

from __future__ import annotations

import asyncio
import struct
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, ClassVar, Protocol

from edgeml.core.advice import explain_no_connection
from edgeml.core.carrier import Stay
from edgeml.core.errors import Closed, EdgemlError, Overloaded, Unreachable, copy_error
from edgeml.core.frames import parts, unframe
from edgeml.core.limits import DEFAULT_LIMITS, Limits
from edgeml.core.loops import Loop
from edgeml.core.message import Message
from edgeml.core.pending import Pending
from edgeml.core.security import Credentials
from edgeml.core.strangers import find_stranger
from edgeml.core.transport import Endpoint, OnRequest, Peer, Requester, Transport
from edgeml.core.url import Url, is_loopback

__all__ = ["Accept", "Link", "LinkTransport", "Listening"]

_NUMBER = struct.Struct("<Q")
_MOST_WAITING = 1 << 28  # bytes that one peer has not taken yet; what comes then is refused
_SOON = 0.5  # seconds in which a server usually answers who connects
_GRACE = 0.5  # seconds that an end which closes gives to what is still to be sent


class Link(Protocol):
    """A connection to one peer. All of it is called in one event loop."""

    async def send(self, piece: bytes, /) -> object:
        """Send a piece, and return when there is room for the next.

        The next may come before: its order is settled before this first waits for anything.
        """

    async def receive(self) -> bytes:
        """The next piece. Raises any exception when the connection is lost."""

    async def close(self) -> object:
        """Send what was given, then end the connection; `abort` follows if this takes long."""

    def abort(self) -> object:
        """End the connection at once, whatever state it is in."""


Accept = Callable[[Link, object], Coroutine[Any, Any, None]]
"""Takes a new link and the peer's address, and returns when it is over."""

Listening = tuple[Url, Callable[[], object]]
"""Where peers reach a server, and what makes it stop listening; not the links' end."""


class LinkTransport(Transport):
    """Subclass it, and set `name`."""

    greeting: ClassVar[bytes] = b""
    """How a server of it begins what it says, unasked or to an HTTP request, as a regular
    expression: whoever says anything else on its port is told apart by that (`find_stranger`)."""

    @abstractmethod
    async def listen(self, url: Url, accept: Accept) -> Listening:
        """Have ``accept`` run for each connection that comes.

        Raises:
            OSError: the address is taken, or isn't this machine's.
        """

    @abstractmethod
    async def dial(self, url: Url) -> Link:
        """Connect. Raises any exception if nobody answers; is cancelled when that takes long.

        An `EdgemlError` is passed on as it is, and the text of any other is quoted.
        """

    def serve(
        self,
        url: Url,
        on_request: OnRequest,
        *,
        credentials: Credentials | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Endpoint:
        """See `Transport.serve`."""
        return _Listener(url, on_request, self.listen)

    def connect(
        self, url: Url, timeout: float, *, credentials: Credentials | None = None
    ) -> Requester:
        """See `Transport.connect`."""
        return _Connection(url, timeout, self.dial, self.greeting)


class _Traffic:
    """What goes through one link; `put` may be called from any thread."""

    def __init__(self, loop: Loop, link: Link) -> None:
        self._loop = loop
        self._link = link
        self._waiting = 0  # bytes
        self._lock = threading.Lock()
        self.lost = False

    def put(self, number: int, message: Message, failed: Callable[[EdgemlError], object]) -> None:
        """Send soon; calls ``failed``, in any thread, if that can't be."""
        piece = b"".join([_NUMBER.pack(number), *parts(message)])
        with self._lock:
            full = self._waiting > _MOST_WAITING
            self._waiting += 0 if full else len(piece)
        if full:
            failed(Overloaded(f"more than {_MOST_WAITING} bytes wait for the peer to read them"))
            return
        try:
            self._loop.start(self._send(piece, failed))
        except Closed as error:
            failed(error)

    async def _send(self, piece: bytes, failed: Callable[[EdgemlError], object]) -> None:
        try:
            await self._link.send(piece)
        except Exception as error:
            failed(Unreachable(f"the connection was lost: {error}"))
        finally:
            with self._lock:
                self._waiting -= len(piece)

    async def receive(self, arrived: Callable[[int, Message], object]) -> str:
        """Hand over what arrives until the connection is lost, and tell why it was."""
        try:
            while True:
                piece = await self._link.receive()
                (number,) = _NUMBER.unpack_from(piece)
                arrived(number, unframe(memoryview(piece)[_NUMBER.size :]))
                del piece  # or it lives until the next one arrives
        except Exception as error:  # the link's, or of what is no message
            return str(error) or type(error).__name__
        finally:
            self.lost = True
            self._link.abort()


class _Reply:
    __slots__ = ("_dropped", "_number", "_traffic", "peer")

    def __init__(
        self, traffic: _Traffic, number: int, peer: Peer, dropped: Callable[[EdgemlError], object]
    ) -> None:
        self._traffic = traffic
        self._number = number
        self._dropped = dropped
        self.peer = peer

    @property
    def expired(self) -> bool:
        return self._traffic.lost

    def __call__(self, message: Message) -> None:
        self._traffic.put(self._number, message, self._dropped)


class _Listener(Endpoint):
    def __init__(
        self,
        url: Url,
        on_request: OnRequest,
        listen: Callable[[Url, Accept], Coroutine[Any, Any, Listening]],
    ) -> None:
        self._on_request = on_request
        self._links: set[Link] = set()
        self._accepted = 0
        self._lock = threading.Lock()
        self._loop = Loop(f"edgeml {url}")
        try:
            self.url, self._stop_listening = self._loop.start(listen(url, self._accept)).result()
            self.local = is_loopback(self.url.host)
        except BaseException:
            self._loop.close()
            raise

    async def _accept(self, link: Link, address: object) -> None:
        self._accepted += 1
        peer = Peer(str(self._accepted), str(address))
        traffic = _Traffic(self._loop, link)

        def arrived(number: int, message: Message) -> None:
            reply = _Reply(traffic, number, peer, self._drop)
            self._loop.hand_over(self._on_request, message, reply)

        self._links.add(link)
        try:
            await traffic.receive(arrived)
        finally:
            self._links.discard(link)

    def _drop(self, why: EdgemlError) -> None:
        with self._lock:
            self.dropped += 1

    def carry(self, stay: Stay) -> bool:
        return self._loop.carry(stay)

    def wake(self) -> None:
        self._loop.wake()

    def relieve(self) -> None:
        self._loop.relieve()

    def close(self) -> None:
        self._loop.close(self._stop, _GRACE)

    async def _stop(self) -> None:
        self._stop_listening()
        await asyncio.gather(*(link.close() for link in self._links), return_exceptions=True)


class _Connection(Requester):
    def __init__(
        self,
        url: Url,
        timeout: float,
        dial: Callable[[Url], Coroutine[Any, Any, Link]],
        greeting: bytes,
    ) -> None:
        self.url = url
        self.local = is_loopback(url.host)
        self._over: EdgemlError | None = None
        self._pending = Pending()
        self._loop = Loop(f"edgeml {url}")
        try:
            self._loop.start(self._open(timeout, dial, greeting)).result()
        except BaseException as error:
            self._loop.close()
            if not isinstance(error, Exception) or isinstance(error, EdgemlError):
                raise
            what = str(error) or type(error).__name__
            raise explain_no_connection(url, what, getattr(error, "errno", None)) from None

    async def _open(
        self, timeout: float, dial: Callable[[Url], Coroutine[Any, Any, Link]], greeting: bytes
    ) -> None:
        deadline = time.monotonic() + timeout
        dialing = asyncio.create_task(dial(self.url))
        await asyncio.wait((dialing,), timeout=min(timeout, _SOON))
        # Some libraries wait for one who doesn't speak their protocol to hang up.
        late = not dialing.done()
        failed = dialing.done() and not isinstance(dialing.exception(), (type(None), OSError))
        left = deadline - time.monotonic()
        stranger = None
        if (late or failed) and self.url.port and left > 0:
            stranger = find_stranger(self.url, greeting, min(0.4, left))
        if stranger is not None:
            dialing.cancel()
            raise stranger
        self._link = await asyncio.wait_for(dialing, max(0.0, deadline - time.monotonic()))
        self._traffic = _Traffic(self._loop, self._link)
        self._receiving = asyncio.create_task(self._receive())

    async def _receive(self) -> None:
        why = await self._traffic.receive(self._settle)
        # Behind the last replies.
        self._loop.pass_on(self._lose, Unreachable(f"the connection to {self.url} was lost: {why}"))

    def _settle(self, number: int, outcome: Message | EdgemlError) -> None:
        if self._loop.inside:  # a future's callback may take long, or call
            self._loop.pass_on(self._pending.settle, number, outcome)
        else:
            self._pending.settle(number, outcome)

    def _lose(self, why: EdgemlError) -> None:
        self._over = self._over or why
        self._pending.fail(self._over)

    @property
    def lost(self) -> bool:
        return self._over is not None

    def call(self, message: Message, timeout: float) -> Message:
        if self._loop.inside:  # in a future's callback: another thread must receive the reply
            self._loop.strand()
        return super().call(message, timeout)

    def request(self, message: Message) -> Future[Message]:
        if self._over is not None:
            raise copy_error(self._over)
        number, future = self._pending.add()
        try:
            self._traffic.put(number, message, lambda why: self._settle(number, why))
        except EdgemlError:  # not to be encoded
            future.cancel()
            raise
        return future

    def close(self) -> None:
        self._over = self._over or Closed(f"the connection to {self.url} has been closed")
        self._loop.close(self._link.close, _GRACE)
        self._lose(self._over)
