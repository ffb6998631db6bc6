"""A WebSocket of which everything can be said that can be said of one, and which hides nothing."""

from __future__ import annotations

import base64
import os
import socket
import ssl
import struct

import numpy as np

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


class Refused(ConnectionError):
    """No WebSocket came about; `status` and `body` are what HTTP says."""

    def __init__(self, status: int, head: bytes, body: bytes) -> None:
        super().__init__(f"{status} {body.decode()}")
        self.status, self.head, self.body = status, head, body


def frame(kind: int, content: bytes, *, last: bool = True, mask: bool = True) -> bytes:
    """A frame, as a client sends it."""
    size, masked = len(content), 128 if mask else 0
    head = bytes(((128 if last else 0) | kind,))
    if size < 126:
        head += bytes((masked | size,))
    elif size < 1 << 16:
        head += struct.pack("!BH", masked | 126, size)
    else:
        head += struct.pack("!BQ", masked | 127, size)
    if not mask:
        return head + content
    key = os.urandom(4)
    cover = np.resize(np.frombuffer(key, np.uint8), size)
    return head + key + (np.frombuffer(content, np.uint8) ^ cover).tobytes()


class RawWebSocket:
    """One connection; a context manager.

    Args:
        port: where it is served.
        path: asked for.
        more: lines of the request.
        host: likewise.
        tls: what secures it, and the server's name.

    Attributes:
        head: of the answer to the request.
        code: why the server closed it; None if it hasn't.
        reason: likewise.
    """

    def __init__(
        self,
        port: int,
        path: str = "/",
        *more: str,
        host: str = "127.0.0.1",
        tls: tuple[ssl.SSLContext, str] | None = None,
    ) -> None:
        self.code: int | None = None
        self.reason = ""
        self.sock = socket.create_connection((host, port), 10.0)
        try:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls is not None:
                self.sock = tls[0].wrap_socket(self.sock, server_hostname=tls[1])
            self._shake_hands(port, path, more)
        except BaseException:
            self.sock.close()
            raise

    def _shake_hands(self, port: int, path: str, more: tuple[str, ...]) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        lines = [
            f"GET {path} HTTP/1.1",
            f"Host: 127.0.0.1:{port}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Version: 13",
            f"Sec-WebSocket-Key: {key}",
            *more,
        ]
        self.sock.sendall("\r\n".join([*lines, "", ""]).encode())
        self._data = b""
        while b"\r\n\r\n" not in self._data:
            self._more()
        self.head, _, self._data = self._data.partition(b"\r\n\r\n")
        status = int(self.head.split()[1])
        if status != 101:
            while data := self.sock.recv(1 << 16):
                self._data += data
            raise Refused(status, self.head, self._data)

    def _more(self) -> None:
        data = self.sock.recv(1 << 16)
        if not data:
            raise ConnectionError("the connection is over")
        self._data += data

    def say(self, *frames: bytes) -> None:
        """Send bytes as they are."""
        self.sock.sendall(b"".join(frames))

    def send(self, message: bytes | str) -> None:
        """Send a message."""
        text = isinstance(message, str)
        self.say(frame(TEXT, message.encode()) if text else frame(BINARY, message))

    def receive(self, timeout: float = 10.0) -> bytes | str:
        """The next message.

        Raises:
            TimeoutError: there was none in so many seconds.
            ConnectionError: the connection is over; `code` says why, if the server did.
        """
        self.sock.settimeout(timeout)
        while True:
            kind, content = self.next_frame()
            if kind == CLOSE:
                self.code = int.from_bytes(content[:2], "big")
                self.reason = content[2:].decode()
                self.say(frame(CLOSE, content[:2]))
            elif kind in (TEXT, BINARY):
                return content.decode() if kind == TEXT else content

    def next_frame(self) -> tuple[int, bytes]:
        """The next frame, of whatever kind."""
        self._need(2)
        size, at = self._data[1], 2
        if size > 125:
            at = 4 if size == 126 else 10
            self._need(at)
            size = int.from_bytes(self._data[2:at], "big")
        self._need(at + size)
        kind, content = self._data[0] & 15, self._data[at : at + size]
        self._data = self._data[at + size :]
        return kind, content

    def _need(self, size: int) -> None:
        while len(self._data) < size:
            self._more()

    def ending(self, timeout: float = 10.0) -> tuple[int | None, str]:
        """How the server ends the connection, whatever it says before."""
        try:
            while True:
                self.receive(timeout)
        except ConnectionError:
            return self.code, self.reason

    def close(self) -> None:
        """End it, without a word."""
        self.sock.close()

    def __enter__(self) -> RawWebSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
