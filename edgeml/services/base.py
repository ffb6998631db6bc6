"""What the three pairs share: starting and stopping, addresses, and being context managers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgeml.core.client import Client
from edgeml.core.errors import Closed
from edgeml.core.message import empty
from edgeml.core.owned import ClosedAtExit, Unpicklable, close_when_dropped
from edgeml.core.server import Server
from edgeml.core.transport import Peer
from edgeml.core.url import Url, check_port, resolve

__all__ = ["ServiceClient", "ServiceServer", "listening_urls"]


def listening_urls(
    transport: str | None, host: str, port: int, broadcast_port: int | None = None
) -> tuple[list[Url], list[Url]]:
    """The addresses that a server listens at, and those that it can do without.

    One listener does everything; a broadcast port that the user names answers in the same way.
    Where the system picks the port (0), it picks the broadcast port too.
    """
    port = check_port(port)
    if broadcast_port is not None:
        broadcast_port = check_port(broadcast_port)
    urls = resolve(transport, host, port)
    if broadcast_port is None or broadcast_port == port:
        return urls, []
    second = broadcast_port if port else 0
    return urls, [url.with_port(second) for url in urls if not url.path]


class _Service(ClosedAtExit, Unpicklable):
    """What a server and a client have in common: memory to send from, and a context manager."""

    def _allocate(self, nbytes: int) -> memoryview | None:
        raise NotImplementedError

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        """An array to be filled and sent, such as a camera's frame; its contents are arbitrary.

        Where a transport shares memory with the other side, the array lies there and is sent
        without a copy, as the whole of it or as a part. Fill it before it is sent, and only read it
        from then on, since the other side may be reading it: take a new one for the next frame,
        which costs next to nothing. On other transports it is an ordinary array.

        Args:
            shape: as for `numpy.empty`.
            dtype: as for `numpy.empty`.
        """
        return empty(self._allocate, shape, dtype)

    def stop(self) -> None:
        raise NotImplementedError

    def _leave(self) -> None:
        self.stop()


class ServiceServer(_Service):
    """A server of any of the three kinds; a context manager that stops it."""

    _server: Server

    def __init__(self, server: Server, advertise: str | None = None) -> None:
        self._server = server
        self._advertise = advertise
        self._stopped = threading.Event()
        self._disarm: Callable[[], object] = lambda: None

    def start(self, threaded: bool = False) -> None:
        """Serve, until `stop` or Ctrl-C; in the background with ``threaded``.

        With one worker, which is the default, all handlers run in one and the same thread: the one
        that calls this, or with ``threaded`` one of the server's own. With more, they run in that
        one and in ``workers - 1`` of the server's.

        Raises:
            OSError: the port is taken.
            PluginError: the transport isn't installed, or is broken.
            RuntimeError: it was started before.
        """
        self._server.open()
        self._disarm = close_when_dropped(self, self._server.close)
        if threaded:
            self._server.dispatcher.start()
        else:
            self._block(self._server.dispatcher.run)

    def _block(self, serve: Callable[[], object]) -> None:
        try:
            serve()
        except KeyboardInterrupt:
            pass
        finally:
            self.stop()

    def stop(self) -> None:
        """Tell the clients, stop serving and end every thread; quick and idempotent."""
        self._disarm()
        self._stopped.set()
        self._server.close()

    def _allocate(self, nbytes: int) -> memoryview | None:
        return self._server.allocate(nbytes)

    @property
    def url(self) -> str:
        """Where clients reach it, the real port filled in; of several transports, the first.

        A server that listens at all addresses of its machine, ``0.0.0.0``, tells the machine's
        name, and one that others reach elsewhere, as behind NAT, what it was told to ``advertise``.

        Raises:
            Closed: it isn't started.
        """
        return str(self._first())

    def urls(self) -> list[str]:
        """Return where clients reach it, by each transport and port; none until it is started."""
        return [str(self._advertised(url)) for url in self._server.urls]

    @property
    def port(self) -> int:
        """The port that it listens on; raises as `url` does."""
        return self._first().port

    def _first(self) -> Url:
        urls = self._server.urls
        if not urls:
            raise Closed("the server isn't started, so it has no address yet")
        return self._advertised(urls[0])

    def _advertised(self, url: Url) -> Url:
        if self._advertise is None or url.path:
            return url
        told = Url.parse(f"{url.scheme}://{self._advertise}")
        return told if told.port else told.with_port(url.port)

    def clients(self) -> list[Peer]:
        """Return the clients heard from of late.

        Their ids, and for people their labels and addresses.
        """
        return [
            Peer(caller.client_id, f"{caller.label} at {caller.peer.address}".strip())
            for caller in self._server.callers
        ]

    def stats(self) -> dict[str, int]:
        """Counts since the start: calls, and everything refused or dropped, by reason; and
        ``waiting``, the calls that wait for a handler now.
        """
        return self._server.stats()


class ServiceClient(_Service):
    """A client of any of the three kinds; a context manager that stops it.

    Args:
        client: what it stands on.
        close: what stops it, and must not refer to it; by default what closes ``client``.
    """

    def __init__(self, client: Client, close: Callable[[], object] | None = None) -> None:
        self._client = client
        self._close = client.close if close is None else close
        self._disarm = close_when_dropped(self, self._close)

    @property
    def client_id(self) -> str:
        """This client's identity."""
        return self._client.client_id

    def _allocate(self, nbytes: int) -> memoryview | None:
        return self._client.allocate(nbytes)

    def stats(self) -> dict[str, int]:
        """Counts since the start: ``replies_copied``, replies and publications that came as private
        copies because too many received arrays are held for the transport to lend more.
        """
        return self._client.stats()

    def stop(self) -> None:
        """Close the connection and end every thread; quick and idempotent."""
        self._disarm()
        self._close()


def names(what: str, given: Sequence[Any]) -> list[str]:
    """Check a configuration's list of names; a single string is a mistake that is easily made."""
    if isinstance(given, str) or not all(isinstance(name, str) and name for name in given):
        raise ValueError(f"{what} must be a list of names, not {given!r}")
    return list(given)
