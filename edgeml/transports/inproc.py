"""Between the threads of one process: the reference transport, and the test double.

An address is a port number in this process. Every message is copied once (`own`), so that what a
receiver keeps never changes under it, exactly as over a network.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from concurrent.futures import Future
from typing import ClassVar

from edgeml.core import (
    Closed,
    Credentials,
    Endpoint,
    Message,
    OnRequest,
    Overloaded,
    Peer,
    Requester,
    Transport,
    Unreachable,
    Url,
    hookimpl,
    own,
)

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_listeners: dict[int, _Listener] = {}
_numbers = itertools.count(1)
_MOST_PENDING = 4096  # requests under way on one connection


class _Listener(Endpoint):
    def __init__(self, url: Url, on_request: OnRequest) -> None:
        with _lock:
            taken = set(_listeners)
            port = url.port or next(p for p in range(49152, 2**20) if p not in taken)
            if port in taken:
                raise OSError(f"inproc port {port} is taken in this process")
            _listeners[port] = self
        self.url = url.with_port(port)
        self.inbox: queue.SimpleQueue[tuple[Message, _Reply] | None] = queue.SimpleQueue()
        self.connections: set[_Connection] = set()
        self.closed = False
        self._on_request = on_request
        self._start_loop()

    def _start_loop(self) -> None:
        self._loop = threading.Thread(target=self._run, name=f"edgeml {self.url}", daemon=True)
        self._loop.start()

    def _run(self) -> None:
        while self._loop is threading.current_thread() and (item := self.inbox.get()):
            try:
                self._on_request(*item)
            except Exception:
                _log.exception("%s: on_request failed", self.url)
            del item  # or the buffers live until the next request

    def relieve(self) -> None:
        self._start_loop()

    def close(self) -> None:
        with _lock:
            if self.closed:
                return
            self.closed = True
            del _listeners[self.url.port]
            connections = list(self.connections)
        for connection in connections:
            connection.lose(Unreachable(f"{self.url} has closed"))
        self.inbox.put(None)
        if self._loop is not threading.current_thread():
            self._loop.join(1.0)


class _Reply:
    __slots__ = ("_connection", "_future")

    def __init__(self, connection: _Connection, future: Future[Message]) -> None:
        self._connection = connection
        self._future = future

    @property
    def peer(self) -> Peer:
        return self._connection.peer

    @property
    def expired(self) -> bool:
        return self._future.done()

    def __call__(self, message: Message) -> None:
        message = own(message)
        if not self._connection.settle(self._future, message):
            self._connection.listener.dropped += 1


class _Connection(Requester):
    def __init__(self, url: Url) -> None:
        self.url = url
        number = next(_numbers)
        self.peer = Peer(f"{number}", f"inproc connection {number}")
        self._pending: set[Future[Message]] = set()
        self._lost: Exception | None = None
        with _lock:
            if url.port not in _listeners:
                raise Unreachable(f"nobody serves {url} in this process")
            self.listener = _listeners[url.port]
            self.listener.connections.add(self)

    def request(self, message: Message) -> Future[Message]:
        future: Future[Message] = Future()
        message = own(message)
        with _lock:
            if self._lost is not None:
                raise type(self._lost)(*self._lost.args)
            if len(self._pending) >= _MOST_PENDING:
                raise Overloaded(f"{_MOST_PENDING} requests to {self.url} are under way")
            self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        self.listener.inbox.put((message, _Reply(self, future)))
        return future

    def settle(self, future: Future[Message], result: Message | Exception) -> bool:
        """Complete a request; False if nobody waits for it any more."""
        with _lock:
            if future not in self._pending:
                return False
            self._pending.discard(future)
        if not future.set_running_or_notify_cancel():
            return False
        if isinstance(result, Message):
            future.set_result(result)
        else:
            future.set_exception(result)
        return True

    def lose(self, why: Exception) -> None:
        """End the connection and every request under way."""
        with _lock:
            if self._lost is None:
                self._lost = why
            self.listener.connections.discard(self)
            pending = list(self._pending)
        for future in pending:
            self.settle(future, why)

    def close(self) -> None:
        self.lose(Closed(f"the connection to {self.url} has been closed"))


class InprocTransport(Transport):
    """``inproc://any:PORT``: between threads of one process."""

    name: ClassVar[str] = "inproc"

    def serve(
        self, url: Url, on_request: OnRequest, *, credentials: Credentials = None
    ) -> Endpoint:
        """See `Transport.serve`; credentials have no meaning within one process."""
        return _Listener(url, on_request)

    def connect(self, url: Url, timeout: float, *, credentials: Credentials = None) -> Requester:
        """See `Transport.connect`; returns or raises at once."""
        return _Connection(url)


@hookimpl
def edgeml_transport() -> type[Transport]:
    """Answer the plugin hook."""
    return InprocTransport
