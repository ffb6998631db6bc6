"""Carries edgeml over WebSockets: ``transport="ws"``."""

import logging
import ssl
from typing import Any, ClassVar

from websockets.asyncio.client import connect
from websockets.asyncio.connection import Connection
from websockets.asyncio.server import serve
from websockets.version import version

from edgeml.core import Transport, Url, find_address, hookimpl, tell_url
from edgeml.core.links import LARGEST_PIECE, Accept, LinkTransport, Listening
from edgeml.core.security import SERVER_NAME

_log = logging.getLogger(__name__)
_log.setLevel(logging.CRITICAL)  # whose handshake fails is counted, and must not fill a log

_OPTIONS: dict[str, Any] = {
    "max_size": LARGEST_PIECE,
    "open_timeout": None,  # by whoever dials, and by the socket
    "logger": _log,
    "compression": None,  # images and weights hardly shrink
    # A pong may be behind a large message, so none is waited for. The pings go on, and so TCP
    # notices a machine that has vanished.
    "ping_timeout": None,
}


class _Link:
    """One connection, of either side; see `edgeml.core.links.Link`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.send = connection.send
        self.close = connection.close
        self.tls: ssl.SSLObject | None = connection.transport.get_extra_info("ssl_object")

    async def receive(self) -> bytes:
        return await self._connection.recv(decode=False)

    def abort(self) -> None:
        self._connection.transport.abort()


class WebSocketTransport(LinkTransport):
    """``ws://host:port``: for what has to pass a web server's front door."""

    name: ClassVar[str] = "ws"
    greeting: ClassVar[bytes] = rb"HTTP/1\.1 (426|503) "  # Upgrade Required; or it is stopping

    def report(self) -> dict[str, str]:
        """See `Transport.report`."""
        return {"websockets": version}

    async def listen(self, url: Url, accept: Accept) -> Listening:
        """See `LinkTransport.listen`. Refuses web pages, which always name their origin."""

        async def accepted(connection: Connection) -> None:
            await accept(_Link(connection), connection.remote_address)

        sock = accept.bind(url)
        server = await serve(accepted, sock=sock, ssl=accept.tls, origins=[None], **_OPTIONS)
        port = sock.getsockname()[1]
        return tell_url(url, find_address(url), port), lambda: server.close(close_connections=False)

    async def dial(self, url: Url, tls: ssl.SSLContext | None) -> _Link:
        """See `LinkTransport.dial`."""
        if tls is None:
            return _Link(await connect(str(url), proxy=None, **_OPTIONS))
        secured = f"wss://{str(url).partition('://')[2]}"
        return _Link(
            await connect(secured, proxy=None, ssl=tls, server_hostname=SERVER_NAME, **_OPTIONS)
        )


@hookimpl
def edgeml_transport() -> type[Transport]:
    """Answer the plugin hook."""
    return WebSocketTransport
