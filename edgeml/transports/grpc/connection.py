"""The client's end: one channel, which makes one HTTP/2 connection."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import grpc

from edgeml.core import (
    Closed,
    Credentials,
    Deadline,
    DeadlineExceeded,
    EdgemlError,
    Malformed,
    Message,
    Pending,
    Requester,
    Unreachable,
    Url,
    own,
    unframe,
)
from edgeml.core.advice import explain_no_connection
from edgeml.core.dial import look_up
from edgeml.core.errors import NotCarriedOut, copy_error
from edgeml.core.forks import drop_sockets, explain_fork, leave_to_parent, watch_forks
from edgeml.core.pieces import LARGEST, PREFIX, Assembly, Parts, cut, flatten
from edgeml.core.tls import client_keys
from edgeml.core.url import is_loopback, require_no_path
from edgeml.transports.grpc.failures import explain_failure, find_proxy
from edgeml.transports.grpc.order import Lane
from edgeml.transports.grpc.processes import NO_FORKS
from edgeml.transports.grpc.protocol import ERRORS, LARGEST_FRAME, SERVICE, STREAMED, name_request
from edgeml.transports.grpc.tls import CHANNEL_OPTIONS, channel_credentials

# Retries stay as gRPC has them, with nothing but a request that no server has seen sent again:
# without its code for them, no deadline fires behind a stream that the server has stopped reading.
_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),  # or connections to one server would be one
    ("grpc.initial_reconnect_backoff_ms", 100),
]
_ASKING = 0.2  # seconds
_MOMENT = 0.4  # seconds that closing waits for gRPC, which now and then takes a second over it


class Connection(Requester):
    """See `edgeml.core.Requester`."""

    def __init__(self, url: Url, timeout: float, credentials: Credentials | None) -> None:
        deadline = Deadline(timeout)
        require_no_path(url)
        keys = client_keys(url, credentials)
        self.secured = keys is not None
        self.url = url
        self._why: EdgemlError | None = None  # set once, when it is over
        self._pending = Pending()
        self._local = threading.local()
        self._lock = threading.Lock()
        # Those that may be at work for this. gRPC has a new one whenever nothing was under way.
        self._threads = weakref.WeakSet[threading.Thread]()
        host = url.host or "localhost"
        proxy = find_proxy(host, deadline)
        self._peers: set[tuple[str, int]] = set()
        if not proxy:  # whose connection has another end, and which may know names that we don't
            try:
                found = look_up(host, url.port, deadline)
            except (OSError, UnicodeError) as error:
                raise explain_no_connection(url, error) from error
            self._peers = {(str(address[0]), int(address[1])) for *_, address in found}
        self.local = not proxy and all(is_loopback(address) for address, _ in self._peers)
        options = [*_OPTIONS, ("grpc.enable_http_proxy", int(bool(proxy)))]
        host = f"[{host}]" if ":" in host else host
        if keys is None:
            self._channel = grpc.insecure_channel(f"{host}:{url.port}", options)
        else:
            self._channel = grpc.secure_channel(
                f"{host}:{url.port}", channel_credentials(keys), [*options, *CHANNEL_OPTIONS]
            )
        self._stream = self._channel.stream_stream(f"/{SERVICE}/Stream")
        self._fetch = self._channel.unary_stream(f"/{SERVICE}/Fetch")
        try:
            connect = self._channel.unary_unary(f"/{SERVICE}/Connect")
            left = deadline.left  # some of it to find out why, where there is no answer
            welcome = connect(b"", timeout=left - min(_ASKING, left / 4))
            if len(welcome) != PREFIX.size:
                raise Unreachable(f"what answers at {url} is no edgeml server")
            self._number, queue = PREFIX.unpack(welcome)
        except grpc.RpcError as error:
            self._channel.close()
            raise explain_failure(url, error, keys, proxy, deadline) from None
        except BaseException:
            self._channel.close()
            raise
        self._request = self._channel.unary_unary(f"/{SERVICE}/{name_request(queue)}")
        watch_forks(self)

    @property
    def lost(self) -> bool:
        """See `Requester.lost`."""
        return self._why is not None

    # Calls, in the caller's thread --------------------------------------------------------

    def call(self, message: Message, timeout: float) -> Message:
        """See `Requester.call`."""
        deadline = Deadline(timeout)
        size, parts = flatten(message)
        if self._why is not None:
            raise self._copy_why()
        content = [PREFIX.pack(self._number, size), *parts]
        lane: Lane | None = getattr(self._local, "lane", None)
        turn, metadata = lane.enter() if lane is not None and lane.busy else (0, None)
        try:
            if size > LARGEST_FRAME:
                with _Sending(content) as sending:
                    stream = self._stream(sending, timeout=deadline.left, metadata=metadata)
                    return _assemble(stream)
            whole = b"".join(content)
            piece = self._request(whole, timeout=deadline.left, metadata=metadata)
            if _read_key(piece):
                size = _read_promise(piece)
                fetch = self._fetch(self._ask_for(piece), timeout=deadline.left)
                return _assemble(fetch, size)
            return _read_reply(piece)
        except (grpc.RpcError, ValueError) as error:
            raise self._explain(error, timeout) from None
        finally:
            if lane is not None and turn:
                lane.leave(turn)

    def _ask_for(self, piece: bytes) -> bytes:
        """What asks for the reply that is kept under a piece's key."""
        return PREFIX.pack(self._number, _read_key(piece))

    def _explain(self, error: Exception, timeout: float) -> EdgemlError:
        """What an error of gRPC means here; one after which nothing more will be sent is kept."""
        if isinstance(error, grpc.RpcError) and ERRORS.get(error.code()) is NotCarriedOut:
            told = f"the connection to {self.url} was lost: {error.details()}"
            self._lose(Unreachable(told))
            return NotCarriedOut(told)
        if self._why is not None:
            return self._copy_why()
        if isinstance(error, EdgemlError):
            return error
        if not isinstance(error, grpc.RpcError):  # a channel that has been closed
            return Unreachable(f"the connection to {self.url} failed: {error}")
        code = error.code()
        kind = ERRORS.get(code, Unreachable)
        if kind is DeadlineExceeded:
            return DeadlineExceeded(f"{self.url} gave no reply within {timeout:g} s")
        if kind in (Unreachable, Closed):
            why = Unreachable(f"the connection to {self.url} was lost: {error.details()}")
            self._lose(why)
            return why
        return kind(f"{self.url}: {error.details()}")

    # Requests, settled in the channel's thread --------------------------------------------

    def request(self, message: Message) -> Future[Message]:
        """See `Requester.request`."""
        size, parts = flatten(message)
        if self._why is not None:
            raise self._copy_why()
        number, future = self._pending.add()
        prefix = PREFIX.pack(self._number, size)
        calls: list[Any] = []  # of gRPC, that this one takes: the last is under way
        lane: Lane | None = getattr(self._local, "lane", None)
        if lane is None:
            lane = self._local.lane = Lane()
        turn, metadata = lane.enter()
        future.add_done_callback(lambda _: lane.leave(turn))
        try:
            if size > LARGEST_FRAME:
                _, parts = flatten(own(message))
                calls.append(self._stream(cut([prefix, *parts], STREAMED), metadata=metadata))
            else:
                calls.append(self._request.future(b"".join([prefix, *parts]), metadata=metadata))
        except ValueError as error:
            future.cancel()
            raise self._explain(error, 0) from None
        future.add_done_callback(lambda done: calls[-1].cancel() if done.cancelled() else None)
        if size > LARGEST_FRAME:
            self._receive(number, calls[0])
        else:
            calls[0].add_done_callback(lambda _: self._take_reply(number, calls))
        return future

    def _take_reply(self, number: int, calls: list[Any]) -> None:
        with self._lock:
            self._threads.add(threading.current_thread())
        outcome: Message | Exception
        try:
            piece = calls[0].result()
            if _read_key(piece):
                size = _read_promise(piece)
                calls.append(self._fetch(self._ask_for(piece)))
                if number in self._pending:
                    self._receive(number, calls[-1], size)
                else:  # cancelled just now
                    calls[-1].cancel()
                return
            outcome = _read_reply(piece)
        except (grpc.RpcError, grpc.FutureCancelledError, EdgemlError, ValueError) as error:
            outcome = self._explain(error, 0)
        self._pending.settle(number, outcome)

    def _receive(self, number: int, call: Any, size: int | None = None) -> None:
        """Receive a large reply, or the reply to what is large, in a thread of its own."""

        def run() -> None:
            outcome: Message | Exception
            try:
                outcome = _assemble(call, size)
            except Exception as error:
                # One that was cancelled tells nothing about the connection.
                outcome = self._explain(error, 0) if number in self._pending else error
            with self._lock:
                self._threads.discard(thread)
            self._pending.settle(number, outcome)

        thread = threading.Thread(target=run, name=f"edgeml to {self.url}", daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()

    # The end ------------------------------------------------------------------------------

    def _copy_why(self) -> EdgemlError:
        why = self._why or Unreachable(f"the connection to {self.url} was lost")
        return copy_error(why)

    def _lose(self, why: EdgemlError) -> None:
        with self._lock:
            if self._why is None:
                self._why = why

    def close(self) -> None:
        """See `Endpoint.close`."""
        self._lose(Closed(f"the connection to {self.url} has been closed"))
        with self._lock:
            threads = [*self._threads]
        if self._channel is None:
            return
        # gRPC waits here for its own thread, which may be the one that calls this.
        closing = threading.Thread(target=self._channel.close, name="edgeml close", daemon=True)
        try:
            closing.start()
        except RuntimeError:  # no more, as the program ends
            self._channel.close()
            return
        if threading.current_thread() in threads:
            return
        deadline = Deadline(_MOMENT)
        closing.join(_MOMENT)
        self._pending.fail(self._copy_why())
        for thread in threads:
            thread.join(deadline.left)

    def abandon(self) -> None:
        """Forget everything, in a forked child, where gRPC's threads are not."""
        leave_to_parent(self, self._channel)
        if self._why is None:
            drop_sockets(peers=self._peers)
        self._channel = None  # which is not the child's to close
        self._why = Closed(f"{explain_fork(self.url)}; {NO_FORKS}")
        self._lock = threading.Lock()  # whoever held it is not there
        self._threads.clear()


class _Sending(Iterator[bytes]):
    """A stream that gRPC's thread takes from the caller's memory, as long as the caller waits."""

    def __init__(self, content: Parts) -> None:
        self._pieces = cut(content, STREAMED)
        self._lock = threading.Lock()

    def __next__(self) -> bytes:
        with self._lock:
            return next(self._pieces)

    def __enter__(self) -> _Sending:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._pieces = iter(())


def _read_key(piece: bytes) -> int:
    """Under which a reply is to be fetched, as it is too large for one piece; 0 if it is here."""
    if len(piece) < PREFIX.size:
        raise Malformed("a reply without a prefix")
    return int(PREFIX.unpack_from(piece)[0])


def _read_promise(piece: bytes) -> int:
    """How large the reply is that is to be fetched."""
    size = int(PREFIX.unpack_from(piece)[1])
    if not LARGEST_FRAME < size <= LARGEST:
        raise Malformed(f"a reply of {size} bytes that is to be fetched")
    return size


def _read_reply(piece: bytes) -> Message:
    """The message of a reply that came in one piece."""
    frame = memoryview(piece)[PREFIX.size :]
    if len(frame) != PREFIX.unpack_from(piece)[1]:
        raise Malformed("a reply that is not as long as its prefix says")
    return unframe(frame)


def _assemble(call: Any, size: int | None = None) -> Message:
    """The message that a call streams, of the size that was promised, if one was."""

    def check(announced: int) -> None:
        if size not in (None, announced):
            raise Malformed(f"a reply of {announced} bytes; {size} were promised")

    assembly = Assembly(admit=check)
    try:
        for piece in call:
            assembly.add(piece)
        return assembly.message()
    finally:
        call.cancel()  # or the server would go on; a call that has ended doesn't mind
        del assembly  # or what has come lives until the error, which is the call, is collected
