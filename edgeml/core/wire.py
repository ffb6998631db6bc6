"""The envelope: what core writes into the header of every message, in front of the codec's part.

A request's header is the MessagePack array ``[kind, session, name, timeout, body]``, a reply's
``[status, body, epoch, number]``, and that of a call ``[status, body, 0, 0, served]``. The buffers
are the codec's alone. Whatever arrives is decoded into these types or refused as `Malformed`;
nothing else of a message is looked at before its session is known.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from edgeml.core.errors import (
    Closed,
    ConfigMismatch,
    DeadlineExceeded,
    EdgemlError,
    Interrupted,
    Malformed,
    NotHolder,
    NotReady,
    Overloaded,
    PermissionDenied,
    RemoteError,
    Stale,
    UnknownInterface,
    text_of,
)
from edgeml.core.tokens import TEXT, check

__all__ = [
    "ALIVE",
    "CALL",
    "DRAINING",
    "GOODBYE",
    "HEARTBEAT",
    "HELLO",
    "HOLD",
    "IDLE",
    "LEAVES",
    "NEXT",
    "NOTHING_YET",
    "NO_SESSION",
    "OK",
    "OLD_SILENCE",
    "PING",
    "PROTOCOL",
    "RESUME",
    "SILENCE",
    "TICK",
    "TOKEN",
    "Answer",
    "Credit",
    "Head",
    "Hello",
    "Pong",
    "Request",
    "Result",
    "Served",
    "Welcome",
    "error_of",
    "pack",
    "pack_error",
    "unpack",
]

PROTOCOL = 1
"""Raised when the envelope changes; the two sides must agree."""

HOLD = 3.0
"""Seconds that a parked request is kept before it is answered "nothing yet"."""

SILENCE = 2.5
"""Seconds without a sign of life after which each end takes the other to be gone; with the time
that it takes to find out and to tell, 3."""

OLD_SILENCE = 10.0
"""As `SILENCE`, where the server doesn't know the extension `ALIVE`; more than twice `HOLD`."""

IDLE = 0.4
"""The part of the silence after which a client that got no answers asks for one."""

TICK = 0.25
"""Seconds between two looks of a server at what is parked; so much longer it may stay there."""

HEARTBEAT = ""
"""The topic on which nothing is ever published: its credits are the heartbeat."""

ALIVE = "alive"
"""The extension by which both ends agree on the seconds of silence after which the other is gone,
and that a server keeps a heartbeat only as long as its `Request.timeout` says."""

LEAVES = "leaves"
"""The extension by which a client says that it leaves a server which is draining, as soon as it has
the answers to what it has asked: such a server waits for that before it stops."""

DRAINING = "draining"
"""The body of the answer to a heartbeat of a server that is draining; else it is empty."""

RESUME = "resume"
"""The extension by which a client that lost its connection goes on with its session."""

TOKEN = "token"
"""The extension by which a client shows the token of its key."""

# Kinds of request.
HELLO, CALL, NEXT, GOODBYE, PING = range(5)

# What a reply can say. The numbers are the protocol's.
OK = 0
NOTHING_YET = 1
NO_SESSION = 2
_ERRORS: dict[int, type[EdgemlError]] = {
    3: RemoteError,
    4: UnknownInterface,
    5: Malformed,
    6: DeadlineExceeded,
    7: Overloaded,
    8: Closed,
    9: ConfigMismatch,
    10: PermissionDenied,
    11: NotReady,
    12: Stale,
    13: NotHolder,
}
_STATUS: dict[type, int] = {error: status for status, error in _ERRORS.items()}


class Request(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The envelope of a request.

    Attributes:
        kind: ``HELLO``, ``CALL``, ``NEXT`` (a credit: one more publication, please),
            ``GOODBYE`` (forget this session) or ``PING`` (who are you, and what is the time?).
        session: what the server gave in its `Welcome`; empty in a ``HELLO`` or ``PING``.
        name: of the interface or topic.
        timeout: seconds that the sender goes on waiting, counted from the sending; of a heartbeat,
            those after which it wants the answer.
        body: the codec's header; for ``HELLO`` and ``NEXT`` a packed `Hello` or `Credit`.
    """

    kind: int
    session: bytes
    name: str
    timeout: float
    body: bytes


class Head(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The beginning of a `Request`, to be had without a copy of the rest."""

    kind: int
    session: bytes


class Answer(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The envelope of a reply.

    Attributes:
        status: ``OK``, or why not.
        body: the codec's header; after an error its packed arguments.
        epoch: of a publication: which start of the server made it.
        number: of a publication: counts from 1 in each epoch and topic. Of a Closed: 1 where what
            was asked had begun, and 0 where it had not.
    """

    status: int
    body: bytes = b""
    epoch: int = 0
    number: int = 0


class Served(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """How a call was served.

    Attributes:
        version: of the function, which counts from 1 and rises when it is replaced; 0 for what
            has none.
        batch_size: calls that were answered by the same run of it.
        queue: seconds from the call's arrival until its handler began.
        compute: seconds from then until there was a result.
        kept: whether the server keeps something for this client from one call to the next; None
            where it does not tell.
    """

    version: int
    batch_size: int
    queue: float
    compute: float
    kept: bool | None = None


class Result(Answer, array_like=True, frozen=True, gc=False):
    """The envelope of the reply to a call.

    Attributes:
        served: None where the server does not tell, and of an error.
    """

    served: Served | None = None


class Publication(Result, array_like=True, frozen=True, gc=False):
    """The envelope of a publication that tells when it was taken.

    Attributes:
        taken: in ns of the publisher's own clock; 0 where it isn't told.
    """

    taken: int = 0


class Hello(msgspec.Struct, frozen=True, omit_defaults=True):
    """The first request on a connection.

    Attributes:
        protocol: `PROTOCOL`.
        service: which kind of server this client is for.
        client_id: the client's identity, at most 200 characters.
        label: for people to read.
        codec: the name of the codec that the client speaks.
        config: what both sides' configurations must share.
        extensions: what the client has to say to parts of the server that it may not have, by name.
    """

    protocol: int
    service: str
    client_id: str
    label: str
    codec: str
    config: dict[str, Any]
    extensions: dict[str, Any] = {}


class Welcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer to a `Hello`.

    Attributes:
        session: names this client from now on.
        epoch: of this start of the server.
        topics: what can be subscribed to, and how many publications the server keeps of each; 0
            for what this client's key does not allow.
        ports: every port on which the server answers.
        extensions: what those parts answer, of the extensions that both have.
        codec: the name of the codec that is spoken; empty from a server that does not tell.
    """

    session: bytes
    epoch: int
    topics: dict[str, int]
    ports: list[int]
    extensions: dict[str, Any] = {}
    codec: str = ""


class Pong(msgspec.Struct, frozen=True):
    """The answer to a ``PING``, which needs no session.

    Attributes:
        protocol: `PROTOCOL`.
        service: which kind of server this is.
        clock: its wall clock, in seconds since 1970.
        state: ``"starting"``, ``"loading"``, ``"ready"`` or ``"draining"``.
        progress: of loading, 0 to 1.
        detail: what it is at, for people to read.
    """

    protocol: int
    service: str
    clock: float
    state: str = "ready"
    progress: float = 1.0
    detail: str = ""


class Credit(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The body of a ``NEXT``.

    Attributes:
        subscription: the client's number for it.
        epoch: of the newest publication that the client has; 0 for none.
        number: its number.
    """

    subscription: int
    epoch: int
    number: int


pack = msgspec.msgpack.Encoder().encode
"""Encode an envelope or a body."""

_decoders: dict[type, msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(kind)
    for kind in (Request, Head, Answer, Result, Publication, Hello, Welcome, Pong, Credit)
}
_arguments = msgspec.msgpack.Decoder(list[str])

T = TypeVar("T")

_OPEN: frozenset[type] = frozenset(
    {Hello, Welcome}
)  # have values of any type, and come from anybody
_MOST_NESTING = 32
_MOST_NODES = 1 << 14  # as `edgeml.core.tokens.check` counts


def unpack(kind: type[T], data: bytes) -> T:
    """Decode an envelope or a body, or raise `Malformed`.

    What comes from anybody takes time in proportion to its size, whatever it is.
    """
    if kind in _OPEN:
        check(data, nodes=_MOST_NODES, nesting=_MOST_NESTING, keys=TEXT)
    try:
        return _decoders[kind].decode(data)  # type: ignore[no-any-return]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"not an edgeml {kind.__name__.lower()}: {error}") from None


def pack_error(error: EdgemlError) -> bytes:
    """The header of a reply that says what went wrong; of a subclass, what it is one of."""
    kind = next((kind for kind in type(error).__mro__ if kind in _STATUS), RemoteError)
    arguments = [text_of(error)]
    if isinstance(error, RemoteError):
        arguments = [error.type_name, error.message, error.traceback]
    elif kind is RemoteError:
        arguments = [type(error).__qualname__, *arguments, ""]
    valid = [text.encode("utf-8", "backslashreplace").decode() for text in arguments]
    begun = int(isinstance(error, Interrupted))
    return pack(Answer(_STATUS[kind], pack(valid), 0, begun))


def error_of(reply: Answer) -> EdgemlError:
    """The error that a reply tells of."""
    if reply.status == NO_SESSION:
        return Closed("the server does not know this session; it has restarted, or forgot it")
    try:
        if reply.number and _ERRORS[reply.status] is Closed:
            return Interrupted(*_arguments.decode(reply.body))
        return _ERRORS[reply.status](*_arguments.decode(reply.body))
    except (KeyError, TypeError, msgspec.MsgspecError, UnicodeDecodeError):
        return Malformed(f"the server answered with an unknown status, {reply.status}")
