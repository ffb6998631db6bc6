"""The messages of vla-eval's protocol, byte by byte.

Each is one MessagePack map with the keys ``type`` (a str), ``payload``, ``seq`` (an int) and
``timestamp`` (seconds since 1970, of which nothing is made here). All keys are str. Within a
payload two kinds of map stand for arrays::

    {"__ndarray__": true, "data": bin, "dtype": "<f4", "shape": [2, 3]}
    {"__image__": true, "format": "raw", "data": bin, "dtype": "|u1", "shape": [224, 224, 3]}
    {"__image__": true, "format": "jpeg" or "png", "data": a file, "shape": [224, 224, 3]}

The dtype is one of bools, ints or floats. Nothing that a sender claims is believed: an array's
bytes must be as many as its dtype and shape say, and an image's file must say of itself what the
message says of it, before memory is taken for either.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, TypeAlias, TypeVar

import msgspec
import numpy as np

from edgeml.core.arrays import restore
from edgeml.core.errors import Malformed, NotEncodable, shown
from edgeml.core.limits import DEFAULT_LIMITS, Limits
from edgeml.core.message import empty, pooled
from edgeml.core.tokens import TEXT, check
from edgeml.images import formats

__all__ = ["Data", "Received", "read", "read_as", "read_payload", "write", "write_action"]

T = TypeVar("T")

Array: TypeAlias = "np.ndarray[Any, Any]"
Data: TypeAlias = "bytes | memoryview"
Path: TypeAlias = "tuple[str | int, ...]"

_ARRAY, _IMAGE = "__ndarray__", "__image__"
_KINDS = "biuf"
_WIDEST = 8  # bytes of a number that is sent; wider ones differ from machine to machine
_DEEPEST = 32  # containers in each other that are sent
# Of all images of a message. What a small file holds is decoded while all other robots wait, and a
# harness sends a few images of some hundred pixels.
_MOST_PIXELS = 1 << 25
_PLAIN = frozenset({type(None), bool, int, float, str, bytes})
_BASES: tuple[tuple[Any, Callable[[Any], Any]], ...] = (  # subclasses of these are sent as these
    (int, int.__index__),
    (float, float.__float__),
    (str, str.__str__),
    ((bytes, bytearray, memoryview), bytes),
)
_BROKEN = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

_encode = msgspec.msgpack.Encoder().encode


class Received(msgspec.Struct):
    """A message whose payload is not decoded yet.

    Attributes:
        type: what it is, as ``"observation"``.
        seq: its number, which the answer to it carries, too.
        payload: as it came.
    """

    type: str
    seq: int
    payload: msgspec.Raw


_receive = msgspec.msgpack.Decoder(Received).decode


def read(data: Data | str) -> Received:
    """Read a message but for its payload.

    Raises:
        Malformed: it is none.
    """
    if isinstance(data, str):
        raise Malformed("a message is binary, and this is a text")
    try:
        return _receive(data)
    except _BROKEN as error:
        raise Malformed(f"no map of type, payload, seq and timestamp: {error}") from None


def read_as(kind: type[T], received: Received) -> T:
    """Decode what of a payload is in a msgspec structure, and make nothing of the rest.

    Raises:
        Malformed: it has something else in there.
    """
    try:
        return msgspec.msgpack.decode(received.payload, type=kind)
    except _BROKEN as error:
        raise Malformed(f"payload: {error}") from None


def read_payload(data: Data, received: Received, limits: Limits = DEFAULT_LIMITS) -> Any:
    """Decode the payload. Its arrays are read-only; several images take several threads.

    Args:
        data: the whole message.
        received: what `read` made of it.
        limits: how much there may be in it, and how deep.

    Raises:
        Malformed: it can't be decoded, or has more in it than is taken.
    """
    check(data, nodes=limits.nodes, nesting=limits.nesting, keys=TEXT)
    try:
        root = [msgspec.msgpack.decode(received.payload)]
    except _BROKEN as error:
        raise Malformed(f"payload: {error}") from None
    images: list[_Image] = []
    _restore(root, 0, ("payload",), images)
    if images:
        _decode_images(images)
    return root[0]


def write_action(result: Any, seq: int) -> bytes:
    """Return the message that answers an observation; what is no dict goes under ``"actions"``.

    Raises:
        NotEncodable: as `write`.
    """
    plain = _plain(result, ("result",))
    if type(plain) is not dict or _ARRAY in plain:
        plain = {"actions": plain}
    return _packed("action", plain, seq)


def write(type: str, payload: Mapping[str, Any], seq: int) -> bytes:
    """Return a message; arrays are copied into it.

    Raises:
        NotEncodable: the protocol has no way to say something in the payload; the text says where.
    """
    return _packed(type, _plain(payload, ("result",)), seq)


def _packed(type: str, plain: Any, seq: int) -> bytes:
    try:
        return _encode({"type": type, "payload": plain, "seq": seq, "timestamp": time.time()})
    except OverflowError:
        raise NotEncodable("result has an int of more than 64 bits: send its str") from None
    except UnicodeEncodeError:
        raise NotEncodable("result has a text with surrogates, which UTF-8 lacks") from None


# Reading ----------------------------------------------------------------------------------


class _Image(NamedTuple):
    """A file whose header was read, and where its pixels are to go."""

    path: Path
    holder: Any
    key: Any
    format: str
    file: memoryview
    shape: tuple[int, int, int]
    claimed: tuple[int, ...]  # the same, or without the channels of a gray one


def _restore(holder: Any, key: Any, path: Path, images: list[_Image]) -> None:
    """Put arrays in the places of the maps that stand for them, and note those of images."""
    value = holder[key]
    if type(value) is list:
        for i, item in enumerate(value):
            if type(item) in (dict, list):
                _restore(value, i, (*path, i), images)
    elif type(value) is dict:
        if _IMAGE in value or _ARRAY in value:
            try:
                image = _restore_array(holder, key, value, path)
            except Malformed as error:
                raise Malformed(f"{_name(path)}: {error}") from None
            if image is not None:
                images.append(image)
        else:
            for name, item in value.items():
                if type(item) in (dict, list):
                    _restore(value, name, (*path, name), images)


def _restore_array(holder: Any, key: Any, said: dict[str, Any], path: Path) -> _Image | None:
    data, shape, format = said.get("data"), said.get("shape"), said.get("format")
    if _IMAGE not in said or format == "raw":
        holder[key] = restore(data, said.get("dtype"), shape, _KINDS)
        return None
    if format not in formats.readable():
        lacks = ': pip install "edgeml-robotics[images]"' if format in ("jpeg", "png") else ""
        raise Malformed(f"an image of format {shown(format, 40)}, which is not known here{lacks}")
    if not isinstance(data, bytes):
        raise Malformed(f"an image's data are bytes, not {type(data).__name__}")
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise Malformed(f"an image's shape is height, width, channels, not {shown(shape, 60)}")
    match shape:
        case [height, width]:
            found = height, width, 1
        case [height, width, channels]:
            found = height, width, channels
        case _:
            raise Malformed(f"an image's shape is height, width, channels, not {shown(shape, 60)}")
    file = memoryview(data)
    formats.check(format, file, found)
    return _Image(path, holder, key, format, file, found, tuple(shape))


def _decode_images(images: list[_Image]) -> None:
    nbytes = sum(math.prod(image.shape) for image in images)
    if nbytes > _MOST_PIXELS:
        raise Malformed(f"images of {nbytes} bytes; at most {_MOST_PIXELS} in a message")
    # Only now is there memory for what was claimed.
    arrays = [empty(pooled, image.shape, np.uint8) for image in images]

    def decode(job: tuple[_Image, Array]) -> None:
        image, pixels = job
        try:
            formats.decode_into(image.format, image.file, pixels)
        except Malformed as error:
            raise Malformed(f"{_name(image.path)}: {error}") from None
        pixels.flags.writeable = False
        image.holder[image.key] = pixels.reshape(image.claimed)

    formats.in_threads(decode, list(zip(images, arrays, strict=True)), nbytes)


def _name(path: Path) -> str:
    first, *rest = path
    return f"{first}" + "".join(f"[{shown(key, 80)}]" for key in rest)


# Writing ----------------------------------------------------------------------------------


def _plain(value: Any, path: Path) -> Any:
    """Return a value in what MessagePack has, maps in the places of arrays."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if len(path) > _DEEPEST + 1:
        raise _refuse(path, f"is nested more than {_DEEPEST} deep, or contains itself")
    if issubclass(kind, Mapping):
        return _pairs(value.items(), path)
    if is_dataclass(kind):
        return _pairs([(field.name, getattr(value, field.name)) for field in fields(kind)], path)
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return _pairs(zip(value._fields, value, strict=True), path)
    if issubclass(kind, (list, tuple)):
        return [_plain(item, (*path, i)) for i, item in enumerate(value)]
    if hasattr(kind, "copy_to_host_async"):  # JAX's
        value = np.asarray(value)
    if isinstance(value, (np.ndarray, np.generic)) and not isinstance(value, (str, bytes)):
        return _said(value, path)
    for base, make in _BASES:
        if issubclass(kind, base):
            return make(value)
    where = f"{kind.__module__}.{kind.__qualname__}"
    raise _refuse(path, f"is a {where}, which vla-eval's protocol doesn't carry: send arrays")


def _pairs(pairs: Iterable[tuple[Any, Any]], path: Path) -> dict[str, Any]:
    plain = {}
    for key, item in pairs:
        if not isinstance(key, str) or key in (_ARRAY, _IMAGE):
            raise _refuse(
                path, f"has the key {shown(key, 80)}: keys are str, and not those of arrays"
            )
        plain[key] = _plain(item, (*path, key))
    return plain


def _said(value: Any, path: Path) -> Any:
    """What says an array, or the number that a scalar of numpy's is."""
    dtype = value.dtype
    if dtype.kind not in _KINDS or dtype.itemsize > _WIDEST:
        raise _refuse(
            path, f"has dtype {dtype}, and bools, ints and floats are carried: use .astype"
        )
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ma.MaskedArray):
        raise _refuse(path, "is a MaskedArray: send its .data and its .mask")
    array = np.asarray(value, dtype.newbyteorder("<"), order="C")  # as native clients get it
    return {_ARRAY: True, "data": array.data, "dtype": array.dtype.str, "shape": list(value.shape)}


def _refuse(path: Path, why: str) -> NotEncodable:
    return NotEncodable(f"{_name(path)} {why}")
