"""Carries edgeml over WebSockets: ``transport="ws"``."""

import logging
import ssl
from typing import Any, ClassVar

from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.connection import Connection
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.version import version

from edgeml.core import Overloaded, Transport, Url, find_address, hookimpl, tell_url
from edgeml.core.links import LARGEST_PIECE, Accept, LinkTransport, Listening
from edgeml.core.security import SERVER_NAME

_log = logging.getLogger(f"{__name__}.connections")
_log.setLevel(logging.CRITICAL)  # whose handshake fails is counted, and must not fill a log

_CALM = 1 << 15  # bytes to be sent, up to which a peer is one that reads
_MOST_PONGS = 1 << 14  # bytes of them that a peer which doesn't read may have

_OPTIONS: dict[str, Any] = {
    "max_size": LARGEST_PIECE,
    "open_timeout": None,  # by whoever dials, and by the socket
    "logger": _log,
    "compression": None,  # images and weights hardly shrink
    # A pong may be behind a large message, so none is waited for. The pings go on, and so TCP
    # notices a machine that has vanished.
    "ping_timeout": None,
}


class _Bounded(Connection):
    """Cuts off a peer that doesn't read the pongs it asks for; websockets would keep them all."""

    pongs = 0  # bytes of those that it hasn't read

    def data_received(self, data: bytes) -> None:
        before = self.transport.get_write_buffer_size()
        super().data_received(data)
        after = self.transport.get_write_buffer_size()
        self.pongs = self.pongs + after - before if after > _CALM else 0
        if self.pongs > _MOST_PONGS:
            self.transport.abort()


class _Served(_Bounded, ServerConnection): ...


class _Dialed(_Bounded, ClientConnection): ...


class _Link:
    """One connection, of either side; see `edgeml.core.links.Link`."""

    def __init__(self, connection: Connection) -> None:
        assert isinstance(connection, _Bounded)
        self._connection = connection
        self.send = connection.send
        self.close = connection.close
        self.tls: ssl.SSLObject | None = connection.transport.get_extra_info("ssl_object")

    async def receive(self) -> bytes:
        try:
            return await self._connection.recv(decode=False)
        except ConnectionClosed:
            if self._connection.pongs > _MOST_PONGS:
                raise Overloaded("it does not read the pongs that it asks for") from None
            raise

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
        options = {**_OPTIONS, "create_connection": _Served, "ssl": accept.tls}
        server = await serve(accepted, sock=sock, origins=[None], **options)
        port = sock.getsockname()[1]
        return tell_url(url, find_address(url), port), lambda: server.close(close_connections=False)

    async def dial(self, url: Url, tls: ssl.SSLContext | None) -> _Link:
        """See `LinkTransport.dial`."""
        options = {**_OPTIONS, "create_connection": _Dialed, "proxy": None}
        if tls is None:
            return _Link(await connect(str(url), **options))
        secured = f"wss://{str(url).partition('://')[2]}"
        return _Link(await connect(secured, ssl=tls, server_hostname=SERVER_NAME, **options))


@hookimpl
def edgeml_transport() -> type[Transport]:
    """Answer the plugin hook."""
    return WebSocketTransport
