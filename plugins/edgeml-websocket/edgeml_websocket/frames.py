"""The server's side of WebSocket (RFC 6455) over one connection, for messages of some hundred KB.

The handshake is read by websockets. The frames are not: a message of 301 KB goes through five
buffers there and two here (the one that the system fills, and the message), which is half of a
call's time. And what a frame is going to take up is counted before any of it is kept.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import numpy as np
from websockets.http11 import Request
from websockets.server import ServerProtocol

from edgeml.core import DeadlineExceeded, EdgemlError, Limits, Malformed, Overloaded, Peer, pooled
from edgeml.core.descriptors import watch_for_end
from edgeml.core.quota import Held, Quota

try:
    from websockets.speedups import apply_mask
except ImportError:  # where websockets was not compiled
    from websockets.utils import apply_mask

__all__ = ["Connection", "Data", "Host"]

Data: TypeAlias = "bytes | memoryview"
"""A message that is no text, which is only to be read."""

_HEAD = 1 << 14  # bytes that a request may have
_MOST_POOLED = 1 << 22  # bytes; what strangers send once is not to be kept
_OVERHEAD = 256  # bytes that a frame which waits takes beside its own
_CALM = 1 << 15  # bytes to be sent, up to which a peer is one that reads
_MOST_PONGS = 1 << 14  # bytes of them that a peer which doesn't read may have
_JOINED = 1 << 16  # bytes, up to which a copy costs less than a second call of the system
_LEAST = 1 << 16  # bytes that are counted of a message that comes in parts
_PATIENCE = 10  # times the seconds of `Limits.stall` that a message may take: others wait for room
_CODES = {*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)}  # that a close may have
_LINGER = 1.0  # seconds that a peer has to read why its connection ends
_MOST_REASON = 120  # bytes

_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0, 1, 2, 8, 9, 10
_BAD_PROTOCOL, _BAD_TEXT, _POLICY, _TOO_LARGE, _LATER = 1002, 1007, 1008, 1009, 1013

_log = logging.getLogger(__name__)
_log.setLevel(logging.CRITICAL)  # whose handshake fails is counted, and must not fill a log


class Host(Protocol):
    """What a connection asks of the listener that it came by."""

    limits: Limits
    incoming: Quota
    unread: Quota
    scratch: memoryview
    """What the system fills with a connection's next frames, all connections' in turn."""

    def begin(self, connection: Connection) -> Peer:
        """Take a new connection."""

    def answer(self, connection: Connection, http: ServerProtocol, request: Request) -> bool:
        """Answer a request by `ServerProtocol.send_response`, and say whether it was let in."""

    def open(self, connection: Connection) -> None:
        """Talk with a peer that was let in, and has been told so."""

    def note(self, peer: Peer, why: EdgemlError) -> None:
        """Count why a connection is ended."""

    def end(self, connection: Connection) -> None:
        """Forget a connection, which is over."""


class Connection(asyncio.BufferedProtocol):
    """One connection, whose peer is believed nothing. All of it is called in one event loop."""

    peer: Peer
    address: tuple[Any, ...]

    def __init__(self, host: Host) -> None:
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._lost: asyncio.Future[None] = self._loop.create_future()
        self._over = False  # nothing more is received or sent
        self._closing = False  # a close frame was sent
        # In
        self._take: Callable[[bytes], None] = self._take_request
        self._rest = b""  # of what came, the beginning of what has not come whole
        self._heard = 0.0  # when something came
        self._stall: asyncio.TimerHandle | None = None
        self._kind = 0  # of the message that is under way; 0 for none
        self._parts: list[Data] = []  # of it
        self._size = 0  # of it, as far as its frames say
        self._came = 0  # bytes of it
        self._frames = 0  # of it
        self._held: list[Held] = []  # for it
        self._counted = 0  # bytes that are held
        self._since = 0.0  # when it began
        self._whole = False  # whether the frame under way is its last
        self._mask = b""
        self._frame: memoryview | None = None  # that comes in parts
        self._room = self._host.scratch  # of the frame, where its next bytes go
        self._filled = 0  # bytes of it
        self._clear = 0  # bytes of it that are unmasked
        self._messages: deque[tuple[Data | str, list[Held]]] = deque()
        self._reader: asyncio.Future[None] | None = None
        # Out
        self._full = False
        self._writers: list[asyncio.Future[None]] = []
        self._pongs = 0  # bytes of those that it hasn't read

    # What asyncio calls -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(_CALM)
        self.address = transport.get_extra_info("peername") or ("", 0)
        watch_for_end(transport.get_extra_info("socket"))
        self.peer = self._host.begin(self)

    def connection_lost(self, why: Exception | None) -> None:
        self._end()
        if self._stall is not None:
            self._stall.cancel()
        self._forget()
        self._release()
        while self._messages:
            self._held = self._messages.popleft()[1]
            self._release()
        if not self._lost.done():
            self._lost.set_result(None)
        self._host.end(self)
        self._take = _pass_over  # not of this, which would keep itself

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._room

    def buffer_updated(self, nbytes: int) -> None:
        self._heard = time.monotonic()
        if self._frame is not None:
            self._came += nbytes
            if self._count():
                self._fill(self._frame, nbytes)
        elif self._rest:
            data, self._rest = self._rest + self._host.scratch[:nbytes], b""
            self._take(data)
        else:
            self._take(bytes(self._host.scratch[:nbytes]))
        if self._stall is None and self._half_read:
            self._watch(self._host.limits.stall)

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._pongs = 0
        self._wake_writers()

    # In -----------------------------------------------------------------------------------

    def _take_request(self, data: bytes) -> None:
        head, there, more = data.partition(b"\r\n\r\n")
        if not there:
            self._rest = data
            if len(data) > _HEAD:
                self._transport.abort()
            return
        http = ServerProtocol(logger=_log)
        http.receive_data(head + there)
        (request,) = http.events_received() or (None,)
        let_in = isinstance(request, Request) and self._host.answer(self, http, request)
        if isinstance(request, Request):
            self._transport.write(b"".join(http.data_to_send()))
        else:
            self._transport.write(http.reject(400, "This is no request.\n").serialize())
        if not let_in:
            self._hang_up()
            self._wait_for_the_end()
            return
        self._take = self._take_frames
        self._host.open(self)
        if more:
            self._take_frames(more)

    def _take_frames(self, data: bytes) -> None:
        at, end = 0, len(data)
        pongs = []
        while end - at >= 2 and not self._over:
            first, second = data[at], data[at + 1]
            length = second & 127
            begin = at + 6 + (0 if length < 126 else 2 if length == 126 else 8)
            if not second & 128 or first & 0x70 or first & 15 not in (0, 1, 2, 8, 9, 10):
                self._fail(_BAD_PROTOCOL, Malformed("this is no frame of a WebSocket"))
                return
            if end < begin:
                break
            if length > 125:
                length = int.from_bytes(data[at + 2 : begin - 4], "big")
            mask = data[begin - 4 : begin]
            if first & 8:
                if not first & 128 or length > 125:
                    self._fail(_BAD_PROTOCOL, Malformed("a frame of control in parts"))
                    return
                if end < begin + length:
                    break
                at = begin + length
                content = apply_mask(data[begin:at], mask)
                if first & 15 == _CLOSE:
                    self._take_close(content)
                elif first & 15 == _PING:
                    pongs.append(_head(_PONG, length) + content)
                continue
            if not self._begin(first, length):
                return
            got = data[begin : begin + length]
            at = begin + len(got)
            self._came += len(got)
            if not (self._is_small or self._count()):
                return
            if len(got) == length:
                self._parts.append(apply_mask(got, mask))
                self._finish()
            else:
                frame = _allocate(length)
                frame[: len(got)] = got
                self._frame = self._room = frame
                self._mask, self._filled, self._clear = mask, 0, 0
                self._fill(frame, len(got))
        if self._over:
            return
        self._rest = data[at:]
        if pongs:
            self._answer_pings(b"".join(pongs))

    def _begin(self, first: int, length: int) -> bool:
        """Make room for a frame of a message, or end the connection."""
        kind = first & 15
        if (kind == _CONTINUATION) != bool(self._kind):
            self._fail(_BAD_PROTOCOL, Malformed("the parts of two messages are mixed"))
            return False
        if not self._kind:
            self._kind, self._since = kind, self._heard
        self._frames += 1
        self._whole = bool(first & 128)
        self._size += length
        most = self._host.limits.message_bytes
        if self._size > most:
            text = f"a message of {self._size} bytes, and {most} are the most"
            self._fail(_TOO_LARGE, Malformed(text))
            return False
        return True

    @property
    def _is_small(self) -> bool:
        """Whether the frame at hand is a whole message, which nobody keeps out: it is here already,
        and there is one of a connection at most.
        """
        return self._frames == 1 and self._whole and self._came == self._size and not self._messages

    def _count(self) -> bool:
        """Count what has come of a message, or end the connection: what is said to come is not
        counted, or others would be kept out by mere claims.
        """
        size = self._came + self._frames * _OVERHEAD
        if size <= self._counted:
            return True
        before, self._counted = self._counted, max(2 * size, _LEAST)
        if self._frames == 1:
            # All of it is known, so that it is taken as one: a single message always has room.
            self._counted = min(self._size + _OVERHEAD, self._counted)
            self._release()
            before = 0
        try:
            self._held.append(self._host.incoming.take(self.peer, self._counted - before))
        except Overloaded as error:
            self._fail(_LATER, error)
            return False
        return True

    def _release(self) -> None:
        while self._held:
            self._held.pop().release()

    def _fill(self, frame: memoryview, nbytes: int) -> None:
        """Take more of a frame that comes in parts."""
        self._room = self._room[nbytes:]
        self._filled += nbytes
        end = self._filled & ~7
        if end > self._clear:
            words = np.frombuffer(frame, np.uint64, (end - self._clear) // 8, self._clear)
            np.bitwise_xor(words, np.frombuffer(self._mask * 2, np.uint64)[0], words)
            self._clear = end
        if self._room:
            return
        for at in range(end, len(frame)):
            frame[at] ^= self._mask[at & 3]
        self._parts.append(frame.toreadonly())
        self._frame, self._room = None, self._host.scratch
        self._finish()

    def _finish(self) -> None:
        """Take a frame, which has come whole."""
        if not self._whole:
            return
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        message: Data | str = data
        kind, held = self._kind, self._held
        self._kind, self._parts, self._held = 0, [], []
        self._size = self._came = self._frames = self._counted = 0
        if self._closing:  # what comes now comes too late
            for each in held:
                each.release()
            return
        if kind == _TEXT:
            try:
                message = str(data, "utf-8")
            except UnicodeDecodeError:
                self._held = held
                self._fail(_BAD_TEXT, Malformed("a text that is not UTF-8"))
                return
        self._messages.append((message, held))
        if self._reader is None:
            self._transport.pause_reading()  # until what came has been taken
        elif not self._reader.done():
            self._reader.set_result(None)

    def _take_close(self, content: bytes) -> None:
        if not self._closing:
            code = int.from_bytes(content[:2], "big") if content else 1000
            if len(content) == 1 or code not in _CODES or self._kind:
                self._fail(_BAD_PROTOCOL, Malformed("a close that is none"))
                return
            try:
                str(content[2:], "utf-8")
            except UnicodeDecodeError:
                self._fail(_BAD_TEXT, Malformed("a reason that is not UTF-8"))
                return
            self._send_close(content)
        self._hang_up()
        self._transport.close()

    def _answer_pings(self, pongs: bytes) -> None:
        if self._full:
            self._pongs += len(pongs)
            if self._pongs > _MOST_PONGS:
                self._host.note(
                    self.peer, Overloaded("it does not read the pongs that it asks for")
                )
                self._transport.abort()
                return
        if not (self._closing or self._transport.is_closing()):
            self._transport.write(pongs)

    @property
    def _half_read(self) -> bool:
        return bool(self._kind or self._rest) and self._take == self._take_frames

    def _watch(self, seconds: float) -> None:
        self._stall = self._loop.call_later(seconds, self._look)

    def _look(self) -> None:
        """See whether a message that is half read goes on."""
        self._stall = None
        if self._over or not self._half_read:
            return
        limit = self._host.limits.stall
        now = time.monotonic()
        if self._messages:  # nobody reads on
            self._since = now
            self._watch(limit)
        elif now >= self._heard + limit:
            text = f"nothing came for {limit:g} s of a message that is half sent"
            self._fail(_POLICY, DeadlineExceeded(text))
        elif self._kind and now >= self._since + _PATIENCE * limit:
            text = f"a message that has not come whole in {_PATIENCE * limit:g} s"
            self._fail(_POLICY, DeadlineExceeded(text))
        else:
            self._watch(self._heard + limit - now)

    async def receive(self) -> Data | str:
        """Return the next message.

        Raises:
            EOFError: the connection is over.
        """
        if self._messages:
            await asyncio.sleep(0)  # who sends ahead lets the others have their turn
        while not self._messages:
            if self._over:
                raise EOFError
            self._reader = self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        if self._over:
            raise EOFError
        message, held = self._messages.popleft()
        for each in held:
            each.release()
        if not self._messages:
            self._transport.resume_reading()
        return message

    # Out ----------------------------------------------------------------------------------

    async def send(self, data: bytes | str) -> None:
        """Send a message, and return when there is room for the next.

        Raises:
            EOFError: the connection is over.
        """
        kind = _BINARY
        if isinstance(data, str):
            kind, data = _TEXT, data.encode("utf-8", "replace")
        if self._over or self._closing or self._transport.is_closing():
            raise EOFError
        head = _head(kind, len(data))
        if len(data) <= _JOINED:
            self._transport.write(head + data)
        else:
            self._transport.write(head)
            self._transport.write(data)
        if not self._full:
            return
        try:
            with self._host.unread.take(self.peer, _OVERHEAD + len(data)):
                await self._drain()
        except (Overloaded, DeadlineExceeded) as error:
            self._host.note(self.peer, error)
            self._transport.abort()
            raise EOFError from None

    async def _drain(self) -> None:
        """Wait until the peer has read most of what it was sent, as long as it reads at all."""
        limit = self._host.limits.stall
        while self._full and not self._over:
            before = self._transport.get_write_buffer_size()
            writer: asyncio.Future[None] = self._loop.create_future()
            self._writers.append(writer)
            await asyncio.wait((writer,), timeout=limit)
            if not writer.done():
                self._writers.remove(writer)
                if self._transport.get_write_buffer_size() == before:
                    raise DeadlineExceeded(f"it read nothing for {limit:g} s of what it was sent")
        if self._over:
            raise EOFError

    def end(self, code: int, reason: str) -> None:
        """End the connection behind what was sent, and say why; `close` waits for it."""
        if not (self._over or self._closing):
            self._send_close(code.to_bytes(2, "big") + _cut(reason))
            self._transport.resume_reading()  # the peer's close frame
            self._loop.call_later(_LINGER, self._transport.abort)

    async def close(self, code: int, reason: str) -> None:
        """End the connection as `end` does; returns when it is over."""
        self.end(code, reason)
        await asyncio.wait((self._lost,), timeout=_LINGER)
        self._transport.abort()

    def _send_close(self, content: bytes) -> None:
        self._closing = True
        if not self._transport.is_closing():
            self._transport.write(_head(_CLOSE, len(content)) + content)

    def _fail(self, code: int, why: EdgemlError) -> None:
        """End the connection for what its peer did."""
        self._host.note(self.peer, why)
        if not self._closing:
            self._send_close(code.to_bytes(2, "big") + _cut(str(why)))
        self._hang_up()
        self._wait_for_the_end()

    def _hang_up(self) -> None:
        """Say no more, and let the peer read what was said: what it sends is passed over."""
        self._end()
        self._take = _pass_over
        self._forget()
        self._transport.resume_reading()
        self._loop.call_later(_LINGER, self._transport.abort)

    def _wait_for_the_end(self) -> None:
        """Leave it to the peer to hang up as well: one that still sends would not read the rest."""
        if self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            self._transport.close()

    def _forget(self) -> None:
        """Let go of what came, and wasn't taken."""
        self._rest, self._parts = b"", []
        self._frame, self._room = None, self._host.scratch

    def _end(self) -> None:
        """Have nobody wait for this connection any more."""
        self._over = True
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
        self._wake_writers()

    def _wake_writers(self) -> None:
        for writer in self._writers:
            if not writer.done():
                writer.set_result(None)
        self._writers.clear()


def _allocate(length: int) -> memoryview:
    """Memory that has been used before; or that is none until something comes."""
    used = pooled(length) if length <= _MOST_POOLED else None
    return used or memoryview(np.empty(length, np.uint8))  # type: ignore[arg-type]


def _pass_over(data: bytes) -> None:
    """Take what comes when it is over."""


def _head(kind: int, length: int) -> bytes:
    if length < 126:
        return bytes((128 | kind, length))
    if length < 1 << 16:
        return bytes((128 | kind, 126)) + length.to_bytes(2, "big")
    return bytes((128 | kind, 127)) + length.to_bytes(8, "big")


def _cut(reason: str) -> bytes:
    """As much of a reason as a close frame takes."""
    return reason.encode("utf-8", "replace")[:_MOST_REASON].decode("utf-8", "ignore").encode()
