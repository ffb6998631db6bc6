"""The codec half of the seam: values to messages and back.

A codec is a plugin: publish a class through the entry-point group ``edgeml.codecs`` whose module
answers the hook ``edgeml_codec``, and hold it to `edgeml.testing.CodecTests` by subclassing.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

from edgeml.core.limits import DEFAULT_LIMITS, Limits
from edgeml.core.message import Allocator, Message, own

__all__ = ["Codec", "Spoken", "Wrapped", "Wrapping", "limited"]


class Codec(ABC):
    """Turns values into messages and back, arrays out of band.

    A codec holds no state between calls and may be used from several threads at once.
    """

    name: ClassVar[str]
    """What both ends call it in the handshake; the same as the entry point's name."""

    executes: ClassVar[bool] = False
    """Whether decoding can run code that the sender chose. Such a codec is offered only where a
    server lists it; beyond this machine it is refused at either end where the transport does not
    vouch for who is on the other (`Endpoint.secured`)."""

    limits: Limits = DEFAULT_LIMITS
    """What it keeps to, both ways, of ``nodes``, ``nesting`` and ``buffers``: before it makes
    anything of what is more. `limited` gives a copy that has others. A codec that ``executes`` need
    not: whoever sends it something can do more harm by less."""

    @abstractmethod
    def encode(self, value: Any) -> Message:
        """Encode a value.

        The buffers alias the value's arrays: they are not copied, so the message is valid only
        while nobody changes them (see `edgeml.core.message.own`).

        Raises:
            NotEncodable: the text gives the path to the part that can't be carried.
        """

    def encode_owned(self, value: Any, allocate: Allocator | None = None) -> Message:
        """Encode a value into a message that keeps what the value is now.

        This is `encode` and `own`. A codec overrides it if it can put something straight into
        memory that is sent from, rather than copy it twice.

        Args:
            value: see `encode`.
            allocate: gives memory of so many bytes to copy into, or None; see `Endpoint.allocate`.

        Raises:
            NotEncodable: see `encode`.
        """
        return own(self.encode(value), allocate)

    @abstractmethod
    def decode(self, message: Message, *, writable: bool = False) -> Any:
        """Decode a message, which may come from anybody.

        Arrays alias the buffers and are read-only; with ``writable`` they are private copies.

        Raises:
            Malformed: on any bytes that `encode` could not have made.
        """


def limited(codec: Codec, limits: Limits) -> Codec:
    """The codec with these limits; all who have its own share one."""
    if limits is codec.limits or limits == codec.limits:
        return codec
    made = copy.copy(codec)
    made.limits = limits
    return made


class Wrapped(Codec):
    """A codec around another one, whose messages say which of the two encoded them."""

    inner: Codec
    """The other one."""


class Spoken(NamedTuple):
    """What is spoken in a session, each way.

    Attributes:
        encoder: encodes what this end sends.
        decoder: decodes what it gets.
    """

    encoder: Codec
    decoder: Codec


class Wrapping(ABC):
    """A codec around whichever two ends speak, where both agree on it when they greet each other.

    It is an extension of the hello: the client says something, and the server answers.
    """

    name: ClassVar[str]
    """Of the extension."""

    @abstractmethod
    def ask(self) -> Any:
        """What a client says: a plain value."""

    @abstractmethod
    def answer(self, asked: Any, codec: Codec, client: object) -> tuple[Any, Spoken]:
        """What a server answers, a plain value, and what it speaks with that client from now on.

        The same codec is to be returned for all clients that are sent the same: what is published
        is encoded once for them all.

        Raises:
            ConfigMismatch: the two don't fit.
            Malformed: what the client said makes no sense.
        """

    @abstractmethod
    def accept(self, answered: Any, codec: Codec, server: object) -> Spoken:
        """What a client speaks from now on, by what the server answered: None if it knows of none.

        Raises:
            ConfigMismatch: the two don't fit.
            Malformed: what the server said makes no sense.
        """

    @abstractmethod
    def check(self, value: Any) -> None:
        """Raise the NotEncodable that a server would raise if somebody got this value wrapped."""
