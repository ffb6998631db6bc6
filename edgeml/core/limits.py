"""What one peer, and all of them together, may make a server keep or do: every bound in one place.

What exceeds one is refused with `Malformed` or `Overloaded`, or cut off where it can't be told, and
counted by its kind in ``stats()``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["DEFAULT_LIMITS", "Limits"]


@dataclass(frozen=True)
class Limits:
    """Bounds of a server; give it others by ``limits=Limits(...)``.

    Those per client mean one connection. What honest clients do stays far below all of them.

    Attributes:
        hello_bytes: of what comes before there is a session.
        header_bytes: of one message without its buffers: all but arrays and bytes over 8 KiB.
        message_bytes: of one message, all its buffers included.
        buffers: of one message.
        nesting: of containers in one message.
        nodes: values and keys in the header of one message; a list, a map or an array counts four,
            whatever its size.
        calls_per_client: calls of one client that wait or are parked.
        bytes_per_client: what these take up; one call is always taken, however large.
        calls: calls of all clients that wait; half of them of one key, or one machine without keys.
        bytes: what these take up; of one key or machine half as much.
        replies_per_client: bytes of replies that one client has not read.
        subscriptions_per_client: subscriptions of one client to one topic.
        credits: publications that one subscription asks for ahead.
        sessions: of all clients.
        sessions_per_connection: of one connection.
        sessions_per_address: of one machine's address.
        connections_per_address: of one machine's address; a client takes up to three, and one
            more for each thread that calls.
        handshake: seconds until a connection has said who it is.
        stall: seconds without a further byte of a message that is half read.
    """

    hello_bytes: int = 1 << 16
    header_bytes: int = 1 << 26
    message_bytes: int = 1 << 31
    buffers: int = 1 << 14
    nesting: int = 32
    nodes: int = 1 << 19
    calls_per_client: int = 1 << 12
    bytes_per_client: int = 1 << 29
    calls: int = 1 << 14
    bytes: int = 1 << 30
    replies_per_client: int = 1 << 28
    subscriptions_per_client: int = 64
    credits: int = 64
    sessions: int = 1 << 16
    sessions_per_connection: int = 16
    sessions_per_address: int = 1 << 13
    connections_per_address: int = 1 << 13
    handshake: float = 10.0
    stall: float = 30.0

    def __post_init__(self) -> None:
        """Refuse what would let nobody in."""
        for each in fields(self):
            value = getattr(self, each.name)
            if not value > 0:
                raise ValueError(f"the limit {each.name} must be positive, not {value!r}")


DEFAULT_LIMITS = Limits()
"""Those of a server that is given no others."""
