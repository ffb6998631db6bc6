"""gRPC over HTTP/2, for links that must pass proxies, load balancers and firewalls.

No generated code and no protobuf: four methods that take and give bytes (`protocol`). What fits
gRPC's own limit of 4 MB a message goes in a unary call; a larger request is one streaming call, and
a larger reply to a unary call is told of, and fetched. ``docs/wire.md`` describes it for clients in
other languages.

Threads. A listener has one event loop (`edgeml.core.loops`), beside the one poller that `grpc.aio`
has in each process; a reply that comes later holds neither. `call` waits in the caller's thread,
and what `request` sent is settled by the channel's one thread. Only what is large takes a thread of
its own for as long as it is under way.

Copies. A message is joined into one piece and gRPC copies that twice: to its own memory, and from
there on the other side. What arrives is not copied again.
"""

from __future__ import annotations

from typing import ClassVar

import grpc

from edgeml.core import Credentials, Endpoint, OnRequest, Requester, Transport, Url, hookimpl
from edgeml.transports.grpc.connection import Connection
from edgeml.transports.grpc.listener import Listener

__all__ = ["GrpcTransport", "edgeml_transport"]


class GrpcTransport(Transport):
    """``grpc://host:port``: gRPC, in clear text."""

    name: ClassVar[str] = "grpc"

    def __init__(self) -> None:
        # glibc gives the memory of large messages back to the system and takes it anew each time,
        # in pages that must be cleared: most of the time of a call of 3 MB. It keeps twice as much
        # as the largest block that was ever freed, up to 64 MiB; see M_MMAP_THRESHOLD in
        # mallopt(3). So free a large one, which costs nothing, as it was never written to.
        bytes(31 << 20)

    def report(self) -> dict[str, str]:
        """See `Transport.report`."""
        return {"grpcio": grpc.__version__, "largest message": "4 MB; beyond that it is streamed"}

    def serve(
        self, url: Url, on_request: OnRequest, *, credentials: Credentials = None
    ) -> Endpoint:
        """See `Transport.serve`."""
        return Listener(url, on_request)

    def connect(self, url: Url, timeout: float, *, credentials: Credentials = None) -> Requester:
        """See `Transport.connect`."""
        return Connection(url, timeout)


@hookimpl
def edgeml_transport() -> type[Transport]:
    """Answer the plugin hook."""
    return GrpcTransport
