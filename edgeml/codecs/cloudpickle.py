"""Pickle for whatever Python objects there are, callables included; for friends only.

Decoding runs code of the sender's choice. A server offers this codec only where the user lists it.
Beyond this machine neither end speaks it but over a transport that vouches for the other by its
keys; within, any user who reaches the port can run code as the server's, but over shm. Both ends
need the packages, in versions that fit, whose classes the values are of.

On the wire: the header is a pickle of protocol 5, the buffers are its out-of-band buffers in
order. Those of up to 8 KiB stay in the header.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np

from edgeml.core.codec import Codec
from edgeml.core.errors import Malformed, NotEncodable
from edgeml.core.message import Message
from edgeml.core.plugins import hookimpl

__all__ = ["CloudpickleCodec", "edgeml_codec"]

_INLINE = 8192  # bytes; up to here a copy costs less than a buffer more


class CloudpickleCodec(Codec):
    """Carries what `cloudpickle` can pickle; arrays out of band."""

    name: ClassVar[str] = "cloudpickle"
    executes: ClassVar[bool] = True

    def encode(self, value: Any) -> Message:
        """Encode a value; contiguous arrays of more than 8 KiB become buffers that alias them.

        Raises:
            NotEncodable: if pickling fails, with pickle's own words.
        """
        import cloudpickle  # here, since a peer that only decodes gets by without it

        buffers: list[memoryview] = []

        def keep_in_band(buffer: pickle.PickleBuffer) -> bool:
            view = buffer.raw()
            if view.nbytes <= _INLINE:
                return True
            buffers.append(view)
            return False

        try:
            header = cloudpickle.dumps(value, protocol=5, buffer_callback=keep_in_band)
        except Exception as error:  # an object's own __reduce__ may raise anything
            raise NotEncodable(f"value can't be pickled: {error}") from error
        return Message(header, buffers)

    def decode(self, message: Message, *, writable: bool = False) -> Any:
        """Decode a message; **this runs code of the sender's choice**.

        Arrays that came out of band are read-only views of the buffers, others private; with
        ``writable`` all numpy arrays are private and writable.

        Raises:
            Malformed: if unpickling fails, for whatever reason: the bytes may be damaged, or a
                package be missing here.
        """
        buffers: Iterable[memoryview | bytearray]
        if writable:
            buffers = map(bytearray, message.buffers)
        else:
            buffers = (buffer.toreadonly() for buffer in message.buffers)
        unused = iter(buffers)
        kind = _WritableUnpickler if writable else pickle.Unpickler
        try:
            value = kind(io.BytesIO(message.header), buffers=unused).load()
        except Exception as error:
            raise Malformed(f"unpickling failed: {type(error).__name__}: {error}") from error
        if next(unused, None) is not None:
            raise Malformed("there are more buffers than the pickle uses")
        return value


class _WritableUnpickler(pickle.Unpickler):
    """Makes arrays writable that were read-only at the sender, which the pickle remembers."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        if name != "_frombuffer" or module.partition(".")[0] != "numpy":
            return found

        def frombuffer(*args: Any) -> np.ndarray[Any, Any]:
            array: np.ndarray[Any, Any] = found(*args)
            return array if array.flags.writeable else array.copy(order="K")

        return frombuffer


@hookimpl
def edgeml_codec() -> type[Codec]:
    """Answer the registry."""
    return CloudpickleCodec
