"""Every error that edgeml raises, each also the built-in that people would catch.

::

    EdgemlError
     ├── Unreachable(ConnectionError)       nobody answers there, or the connection was lost
     │    └── NotReady                      the server is loading, or is about to stop
     ├── DeadlineExceeded(TimeoutError)     no answer within the time given
     ├── Stale(TimeoutError)                an action that came too late, so that it wasn't taken
     ├── Closed(ConnectionError)            this end, or the server, has been stopped
     ├── Overloaded(ConnectionError)        too much is waiting already; try again later
     ├── RemoteError(RuntimeError)          the handler on the far side raised
     ├── UnknownInterface(LookupError)      no such interface, key, request type or store
     ├── Malformed(ValueError)              bytes that are not what they claim to be
     ├── NotEncodable(TypeError)            a value that the codec does not carry
     ├── ConfigMismatch(ValueError)         the two sides were configured differently
     ├── PermissionDenied(PermissionError)  not allowed, or an older self that was replaced
     ├── NotHolder(PermissionError)         an action whose key another client has the lease of
     └── PluginError(ImportError)           a transport or codec that is missing or broken
"""

from __future__ import annotations

import reprlib
from typing import Any, TypeVar

__all__ = [
    "Closed",
    "ConfigMismatch",
    "DeadlineExceeded",
    "EdgemlError",
    "Interrupted",
    "Malformed",
    "NotCarriedOut",
    "NotEncodable",
    "NotHolder",
    "NotReady",
    "Overloaded",
    "PermissionDenied",
    "PluginError",
    "RemoteError",
    "Stale",
    "UnknownInterface",
    "Unreachable",
    "copy_error",
    "printable",
    "shown",
    "text_of",
]

_MOST_TEXT = 20_000  # characters of an error's text

_Error = TypeVar("_Error", bound=Exception)


class EdgemlError(Exception):
    """The root of the tree."""


class Unreachable(EdgemlError, ConnectionError):
    """Nobody answers at the address, or the connection was lost with requests under way.

    Whether a request that was under way has been carried out is not known.
    """


class NotCarriedOut(Unreachable):
    """The connection was lost, and this request has certainly not been carried out.

    A transport says so to `edgeml.core.client`, which sends it again over a new connection.
    """


class NotReady(Unreachable):
    """The server is loading, or answers what it has and then stops; this was not carried out.

    The text has its state. ``wait_for_server=`` has a client wait until it is ready.
    """


class DeadlineExceeded(EdgemlError, TimeoutError):
    """No answer came within the time given; the server may still be at work on it."""


class Stale(EdgemlError, TimeoutError):
    """An action came when its time was over, or a later one had come before; it wasn't taken."""


class Closed(EdgemlError, ConnectionError):
    """This end has been closed, or the server says that it is stopping."""


class Interrupted(Closed):
    """The server was stopped amid carrying this out; every other Closed says that it hadn't begun.

    So `edgeml.core.pool` has another server carry out those.
    """


class Overloaded(EdgemlError, ConnectionError):
    """A queue is at its limit, so this was refused rather than kept waiting unseen."""


class RemoteError(EdgemlError, RuntimeError):
    """The handler on the far side raised.

    Attributes:
        type_name: qualified name of the far side's exception type, e.g. ``"KeyError"``.
        message: its text.
        traceback: the far side's formatted traceback.
    """

    def __init__(self, type_name: str, message: str, traceback: str = "") -> None:
        self.type_name = type_name
        self.message = message
        self.traceback = traceback
        super().__init__(type_name, message, traceback)

    def __str__(self) -> str:
        text = f"{self.type_name}: {self.message}"
        return f"{text}\n\nOn the far side:\n{self.traceback}" if self.traceback else text


class UnknownInterface(EdgemlError, LookupError):
    """The server has no interface, key, request type or store of that name; the text lists it."""


class Malformed(EdgemlError, ValueError):
    """Bytes that are not what they claim to be: truncated, forged, or not edgeml's at all."""


class NotEncodable(EdgemlError, TypeError):
    """A value that the codec does not carry; the text gives the path to it and what to do."""


class ConfigMismatch(EdgemlError, ValueError):
    """The server and the client were configured differently; the text names field and values."""


class PermissionDenied(EdgemlError, PermissionError):
    """The server does not let this client do that."""


class NotHolder(EdgemlError, PermissionError):
    """Another client has the lease of this action's key, so the action wasn't taken."""


class PluginError(EdgemlError, ImportError):
    """A transport or codec that is not installed, is broken, or is claimed by two packages."""


def text_of(error: BaseException) -> str:
    """The text of an exception, which may be any user's: one line of many, or none at all."""
    try:
        return str(error)[:_MOST_TEXT]
    except Exception:
        return "(its text cannot be had: __str__ failed)"


def printable(text: str, most: int = 200) -> str:
    """A text that a stranger chose, for a line of people's: of this length, and on that line."""
    shown = text if len(text) <= most else f"{text[:most]}..."
    return shown if shown.isprintable() else shown.encode("unicode_escape").decode("ascii")


class _Brief(reprlib.Repr):
    """Makes no more of a value than is shown, since all threads wait for a repr of 100 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 400
        self.maxlevel = 4

    def repr_bytes(self, value: bytes | bytearray, level: int) -> str:
        del level
        return repr(bytes(value[: self.maxstring]))

    repr_bytearray = repr_bytes

    def repr_memoryview(self, value: memoryview, level: int) -> str:
        del level
        return f"a memoryview of {value.nbytes} bytes"

    def repr_ndarray(self, value: Any, level: int) -> str:
        del level
        return f"an array of shape {value.shape} and dtype {str(value.dtype)[:20]}"


_brief = _Brief()


def shown(value: object, most: int = 100) -> str:
    """Return a value that a stranger may have sent, for an error: its repr, cut to this length."""
    text: str = _brief.repr(value)
    return text[:most]


def copy_error(error: _Error) -> _Error:
    """Return another error like this one: each who is told gets one, since raising adds to it."""
    return type(error)(*error.args)
