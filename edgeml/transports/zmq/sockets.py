"""What both ends do with libzmq's sockets: open them, and send and receive a message."""

from __future__ import annotations

import atexit
import ctypes
import secrets
import struct
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import zmq
import zmq.utils.garbage  # registers with atexit what is to come after our own

from edgeml.core import Message, NotEncodable, own
from edgeml.core.forks import leave_to_parent, watch_forks

__all__ = [
    "DROPPED",
    "LARGEST_FRAME",
    "MOST_BUFFERS",
    "MOST_PENDING",
    "MOST_SOCKETS",
    "NUMBER",
    "WHO",
    "ZERO_COPY",
    "check",
    "frame_on_wire",
    "open_router",
    "open_socket",
    "receive",
    "send",
    "size_on_wire",
    "share_context",
    "start_collector",
]

ZERO_COPY = 1 << 19
"""Bytes from which on a buffer is sent from where it lies."""

MOST_PENDING = 4096
"""Requests under way on one connection."""

MOST_SOCKETS = 1 << 14
"""Of all connections; eight for each, and one for each thread that calls."""

WHO = "X-Edgeml-Connection"
"""A property that sockets tell each other when they meet."""

NUMBER = struct.Struct("<Q")

LARGEST_FRAME = 1 << 30
"""Bytes; a peer that announces more is cut off by libzmq."""

MOST_BUFFERS = 1 << 14
"""In one message."""

DROPPED = b""
"""The first frame of what tells that a reply was dropped; the other one is the request's number."""

_SURPLUS = b"\xff"  # no number, as it is too short for one
_LARGEST_SHORT = 255  # bytes of a frame whose size takes one
_MORE = int(zmq.SNDMORE)  # a plain int: enum flags cost a microsecond to combine

_exiting = False


@atexit.register
def _exit() -> None:
    """Copy from now on, since pyzmq sends nothing in place while the interpreter shuts down."""
    global _exiting
    _exiting = True


class _Shared:
    """The context of all connections of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._context: zmq.Context[Any] | None = None
        watch_forks(self)

    def get(self) -> zmq.Context[Any]:
        with self._lock:
            if self._context is None:
                self._context = zmq.Context()
                self._context.max_sockets = MOST_SOCKETS
            return self._context

    def abandon(self) -> None:
        """In a forked child: the next connection opens another."""
        leave_to_parent(self._context)
        self._lock = threading.Lock()  # whoever held it is not there
        self._context = None


_shared = _Shared()


def share_context() -> zmq.Context[Any]:
    """Return the context that all connections of this process have in common."""
    return _shared.get()


def open_socket(context: zmq.Context[Any], kind: int) -> zmq.Socket[bytes]:
    """Make a socket that sends nothing more once it is closed, and notices who has vanished."""
    made: zmq.Socket[bytes] = context.socket(kind)
    made.linger = 0
    made.maxmsgsize = LARGEST_FRAME
    # A machine that vanished without a word is noticed, and what is kept for it freed. By TCP,
    # for ZeroMQ's own heartbeats wait behind the frame under way: they cut off whoever takes
    # longer over one than they allow.
    made.tcp_keepalive, made.tcp_keepalive_cnt = 1, 3
    made.tcp_keepalive_idle, made.tcp_keepalive_intvl = 10, 5  # seconds
    made.tcp_maxrt = 60_000  # ms
    return made


def open_router(context: zmq.Context[Any]) -> zmq.Socket[bytes]:
    """Open a ROUTER whose names for its peers nobody can foresee.

    libzmq counts them from where C's rand() is, which nobody has seeded, and ends the process when
    it comes to a name that a peer has given itself.
    """
    ctypes.CDLL(None).srand(secrets.randbits(32))
    return open_socket(context, zmq.ROUTER)


def start_collector() -> None:
    """Have pyzmq start its thread that lets go of what has been sent in place, one in a process.

    It would do so amid the first large message, with three threads and seven descriptors.
    """
    zmq.Frame(memoryview(b"\0"), copy=False)


def check(message: Message) -> None:
    """Refuse here, with a reason, what the other end would cut the connection for."""
    if len(message.buffers) > MOST_BUFFERS:
        raise NotEncodable(
            f"a message of {len(message.buffers)} arrays; zmq carries {MOST_BUFFERS}: "
            "stack the small ones into one"
        )
    for buffer in message.buffers:
        if buffer.nbytes > LARGEST_FRAME:
            raise NotEncodable(
                f"an array of {buffer.nbytes} bytes; zmq carries {LARGEST_FRAME}: split it"
            )
    if len(message.header) > LARGEST_FRAME - NUMBER.size:
        raise NotEncodable(f"a header of {len(message.header)} bytes; zmq carries {LARGEST_FRAME}")


def send(
    line: zmq.Socket[bytes],
    number: bytes,
    message: Message,
    lent: list[weakref.ref[memoryview]] | None = None,
    mark: Callable[[memoryview], object] | None = None,
) -> None:
    """Send one message; ``lent`` receives a reference to each buffer that is sent in place.

    It dies when libzmq has let go of the buffer; pyzmq's own trackers cost several times as much.
    ``mark`` is given a view of the last frame, which dies when libzmq has written all of this.
    """
    buffers = message.buffers
    last = len(buffers) - 1
    header = number + message.header
    if buffers or mark is None:
        line.send(header, _MORE if buffers else 0)
    else:
        _send_marked(line, header, mark)
    for index, buffer in enumerate(buffers):
        flags = 0 if index == last else _MORE
        if mark is not None and not flags:
            # What is small is the caller's to change, once this has returned.
            _send_marked(line, own(Message(b"", [buffer])).buffers[0], mark)
        elif buffer.nbytes < ZERO_COPY or _exiting:
            line.send(buffer, flags)
        else:
            view = memoryview(buffer)
            if lent is not None:
                lent.append(weakref.ref(view))
            try:
                line.send(view, flags, copy=False)
            except RuntimeError:  # pyzmq can't start its thread any more, as the program ends
                line.send(buffer, flags)
            del view


def _send_marked(
    line: zmq.Socket[bytes], data: bytes | memoryview, mark: Callable[[memoryview], object]
) -> None:
    """Send a message's last frame from where it lies, however small."""
    view = memoryview(data)
    mark(view)
    if not _exiting:
        with suppress(RuntimeError):  # as above
            line.send(zmq.Frame(view, copy=False), copy=False)
            return
    line.send(data)


def frame_on_wire(size: int) -> int:
    """Bytes that a frame of so many takes up on a connection."""
    return size + (9 if size > _LARGEST_SHORT else 2)


def size_on_wire(number: bytes, message: Message, extra: int) -> int:
    """Bytes that a message takes up on a connection where each frame has so many bytes more."""
    head = frame_on_wire(len(number) + len(message.header) + extra)
    return head + sum(frame_on_wire(buffer.nbytes + extra) for buffer in message.buffers)


def receive(line: zmq.Socket[bytes], most: int = MOST_BUFFERS) -> tuple[zmq.Frame, bytes, Message]:
    """Receive one message: its first frame, its number, and what it says.

    Where the number is shorter than one, what came is no message, or one of too many buffers.
    """
    head = line.recv(copy=False)
    if not head.more and len(head) < ZERO_COPY:
        alone = head.bytes
        return head, alone[: NUMBER.size], Message(alone[NUMBER.size :])
    more = head.more
    buffers: list[memoryview] = []
    surplus = False
    while more:
        frame = line.recv(copy=False)
        more = frame.more
        if len(buffers) < most:
            buffers.append(frame.buffer.toreadonly())
        else:
            surplus = True
    if surplus:
        return head, _SURPLUS, Message(b"")
    whole = head.bytes if len(head) < ZERO_COPY else head.buffer  # which no copy is made of
    return head, bytes(whole[: NUMBER.size]), Message(bytes(whole[NUMBER.size :]), buffers)
