"""gRPC over HTTP/2, for links that must pass proxies, load balancers and firewalls.

No generated code and no protobuf: four methods that take and give bytes (`protocol`). What fits
gRPC's own limit of 4 MB a message goes in a unary call; a larger request is one streaming call, and
a larger reply to a unary call is told of, and fetched. ``docs/wire.md`` describes it for clients in
other languages. Load balancers are answered by gRPC's health service (`health`).

Threads. A listener has one event loop (`edgeml.core.loops`), beside the one poller that `grpc.aio`
has in each process; a reply that comes later holds neither. `call` waits in the caller's thread,
and what `request` sent is settled by the channel's one thread. Only what is large takes a thread of
its own for as long as it is under way.

Copies. A message is joined into one piece and gRPC copies that twice: to its own memory, and from
there on the other side. What arrives is not copied again.

Forks. A process that was forked from one that uses gRPC can't use it (`processes`). So gRPC's own
provisions for forks are off, unless ``$GRPC_ENABLE_FORK_SUPPORT`` says otherwise: the threads that
they start in each child ended 18 of 30 that did nothing with gRPC; without them it was none.
"""

from __future__ import annotations

import os
from typing import ClassVar

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # which gRPC reads as it is imported

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # or each stranger's handshake is told on stderr

import grpc

from edgeml.core import (
    DEFAULT_LIMITS,
    Credentials,
    Endpoint,
    Limits,
    OnRequest,
    Requester,
    Transport,
    Url,
    hookimpl,
)
from edgeml.transports.grpc.connection import Connection
from edgeml.transports.grpc.listener import Listener
from edgeml.transports.grpc.processes import enter_process

__all__ = ["GrpcTransport", "edgeml_transport"]


class GrpcTransport(Transport):
    """``grpc://host:port``: gRPC, over TLS where there are keys, else in clear text."""

    name: ClassVar[str] = "grpc"

    def __init__(self) -> None:
        # glibc gives the memory of large messages back to the system and takes it anew each time,
        # in pages that must be cleared: most of the time of a call of 3 MB. It keeps twice as much
        # as the largest block that was ever freed, up to 64 MiB; see M_MMAP_THRESHOLD in
        # mallopt(3). So free a large one, which costs nothing, as it was never written to.
        bytes(31 << 20)

    def report(self) -> dict[str, str]:
        """See `Transport.report`."""
        return {
            "grpcio": grpc.__version__,
            "largest message": "4 MB; beyond that it is streamed",
            "forked children": 'can\'t use it; start processes by "spawn" or "forkserver"',
        }

    def serve(
        self,
        url: Url,
        on_request: OnRequest,
        *,
        credentials: Credentials | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Endpoint:
        """See `Transport.serve`.

        Raises:
            PermissionDenied: this process was forked from one that uses gRPC.
        """
        enter_process()
        return Listener(url, on_request, credentials, limits)

    def connect(
        self, url: Url, timeout: float, *, credentials: Credentials | None = None
    ) -> Requester:
        """See `Transport.connect`.

        Raises:
            PermissionDenied: the server says so; or this process was forked from one that uses
                gRPC, which would crash it now and then.
        """
        enter_process()
        return Connection(url, timeout, credentials)


@hookimpl
def edgeml_transport() -> type[Transport]:
    """Answer the plugin hook."""
    return GrpcTransport
