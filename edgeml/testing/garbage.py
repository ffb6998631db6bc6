"""What hostile peers say: other protocols' greetings, and conversations that were spoilt."""

from __future__ import annotations

import os
import random
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress

from edgeml.core import Url
from edgeml.testing.ends import KB

__all__ = ["bombard", "busyness", "garble", "pass_on"]

_GREETINGS = (  # of other protocols
    b"",
    b"\0",
    b"\0" * 1000,
    b"\xff" * 1000,
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /x HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
    b"GET / HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n\x81\xff\xff",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff\xff\xff\4\0\0\0\0\0",
    b"\xff\0\0\0\0\0\0\0\1\x7f\3\0NULL" + b"\0" * 48,
    b"\xff\0\0\0\0\0\0\0\1\x7f\3\0CURVE" + b"\0" * 47 + b"\2\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\x16\3\1\xff\xff\1\0\xff\xfc\3\3" + b"\0" * 32,
    b"SSH-2.0-OpenSSH_9.9\r\n",
    b"*1\r\n$4\r\nPING\r\n",
    b"\x80\4\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
)


def pass_on(tap: socket.socket, url: Url, over: threading.Event) -> list[list[bytes]]:
    """Connect whoever comes to where `url` is served; returns what each of them says."""
    said: list[list[bytes]] = []
    with selectors.DefaultSelector() as selector, ExitStack() as opened:

        def forward(source: socket.socket, target: socket.socket, pieces: list[bytes]) -> None:
            data = b""
            with suppress(OSError):
                if data := source.recv(64 * KB):
                    pieces.append(data)
                    target.sendall(data)
            if not data:
                selector.unregister(source)
                with suppress(OSError):
                    target.shutdown(socket.SHUT_WR)

        selector.register(tap, selectors.EVENT_READ)
        while not over.is_set():
            for key, _ in selector.select(0.02):
                if key.fileobj is not tap:
                    forward(*key.data)
                    continue
                client = opened.enter_context(tap.accept()[0])
                server = opened.enter_context(socket.create_connection((url.host, url.port)))
                said.append([])
                read = selectors.EVENT_READ
                selector.register(client, read, (client, server, said[-1]))
                selector.register(server, read, (server, client, []))
    return said


def garble(pieces: list[bytes], rng: random.Random) -> list[bytes]:
    """What is nearly a conversation, or another protocol's, or nothing like one."""
    kind = rng.randrange(4)
    if kind == 0:
        return [rng.choice(_GREETINGS)]
    if kind == 1 or not pieces:
        return [rng.randbytes(rng.choice((1, 9, 64, 1000, 60_000)))]
    said = list(pieces[: rng.randrange(1, len(pieces) + 1)])
    if kind == 2:  # cut short
        said[-1] = said[-1][: rng.randrange(len(said[-1]) + 1)]
        return said
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(said))
        piece = bytearray(said[at])
        for _ in range(rng.choice((1, 1, 2, 30))):
            if piece:
                piece[rng.randrange(len(piece))] = rng.randrange(256)
        said[at] = bytes(piece)
    return said


def _say(made: socket.socket, said: list[bytes], rng: random.Random) -> None:
    with made, suppress(OSError):
        made.settimeout(0.5)
        for piece in said:
            made.sendall(piece)
        if rng.random() < 0.5:
            made.settimeout(0.02)
            made.recv(4 * KB)


def bombard(dial: Callable[[int], socket.socket], pieces: list[bytes], count: int) -> int:
    """Make garbage connections, of which some speak one byte at a time, and never to the end.

    Args:
        dial: makes one, and is given its number; it may raise OSError.
        pieces: of a conversation that is to be spoilt.
        count: of the connections.

    Returns:
        How many came about.
    """
    rng = random.Random(count)
    slow: deque[tuple[socket.socket, bytes]] = deque()
    connected = 0
    try:
        for index in range(count):
            try:
                made = dial(index)
            except OSError:
                continue
            connected += 1
            said = garble(pieces, rng)
            if rng.random() < 0.2:
                slow.append((made, b"".join(said)))
            else:
                _say(made, said, rng)
            for _ in range(min(len(slow), 5)):
                made, rest = slow.popleft()
                if not rest or len(slow) > 40:
                    made.close()
                    continue
                with suppress(OSError):
                    made.send(rest[:1])
                slow.append((made, rest[1:]))
    finally:
        for made, _ in slow:
            made.close()
    return connected


def busyness() -> float:
    """How many there are for each core; 1 where nobody waits for one."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
