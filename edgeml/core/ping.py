"""Asking a server who it is, which needs no session."""

from __future__ import annotations

import time

from edgeml.core import wire
from edgeml.core.message import Message
from edgeml.core.transport import Requester

__all__ = ["ping"]


def ping(requester: Requester, timeout: float) -> tuple[wire.Pong, float, float]:
    """Ask the server at the other end of a connection who it is; needs no session.

    Returns:
        What it says, the round trip in seconds, and how many seconds its clock is ahead of ours:
        to half a round trip exactly, and better the more alike the two ways are (RFC 5905).

    Raises:
        DeadlineExceeded, Unreachable, Closed: as for `Requester.call`.
        Malformed: what answers is no edgeml server.
    """
    header = wire.pack(wire.Request(wire.PING, b"", "", timeout, b""))
    began, clock = time.perf_counter(), time.time()
    reply = wire.unpack(wire.Answer, requester.call(Message(header), timeout).header)
    took = time.perf_counter() - began
    if reply.status != wire.OK:
        raise wire.error_of(reply)
    pong = wire.unpack(wire.Pong, reply.body)
    return pong, took, pong.clock - (clock + took / 2)
