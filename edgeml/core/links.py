"""A whole transport from what carries pieces of bytes in asyncio: say how to listen, how to dial,
and how to send and receive a piece, and the rest of `Transport` is here.

A message goes in pieces of at most `LARGEST_PIECE` bytes, one after the other
(`edgeml.core.pieces`); the number of its prefix is the request's, and the reply to it carries the
same. The highest bit of a reply's number says that the request was refused; its header is a text
that says why. With keys the server speaks first: number 0, and nothing, or why it refuses the
client's key.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import ssl
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, ClassVar, Protocol

from edgeml.core.advice import explain_no_connection
from edgeml.core.deadline import Deadline
from edgeml.core.errors import (
    Closed,
    DeadlineExceeded,
    EdgemlError,
    Malformed,
    Overloaded,
    PermissionDenied,
    Unreachable,
    copy_error,
)
from edgeml.core.frames import unframe
from edgeml.core.gate import Gate
from edgeml.core.limits import DEFAULT_LIMITS, Limits
from edgeml.core.loops import Loop, LoopEndpoint
from edgeml.core.message import Message
from edgeml.core.pending import Pending
from edgeml.core.pieces import PREFIX, Assembly, cut, flatten
from edgeml.core.quota import Held, Quota
from edgeml.core.refusals import Refusals
from edgeml.core.security import Credentials, Keyring, TlsKeys
from edgeml.core.strangers import find_stranger
from edgeml.core.tls import (
    NO_KEY,
    client_context,
    client_keys,
    explain_refusal,
    server_context,
    server_keys,
)
from edgeml.core.transport import Endpoint, OnRequest, Peer, Reply, Requester, Transport
from edgeml.core.url import Url, is_loopback, leads_to_loopback, require_no_path

__all__ = ["LARGEST_PIECE", "Accept", "Link", "LinkTransport", "Listening"]

_numbers = itertools.count(1)  # of connections, all listeners' together, since ids are compared

LARGEST_PIECE = 1 << 20
"""Bytes; a link refuses a larger one before it takes memory for it."""

_CONTENT = LARGEST_PIECE - PREFIX.size
_REFUSED = 1 << 63
_OVERHEAD = 2048  # bytes that a message which waits takes beside its own
_MOST_REFUSALS = 4096  # that wait to be sent to one peer
_SOON = 0.5  # seconds in which a server usually answers who connects
_GRACE = 0.5  # seconds that an end which closes gives to what is still to be sent
_LOOK = 0.3  # seconds from one look at who has been revoked to the next
_TURN = 0.001  # seconds that a link may work off what has come before the others have their turn


class Link(Protocol):
    """A connection to one peer. All of it is called in one event loop."""

    @property
    def tls(self) -> ssl.SSLObject | None:
        """Its TLS, which asyncio calls its ``ssl_object``; None in clear text."""

    async def send(self, piece: bytes, /) -> object:
        """Send a piece, and return when there is room for the next."""

    async def receive(self) -> bytes:
        """The next piece. Raises any exception when the connection is lost, and an `Overloaded`
        where it was ended for what its peer doesn't read."""

    async def close(self) -> object:
        """Send what was given, then end the connection; `abort` follows if this takes long."""

    def abort(self) -> object:
        """End the connection at once, whatever state it is in."""


class Accept(Protocol):
    """A server's side of `LinkTransport.listen`."""

    @property
    def tls(self) -> ssl.SSLContext | None:
        """What connections are to be secured by; None for clear text."""

    def bind(self, url: Url) -> socket.socket:
        """A socket to listen by. It lets no more connections in than one address may have, and
        ends those that take too long to be handed over.

        Raises:
            OSError: the address is taken, or isn't this machine's.
        """

    async def __call__(self, link: Link, address: object) -> None:
        """Take a new link and the peer's address, and return when it is over."""


Listening = tuple[Url, Callable[[], object]]
"""Where peers reach a server, and what makes it stop listening; not the links' end."""


class LinkTransport(Transport):
    """Subclass it, and set `name`."""

    greeting: ClassVar[bytes] = b""
    """How a server of it begins what it says, unasked or to an HTTP request, as a regular
    expression: whoever says anything else on its port is told apart by that (`find_stranger`)."""

    @abstractmethod
    async def listen(self, url: Url, accept: Accept) -> Listening:
        """Have ``accept`` run for each connection that comes, over ``accept.tls``.

        Raises:
            OSError: the address is taken, or isn't this machine's.
        """

    @abstractmethod
    async def dial(self, url: Url, tls: ssl.SSLContext | None) -> Link:
        """Connect. Raises any exception if nobody answers; is cancelled when that takes long.

        An `EdgemlError` is passed on as it is, and the text of any other is quoted.

        Args:
            url: where to.
            tls: what the connection is to be secured by, with `SERVER_NAME` as the server's name,
                whatever the host is called; None for clear text.
        """

    def serve(
        self,
        url: Url,
        on_request: OnRequest,
        *,
        credentials: Credentials | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Endpoint:
        """See `Transport.serve`."""
        require_no_path(url)
        return _Listener(url, on_request, self.listen, server_keys(url, credentials), limits)

    def connect(
        self, url: Url, timeout: float, *, credentials: Credentials | None = None
    ) -> Requester:
        """See `Transport.connect`."""
        require_no_path(url)
        return _Connection(url, timeout, self.dial, self.greeting, client_keys(url, credentials))


class _Traffic:
    """What goes through one link; `put` may be called from any thread."""

    def __init__(
        self, loop: Loop, link: Link, peer: Peer, limits: Limits, incoming: Quota, unread: Quota
    ) -> None:
        self._loop = loop
        self._link = link
        self._peer = peer
        self._limits = limits
        self._incoming = incoming
        self._unread = unread
        self._turn = asyncio.Lock()  # a message's pieces follow one another
        self._stall: asyncio.TimerHandle | None = None
        self._why: Exception | None = None  # it was given up
        self._refusals = 0  # that have not been sent
        self.lost = False
        self.heard = 0.0  # when a piece last came
        self.taken = 0.0  # when there was last room for another piece of the same message

    # Out ----------------------------------------------------------------------------------

    def put(self, number: int, message: Message, failed: Callable[[EdgemlError], object]) -> None:
        """Send soon; calls ``failed``, in any thread, if that can't be."""
        size, parts = flatten(message)
        try:
            held = self._unread.take(self._peer, _OVERHEAD + size)
        except Overloaded as error:
            failed(error)
            return
        content = [PREFIX.pack(number, size), *parts]
        pieces = [b"".join(content)] if size <= _CONTENT else list(cut(content, LARGEST_PIECE))
        self._begin(pieces, held.release, failed)

    def refuse(
        self, number: int, why: EdgemlError, failed: Callable[[EdgemlError], object]
    ) -> None:
        """Tell that a request was refused; a peer that doesn't read even that is cut off."""
        if self._refusals >= _MOST_REFUSALS:
            self._loop.do(self._link.abort)
            return
        self._refusals += 1
        size, parts = flatten(Message(str(why).encode()[:1000]))
        piece = b"".join([PREFIX.pack(number | _REFUSED, size), *parts])
        self._begin([piece], self._forget_refusal, failed)

    def _forget_refusal(self) -> None:
        self._refusals -= 1

    def _begin(
        self,
        pieces: list[bytes],
        sent: Callable[[], object],
        failed: Callable[[EdgemlError], object],
    ) -> None:
        try:
            self._loop.start(self._send(pieces, sent, failed))
        except Closed as error:
            sent()
            failed(error)

    async def _send(
        self,
        pieces: list[bytes],
        sent: Callable[[], object],
        failed: Callable[[EdgemlError], object],
    ) -> None:
        try:
            async with self._turn:
                pieces.reverse()
                while pieces:
                    await self._link.send(pieces.pop())
                    if pieces:
                        self.taken = time.monotonic()
        except Exception as error:
            failed(Unreachable(f"the connection was lost: {error}"))
        finally:
            sent()

    async def close(self) -> None:
        """End the connection behind all that was put."""
        async with self._turn:
            await self._link.close()

    def abort(self) -> None:
        """End it at once."""
        self._link.abort()

    # In -----------------------------------------------------------------------------------

    async def receive(
        self,
        arrived: Callable[[int, Message], object],
        refused: Callable[[int, EdgemlError], object],
    ) -> Exception:
        """Hand over what arrives until the connection is lost, and tell why it was.

        Args:
            arrived: is given each message.
            refused: is given the number of each for which there is no room.
        """
        worked = 0.0  # seconds since the others had their turn
        try:
            while True:
                if worked > _TURN:
                    worked = 0.0
                    await asyncio.sleep(0)  # `receive` doesn't wait while there is something
                piece = await self._link.receive()
                self.heard = time.monotonic()
                began = time.perf_counter()
                if len(piece) < PREFIX.size:
                    raise Malformed("a piece without a prefix")
                number, size = PREFIX.unpack_from(piece)
                if len(piece) == PREFIX.size + size:
                    arrived(number, unframe(memoryview(piece)[PREFIX.size :]))
                    del piece  # or it lives until the next one arrives
                    worked += time.perf_counter() - began
                    continue
                held: list[Held] = []
                try:
                    message = await self._assemble(piece, held)
                except Overloaded as error:
                    await self._skip(size - len(piece) + PREFIX.size)
                    refused(number, error)
                    continue
                finally:
                    self._watch(None)
                    for each in held:
                        each.release()
                began = time.perf_counter()
                arrived(number, message)
                del piece, message
                worked += time.perf_counter() - began
        except Exception as error:  # the link's, or of what is no message
            return self._why or error
        finally:
            self.lost = True
            self._link.abort()

    async def _assemble(self, piece: bytes, held: list[Held]) -> Message:
        assembly = Assembly(
            self._limits.message_bytes,
            lambda size: held.append(self._incoming.take(self._peer, size)),
        )
        assembly.add(piece)
        while not assembly.whole:
            assembly.add(await self._next())
        return assembly.message()

    async def _skip(self, left: int) -> None:
        while left > 0:
            left -= len(await self._next())
        if left:
            raise Malformed("a message that is longer than its prefix says")

    async def _next(self) -> bytes:
        """The next piece of a message that is half read."""
        self._watch(self._limits.stall)
        piece = await self._link.receive()
        self.heard = time.monotonic()
        if not piece:
            raise Malformed("a piece of nothing")
        return piece

    def _watch(self, seconds: float | None) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        if seconds is not None:
            self._stall = asyncio.get_running_loop().call_later(seconds, self._give_up)

    def _give_up(self) -> None:
        self._why = DeadlineExceeded(
            f"nothing came for {self._limits.stall:g} s of a message that is half sent"
        )
        self._link.abort()


class _Reply:
    __slots__ = ("_dropped", "_number", "_traffic", "peer")

    def __init__(
        self, traffic: _Traffic, number: int, peer: Peer, dropped: Callable[[EdgemlError], object]
    ) -> None:
        self._traffic = traffic
        self._number = number
        self._dropped = dropped
        self.peer = peer

    @property
    def expired(self) -> bool:
        return self._traffic.lost

    def __call__(self, message: Message) -> None:
        self._traffic.put(self._number, message, self._drop)

    def _drop(self, why: EdgemlError) -> None:
        self._dropped(why)
        if isinstance(why, Overloaded):
            self._traffic.refuse(self._number, why, lambda _: None)


class _Accept:
    """See `Accept`."""

    def __init__(self, listener: _Listener, tls: ssl.SSLContext | None, gate: Gate) -> None:
        self._listener = listener
        self._gate = gate
        self.tls = tls
        self.local: bool | None = None

    def bind(self, url: Url) -> socket.socket:
        sock = self._gate.bind(url)
        self.local = is_loopback(sock.getsockname()[0])
        return sock

    async def __call__(self, link: Link, address: object) -> None:
        self._gate.greet(address)
        await self._listener.welcome(link, address)


class _Listener(LoopEndpoint):
    def __init__(
        self,
        url: Url,
        on_request: OnRequest,
        listen: Callable[[Url, Accept], Coroutine[Any, Any, Listening]],
        keys: tuple[TlsKeys, Keyring] | None,
        limits: Limits,
    ) -> None:
        self._on_request = on_request
        self._limits = limits
        self._clients = None if keys is None else keys[1]
        self._incoming = Quota(limits.bytes_per_client, limits.bytes, "are on their way")
        self._unread = Quota(limits.replies_per_client, limits.bytes, "have not been read")
        self._links: dict[_Traffic, tuple[Peer, bytes]] = {}  # with the certificate of each
        self._lock = threading.Lock()
        tls = None if keys is None else server_context(keys[0])
        self.secured = keys is not None
        self._refusals = Refusals(url, self.counts)
        unless = ("PermissionDenied", NO_KEY) if tls else ("Malformed", "it speaks something else")
        self._loop = Loop(f"edgeml {url}")
        self._gate = Gate(limits, self._refusals, self._loop.later, unless)
        accept = _Accept(self, tls, self._gate)
        try:
            self.url, self._stop_listening = self._loop.start(listen(url, accept)).result()
            if self._clients is not None:
                self._loop.do(self._look_at_keys)
        except BaseException:
            self._loop.close()
            raise
        self.local = is_loopback(self.url.host) if accept.local is None else accept.local

    def heard_from(self, peer: Peer) -> float:
        links = list(self._links.items())
        return max((t.heard for t, (who, _) in links if who.id == peer.id), default=0.0)

    async def welcome(self, link: Link, address: object) -> None:
        """Serve a peer until it has gone."""
        host = str(address[0]) if isinstance(address, tuple) else str(address)
        peer = Peer(f"{self.url.scheme} {next(_numbers)}", str(address), host)
        certificate = b""
        if self._clients is not None:
            try:
                certificate = _certificate_of(link)
                identity = self._clients.by_certificate(certificate).name
            except PermissionDenied as error:
                self._note(peer, error)
                await self._turn_away(link, str(error).encode())
                return
            peer = Peer(peer.id, peer.address, host, identity)
            await link.send(PREFIX.pack(0, 0))
        traffic = _Traffic(self._loop, link, peer, self._limits, self._incoming, self._unread)

        def arrived(number: int, message: Message) -> None:
            reply: Reply = _Reply(traffic, number, peer, self._drop)
            self._loop.hand_over(self._on_request, message, reply)

        def refused(number: int, why: EdgemlError) -> None:
            self._note(peer, why)
            traffic.refuse(number, why, self._drop)

        self._links[traffic] = peer, certificate
        try:
            why = await traffic.receive(arrived, refused)
            if isinstance(why, (Malformed, DeadlineExceeded, Overloaded)):
                self._note(peer, why)
        finally:
            self._links.pop(traffic, None)

    async def _turn_away(self, link: Link, why: bytes) -> None:
        try:
            await link.send(PREFIX.pack(0, len(why)) + why)
            await asyncio.wait_for(link.close(), _GRACE)
        except Exception:  # it has gone
            pass
        finally:
            link.abort()

    def _look_at_keys(self) -> None:
        """End the links of those who are let in no more."""
        assert self._clients is not None
        for traffic, (peer, certificate) in list(self._links.items()):
            try:
                self._clients.by_certificate(certificate)
            except PermissionDenied as error:
                self._note(peer, error)
                traffic.abort()
        self._loop.later(_LOOK, self._look_at_keys)

    def _note(self, peer: Peer, why: Exception) -> None:
        who = peer.address if peer.identity is None else f"{peer.identity!r} at {peer.address}"
        self._refusals.note(type(why).__name__, who, peer.host, why)

    def _drop(self, why: EdgemlError) -> None:
        with self._lock:
            self.dropped += 1

    def close(self) -> None:
        self._loop.close(self._stop, _GRACE)

    async def _stop(self) -> None:
        self._stop_listening()
        closing = (traffic.close() for traffic in self._links)
        await asyncio.gather(*closing, return_exceptions=True)


def _certificate_of(link: Link) -> bytes:
    certificate = link.tls.getpeercert(binary_form=True) if link.tls is not None else None
    if not certificate:
        raise PermissionDenied("the connection has no certificate")
    return certificate


class _Connection(Requester):
    tells_loss = True

    def __init__(
        self,
        url: Url,
        timeout: float,
        dial: Callable[[Url, ssl.SSLContext | None], Coroutine[Any, Any, Link]],
        greeting: bytes,
        keys: TlsKeys | None,
    ) -> None:
        deadline = Deadline(timeout)
        self.url = url
        self.secured = keys is not None
        self._over: EdgemlError | None = None
        self._pending = Pending()
        tls = None if keys is None else client_context(keys)
        self._loop = Loop(f"edgeml {url}")
        try:
            self.local = leads_to_loopback(url, deadline)
            self._loop.start(self._open(deadline, dial(url, tls), greeting, keys)).result()
        except BaseException as error:
            self._loop.close()
            if not isinstance(error, Exception) or isinstance(error, EdgemlError):
                raise
            what = str(error) or type(error).__name__
            raise explain_no_connection(url, what, getattr(error, "errno", None)) from None

    async def _open(
        self,
        deadline: Deadline,
        dial: Coroutine[Any, Any, Link],
        greeting: bytes,
        keys: TlsKeys | None,
    ) -> None:
        dialing = asyncio.create_task(self._dial(dial, keys))
        await asyncio.wait((dialing,), timeout=min(deadline.left, _SOON))
        # Some libraries wait for one who doesn't speak their protocol to hang up.
        late = not dialing.done()
        error = None if late else dialing.exception()
        # An error of the system's tells itself; but those of TLS are taken for such.
        told = EdgemlError if keys is not None else (EdgemlError, OSError)
        failed = error is not None and not isinstance(error, told)
        left = deadline.left
        why: EdgemlError | None = None
        if (late or failed) and self.url.port and left:
            why = explain_refusal(self.url, keys, greeting, min(1.0, left * 2 / 3))
            left = deadline.left
            if why is None and keys is None and left:
                why = find_stranger(self.url, greeting, min(0.4, left))
        if why is not None:
            dialing.cancel()
            raise why
        await asyncio.wait((dialing,), timeout=deadline.left)
        if not dialing.done():  # it is given up, which may take it a while, by the loop's end
            raise TimeoutError(f"no connection within {deadline.timeout:g} s")
        self._link = dialing.result()
        here = Peer("", str(self.url))
        # What a server sends was asked for; what it doesn't read is bounded as the other way round.
        limits = DEFAULT_LIMITS
        everything = Quota(1 << 62, 1 << 63, "are on their way")
        unread = Quota(limits.replies_per_client, limits.bytes, "have not been read")
        self._traffic = _Traffic(self._loop, self._link, here, limits, everything, unread)
        self._receiving = asyncio.create_task(self._receive())

    async def _dial(self, dial: Coroutine[Any, Any, Link], keys: TlsKeys | None) -> Link:
        link = await dial
        if keys is None:
            return link
        try:
            _certificate_of(link)
            said = await link.receive()
            if said[: PREFIX.size] != PREFIX.pack(0, len(said) - PREFIX.size):
                raise Malformed(f"what answers at {self.url} is no edgeml server")
            if len(said) > PREFIX.size:
                told = said[PREFIX.size :].decode("utf-8", "replace")[:1000]
                raise PermissionDenied(f"{self.url}: {told}")
        except BaseException:
            link.abort()
            raise
        return link

    async def _receive(self) -> None:
        why = await self._traffic.receive(self._settle, self._settle)
        # Behind the last replies.
        told = str(why) or type(why).__name__
        lost = Unreachable(f"the connection to {self.url} was lost: {told}")
        self._loop.pass_on(self._lose, lost)

    def _settle(self, number: int, outcome: Message | EdgemlError) -> None:
        if number & _REFUSED:
            number &= ~_REFUSED
            if isinstance(outcome, Message):
                outcome = Overloaded(f"{self.url}: {outcome.header.decode('utf-8', 'replace')}")
        if self._loop.inside:  # a future's callback may take long, or call
            self._loop.pass_on(self._pending.settle, number, outcome)
        else:
            self._pending.settle(number, outcome)

    def _lose(self, why: EdgemlError) -> None:
        self._over = self._over or why
        self._pending.fail(self._over)

    @property
    def lost(self) -> bool:
        return self._over is not None

    @property
    def heard(self) -> float:
        return max(self._traffic.heard, self._traffic.taken)

    def call(self, message: Message, timeout: float) -> Message:
        if self._loop.inside:  # in a future's callback: another thread must receive the reply
            self._loop.strand()
        return super().call(message, timeout)

    def request(self, message: Message) -> Future[Message]:
        if self._over is not None:
            raise copy_error(self._over)
        number, future = self._pending.add()
        try:
            self._traffic.put(number, message, lambda why: self._settle(number, why))
        except EdgemlError:  # not to be encoded
            future.cancel()
            raise
        return future

    def close(self) -> None:
        self._over = self._over or Closed(f"the connection to {self.url} has been closed")
        self._loop.close(self._traffic.close, _GRACE)
        self._lose(self._over)
