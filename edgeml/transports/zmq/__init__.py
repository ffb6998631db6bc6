"""ZeroMQ over TCP: a ROUTER serves, DEALERs ask.

A request or reply is one multipart message: an 8-byte number chosen by the client, directly
followed by the header, then one frame for each buffer. The number comes back with the reply, so a
late reply is never taken for the next one's.

Threads. The `listener` has one loop, which alone touches the ROUTER; other threads leave their
replies in an outbox and wake the loop through a DEALER that is connected to the same ROUTER over
inproc, so that there is one socket to wait on and no poll. A `connection` gives each calling thread
a DEALER of its own, on which `call` sends and waits without a thread hop; `request` goes
through one I/O thread, and so does a call from a thread with a request that has had no answer,
lest it overtake it. All connections share one context, and so one of libzmq's own threads. What
wakes a caller that is blocked in its DEALER is a message from the connection's waker, to which the
DEALER is connected as well, by a pipe that is filled at first so that no request takes it. Nothing
of this survives a fork: in the child every connection is closed, and its sockets are left alone.

Keys. With credentials all is encrypted, and each end knows the other by its key (`curve`). A
listener's `guard` decides who comes in and watches over connections, in a thread of its own, so
that the loop has one socket to wait for.

Bounds. libzmq queues what a peer doesn't read, and the frames of a message that doesn't end,
without a bound in bytes. Replies are counted as they are given to it; now and then one is sent from
where it lies, however small, and that it is let go of tells that all before it has been written.
What is coming in is what Linux says has come, less what the loop has taken. A reply beyond the
bound is dropped, and its number sent behind an empty frame, which tells the client so.
"""

from __future__ import annotations

from typing import ClassVar

import zmq

from edgeml.core import (
    DEFAULT_LIMITS,
    Credentials,
    Deadline,
    Endpoint,
    Limits,
    OnRequest,
    Requester,
    Transport,
    Url,
    hookimpl,
)
from edgeml.core.advice import explain_no_connection
from edgeml.core.dial import dial
from edgeml.core.url import format_host, require_no_path
from edgeml.transports.zmq.connection import Connection
from edgeml.transports.zmq.curve import client_keys
from edgeml.transports.zmq.listener import Listener
from edgeml.transports.zmq.sockets import MOST_SOCKETS

__all__ = ["ZmqTransport", "edgeml_transport"]


class ZmqTransport(Transport):
    """``zmq://host:port``: ZeroMQ over TCP."""

    name: ClassVar[str] = "zmq"

    def report(self) -> dict[str, str]:
        """See `Transport.report`: versions, and how many sockets there may be."""
        return {
            "libzmq": zmq.zmq_version(),
            "pyzmq": zmq.__version__,
            "sockets of all clients": f"{MOST_SOCKETS} at most, about eight for each client",
        }

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
        return Listener(url, on_request, credentials, limits)

    def connect(
        self, url: Url, timeout: float, *, credentials: Credentials | None = None
    ) -> Requester:
        """See `Transport.connect`. ZeroMQ itself never tells that nobody listens, so ask TCP."""
        deadline = Deadline(timeout)
        require_no_path(url)
        keys = client_keys(credentials)
        try:
            with dial(url.host or "localhost", url.port, deadline) as probe:
                host = format_host(probe.getpeername())
        except (OSError, UnicodeError) as error:
            number = getattr(error, "errno", None)
            raise explain_no_connection(url, error, number) from error
        connection = Connection(url, Url("tcp", host, url.port), keys, deadline)
        try:
            connection.meet(deadline)
        except BaseException:
            connection.close()
            raise
        return connection


@hookimpl
def edgeml_transport() -> type[Transport]:
    """Answer the plugin hook."""
    return ZmqTransport
