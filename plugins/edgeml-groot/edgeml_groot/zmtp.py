"""The server's side of ZeroMQ's protocol, ZMTP 3, over one connection: what REQ, DEALER and ROUTER
sockets say, and what a REP would hear of it.

After the RFCs 23 (3.0) and 37 (3.1), with the mechanism NULL. It is spoken here since libzmq's
ROUTER lets a peer choose the name by which it knows it, and ends the process when it comes to give
that name to another one. Here nothing that a peer calls itself means anything.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any, Protocol, TypeAlias

import numpy as np

from edgeml.core import Limits, Overloaded, Peer, pooled
from edgeml.core.descriptors import watch_for_end
from edgeml.core.quota import Held, Quota

__all__ = ["Connection", "Data", "Front", "Host", "VERSION", "frame_head"]

VERSION = (3, 1)
Data: TypeAlias = "bytes | memoryview"
Front: TypeAlias = "tuple[bytes, ...]"
"""What comes before a request and goes before its answer: frames up to an empty one."""

_SIGNATURE = b"\xff" + bytes(7) + b"\x01\x7f"
_NULL = b"NULL".ljust(20, b"\0")
_GREETING = _SIGNATURE + bytes(VERSION) + _NULL + bytes(32)
_READY = b"\x05READY\x0bSocket-Type\0\0\0\x06ROUTER"
_ASK = (b"REQ", b"DEALER", b"ROUTER")  # sockets that do
_MORE, _LONG, _COMMAND = 1, 2, 4  # flags of a frame
_MOST_COMMAND = 1 << 12  # bytes
_MOST_CONTEXT = 16  # bytes of a ping that its pong repeats
_MOST_FRONT = 16  # frames of a return address: a proxy adds one
_LARGEST_FRONT = 255  # bytes of each
_LITTLE = 1 << 16  # bytes of half a message, and of an answer, that are not counted
_AHEAD = 1 << 20  # bytes of half a message that are counted before they come
_MOST_POOLED = 1 << 22  # bytes; what strangers send once is not to be kept
_JOINED = 1 << 16  # bytes, up to which a copy costs less than a second call of the system
_OVERHEAD = 64  # bytes that an answer takes beside its own
_MOST_TOLD = 1 << 19  # bytes of errors that a peer which doesn't read may have
_PATIENCE = 10  # times the seconds of `Limits.stall` that a message may take: others wait for room
_LINGER = 1.0  # seconds that a peer has to read the last that it is sent


class Host(Protocol):
    """What a connection asks of the listener that it came by."""

    limits: Limits
    incoming: Quota
    unread: Quota
    scratch: memoryview
    """What the system fills with a connection's next frames, all connections' in turn."""

    def begin(self, connection: Connection) -> Peer:
        """Take a new connection."""

    def greet(self, connection: Connection) -> None:
        """Take notice that a peer has shaken hands, or was told that it can't."""

    def receive(self, connection: Connection, front: Front, body: Data) -> None:
        """Take a request."""

    def refuse(self, connection: Connection, front: Front, kind: str, why: str) -> None:
        """Answer a message that was passed over."""

    def note(self, kind: str, peer: Peer, why: object) -> None:
        """Count why a connection is ended."""

    def end(self, connection: Connection) -> None:
        """Forget a connection, which is over."""


class Connection(asyncio.BufferedProtocol):
    """One connection, whose peer is believed nothing. All of it is called in one event loop.

    Attributes:
        alone: whether it is one client's, a REQ's, whatever that puts in front of its requests.
        waiting: requests that the host keeps until others are answered.
    """

    peer: Peer
    address: tuple[Any, ...]

    def __init__(self, host: Host) -> None:
        self.alone = False
        self.waiting = 0
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._over = False  # nothing more is received or sent
        self._greeted = False  # its greeting has come, ...
        self._ready = False  # ... and its READY
        self._rest = b""  # of what came, the beginning of what has not come whole
        self._heard = 0.0  # when something came
        self._silence = 0.0  # seconds after which a peer that pings is taken for dead; 0 for never
        self._timer: asyncio.TimerHandle | None = None
        # The message that is under way
        self._since = 0.0  # when it began; 0 for none
        self._front: list[bytes] = []
        self._too_long = False  # what comes before the empty frame
        self._delimited = False  # the empty frame has come
        self._wrong: tuple[str, str] | None = None  # kind and reason for which it is passed over
        self._skip = 0  # bytes of the frame under way that are passed over
        self._last = False  # whether that is the message's last
        self._body: memoryview | None = None  # a request that comes in parts
        self._room = memoryview(b"")  # of it, where its next bytes go
        self._counted = 0  # bytes of it
        self._held: Held | None = None  # for it
        # Out
        self._sent = 0  # bytes in all
        self._told = 0  # bytes of errors since the peer read all
        self._unread: deque[tuple[int, Held]] = deque()  # answers, and what was sent up to each

    # What asyncio calls -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.address = transport.get_extra_info("peername") or ("", 0)
        watch_for_end(transport.get_extra_info("socket"))
        self.peer = self._host.begin(self)
        transport.set_write_buffer_limits(0)  # `resume_writing` tells that it has read all
        self._write(b"", _GREETING)

    def connection_lost(self, why: Exception | None) -> None:
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        self._forget()
        while self._unread:
            self._unread.popleft()[1].release()
        self._host.end(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._room if self._body is not None else self._host.scratch

    def buffer_updated(self, nbytes: int) -> None:
        if self._over:
            return
        self._heard = time.monotonic()
        try:
            if self._body is not None:
                self._fill(self._body, nbytes)
            elif self._skip > nbytes:
                self._skip -= nbytes
            else:
                self._take(self._rest + self._host.scratch[:nbytes])
        except BaseException:  # what comes next would be taken for something else
            self._transport.abort()
            raise
        if self._timer is None:
            self._watch()

    def resume_writing(self) -> None:
        self._note_read()

    # In -----------------------------------------------------------------------------------

    def _take(self, data: bytes) -> None:
        if not self._greeted:
            self._rest = data
            if not self._take_greeting(data):
                return
            data = data[len(_GREETING) :]
        at = self._take_frames(data)
        self._rest = b"" if self._over else data[at:]

    def _take_greeting(self, data: bytes) -> bool:
        """Look at the beginning of what came; whether it is a whole greeting."""
        if data[:1] != b"\xff" or data[9:10] not in (b"", b"\x7f"):
            self.cut("Malformed", "it does not speak ZeroMQ's protocol")
        elif data[10:11] and data[10] < VERSION[0]:
            self.cut("Malformed", "it speaks a ZMTP before 3: libzmq 4 or later is needed")
        elif data[12:32] != _NULL[: len(data[12:32])]:
            named = data[12:32].rstrip(b"\0")
            self.cut("Malformed", f"it asks for the mechanism {named!r}, not for NULL")
        elif len(data) >= len(_GREETING):
            self._greeted = True
            self._write_command(_READY)
            return True
        return False

    def _take_frames(self, data: bytes) -> int:
        """Take what has come whole, and what is passed over; returns where the rest begins."""
        at, end = 0, len(data)
        while not self._over:
            if self._skip:
                passed = min(self._skip, end - at)
                self._skip -= passed
                at += passed
                if self._skip:
                    break
                if self._last:
                    self._refuse()
            if end - at < 2:
                break
            flags, length, begin = data[at], data[at + 1], at + 2
            if flags & _LONG:
                begin = at + 9
                if end < begin:
                    break
                length = int.from_bytes(data[at + 1 : begin], "big")
            if flags > 7 or length >> 63 or (flags & _COMMAND and flags & _MORE):
                self.cut("Malformed", "this is no frame of ZeroMQ's")
            elif flags & _COMMAND:
                if length > _MOST_COMMAND:
                    self.cut("Malformed", f"a command of {length} bytes")
                elif end < begin + length:
                    break
                else:
                    at = begin + length
                    self._take_command(data[begin:at])
            elif not self._ready:
                self.cut("Malformed", "a message before the handshake has ended")
            elif self._wrong or self._delimited or not length or not self._fits(length):
                self._since = self._since or self._heard
                self._last = not flags & _MORE
                at = begin + self._take_part(data[begin : begin + length], length)
            elif end < begin + length:
                break
            else:
                self._since = self._since or self._heard
                at = begin + length
                self._front.append(data[begin:at])
                if not flags & _MORE:
                    self._refuse()
        return at

    def _fits(self, length: int) -> bool:
        """Whether a frame of that size is one of a return address that is kept."""
        return length <= _LARGEST_FRONT and len(self._front) < _MOST_FRONT and not self._too_long

    def _take_part(self, got: bytes, length: int) -> int:
        """Begin a frame that isn't of a return address; returns how much of it was taken."""
        if not self._delimited:
            if not length:
                self._delimited = True
                if self._too_long:
                    self._front = []
                    self._wrong = "Malformed", "a request needs a shorter return address"
            else:
                self._too_long = True
        elif not self._wrong:
            most = self._host.limits.message_bytes
            if not self._last:
                self._wrong = _NOT_ONE
            elif length > most:
                why = f"a request of {length} bytes, and {most} are taken (Limits.message_bytes)"
                self._wrong = "Malformed", why
            elif len(got) == length:
                self._finish(got)
                return length
            elif self._make_room(length):
                self._room[: len(got)] = got
                self._room = self._room[len(got) :]
                return len(got)
        if not length and self._last:
            self._refuse()
        self._skip = length
        return 0

    def _make_room(self, length: int) -> bool:
        used = None
        try:
            if length <= _MOST_POOLED:
                used = pooled(length)
            self._body = used or memoryview(np.empty(length, np.uint8))  # type: ignore[arg-type]
        except (MemoryError, OSError):
            self._wrong = "Overloaded", "no memory for this request: try again later"
            return False
        self._room = self._body
        return True

    def _fill(self, body: memoryview, nbytes: int) -> None:
        """Take more of a request that comes in parts."""
        self._room = self._room[nbytes:]
        if not self._room:
            self._finish(body.toreadonly())
            return
        come = len(body) - len(self._room)
        if come <= max(self._counted, _LITTLE):
            return
        # It is counted as it comes: what its head says is only what a peer says.
        self._release()
        self._counted = min(len(body), come + _AHEAD)
        try:
            self._held = self._host.incoming.take(self.peer, self._counted)
        except Overloaded as error:
            self._wrong = "Overloaded", str(error)
            self._skip = len(self._room)
            self._body, self._room = None, memoryview(b"")

    def _finish(self, body: Data) -> None:
        front = (*self._front, b"")
        self._forget()
        self._host.receive(self, front, body)

    def _refuse(self) -> None:
        """Have a message answered that was passed over, as it has come whole."""
        front: Front = ()  # as whoever sent no empty frame would read an answer
        wrong = _UNDELIMITED
        if self._delimited:
            front, wrong = (*self._front, b""), self._wrong or _NOT_ONE
        self._forget()
        self._host.refuse(self, front, *wrong)

    def _forget(self) -> None:
        """Let go of the message that was under way."""
        self._since, self._too_long, self._delimited = 0.0, False, False
        self._front, self._wrong, self._skip = [], None, 0
        self._body, self._room, self._counted = None, memoryview(b""), 0
        self._release()

    def _release(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.release()

    def _take_command(self, content: bytes) -> None:
        size = content[0] + 1 if content else 0
        name, said = content[1:size], content[size:]
        if not self._ready:
            self._take_ready(name, said)
        elif name == b"PING":
            self._silence = int.from_bytes(said[:2], "big") / 10
            if not self._transport.get_write_buffer_size():  # else what is there says as much
                self._write_command(b"\x04PONG" + said[2 : 2 + _MOST_CONTEXT])

    def _take_ready(self, name: bytes, said: bytes) -> None:
        if name != b"READY":
            self.cut("Malformed", f"it begins with {name!r:.100}, not with READY")
            return
        kind, at = b"", 0
        while at < len(said):
            begin = at + 1 + said[at]
            end = begin + 4 + int.from_bytes(said[begin : begin + 4], "big")
            if said[at + 1 : begin].lower() == b"socket-type":
                kind = said[begin + 4 : end]
            at = end
        if at > len(said) or kind not in _ASK:
            why = f"a socket of type {kind!r:.50} can't ask: use a REQ"
            self._write_command(b"\x05ERROR" + bytes((len(why),)) + why.encode())
            self.cut("Malformed", why)
        else:
            self._ready, self.alone = True, kind == b"REQ"
            self._host.greet(self)

    def _watch(self) -> None:
        """See whether what is half read goes on, and whether who promised to say something does."""
        self._timer = None
        stall, due = self._host.limits.stall, []
        half = self._greeted and bool(self._rest or self._since)
        if half:
            due.append(self._heard + stall)
        if self._since:
            due.append(self._since + _PATIENCE * stall)
        if self._silence:
            due.append(self._heard + self._silence)
        if not due:
            return
        left = min(due) - time.monotonic()
        if left > 0:  # soon enough, too, for half a message that begins meanwhile
            self._timer = self._loop.call_later(min(left, stall), self._watch)
        elif half:
            self.cut("Stalled", "half a message has come, and the rest of it not in time")
        else:
            self.cut("Stalled", "it has not been heard of for longer than its pings had promised")

    # Out ----------------------------------------------------------------------------------

    def send(self, head: bytes, answer: bytes) -> bool:
        """Send an answer; whether the peer is there.

        Args:
            head: the frames that come before it, as `frame_head` makes them.

        Raises:
            Overloaded: the peer has not read too much.
        """
        if self._is_gone():
            return False
        size = len(head) + len(answer)
        if size > _LITTLE or self._transport.get_write_buffer_size():
            self._note_read()
            held = self._host.unread.take(self.peer, size + _OVERHEAD)
            self._unread.append((self._sent + size, held))
        self._write(head + frame_head(0, len(answer)), answer)
        self._note_read()
        return True

    def tell(self, head: bytes, error: bytes) -> bool:
        """Send what takes the place of an answer, in any case; whether the peer is there."""
        if self._is_gone():
            return False
        if not self._transport.get_write_buffer_size():
            self._told = 0
        self._told += len(head) + len(error) + _OVERHEAD
        if self._told > _MOST_TOLD:
            self.cut("Overloaded", "it reads nothing of what it is answered")
            return False
        self._write(head + frame_head(0, len(error)), error)
        return True

    def _is_gone(self) -> bool:
        """Whether nothing can be said any more: asyncio logs what is written all the same."""
        return self._over or self._transport.is_closing()

    def _write(self, head: bytes, data: bytes) -> None:
        self._sent += len(head) + len(data)
        if len(data) <= _JOINED:
            self._transport.write(head + data)
        else:
            self._transport.write(head)
            self._transport.write(data)

    def _write_command(self, content: bytes) -> None:
        if self._transport.is_closing():
            return
        self._write(frame_head(_COMMAND, len(content)), content)

    def _note_read(self) -> None:
        """Count no more what the system has taken."""
        read = self._sent - self._transport.get_write_buffer_size()
        while self._unread and self._unread[0][0] <= read:
            self._unread.popleft()[1].release()

    def close(self) -> None:
        """End the connection behind what was sent."""
        self._over = True
        self._forget()
        self._transport.close()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(_LINGER, self._transport.abort)

    def cut(self, kind: str, why: str) -> None:
        """End the connection for what its peer did."""
        self._host.note(kind, self.peer, why)
        self._host.greet(self)
        self.close()


_UNDELIMITED = "Malformed", "a request needs an empty frame in front of it, as a REQ sends"
_NOT_ONE = "Malformed", "a request needs exactly one frame after the empty one"


def frame_head(flags: int, length: int) -> bytes:
    """Return what comes before a frame's content."""
    if length < 256:
        return bytes((flags, length))
    return bytes((flags | _LONG,)) + length.to_bytes(8, "big")
