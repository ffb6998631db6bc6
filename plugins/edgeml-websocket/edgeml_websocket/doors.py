"""What doors have in common whose clients come by WebSocket: all but the protocol they speak.

A door subclasses `WebSocketDoor` and says how to talk with one client; how connections come about,
what is kept of them, and how they end is here and in `edgeml_websocket.frames`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import logging
import socket
import ssl
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, ClassVar, TypeAlias
from urllib.parse import urlsplit

from websockets.http11 import Request
from websockets.server import ServerProtocol
from websockets.version import version

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
    PermissionDenied,
    Url,
    find_address,
    tell_url,
)
from edgeml.core.gate import Gate
from edgeml.core.loops import Loop, LoopEndpoint
from edgeml.core.quota import Quota
from edgeml.core.refusals import Refusals
from edgeml.core.state import ServerState
from edgeml.core.tls import door_context, server_keys
from edgeml.core.url import is_loopback, require_no_path
from edgeml_websocket.frames import Connection, Data

__all__ = ["Visit", "WebSocketDoor"]

_log = logging.getLogger(__name__)
_numbers = itertools.count(1)  # of connections
_SCRATCH = 1 << 14
_Waiting: TypeAlias = "asyncio.Future[bytes]"
_GRACE = 0.5  # seconds that an end which closes gives to what is still to be sent
_LOOK = 0.3  # seconds from one look at who has been revoked to the next


class Visit:
    """One connection. All of it is called in the door's event loop.

    Attributes:
        path: that the client asked for, without what follows a question mark.
        headers: of its request, by names in lower case; of two of one name the last.
        peer: who it is.
        dispatch: where calls go.
        limits: what it may make the door hold.
        guests: as whom it was let in.
    """

    def __init__(
        self,
        connection: Connection,
        request: Request,
        loop: Loop,
        dispatch: Dispatch,
        limits: Limits,
        dropped: Callable[[], object],
        note: Callable[[Peer, EdgemlError], object],
    ) -> None:
        self.path = _text(request.path.partition("?")[0])
        self.headers: Mapping[str, str] = {
            name.lower(): _text(value) for name, value in request.headers.raw_items()
        }
        self.peer = connection.peer
        self.dispatch = dispatch
        self.limits = limits
        self._connection = connection
        self._loop = loop
        self._dropped = dropped
        self._note = note
        self.guests: list[Guest] = []
        self._waiting: set[_Waiting] = set()
        self._over = False

    def enter(self, token: str | None = None, label: str = "") -> Guest:
        """Let the client in, until the connection ends; see `Dispatch.enter`.

        Raises:
            PermissionDenied, Overloaded, NotReady, Closed: as there.
        """
        guest = self.dispatch.enter(self.peer, label=label, token=token)
        self.guests.append(guest)
        return guest

    def note(self, why: EdgemlError) -> None:
        """Count why a message was refused that made no call; calls are counted as they are."""
        self._note(self.peer, why)

    async def receive(self) -> Data | str:
        """Return the next message: a text, or else bytes, or a view on those of a large one.

        Raises:
            EOFError: the connection is over.
        """
        return await self._connection.receive()

    async def send(self, data: bytes | str) -> None:
        """Send a message, and return when there is room for the next.

        Raises:
            EOFError: the connection is over.
        """
        await self._connection.send(data)

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
        if self._over:
            raise EOFError
        waiting: Any = asyncio.get_running_loop().create_future()

        def answer(value: Any) -> None:
            self._loop.do(self._settle, waiting, encode(value))

        def fail(error: EdgemlError) -> None:
            self._loop.do(self._fail, waiting, error)

        self._waiting.add(waiting)
        try:
            guest.call(payload, answer, fail, nbytes=nbytes)
            data: bytes = await waiting
            return data
        finally:
            self._waiting.discard(waiting)
            waiting = None  # or its error would keep this frame, and that the error

    def _settle(self, waiting: _Waiting | None, data: bytes) -> None:
        if waiting is None or waiting.done():
            self._dropped()
        else:
            waiting.set_result(data)

    def _fail(self, waiting: _Waiting | None, error: Exception) -> None:
        if waiting is not None and not waiting.done():
            waiting.set_exception(error)

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """End the connection behind what was sent, and say why."""
        await self._connection.close(code, reason)

    def _end(self) -> None:
        """Forget what waits, as the connection is over."""
        self._over = True
        for waiting in list(self._waiting):
            self._fail(waiting, EOFError())
        while self.guests:
            self.guests.pop().leave()


class WebSocketDoor(Door):
    """Subclass it, and set `name` and `health`."""

    health: ClassVar[str]
    """A path that is answered by plain HTTP, for those who look whether the server is well."""

    def report(self) -> dict[str, str]:
        """See `Door.report`."""
        return {"websockets": version}

    @abstractmethod
    def answer_health(self, state: ServerState) -> tuple[int, str, bytes]:
        """Return the status, the content type and the body for whoever asks for `health`."""

    def welcome(self, visit: Visit) -> None:
        """Look at a client before its connection is accepted.

        An EdgemlError from here is told by HTTP: 401 for PermissionDenied, else 503. So a protocol
        has this refuse a client that has no words for it later, or that tries again only after a
        connection which wasn't opened.
        """

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


class _Listener(LoopEndpoint):
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
        self.limits = limits
        self.incoming = Quota(limits.bytes_per_client, limits.bytes, "are on their way")
        self.unread = Quota(limits.replies_per_client, limits.bytes, "have not been read")
        self.scratch = memoryview(bytearray(_SCRATCH))
        self._visits: dict[Connection, Visit] = {}
        self._talks: dict[Connection, asyncio.Task[None]] = {}
        self._refusals = Refusals(url, self.counts)
        self._loop = Loop(f"edgeml {url}")
        self._gate = Gate(
            limits, self._refusals, self._loop.later, ("Malformed", "it speaks something else")
        )
        try:
            sock = self._gate.bind(url)
            self.local = is_loopback(sock.getsockname()[0])
            keys = None if self.local else server_keys(url, credentials)
            tls = None if keys is None else door_context(keys[0])
            self.secured = tls is not None
            self._server = self._loop.start(self._listen(sock, tls)).result()
            if credentials is not None:
                self._loop.do(self._look_at_keys)
        except BaseException:
            self._loop.close()
            raise
        self.url = tell_url(url, find_address(url), sock.getsockname()[1])

    async def _listen(
        self, sock: socket.socket, tls: ssl.SSLContext | None
    ) -> asyncio.AbstractServer:
        loop = asyncio.get_running_loop()
        return await loop.create_server(lambda: Connection(self), sock=sock, ssl=tls)

    def _look_at_keys(self) -> None:
        """End the connections of those who are let in no more; the calls of each were refused."""
        for connection, visit in list(self._visits.items()):
            if any(guest.left for guest in visit.guests):
                connection.end(1008, "its key is not, or no longer, one of the server's")
        self._loop.later(_LOOK, self._look_at_keys)

    # What connections ask -----------------------------------------------------------------

    def begin(self, connection: Connection) -> Peer:
        address = connection.address
        return Peer(str(next(_numbers)), str(address), str(address[0]))

    def answer(self, connection: Connection, http: ServerProtocol, request: Request) -> bool:
        visit = Visit(
            *(connection, request, self._loop, self._dispatch, self.limits),
            *(self._count_dropped, self.note),
        )
        status, text = 0, ""
        if visit.path == self._door.health:
            status, kind, body = self._door.answer_health(self._dispatch.state)
            response = http.reject(status, "")
            for name, value in (("Content-Type", kind), ("Content-Length", str(len(body)))):
                del response.headers[name]
                response.headers[name] = value
            response.body = body
        else:
            response = http.accept(request)
            if response.status_code == 101:
                status, text = self._admit(visit)
            if status:
                response = http.reject(status, f"{text}\n")
        http.send_response(response)
        if response.status_code == 101:
            self._visits[connection] = visit
        if status or response.status_code == 101:
            self._gate.greet(connection.address)
        return response.status_code == 101

    def _admit(self, visit: Visit) -> tuple[int, str]:
        """Why a client isn't let in, as HTTP says it; 0 if it is."""
        if _is_web_page(visit.headers):
            error = PermissionDenied("web pages are not let in")
            self.note(visit.peer, error)
            return 403, str(error)
        try:
            self._door.welcome(visit)
        except EdgemlError as why:
            visit._end()
            return 401 if isinstance(why, PermissionDenied) else 503, str(why)
        return 0, ""

    def open(self, connection: Connection) -> None:
        talk = self._talk(connection, self._visits[connection])
        self._talks[connection] = asyncio.get_running_loop().create_task(talk)

    async def _talk(self, connection: Connection, visit: Visit) -> None:
        code, reason = 1000, ""
        try:
            await self._door.talk(visit)
        except EOFError:
            pass
        except EdgemlError as error:
            self.note(visit.peer, error)
            code, reason = 1011, str(error)
        except Exception:
            _log.exception("%s: talking with %s failed", self.url, visit.peer.address)
            code, reason = 1011, "the server has a fault, which its log tells"
        await connection.close(code, reason)

    def note(self, peer: Peer, why: EdgemlError) -> None:
        self._refusals.note(type(why).__name__, peer.address, peer.host, why)

    def end(self, connection: Connection) -> None:
        visit = self._visits.pop(connection, None)
        talk = self._talks.pop(connection, None)
        if visit is not None:
            visit._end()
        if talk is not None:
            self._loop.later(_GRACE, talk.cancel)  # it ends by itself, unless it doesn't listen

    def _count_dropped(self) -> None:
        self.dropped += 1

    # Endpoint -----------------------------------------------------------------------------

    def close(self) -> None:
        self._loop.close(self._stop, _GRACE)

    async def _stop(self) -> None:
        self._server.close()
        closing = (connection.close(1001, "the server stops") for connection in self._visits)
        await asyncio.gather(*closing, return_exceptions=True)


def _text(raw: str) -> str:
    """What websockets made of bytes, as a text that can be encoded."""
    return raw.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _is_web_page(headers: Mapping[str, str]) -> bool:
    """Whether a browser connects for a page, which need not know what its visitor's machine can
    reach. Some libraries name an origin as well: the very address that they connect to. A page is
    at no bare address of ours, since none is served here; a name may be made to lead here.
    """
    origin = headers.get("origin")
    if origin is None:
        return False
    with suppress(ValueError):
        host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        if urlsplit(origin).netloc == headers.get("host"):
            if host in ("localhost", socket.gethostname().lower()):
                return False
            ipaddress.ip_address(host)
            return False
    return True
