"""What doors have in common whose clients come by WebSocket: all but the protocol they speak.

A door subclasses `WebSocketDoor` and says how to talk with one client; here is how connections come
about, how much of them is kept, and how they end.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import ssl
import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from edgeml.core import (
    DEFAULT_LIMITS,
    Credentials,
    Dispatch,
    Door,
    EdgemlError,
    Endpoint,
    Guest,
    Limits,
    Peer,
    Url,
    find_address,
    tell_url,
)
from edgeml.core.carrier import Stay
from edgeml.core.gate import Gate
from edgeml.core.loops import Loop
from edgeml.core.refusals import Refusals
from edgeml.core.state import ServerState
from edgeml.core.tls import door_context, server_keys
from edgeml.core.url import is_loopback, require_no_path

__all__ = ["Visit", "WebSocketDoor"]

_log = logging.getLogger(__name__)
_numbers = itertools.count(1)
_GRACE = 0.5  # seconds that a door which closes gives to what is still to be sent


class Visit:
    """One connection. All of it is called in the door's event loop.

    Attributes:
        path: that the client asked for, without what follows a question mark.
        headers: of its request, by names in lower case; of two of one name the last.
        peer: who it is.
        dispatch: where calls go.
        limits: what it may make the door hold.
    """

    def __init__(
        self, connection: ServerConnection, loop: Loop, dispatch: Dispatch, limits: Limits
    ) -> None:
        assert connection.request is not None
        self.path = connection.request.path.partition("?")[0]
        raw = connection.request.headers.raw_items()
        self.headers: Mapping[str, str] = {name.lower(): value for name, value in raw}
        address = connection.remote_address
        self.peer = Peer(str(next(_numbers)), str(address), str(address[0]))
        self.dispatch = dispatch
        self.limits = limits
        self._connection = connection
        self._loop = loop
        self._guests: list[Guest] = []
        self._waiting: set[asyncio.Future[bytes]] = set()

    def enter(self, token: str | None = None, label: str = "") -> Guest:
        """Let the client in, until the connection ends; see `Dispatch.enter`."""
        guest = self.dispatch.enter(self.peer, label=label, token=token)
        self._guests.append(guest)
        return guest

    async def receive(self) -> bytes | str:
        """Return the next message: bytes, or a text.

        Raises:
            EOFError: the connection is over.
        """
        try:
            return await self._connection.recv()
        except ConnectionClosed:
            raise EOFError from None

    async def send(self, data: bytes | str) -> None:
        """Send a message, and return when there is room for the next.

        Raises:
            EOFError: the connection is over.
        """
        try:
            await self._connection.send(data)
        except ConnectionClosed:
            raise EOFError from None

    async def call(
        self,
        guest: Guest,
        payload: Callable[[], Any],
        encode: Callable[[Any], bytes],
        nbytes: int = 0,
    ) -> bytes:
        """Have the door's function called, and return its encoded result.

        Args:
            guest: whose call it is.
            payload: gives what the client sent; called in the handlers' thread, once at most.
            encode: makes a message of a result, in the handlers' thread, since the result may be
                changed afterwards.
            nbytes: what the payload takes up while the call waits.

        Raises:
            EOFError: the connection is over.
            EdgemlError: why there is no result.
        """
        waiting: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def answer(value: Any) -> None:
            self._loop.do(_settle, waiting, encode(value))

        def fail(error: EdgemlError) -> None:
            self._loop.do(_fail, waiting, error)

        self._waiting.add(waiting)
        try:
            guest.call(payload, answer, fail, nbytes=nbytes)
            return await waiting
        finally:
            self._waiting.discard(waiting)

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """End the connection behind what was sent, and say why."""
        await self._connection.close(code, reason)

    def _leave(self) -> None:
        """Forget what waits, as the connection is over."""
        for waiting in self._waiting:
            _fail(waiting, EOFError())
        while self._guests:
            self._guests.pop().leave()


def _settle(waiting: asyncio.Future[bytes], data: bytes) -> None:
    if not waiting.done():
        waiting.set_result(data)


def _fail(waiting: asyncio.Future[bytes], error: Exception) -> None:
    if not waiting.done():
        waiting.set_exception(error)


class WebSocketDoor(Door):
    """Subclass it, and set `name` and `health`."""

    health: ClassVar[str]
    """A path that is answered by plain HTTP, for those who look whether the server is well."""

    @abstractmethod
    def answer_health(self, state: ServerState) -> tuple[int, str, bytes]:
        """Return the status, the content type and the body for whoever asks for `health`."""

    def admits(self, state: ServerState) -> bool:
        """Whether a client is to be let in; else its request is answered as one for `health` is.

        For a protocol whose clients try a connection again that wasn't opened, but nothing later.
        By default all are let in, and their calls refused while the server isn't ready.
        """
        del state
        return True

    @abstractmethod
    async def talk(self, visit: Visit) -> None:
        """Talk with one client until its connection is over.

        May raise EOFError as `Visit` does. Once it returns the connection is closed.
        """

    def open(
        self,
        url: Url,
        dispatch: Dispatch,
        *,
        credentials: Credentials | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Endpoint:
        """See `Door.open`."""
        require_no_path(url)
        return _Listener(self, url, dispatch, credentials, limits)


class _Listener(Endpoint):
    def __init__(
        self,
        door: WebSocketDoor,
        url: Url,
        dispatch: Dispatch,
        credentials: Credentials | None,
        limits: Limits,
    ) -> None:
        self._door = door
        self._dispatch = dispatch
        self._limits = limits
        self._visits: set[Visit] = set()
        self._lock = threading.Lock()
        self._refusals = Refusals(url, self.counts)
        self._loop = Loop(f"edgeml {url}")
        unless = ("Malformed", "it speaks something else")
        self._gate = Gate(limits, self._refusals, self._loop.later, unless)
        try:
            sock = self._gate.bind(url)
            self.local = is_loopback(sock.getsockname()[0])
            keys = None if self.local else server_keys(url, credentials)
            self.secured = keys is not None
            tls = None if keys is None else door_context(keys[0])
            self._server = self._loop.start(self._listen(sock, tls)).result()
        except BaseException:
            self._loop.close()
            raise
        self.url = tell_url(url, find_address(url), sock.getsockname()[1])

    async def _listen(self, sock: socket.socket, tls: ssl.SSLContext | None) -> Server:
        return await serve(
            self._welcome,
            sock=sock,
            ssl=tls,
            process_request=self._look_at,
            max_size=self._limits.message_bytes,
            open_timeout=None,
            ping_timeout=None,
            compression=None,
        )

    def _look_at(self, connection: ServerConnection, request: Request) -> Response | None:
        state = self._dispatch.state
        if request.path.partition("?")[0] != self._door.health and self._door.admits(state):
            return None
        self._gate.greet(connection.remote_address)
        status, kind, body = self._door.answer_health(state)
        response = connection.respond(status, "")
        response.body = body
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body)))):
            del response.headers[name]
            response.headers[name] = value
        return response

    async def _welcome(self, connection: ServerConnection) -> None:
        self._gate.greet(connection.remote_address)
        visit = Visit(connection, self._loop, self._dispatch, self._limits)
        self._visits.add(visit)
        try:
            await self._door.talk(visit)
        except EOFError:
            pass
        finally:
            self._visits.discard(visit)
            visit._leave()

    def carry(self, stay: Stay) -> bool:
        return self._loop.carry(stay)

    def wake(self) -> None:
        self._loop.wake()

    def relieve(self) -> None:
        self._loop.relieve()

    def close(self) -> None:
        self._loop.close(self._stop, _GRACE)

    async def _stop(self) -> None:
        self._server.close(close_connections=False)
        closing = (visit.close(1001) for visit in self._visits)
        await asyncio.gather(*closing, return_exceptions=True)
