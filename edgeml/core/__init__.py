"""The seam between what users call and how bytes move; knows no plugin."""

from edgeml.core.codec import Codec, limited
from edgeml.core.deadline import Deadline
from edgeml.core.door import Dispatch, Door, Guest
from edgeml.core.errors import (
    Closed,
    ConfigMismatch,
    DeadlineExceeded,
    EdgemlError,
    Malformed,
    NotEncodable,
    Overloaded,
    PermissionDenied,
    PluginError,
    RemoteError,
    UnknownInterface,
    Unreachable,
)
from edgeml.core.frames import frame, unframe
from edgeml.core.limits import DEFAULT_LIMITS, Limits
from edgeml.core.message import Message, Owned, copy, is_owned, own, pooled, root_of
from edgeml.core.pending import Pending
from edgeml.core.plugins import hookimpl, load_codec, load_door, load_resolver, load_transport
from edgeml.core.resolver import Asker, Place, Resolver
from edgeml.core.security import Credentials
from edgeml.core.transport import (
    Endpoint,
    OnRequest,
    Peer,
    Reply,
    Requester,
    Transport,
)
from edgeml.core.url import Url, find_address, tell_url

__all__ = [
    # the seam
    "Transport",
    "Endpoint",
    "Requester",
    "Reply",
    "Peer",
    "OnRequest",
    "Credentials",
    "Limits",
    "DEFAULT_LIMITS",
    "Codec",
    "Door",
    "Dispatch",
    "Guest",
    "Resolver",
    "Asker",
    "Place",
    "Message",
    "Url",
    "find_address",
    "tell_url",
    "copy",
    "own",
    "pooled",
    "is_owned",
    "Owned",
    "root_of",
    "Pending",
    "Deadline",
    "frame",
    "unframe",
    # plugins
    "hookimpl",
    "load_transport",
    "limited",
    "load_codec",
    "load_door",
    "load_resolver",
    # errors
    "EdgemlError",
    "Unreachable",
    "DeadlineExceeded",
    "Closed",
    "Overloaded",
    "RemoteError",
    "UnknownInterface",
    "Malformed",
    "NotEncodable",
    "ConfigMismatch",
    "PermissionDenied",
    "PluginError",
]
