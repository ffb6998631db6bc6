"""Between the threads of one process: the reference transport, and the test double.

An address is a port number in this process. Every message is copied once (`own`), so that what a
receiver keeps never changes under it, exactly as over a network.

Threads. A listener has one loop. A connection has a thread in which the futures of `request` are
settled, so that their callbacks hold up no server, however long they take; a `call` is settled by
whoever replies.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ClassVar

from edgeml.core import (
    DEFAULT_LIMITS,
    Closed,
    Credentials,
    Deadline,
    EdgemlError,
    Endpoint,
    Limits,
    Malformed,
    Message,
    OnRequest,
    Overloaded,
    Peer,
    Pending,
    Requester,
    Transport,
    Unreachable,
    Url,
    hookimpl,
    own,
)
from edgeml.core.carrier import Carrier, Stay
from edgeml.core.errors import copy_error
from edgeml.core.forks import explain_fork, watch_forks
from edgeml.core.url import require_no_path

_log = logging.getLogger(__name__)
_numbers = itertools.count(1)
_MOST_WAITING = 1 << 14  # that one listener has not come to, those cancelled meanwhile included
_MOMENT = 1.0  # seconds that a thread has to end

_Settle = Callable[[int, Message], bool]


class _Ports:
    """The listeners of this process, by port."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: dict[int, _Listener] = {}
        # Each pick another one, as a server over several transports needs one that all have free.
        self._picks = itertools.cycle(range(49152, 65536))
        watch_forks(self)

    def take(self, port: int, listener: _Listener) -> int:
        """Have a listener found at a port, or at any free one for 0; returns the port."""
        with self._lock:
            taken = self._listeners
            picks = itertools.islice(self._picks, 1 << 14)
            port = port or next((p for p in picks if p not in taken), 0)
            if not port or port in taken:
                raise OSError(f"inproc port {port or ''} is taken in this process")
            taken[port] = listener
        return port

    def find(self, port: int) -> _Listener | None:
        with self._lock:
            return self._listeners.get(port)

    def give_back(self, port: int) -> None:
        with self._lock:
            del self._listeners[port]

    def abandon(self) -> None:
        self._lock = threading.Lock()  # whoever held it is not there
        self._listeners.clear()


_ports = _Ports()


class _Listener(Endpoint):
    local = secured = True

    def __init__(self, url: Url, on_request: OnRequest, limits: Limits) -> None:
        self._on_request = on_request
        self._limits = limits
        self._lock = threading.Lock()
        self._inbox: queue.SimpleQueue[tuple[Message, _Reply] | None] = queue.SimpleQueue()
        self._connections: set[_Connection] = set()
        self._closed = False
        self.url = url.with_port(_ports.take(url.port, self))
        self._carrier = Carrier(
            f"edgeml {self.url}", self._run_rounds, lambda: self._inbox.put(None), lambda: None
        )
        self._carrier.start()
        watch_forks(self)

    def _run_rounds(self, stay: Stay) -> bool:
        waiting = stay()
        while not self._closed:
            try:
                item = self._inbox.get(waiting)
            except queue.Empty:
                break
            if item is not None and not item[1].expired:
                self._carrier.hand_over(self._on_request, *item)
            del item  # or the buffers live until the next request
            if waiting and not stay():
                break
        return self._closed

    def carry(self, stay: Stay) -> bool:
        return self._carrier.carry(stay)

    def wake(self) -> None:
        self._carrier.wake()

    def relieve(self) -> None:
        self._carrier.relieve()

    def attach(self, connection: _Connection) -> None:
        """Have a connection told when this closes."""
        with self._lock:
            if self._closed:
                raise Unreachable(f"{self.url} has closed")
            self._connections.add(connection)

    def detach(self, connection: _Connection) -> None:
        with self._lock:
            self._connections.discard(connection)

    def put(self, message: Message, reply: _Reply) -> None:
        """Take a request."""
        if message.nbytes > self._limits.message_bytes:
            with self._lock:
                self.counts["Malformed"] += 1
            raise Malformed(
                f"a message of {message.nbytes} bytes; {self.url} takes "
                f"{self._limits.message_bytes}"
            )
        if self._inbox.qsize() >= _MOST_WAITING:
            raise Overloaded(f"{_MOST_WAITING} requests to {self.url} are waiting")
        self._inbox.put((message, reply))

    def drop(self) -> None:
        """Count a reply that nobody waits for."""
        with self._lock:
            self.dropped += 1

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            connections = list(self._connections)
        _ports.give_back(self.url.port)
        if not self._carrier.in_round:
            self._carrier.relieve()  # a handler that stops its own server carries it no more
        self._carrier.wake()
        for connection in connections:
            connection.lose(Unreachable(f"{self.url} has closed"))
        self._carrier.wait(_MOMENT)

    def abandon(self) -> None:
        """Forget everything, in a forked child, where the loop is not."""
        self._lock = threading.Lock()  # whoever held it is not there
        self._carrier.abandon()
        self._closed = True


class _Reply:
    __slots__ = ("_connection", "_number", "_pending", "_settle")

    def __init__(
        self, connection: _Connection, pending: Pending, number: int, settle: _Settle
    ) -> None:
        self._connection = connection
        self._pending = pending
        self._number = number
        self._settle = settle

    @property
    def peer(self) -> Peer:
        return self._connection.peer

    @property
    def expired(self) -> bool:
        return self._number not in self._pending

    def __call__(self, message: Message) -> None:
        if self.expired or not self._settle(self._number, own(message)):
            self._connection.listener.drop()


class _Connection(Requester):
    local = secured = True
    tells_loss = True

    def __init__(self, url: Url) -> None:
        listener = _ports.find(url.port)
        if listener is None:
            raise Unreachable(f"nobody serves {url} in this process")
        self.url = url
        self.listener = listener
        number = next(_numbers)
        self.peer = Peer(f"{number}", f"inproc connection {number}", "this process")
        self._lock = threading.Lock()
        self._calls, self._requests = Pending(), Pending()
        self._arrived: queue.SimpleQueue[tuple[int, Message] | None] = queue.SimpleQueue()
        self._why: Exception | None = None  # set once, when it is over
        listener.attach(self)
        self._thread = threading.Thread(target=self._run, name=f"edgeml to {url}", daemon=True)
        self._thread.start()
        watch_forks(self)

    def _run(self) -> None:
        """Settle requests until the connection is over."""
        while arrived := self._arrived.get():
            if not self._requests.settle(*arrived):
                self.listener.drop()
            del arrived  # or the buffers live until the next reply
        self._requests.fail(self._copy_why())

    def _arrive(self, number: int, message: Message) -> bool:
        self._arrived.put((number, message))
        return True

    @property
    def lost(self) -> bool:
        return self._why is not None

    def _copy_why(self) -> Exception:
        return copy_error(self._why or Unreachable(f"the connection to {self.url} was lost"))

    def call(self, message: Message, timeout: float) -> Message:
        deadline = Deadline(timeout)
        return self.wait_for(self._ask(message, self._calls, self._calls.settle), deadline)

    def request(self, message: Message) -> Future[Message]:
        return self._ask(message, self._requests, self._arrive)

    def _ask(self, message: Message, pending: Pending, settle: _Settle) -> Future[Message]:
        message = own(message)
        with self._lock:
            if self._why is not None:
                raise self._copy_why()
            number, future = pending.add()
            try:
                self.listener.put(message, _Reply(self, pending, number, settle))
            except EdgemlError:
                future.cancel()
                raise
        return future

    def lose(self, why: Exception) -> None:
        """End the connection and every request under way."""
        with self._lock:
            if self._why is None:
                self._why = why
        self.listener.detach(self)
        self._calls.fail(self._copy_why())
        self._arrived.put(None)  # behind the last replies

    def close(self) -> None:
        self.lose(Closed(f"the connection to {self.url} has been closed"))
        if self._thread is not threading.current_thread():
            self._thread.join(_MOMENT)

    def abandon(self) -> None:
        """Forget everything, in a forked child, where the threads are not."""
        self._lock = threading.Lock()  # whoever held it is not there
        self._why = explain_fork(self.url)
        self._calls, self._requests = Pending(), Pending()


class InprocTransport(Transport):
    """``inproc://any:PORT``: between threads of one process."""

    name: ClassVar[str] = "inproc"

    def serve(
        self,
        url: Url,
        on_request: OnRequest,
        *,
        credentials: Credentials | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Endpoint:
        """See `Transport.serve`; the credentials are left alone, as nobody is between threads."""
        require_no_path(url)
        return _Listener(url, on_request, limits)

    def connect(
        self, url: Url, timeout: float, *, credentials: Credentials | None = None
    ) -> Requester:
        """See `Transport.connect`; returns or raises at once."""
        require_no_path(url)
        return _Connection(url)


@hookimpl
def edgeml_transport() -> type[Transport]:
    """Answer the plugin hook."""
    return InprocTransport
