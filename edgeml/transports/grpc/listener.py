"""The server's end: `grpc.aio` in a loop that a slow handler can't stop."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any
from urllib.parse import unquote

import grpc
from grpc import aio

from edgeml.core import (
    Closed,
    Credentials,
    DeadlineExceeded,
    EdgemlError,
    Limits,
    Malformed,
    Message,
    OnRequest,
    Overloaded,
    Peer,
    Reply,
    Unreachable,
    Url,
    find_address,
    own,
    tell_url,
    unframe,
)
from edgeml.core.errors import NotCarriedOut
from edgeml.core.forks import drop_sockets, watch_forks
from edgeml.core.loops import Loop, LoopEndpoint
from edgeml.core.pieces import PREFIX, Assembly, cut_message, flatten
from edgeml.core.quota import Held, Quota
from edgeml.core.refusals import Refusals
from edgeml.core.security import TlsKeys
from edgeml.core.tls import server_keys
from edgeml.core.url import is_loopback, require_no_path
from edgeml.transports.grpc.health import Health
from edgeml.transports.grpc.order import Turns
from edgeml.transports.grpc.protocol import (
    ERRORS,
    LARGEST_FRAME,
    QUEUES,
    SERVICE,
    STREAMED,
    name_request,
)
from edgeml.transports.grpc.sockets import Address, Sockets
from edgeml.transports.grpc.tls import Clients, server_credentials

_log = logging.getLogger(__name__)

_GRACE = 0.3  # seconds that an endpoint which closes gives to what is still to be sent
_LOOK = 0.1  # seconds between two looks whether grpc.aio has ended by itself
_DRAIN = 5.0  # seconds that it then has for what is under way
_MOST_AWAY = 5.0  # seconds until its port must be free again
_KEPT = 30.0  # seconds that a large reply waits to be fetched
_EARLY = 1 << 27  # bytes that one connection may have waiting for their turn
_EACH = 1 << 14  # bytes that each of those counts for, beside its own
_COUNTED = 1 << 16  # bytes; smaller replies are held down by how many calls one connection may have
_GONE: Address = ("", 0)  # of a connection that gRPC has forgotten
_MOST_STREAMS = 1 << 13  # under way on one connection; more than an honest client has
_OPTIONS = [
    ("grpc.so_reuseport", 0),  # or a taken port would be shared
    ("grpc.max_concurrent_streams", _MOST_STREAMS),
    # Requests that the loop has not come to yet; beyond 1,000 gRPC would cancel some by itself.
    ("grpc.server.max_pending_requests", 1 << 16),
    ("grpc.server.max_pending_requests_hard_limit", 1 << 17),
    # A machine that vanished without a word is noticed, and what is kept for it freed.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 40_000),  # since a ping may wait behind a large message
    ("grpc.http2.max_pings_without_data", 0),
]
_CODES = {error: code for code, error in reversed(ERRORS.items())}

_Context = Any  # aio.ServicerContext; grpcio is published without types
_Answer = bytes | Message
"""What a reply becomes: a piece, or a message that is too large for one."""


@functools.cache
def _keep_poller() -> None:
    """Have one poller for the process; else it ends with whichever server is collected last."""
    aio.init_grpc_aio()


def _peer_of(context: _Context, identity: str | None) -> Peer:
    address = context.peer()
    return Peer(address, address, _read_address(address)[0], identity)


@functools.lru_cache(maxsize=4096)
def _read_address(text: str) -> Address:
    """Read what gRPC says: "ipv4:127.0.0.1:1234", "ipv6:%5B::1%5D:1234"; `_GONE` if no address."""
    host, _, port = unquote(text).partition(":")[2].rpartition(":")
    return (host.strip("[]").partition("%")[0], int(port)) if port.isdecimal() else _GONE


def _address_of(context: _Context) -> Address:
    """Return where a request comes from; raises CancelledError if nobody waits for it any more.

    Of a connection that had ended before the request was looked at, gRPC doesn't know the address.
    """
    address = _read_address(context.peer())
    if address is _GONE:
        raise asyncio.CancelledError
    return address


class _Reply:
    __slots__ = ("_context", "_listener", "answer", "identity")

    def __init__(self, listener: Listener, context: _Context, identity: str | None) -> None:
        self._listener = listener
        self._context = context
        self.identity = identity
        self.answer: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()

    @property
    def peer(self) -> Peer:
        return _peer_of(self._context, self.identity)

    @property
    def expired(self) -> bool:
        return self.answer.done()

    def __call__(self, message: Message) -> None:
        self._listener.give([self], message)


class Listener(LoopEndpoint):
    """See `edgeml.core.Endpoint`."""

    def __init__(
        self, url: Url, on_request: OnRequest, credentials: Credentials | None, limits: Limits
    ) -> None:
        require_no_path(url)
        keys = server_keys(url, credentials)
        self.secured = keys is not None
        self._clients = None if keys is None else Clients(keys[1])
        self._limits = limits
        self._refusals = Refusals(url, self.counts)
        self._sockets = Sockets(self._later, limits, self._refusals, self.secured)
        self._incoming = Quota(limits.bytes_per_client, limits.bytes, "are on their way")
        self._early = Quota(
            min(_EARLY, limits.bytes_per_client), limits.bytes // 2, "wait for their turn"
        )
        self._unread = Quota(limits.replies_per_client, limits.bytes, "have not been read")
        self._on_request = on_request
        self._number = secrets.randbits(64) | 1  # of this server; 0 stands for any
        self._waiting: set[asyncio.Future[_Answer]] = set()
        self._kept: dict[int, tuple[Message, Held]] = {}  # replies that are to be fetched
        self._turns = Turns()
        self._queues = itertools.cycle([0])  # of which the next connection is told one
        self._closed = False
        self._health = Health(self._receive)
        self._loop = Loop(f"edgeml {url}")
        try:
            self._server, self.url = self._loop.start(self._open(url, keys and keys[0])).result()
        except BaseException:
            self._loop.close()
            raise
        self._loop.start(self._watch(keys and keys[0]))
        watch_forks(self)

    async def _open(self, url: Url, keys: TlsKeys | None) -> tuple[aio.Server, Url]:
        _keep_poller()
        self._address = find_address(url)
        self.local = is_loopback(self._address)
        server, port = await self._serve(url, keys)
        self._sockets.port = port
        self._check_sockets()
        return server, tell_url(url, self._address, port)

    async def _serve(self, url: Url, keys: TlsKeys | None) -> tuple[aio.Server, int]:
        options = [
            *_OPTIONS,
            # Of TLS, and until HTTP/2 has begun.
            ("grpc.server_handshake_timeout_ms", int(1000 * self._limits.handshake)),
        ]
        server = aio.server(options=options)
        # All of them take streams, since a unary method is told of when its request has come.
        handlers = {
            "Connect": grpc.stream_unary_rpc_method_handler(self._connect),
            "Request": grpc.stream_unary_rpc_method_handler(self._request),
            "Stream": grpc.stream_stream_rpc_method_handler(self._stream),
            "Fetch": grpc.stream_stream_rpc_method_handler(self._fetch),
        }
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, handlers), self._health.handler())
        )
        if hasattr(server, "add_registered_method_handlers"):  # not in older releases
            names = {name_request(queue): handlers["Request"] for queue in range(1, QUEUES + 1)}
            server.add_registered_method_handlers(SERVICE, names)
            self._queues = itertools.cycle(range(1, QUEUES + 1))
        try:
            if keys is None:
                port = server.add_insecure_port(f"{self._address}:{url.port}")
            else:
                port = server.add_secure_port(
                    f"{self._address}:{url.port}", server_credentials(keys, self._sockets.begin)
                )
        except RuntimeError as error:
            raise OSError(
                f"cannot serve {url}: {error}; another port, or 0, may be free"
            ) from error
        await server.start()
        return server, port

    async def _watch(self, keys: TlsKeys | None) -> None:
        """Serve anew where `grpc.aio` has ended by itself, as it does of a path that isn't UTF-8.

        What is under way is still answered, and to its clients this is the same server.
        """
        while not self._closed:
            try:
                await self._server.wait_for_termination(_LOOK)
            except Exception as error:  # of which it has ended
                if self._closed:
                    return
                self._refusals.note("Malformed", "somebody", "", f"grpc.aio has ended: {error!r}")
                ended = self._server
                if not await self._serve_again(keys):
                    return
                self._loop.start(ended.stop(_DRAIN))

    async def _serve_again(self, keys: TlsKeys | None) -> bool:
        now = asyncio.get_running_loop().time
        ends = now() + _MOST_AWAY
        while not self._closed:
            try:
                self._server, _ = await self._serve(self.url, keys)
                return True
            except OSError as error:
                if now() > ends:
                    _log.error("%s ends, as it can't be served again: %s", self.url, error)
                    self._loop.do(self.close)
                    return False
            await asyncio.sleep(_LOOK / 10)  # the port is not free yet
        return False

    def _later(self, seconds: float, function: Callable[..., object]) -> None:
        self._loop.later(seconds, function)

    def _check_sockets(self) -> None:
        if not self._closed:
            self._loop.later(self._sockets.check(), self._check_sockets)

    # Requests, in the loop ----------------------------------------------------------------

    async def _connect(self, _: AsyncIterator[bytes], context: _Context) -> bytes:
        try:
            await self._receive(context)
            self._identify(context)
        except EdgemlError as error:
            await self._abort(context, error)
        return PREFIX.pack(self._number, next(self._queues))

    async def _request(self, _: AsyncIterator[bytes], context: _Context) -> bytes:
        try:
            data = await self._receive(context)
            identity = self._identify(context)
            if len(data) < PREFIX.size:
                raise Malformed("this is no request of edgeml: it has no prefix")
            number, size = PREFIX.unpack_from(data)
            self._check(number)
            frame = memoryview(data)[PREFIX.size :]
            if len(frame) != size:
                raise Malformed("a request that is not as long as its prefix says")
            message = unframe(frame)
            await self._take_turn(context, identity, size)
            answer, held = await self._answer(message, context, identity)
        except EdgemlError as error:
            await self._abort(context, error)
        if isinstance(answer, bytes):
            if held is not None:
                context.add_done_callback(lambda _: held.release())
            return answer
        assert held is not None  # as what is so large has been counted
        key = secrets.randbits(64) | 1
        self._kept[key] = answer, held
        self._loop.later(_KEPT, self._forget, key)
        return PREFIX.pack(key, flatten(answer)[0])

    async def _stream(self, _: AsyncIterator[bytes], context: _Context) -> None:
        incoming: list[Held] = []
        assembly: Assembly | None = None
        try:
            identity = self._identify(context)
            peer = _peer_of(context, identity)
            assembly = Assembly(
                self._limits.message_bytes,
                lambda size: incoming.append(self._incoming.take(peer, size)),
            )
            with self._sockets.receiving(_address_of(context)) as flow:
                while (piece := await self._read(context)) is not aio.EOF:
                    flow.given += len(piece)
                    assembly.add(piece)
                    self._check(assembly.number)
            message = assembly.message()
            await self._take_turn(context, identity, 0)  # as it is counted already
            for held in incoming:
                held.release()  # from here on core counts it
            answer, unread = await self._answer(message, context, identity)
        except EdgemlError as error:
            await self._abort(context, error)
        finally:
            assembly = None  # or what has come lives as long as gRPC keeps the error
            for held in incoming:
                held.release()
        try:
            if isinstance(answer, bytes):
                await context.write(answer)
                return
            for piece in cut_message(0, answer, STREAMED):
                await context.write(piece)
        finally:
            if unread is not None:
                unread.release()

    async def _receive(self, context: _Context) -> bytes:
        """The one piece of a unary request; raises Malformed if there is none."""
        with self._sockets.receiving(_address_of(context)) as flow:
            piece = await context.read()
            if piece is aio.EOF:
                raise Malformed("a request without a message")
            flow.given += len(piece)
            return bytes(piece)

    async def _read(self, context: _Context) -> Any:
        """The next piece of a stream; raises DeadlineExceeded if none comes for too long."""
        reading = asyncio.ensure_future(context.read())
        try:
            done, _ = await asyncio.wait((reading,), timeout=self._limits.stall)
        except asyncio.CancelledError:
            reading.cancel()
            raise
        if done:
            return reading.result()
        reading.cancel()
        raise DeadlineExceeded(
            f"nothing has come for {self._limits.stall:g} s of a message that is half sent"
        )

    async def _fetch(self, _: AsyncIterator[bytes], context: _Context) -> None:
        try:
            data = await self._receive(context)
            self._identify(context)
            if len(data) != PREFIX.size:
                raise Malformed("this is no fetch of edgeml")
            number, key = PREFIX.unpack(data)
            try:
                self._check(number)
            except NotCarriedOut as error:  # of the request that this is the reply to, who knows?
                raise Unreachable(str(error)) from None
            if key not in self._kept:
                raise Malformed("there is no such reply to be fetched, or it came too late")
            answer, held = self._kept.pop(key)  # now, or it could be forgotten on the way
        except EdgemlError as error:
            await self._abort(context, error)
        try:
            for piece in cut_message(0, answer, STREAMED):
                await context.write(piece)
        except BaseException:
            self.dropped += 1
            raise
        finally:
            held.release()

    def _identify(self, context: _Context) -> str | None:
        """Who asks, by its certificate; None without keys. Raises PermissionDenied."""
        if self._clients is None:
            return None
        self._sockets.ask(_address_of(context))
        return self._clients.find(context)

    def _check(self, number: int) -> None:
        if number not in (0, self._number):
            raise NotCarriedOut("the server has restarted since this client connected")

    async def _take_turn(self, context: _Context, identity: str | None, nbytes: int) -> None:
        """Wait for a request's turn, if it came too early, and count it meanwhile."""
        await self._turns.take(
            context.invocation_metadata(),
            lambda: self._early.take(_peer_of(context, identity), nbytes + _EACH),
        )

    async def _answer(
        self, message: Message, context: _Context, identity: str | None
    ) -> tuple[_Answer, Held | None]:
        """The answer, and what it is counted as until it has been read, if it is large."""
        if self._closed:
            raise Closed(f"{self.url} has closed")
        reply = _Reply(self, context, identity)
        answer = reply.answer
        self._waiting.add(answer)
        try:
            self._loop.hand_over(self._on_request, message, reply)
            del message, reply  # or the buffers live until the answer
            given = await answer
        finally:
            self._waiting.discard(answer)
        size = len(given) if isinstance(given, bytes) else given.nbytes
        if size <= _COUNTED:
            return given, None
        try:
            return given, self._unread.take(_peer_of(context, identity), size)
        except Overloaded:
            self.dropped += 1
            raise

    async def _abort(self, context: _Context, error: EdgemlError) -> Any:
        if not isinstance(error, (Closed, Unreachable)):
            address = context.peer()
            self._refusals.note(type(error).__name__, address, _read_address(address)[0], error)
        await context.abort(_CODES.get(type(error), grpc.StatusCode.UNKNOWN), str(error))

    def _forget(self, key: int) -> None:
        if key in self._kept:
            self._kept.pop(key)[1].release()
            self.dropped += 1

    # Replies, from any thread -------------------------------------------------------------

    def give(self, replies: list[_Reply], message: Message) -> None:
        """Answer several requests with one message."""
        size, parts = flatten(message)
        if size <= LARGEST_FRAME:
            answer: _Answer = b"".join([PREFIX.pack(0, size), *parts])
        else:
            answer = own(message)
        if not self._loop.do(self._settle, replies, answer):
            self.dropped += len(replies)

    def _settle(self, replies: list[_Reply], answer: _Answer) -> None:
        for reply in replies:
            if reply.answer.done():  # cancelled, as nobody waits any more
                self.dropped += 1
            else:
                reply.answer.set_result(answer)

    def reply_many(self, replies: Iterable[Reply], message: Message) -> None:
        """See `Endpoint.reply_many`."""
        self.give([reply for reply in replies if isinstance(reply, _Reply)], message)

    # The end ------------------------------------------------------------------------------

    def abandon(self) -> None:
        """In a forked child: let go of what gRPC has open."""
        if not self._closed:
            drop_sockets(port=self.url.port)

    def close(self) -> None:
        """See `Endpoint.close`."""
        self._closed = True
        self._loop.close(self._stop)

    async def _stop(self) -> None:
        self._health.end()
        for answer in self._waiting:
            if not answer.done():
                answer.set_exception(Closed(f"{self.url} has closed"))
        ends = asyncio.get_running_loop().time() + _GRACE
        while self._kept and asyncio.get_running_loop().time() < ends:
            await asyncio.sleep(0.01)
        await self._server.stop(max(0.05, ends - asyncio.get_running_loop().time()))
        del self._server  # it refers to this
