"""Who listens at a TCP port where no server of ours answers, for errors that tell it."""

from __future__ import annotations

import re
from contextlib import suppress

from edgeml.core.deadline import Deadline
from edgeml.core.dial import dial
from edgeml.core.errors import Unreachable
from edgeml.core.url import Url

__all__ = ["HTTP2", "ZMTP", "find_stranger"]

_UNASKED = 0.1  # seconds that somebody who speaks first is given
_MOST = 512  # bytes that are read
# HTTP servers answer it, and Redis complains about it.
_QUESTION = b"GET / HTTP/1.1\r\nHost: edgeml\r\nConnection: close\r\n\r\n"

ZMTP = rb"\xff.{8}\x7f"
"""How a ZeroMQ socket greets."""
HTTP2 = rb"...\x04.\0\0\0\0"
"""HTTP/2's first frame: SETTINGS, of stream 0."""

_KNOWN = (
    (rb"SSH-", "an SSH server"),
    (rb"HTTP/\d", "an HTTP server"),
    (rb"-(ERR|NOAUTH|DENIED|MISCONF|LOADING)\b", "a Redis server"),
    (rb"220[ -]", "a mail or FTP server"),
    (ZMTP, "a ZeroMQ socket"),
    (HTTP2, "a gRPC server"),
    (rb"[\x15\x16]\x03[\0-\4]", "a server that speaks TLS"),
)


def find_stranger(url: Url, ours: bytes = b"", timeout: float = 0.4) -> Unreachable | None:
    """Find out who listens where no server of ours answers, by what it says.

    It is told apart by what it says unasked, or to an HTTP request.

    Args:
        url: where.
        ours: how a server of ours would begin, as a regular expression; it is no stranger.
        timeout: seconds that all of it may take.

    Returns:
        The error to raise; None if nobody listens, or who does says nothing, or may be ours.
    """
    said = b""
    with suppress(OSError, UnicodeError):
        said = _hear(url, Deadline(timeout))
    if not said or (ours and re.match(ours, said, re.DOTALL)):
        return None
    known = (name for pattern, name in _KNOWN if re.match(pattern, said, re.DOTALL))
    who = next(known, "no server of edgeml")
    first = said.split(b"\n")[0].strip()[:60].decode("ascii", "replace")
    quoted = f" ({first!r})" if first.isascii() and first.isprintable() and first else ""
    return Unreachable(
        f"something else listens at {url}: {who}{quoted}; is the port right, and the transport?"
    )


def _hear(url: Url, deadline: Deadline) -> bytes:
    """Connect, ask if need be, and return the first that is said."""
    with dial(url.host or "localhost", url.port, deadline) as sock:
        sock.settimeout(max(1e-3, min(_UNASKED, deadline.left)))
        with suppress(TimeoutError):
            return sock.recv(_MOST)
        sock.sendall(_QUESTION)
        sock.settimeout(max(1e-3, deadline.left))
        return sock.recv(_MOST)
