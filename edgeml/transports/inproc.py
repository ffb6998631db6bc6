"""Between the threads of one process: the reference transport, and the test double.

An address is a port number in this process. Every message is copied once (`own`), so that what a
receiver keeps never changes under it, exactly as over a network.
"""

from __future__ import annotations

import itertools
import logging
import os
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
_MOST_WAITING = 1 << 14  # that one listener has not come to, those cancelled meanwhile included


class _Listener(Endpoint):
    def __init__(self, url: Url, on_request: OnRequest) -> None:
        with _lock:
            port = url.port or next((p for p in range(49152, 65536) if p not in _listeners), 0)
            if not port or port in _listeners:
                raise OSError(f"inproc port {port or ''} is taken in this process")
            _listeners[port] = self
        self.url = url.with_port(port)
        self.inbox: queue.SimpleQueue[tuple[Message, _Reply] | None] = queue.SimpleQueue()
        self.connections: set[_Connection] = set()
        self.closed = False
        self._on_request = on_request
        self._start_loop()

    def _start_loop(self) -> None:
        self._handling = False
        self._loop = threading.Thread(target=self._run, name=f"edgeml {self.url}", daemon=True)
        self._loop.start()

    def _run(self) -> None:
        me = threading.current_thread()
        while (item := self.inbox.get()) and not self.closed:
            self._handling = True
            try:
                if not item[1].expired:
                    self._on_request(*item)
            except BaseException:  # a handler's sys.exit() ends nothing here
                _log.exception("%s: on_request failed", self.url)
            del item  # or the buffers live until the next request
            with _lock:
                if self._loop is not me:
                    return
                self._handling = False

    def relieve(self) -> None:
        with _lock:
            if self._handling and not self.closed:
                self._start_loop()

    def close(self) -> None:
        with _lock:
            if self.closed:
                return
            self.closed = True
            del _listeners[self.url.port]
            connections = list(self.connections)
        self.inbox.put(None)
        for connection in connections:
            connection.lose(Unreachable(f"{self.url} has closed"))
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
            with _lock:
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

    @property
    def lost(self) -> bool:
        return self._lost is not None

    def request(self, message: Message) -> Future[Message]:
        future: Future[Message] = Future()
        message = own(message)
        with _lock:
            if self._lost is not None:
                raise type(self._lost)(*self._lost.args)
            if len(self._pending) >= _MOST_PENDING or self.listener.inbox.qsize() >= _MOST_WAITING:
                raise Overloaded(f"{len(self._pending)} requests to {self.url} are under way")
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
            self.settle(future, type(why)(*why.args))  # one each: raising adds to an exception

    def forked(self) -> None:
        """In a forked child: the listener's loop is not there."""
        self._lost = Closed(f"the connection to {self.url} belongs to the process before the fork")

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


def _forked() -> None:
    global _lock
    _lock = threading.Lock()  # whoever held it is not there
    for listener in _listeners.values():
        listener.closed = True
        for connection in listener.connections:
            connection.forked()
    _listeners.clear()


os.register_at_fork(after_in_child=_forked)


@hookimpl
def edgeml_transport() -> type[Transport]:
    """Answer the plugin hook."""
    return InprocTransport
