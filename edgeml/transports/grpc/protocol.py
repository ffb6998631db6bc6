"""What goes over the wire: methods, pieces, codes. ``docs/wire.md`` says it for other languages.

Every request and reply starts with a prefix (`edgeml.core.pieces`), whose number says which server
this is for, or, in a reply, under which number the rest is kept. A unary method carries one piece,
with a frame of at most `LARGEST_FRAME` bytes, a streaming one any number of them.
"""

from __future__ import annotations

import grpc

from edgeml.core import (
    Closed,
    DeadlineExceeded,
    EdgemlError,
    Malformed,
    Overloaded,
    PermissionDenied,
    Unreachable,
)
from edgeml.core.errors import NotCarriedOut
from edgeml.core.pieces import PREFIX

__all__ = ["ERRORS", "LARGEST_FRAME", "QUEUES", "SERVICE", "STREAMED", "name_request"]

SERVICE = "edgeml.Transport"
LARGEST_FRAME = (4 << 20) - PREFIX.size
"""That goes in one piece: gRPC's own limit on what is received, which neither end changes."""

QUEUES = 7
"""Names of Request beside its own, of which each has a queue of its own in the server.

For `grpc.aio` takes one call of a name at a time, which is five rounds of its event loop: beside
other work that was 50 to 250 calls a second, and the calls of all clients waited for seconds. An
odd number, as a client has two connections and each of them should meet all names.
"""

STREAMED = 1 << 20
"""Bytes of a piece of a stream; larger and smaller ones were slower."""

ERRORS: dict[grpc.StatusCode, type[EdgemlError]] = {
    grpc.StatusCode.ABORTED: NotCarriedOut,
    grpc.StatusCode.CANCELLED: Closed,
    grpc.StatusCode.INVALID_ARGUMENT: Malformed,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNAUTHENTICATED: PermissionDenied,
    grpc.StatusCode.UNAVAILABLE: Unreachable,
}
"""What a status means here, and what an error is told as; any other means `Unreachable`."""


def name_request(queue: int) -> str:
    """Return the method that takes requests in a queue; 0 is the one that is always there."""
    return f"Request{queue or ''}"
